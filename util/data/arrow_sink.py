"""A place that Arrow writes to, as it writes to a file."""


class ArrowSink:
    """What Arrow takes for an open file: each piece of bytes goes to `take`. For pa.PythonFile(sink, "w")."""

    closed = False

    def take(self, data: bytes) -> None:
        """What becomes of the next piece."""
        raise NotImplementedError

    def write(self, data: bytes) -> int:
        self.take(data)
        return memoryview(data).nbytes

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass
