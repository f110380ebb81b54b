"""Files that are either whole or not there, and folders that one process at a time writes to."""

import fcntl
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from util.run.causes import disk_trouble
from util.run.errors import UserError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]+\.tmp")  # the name of a file that is being written
_LOCK_NAME = ".lock"

_swept: set[Path] = set()  # folders that this process has looked through


def write_atomically(path: Path, write: Callable[[Path], None], *, sync: bool = True) -> None:
    """Let `write` fill a temporary file beside `path`, force it to disk, then put it in place in one step.

    sync: False where a file that a power cut empties is made again anyway. Temporary files that killed processes have
    left in the folder are removed: a living one holds a lock on its own. UserError where the disk refuses.
    """
    _sweep(path.parent)
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as held:
            _try_flock(held)
            write(temporary)
            if sync:
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
            os.replace(temporary, path)
    except Exception as error:
        if trouble := disk_trouble(error):
            raise UserError(f"{path} cannot be written: {trouble}") from error
        raise
    finally:
        with suppress(OSError):  # a disk that became read-only has refused already
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def is_temporary(path: Path) -> bool:
    """Whether a file is one that is being written, or a lock; a process that was killed may have left it."""
    return path.name == _LOCK_NAME or bool(_TEMPORARY.fullmatch(path.name))


def _sweep(folder: Path) -> None:
    """Remove the temporary files of processes that were killed; once in the life of a process."""
    if folder in _swept or not folder.is_dir():
        return
    _swept.add(folder)
    with os.scandir(folder) as entries:
        left = [entry.path for entry in entries if _TEMPORARY.fullmatch(entry.name)]
    for path in left:
        with suppress(OSError), open(path, "rb+") as file:  # gone, or not ours
            if _try_flock(file):
                os.unlink(path)


def _try_flock(file) -> bool:
    """Lock an open file for as long as it is open; False if another process has it, or where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def only_writer(folder: Path, flag: str = "--output_dir") -> Iterator[None]:
    """Hold `folder` against other processes. The lock ends with this process, however that ends.

    It is of this process alone: workers that outlive it for a moment do not hold it. flag: what the folder was given
    by. UserError where another process has it, or it cannot be written to.
    """
    path = folder / _LOCK_NAME
    file = _open_lock(path, flag)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        file.close()


def _open_lock(path: Path, flag: str):
    while True:
        try:
            file = open(path, "ab+", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"{flag} {path.parent} is not writable ({error.strerror}): choose another") from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            holder = file.read().decode(errors="replace") or "another process"
            file.close()
            raise UserError(
                f"{flag} {path.parent} is in use by {holder}: wait for it, stop it, or choose another folder"
            ) from None
        except OSError:
            print(f"warning: {path.parent} has no locks: start nothing else that writes there", file=sys.stderr)
            return file
        # the one who held it may have taken the file away since it was opened
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            file.truncate(0)
            with suppress(OSError):  # on a full disk the lock holds all the same
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()
