"""Files that are either whole or not there, and folders that one process at a time writes to."""

import fcntl
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, BinaryIO

from util.run.causes import disk_trouble
from util.run.errors import UserError

HELD, BUSY, NONE = "held", "busy", "none"  # what became of a try to lock
LOCK_PATIENCE_S = 3.0  # for one that is just ending
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # the name of a file that is being written
_LOCK_NAME = ".lock"
_TAIL_BYTES = 1 << 20  # in which the end of the last whole line is looked for

_swept: set[Path] = set()  # folders that this process has looked through


def write_atomically(path: Path, write: Callable[[Path], None], *, sync: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, then put it in place in one step.

    sync: False where the caller forces many files to disk at once (os.sync), before it notes that they are there.
    Temporary files that killed processes have left in the folder are removed: a living one holds a lock on its own.
    UserError where the disk refuses.
    """
    _sweep(path.parent)
    try:
        with _temporary(path) as temporary:
            write(temporary)
            if sync:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except Exception as error:
        if trouble := disk_trouble(error):
            raise UserError(f"{path} cannot be written: {trouble}") from error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def is_temporary(path: Path) -> bool:
    """Whether a file is one that is being written, or a lock; a process that was killed may have left it."""
    return path.name == _LOCK_NAME or bool(_TEMPORARY.fullmatch(path.name))


@contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new file beside `path`, locked; removed at the end, unless it was put in place.

    Until it is locked, it looks like a killed process's: one that was swept away meanwhile is given up.
    """
    while True:
        temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
        with open(temporary, "xb") as file:
            if try_lock(file, inherited=True) == BUSY or not is_at(file, temporary):
                continue
            try:
                yield temporary
            finally:
                with suppress(OSError):  # a disk that became read-only has refused already
                    temporary.unlink(missing_ok=True)
            return


def _sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; once in the life of a process.

    Where there are no locks they stay: nobody can tell whose they are.
    """
    if folder in _swept or not folder.is_dir():
        return
    _swept.add(folder)
    with os.scandir(folder) as entries:
        left = [entry.path for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for path in left:
        with suppress(OSError), open(path, "rb+") as file:  # gone, or not ours
            if try_lock(file, inherited=True) == HELD:
                os.unlink(path)


def cut_to_whole_lines(file: BinaryIO) -> None:
    """Take away a last line that was cut short by a crash, and go to the beginning. file: open to read and write."""
    end, tail = file.seek(0, os.SEEK_END), b""
    while end > 0 and b"\n" not in tail:
        start = max(0, end - _TAIL_BYTES)
        file.seek(start)
        end, tail = start, file.read(end - start)
    whole = end + tail.rfind(b"\n") + 1
    if whole != file.seek(0, os.SEEK_END):
        file.truncate(whole)
    file.seek(0)


def is_at(file: IO, path: Path) -> bool:
    """Whether an open file still has the name `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def try_lock(file: IO, *, patience_s: float = 0.0, inherited: bool = False) -> str:
    """Lock an open file until it is closed: HELD; BUSY, another has it for so many seconds; NONE, there are no locks.

    inherited: the lock is also of processes that inherit the file, and lasts as long as any of them. Otherwise it is of
    this process alone: workers that outlive it for a moment do not hold it.
    """
    take, end = fcntl.flock if inherited else fcntl.lockf, time.monotonic() + patience_s
    while True:
        try:
            take(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return HELD
        except (BlockingIOError, PermissionError):
            if time.monotonic() >= end:
                return BUSY
            time.sleep(0.1)
        except OSError:
            return NONE


def lock(file: IO, *, inherited: bool = False) -> bool:
    """Lock an open file as `try_lock` does, with patience; False where another process has it. Warns without locks."""
    state = try_lock(file, patience_s=LOCK_PATIENCE_S, inherited=inherited)
    if state == NONE:
        print(f"warning: {Path(file.name).parent} has no locks: start nothing else that writes there", file=sys.stderr)
    return state != BUSY


def in_use(what: str, holder: str, path: Path, otherwise: str = "choose another folder") -> UserError:
    """What to say where another process has the lock on the file `path`. otherwise: what else the user can do."""
    return UserError(
        f"{what} is in use by {holder}: wait for it, stop it, {otherwise}, or, if its machine has failed, remove {path}"
    )


def name_process(pid: int) -> str:
    """A process of this machine as messages name it."""
    return f"process {pid} on {socket.gethostname()}"


def holder_of(file: IO) -> str:
    """Who has a lock for itself alone on an open file, as far as the system tells."""
    if sys.platform == "linux":
        layout = "hhqqi4x"  # struct flock: kind, origin, start, length, process
        with suppress(OSError):
            asked = struct.pack(layout, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_, pid = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, asked))
            if kind != fcntl.F_UNLCK and pid > 0:  # not on another machine
                return name_process(pid)
    return "another process"


@contextmanager
def only_writer(folder: Path, flag: str = "--output_dir") -> Iterator[bytes]:
    """Hold `folder`, which is made, against other processes. The lock ends with this process, however that ends.

    flag: what the folder was given by. Yields what the lock says (`read_lock`). UserError where another process has it,
    or it cannot be written to.
    """
    path = folder / _LOCK_NAME
    file = _open_lock(path, flag)
    try:
        file.seek(0)
        yield file.read()
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()


def read_lock(folder: Path) -> bytes | None:
    """What the lock of a folder says; None without one. Its holder may not ask: closing the file gives the lock up."""
    try:
        return (folder / _LOCK_NAME).read_bytes()
    except OSError:
        return None


def _open_lock(path: Path, flag: str) -> BinaryIO:
    what = f"{flag} {path.parent}"
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "ab+", buffering=0)  # noqa: SIM115
        except OSError as error:
            if trouble := disk_trouble(error):
                raise UserError(f"{what} cannot be written: {trouble}") from error
            wrong = "is not writable" if path.parent.is_dir() else "cannot be made"
            raise UserError(f"{what} {wrong} ({error.strerror}): choose another") from error
        if not lock(file):
            file.seek(0)
            holder = file.read().decode(errors="replace") or holder_of(file)
            file.close()
            raise in_use(what, holder, path)
        if is_at(file, path):
            with suppress(OSError):  # on a full disk the lock holds all the same
                file.truncate(0)
                file.write(name_process(os.getpid()).encode())
                os.fsync(file.fileno())  # for those who read it over a network
            return file
        file.close()  # the one who held it has taken the file away since it was opened
