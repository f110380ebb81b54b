"""Scripts as forks of a process that has imported what they need: real processes, without the seconds of an import.

The process that forks must not compute anything itself: threads of a library would be missing in its children.
"""

import atexit
import ctypes
import importlib
import json
import multiprocessing.util
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# audit events of changes to a file, and where the argument is that names the file afterwards
_CHANGES = {"os.rename": 1, "os.link": 1, "os.remove": 0, "os.truncate": 0, "os.mkdir": 0, "shutil.rmtree": 0}


def preload(modules: Sequence[str]) -> None:
    """Import what jobs will need."""
    for name in modules:
        importlib.import_module(name)


def fork(work: Callable[[], int | None]) -> int:
    """Run `work` in a process of its own, which leads a session, and end it with the status that comes back.

    Returns its number; to be waited for.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)  # a campaign that is killed leaves no job behind
        atexit._clear()  # what the parent has to do at its end is not the child's
        atexit.register(multiprocessing.util._exit_function)
        _own_locks()
        status = work() or 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else bool(stop.code)
    except BaseException:
        traceback.print_exc()
    finally:
        try:  # as an interpreter does when it ends
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _own_locks() -> None:
    """Give this process a lock of its own for its bars: tqdm shares one with all forks, which a killed one keeps."""
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.set_lock(threading.RLock())


def run_script(argv: Sequence[str], output: Path) -> None:
    """Become `python ARGV`: a .py file, or -m MODULE. What it prints is added to the file `output`."""
    with open(output, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    with open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if argv[0] == "-m":
        sys.argv = [argv[1], *argv[2:]]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(argv)
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")


def ask(work: Callable[[], object]) -> object:
    """What `work` finds out, in a process of its own: something JSON can say. RuntimeError where that fails."""
    read, write = os.pipe()

    def tell() -> None:
        os.close(read)
        with open(write, "w", encoding="utf-8") as file:
            json.dump(work(), file)

    pid = fork(tell)
    os.close(write)
    with open(read, encoding="utf-8") as file:
        text = file.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError(f"a process that looked at files ended with status {os.waitstatus_to_exitcode(status)}")
    return json.loads(text)


def tell_changes(folder: Path, to: int, stop_at: Callable[[str], bool]) -> None:
    """Write a line "name of the file" to the descriptor `to` before each change that this process makes in `folder`.

    Opened for writing, renamed, removed and so on, as Python's audit events have it; what a library does in C comes
    between two of them. stop_at: told of the name, too; where it says so, the process is killed there and then.
    """
    owner, inside = os.getpid(), f"{folder}/"

    def hook(event: str, args: tuple) -> None:
        if event == "open":
            path = args[0] if args[2] & _WRITES else None
        else:
            path = args[_CHANGES[event]] if event in _CHANGES else None
        if path is None or isinstance(path, int) or os.getpid() != owner:
            return
        name = os.fsdecode(path)
        if name.startswith(inside):
            os.write(to, f"{name[len(inside) :]}\n".encode())
            if stop_at(name):
                os.kill(owner, signal.SIGKILL)

    sys.addaudithook(hook)
