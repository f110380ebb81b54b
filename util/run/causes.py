"""What the system did to a process, as a user is told it: a disk that refuses, a helper that was killed."""

import errno
import os
import re
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor

# what a disk may refuse in the middle of a run, and the remedy
_DISK = {
    errno.ENOSPC: "make room",
    errno.EDQUOT: "make room, or have the quota raised",
    errno.EFBIG: "raise the limit (ulimit -f), or write to another file system",
    errno.EROFS: "choose another folder",
    errno.EIO: "look after the disk",
}


def disk_trouble(error: BaseException) -> str | None:
    """What the disk has refused, and the remedy; None where something else went wrong.

    Libraries wrap it: torch says in a RuntimeError that a position is unexpected, safetensors has the number in its
    message only, and NumPy counts what it has written.
    """
    for cause in causes(error):
        number = getattr(cause, "errno", None)
        if found := re.search(r"\(os error (\d+)\)", str(cause)):
            number = int(found[1])
        elif re.fullmatch(r"\d+ requested and \d+ written", str(cause)):
            number = errno.ENOSPC
        if number in _DISK:
            return f"{os.strerror(number).lower()}: {_DISK[number]}, then give the same command again"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what it was raised from or in the handling of, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def outside_cause(error: Exception) -> str | None:
    """The message for an error that neither we nor the user's flags have caused; None where it is not of that kind."""
    if trouble := disk_trouble(error):
        name = getattr(error, "filename", None)
        return f"{name}: {trouble}" if name else trouble
    if any(map(_is_lost_peer, causes(error))):
        return (
            "another process of this run ended, or cannot be reached any more: it may have said why, here or on its "
            "machine; what was saved is kept; give the same command again (a training with --resume auto)"
        )
    if not any(map(_is_killed_worker, causes(error))):
        return None
    return (
        "a worker process was killed, perhaps because memory ran out: what was saved is kept; "
        "give the same command again (a training with --resume auto), with fewer workers if it happens again"
    )


def _is_lost_peer(error: BaseException) -> bool:
    """What gloo, NCCL and the store by which processes meet say where the other end is gone."""
    if type(error).__name__ in ("DistNetworkError", "DistStoreError"):  # of torch, which is slow to import
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(
            r"gloo/.*(Connection (closed by peer|reset by peer|refused)|Broken pipe)|ncclRemoteError",
            str(error),
            re.DOTALL,
        )
    )


def _is_killed_worker(error: BaseException) -> bool:
    """PyTorch raises it wherever the main process just is, so that other errors may follow from it.

    An error that a worker itself has raised is none: "Caught RuntimeError in DataLoader worker process 0".
    """
    notice = isinstance(error, RuntimeError) and re.match(r"DataLoader worker \(pid", str(error))
    return bool(notice) or isinstance(error, BrokenExecutor)
