"""Long work on every row of a data set that can be stopped at any moment: a packing, or the drawing of maps.

Rows go to their place in FILE.part; FILE.part.jsonl says what is done: a line for the plan, and one for each chunk of
rows that is on the disk.
"""

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from util.data.batches import end_workers, worker_options
from util.data.images import BadImage
from util.data.packed import checksum
from util.data.sources import Source
from util.run.errors import UserError
from util.run.files import HELD, cut_to_whole_lines, holder_of, in_use, is_at, lock, try_lock, write_text
from util.run.log import progress

CHUNK = 64  # rows that share a checksum and are written together
_WORDS = {
    "finder_files": "the files of the finder",
    "samples": "the number of samples",
    "fingerprint": "the list of samples",
    "stamp": "the pictures",
    "beside": "the maps or protocols",
}


def difference(before: dict, now: dict) -> str | None:
    """What changed between two plans, in words; None if nothing did."""
    changed = [name for name in now if before.get(name) != now[name]]
    facts = [_WORDS[name] for name in changed if name in _WORDS]
    choices = [f"--{name} was {before.get(name)} and is now {now[name]}" for name in changed if name not in _WORDS]
    return ", ".join([*choices, *facts]) or None


class Journal:
    """The journal of a packing, to be used as a context: it is locked against a second one meanwhile.

    out: FILE. part: FILE.part, where the pixels go; they end at `end_of_pixels`, bytes. plan: what is packed, and how;
    that of an earlier start must be equal, unless `overwrite` gives it up. chunks: number -> where its line begins in
    the file, bytes: what `add` got stays on disk, as objects a hundred million rows would take 40 GB. bad: row -> why
    its picture cannot be read. bad_list: the file that lists them. Raises UserError.
    """

    work = "packing"  # for messages

    def __init__(self, out: Path, plan: dict, end_of_pixels: int, overwrite: bool):
        self.out, self.plan, self.end_of_pixels, self.overwrite = out, plan, end_of_pixels, overwrite
        self.part = out.with_name(f"{out.name}.part")
        self.path = out.with_name(f"{out.name}.part.jsonl")
        self.bad_list = out.with_name(f"{out.name}.bad_images.jsonl")
        self.chunks: dict[int, int] = {}
        self.bad: dict[int, str] = {}

    def __enter__(self) -> "Journal":
        self._file = open(self.path, "a+b")
        try:
            if not lock(self._file):
                holder = f"another {self.work} ({holder_of(self._file)})"
                raise in_use(str(self.path), holder, self.path, "give another --out")
            if not is_at(self._file, self.path):
                raise UserError(f"{self.out}: another {self.work} has just ended: give the same command again")
            self._start()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def _start(self) -> None:
        cut_to_whole_lines(self._file)
        first = self._file.readline()
        changed = difference(json.loads(first), self.plan) if first else None
        if changed and not self.overwrite:
            raise UserError(
                f"{self.part} was begun from other data or with other flags ({changed}): give another --out, or "
                "--overwrite"
            )
        if not first or changed or not self.part.exists():
            self._file.truncate(0)
            self.part.unlink(missing_ok=True)  # what is left of an earlier packing may still be written to for a moment
            with open(self.part, "wb") as part:
                part.truncate(self.end_of_pixels)
            self._write(self.plan)
            return
        place = len(first)
        while line := self._file.readline():
            self._note(json.loads(line), place)
            place += len(line)

    def add(self, done: dict) -> None:
        """Note a chunk: {"chunk": number, "checksum": hex, "rows": [...]}, a row that is a str says what is wrong."""
        self._note(done, self._write(done))

    def _write(self, line: dict) -> int:
        """Append a line; where it begins."""
        place = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        return place

    def _note(self, done: dict, place: int) -> None:
        self.chunks[done["chunk"]] = place
        first = done["chunk"] * self.plan["chunk"]
        self.bad |= {first + i: row for i, row in enumerate(done["rows"]) if isinstance(row, str)}

    def in_order(self) -> Iterator[dict]:
        """The chunks by their number, as `add` got them; read from the file one by one."""
        for number in sorted(self.chunks):
            self._file.seek(self.chunks[number])
            yield json.loads(self._file.readline())

    def rows(self) -> Iterator:
        """What is known of every canvas."""
        for done in self.in_order():
            yield from done["rows"]

    def finish(self) -> None:
        """Give the file its name, and remove the journal."""
        os.replace(self.part, self.out)
        self.path.unlink()

    @staticmethod
    def remove_rest(out: Path) -> None:
        """Remove the journal of a packing that was killed when its file had just got its name."""
        path, part = out.with_name(f"{out.name}.part.jsonl"), out.with_name(f"{out.name}.part")
        with suppress(OSError), open(path, "rb+") as file:
            if try_lock(file) == HELD and not part.exists():  # else somebody is packing anew
                path.unlink()

    def discard(self) -> None:
        """Remove what was written, and the journal."""
        self.part.unlink()
        self.path.unlink()


class Chunks(Dataset):
    """Chunk number -> what is known of its rows, which are written to their place in the file on the way.

    {"chunk": int, "checksum": hex, "rows": [...]}: for each row what `fill` says, or why its picture cannot be read,
    a str. row_shape: of the uint8 values of a row. offset: where the first row begins in the file, bytes.
    """

    def __init__(self, source: Source, path: Path, row_shape: tuple[int, ...], offset: int = 0):
        self.source, self.path, self.row_shape, self.offset = source, path, row_shape, offset
        self._fd: int | None = None

    def fill(self, values: np.ndarray, i: int) -> list:
        """Write row `i` into `values`, and say what is known of it. Raises BadImage or ValueError."""
        raise NotImplementedError

    def __len__(self) -> int:
        return -(-len(self.source) // CHUNK)

    def __getitem__(self, chunk: int) -> dict:
        if self._fd is None:
            # once, and before anything is decoded: a worker that outlives its packing for some seconds must not find
            # the file of another one under this name
            self._fd = os.open(self.path, os.O_WRONLY)
        first = chunk * CHUNK
        values = np.zeros((min(CHUNK, len(self.source) - first), *self.row_shape), np.uint8)
        rows = [self._try_to_fill(values[i], first + i) for i in range(len(values))]
        try:
            self._write(memoryview(values).cast("B"), self.offset + first * values[0].nbytes)
        except OSError as error:
            raise write_error(self.path, error) from error
        return {"chunk": chunk, "checksum": checksum(values).hex(), "rows": rows}

    def _try_to_fill(self, values: np.ndarray, i: int) -> list | str:
        try:
            return self.fill(values, i)
        except (BadImage, ValueError) as error:
            return error.reason if isinstance(error, BadImage) else str(error)

    def _write(self, data: memoryview, offset: int) -> None:
        while data:
            written = os.pwrite(self._fd, data, offset)
            data, offset = data[written:], offset + written
        os.fsync(self._fd)  # before the journal says that they are there

    def close(self) -> None:
        """Close the file, where this process has opened it."""
        if self._fd is not None:
            os.close(self._fd)


def write_chunks(chunks: Chunks, journal: Journal, num_workers: int, max_bad: float) -> None:
    """Write the chunks that the journal lacks. Raises UserError where more than `max_bad` of the pictures are bad."""
    todo = [chunk for chunk in range(len(chunks)) if chunk not in journal.chunks]
    most = max_bad * len(chunks.source)
    options = worker_options(num_workers, torch.device("cpu"))
    loaded = iter(DataLoader(chunks, batch_size=None, sampler=todo, collate_fn=_as_it_is, **options))
    try:
        with progress(total=len(chunks), initial=len(journal.chunks), unit="chunk") as bar:
            _stop_if_bad(journal, chunks.source, most, max_bad)
            for done in loaded:
                journal.add(done)
                bar.update()
                _stop_if_bad(journal, chunks.source, most, max_bad)
    finally:
        end_workers(loaded)
        chunks.close()


def _as_it_is(value):
    return value


def _stop_if_bad(journal: Journal, source: Source, most: float, max_bad: float) -> None:
    if len(journal.bad) > most:
        listed = list_bad(journal, source)
        raise UserError(
            f"{len(journal.bad)} of {len(source)} images cannot be read, more than --max_bad {max_bad:g} allows: "
            f"see {listed}, mend or remove them, or raise --max_bad"
        )


def list_bad(journal: Journal, source: Source) -> Path:
    """Write the list of bad pictures, or remove it where every picture could be read; returns its path."""
    path = journal.bad_list
    entries = [
        {"index": row, "path": source.record(row)["file_name"], "reason": reason}
        for row, reason in sorted(journal.bad.items())
    ]
    if entries:
        write_text(path, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    else:
        path.unlink(missing_ok=True)
    return path


def write_error(path: Path, error: OSError) -> UserError:
    """What to say where a file cannot be written."""
    if error.errno == errno.ENOSPC:
        return UserError(f"the disk of {path} is full: make room, then run the same command; it goes on where it was")
    return UserError(f"{path} cannot be written ({error.strerror}): choose another --out")
