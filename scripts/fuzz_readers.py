"""Damaged and hostile files to every reader of the project: each is read, or refused in one line, and nothing else.

    python scripts/fuzz_readers.py --reader all --inputs 10000 --seed 0 --out runs/fuzz
    python scripts/fuzz_readers.py --reader images --only 123 --seed 0 --out runs/fuzz     # one input again

Input I of a reader is a function of (seed, reader, I). Inputs are read in a child process of limited memory, so that a
decoder that crashes or hangs is counted and the others go on. A run that was stopped goes on where it was when the
command is given again, also with more --inputs. OUT/READER.json has the counts; OUT/READER/failures/I the inputs that
failed; OUT/table.md the counts of all readers.

What fails: an exception that is no UserError or BadImage; more than 5 s of processor time; more than 1 GB of memory
beside what the process had; the end of the process; an attempt to run a command, to reach the network, or to touch a
file outside the folder.
"""

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.run.args import Parser, count, count0
from util.run.causes import causes
from util.run.errors import UserError, cli
from util.run.files import write_text
from util.run.log import progress, write_json

SECONDS = 5  # of processor time for an input
PATIENCE_S = 120  # on the clock: a process that waits takes no processor time, and one of many gets little
MEMORY = 1 << 30  # bytes beside what the process had
ADDRESSES = 4 << 30  # bytes beside those, which are refused to it
PER_CHILD = 1000
SAVE_EVERY = 50
REFUSED, READ = "refused", "read"
FAILED, HANG, MEMORY_OVER, CRASH, ESCAPE = "failed", "hang", "memory", "crash", "escape"
OUTCOMES = (READ, REFUSED, FAILED, HANG, MEMORY_OVER, CRASH, ESCAPE)


def get_parser() -> Parser:
    parser = Parser("Give damaged and hostile files to the readers of the project.")
    parser.add_argument("--reader", nargs="+", required=True, metavar="NAME", help="which readers; all: every one")
    parser.add_argument("--inputs", type=count, default=10_000, help="for each reader")
    parser.add_argument("--seed", type=count0, default=0, help="of the inputs")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the counts and what failed")
    parser.add_argument("--only", type=count0, metavar="I", help="read this one input, here, and show what happens")
    parser.add_argument("--child", type=count0, nargs=2, metavar=("FIRST", "END"), help="of the program itself")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    out = Path(args.out)
    if args.child:
        serve(args.reader[0], args.seed, range(*args.child), out)
        return
    from scripts.fuzz_targets import READERS

    names = list(READERS) if args.reader == ["all"] else args.reader
    for name in names:
        if name not in READERS:
            raise UserError(f"--reader {name} is not known: choose from all, {', '.join(READERS)}")
    if args.only is not None:
        show(names[0], args.seed, args.only, out)
        return
    out.mkdir(parents=True, exist_ok=True)
    counts = [Campaign(name, args.seed, out).run(args.inputs) for name in names]
    text = table(out)
    write_text(out / "table.md", text)
    print(text)
    if any(found["failures"] for found in counts):
        sys.exit(1)


# --- here: counting ---------------------------------------------------------------------------------------------------


class Campaign:
    """The inputs of one reader. state: {"reader", "seed", "inputs", "counts", "cpu_seconds", "failures"}."""

    def __init__(self, name: str, seed: int, out: Path):
        self.name, self.out, self.path = name, out, out / f"{name}.json"
        self.state = {"reader": name, "seed": seed, "inputs": 0, "counts": {}, "cpu_seconds": 0.0, "failures": []}
        if self.path.is_file():
            self.state = json.loads(self.path.read_text(encoding="utf-8"))
            if self.state["seed"] != seed:
                raise UserError(f"{self.path} is of --seed {self.state['seed']}: give that, or another --out")

    def run(self, inputs: int) -> dict:
        """Read inputs until so many have been read; returns the state."""
        with progress(total=inputs, initial=min(self.state["inputs"], inputs), desc=self.name, unit="input") as bar:
            while (first := self.state["inputs"]) < inputs:
                for outcome, detail, seconds in self._child(first, min(inputs, first + PER_CHILD)):
                    self._count(outcome, detail, seconds)
                    bar.update()
                write_json(self.path, self.state)
        return self.state

    def _count(self, outcome: str, detail: str, seconds: float) -> None:
        number = self.state["inputs"]
        self.state["inputs"] += 1
        self.state["counts"][outcome] = self.state["counts"].get(outcome, 0) + 1
        self.state["cpu_seconds"] = round(self.state["cpu_seconds"] + seconds, 3)
        if outcome not in (READ, REFUSED):
            self.state["failures"].append({"input": number, "outcome": outcome, "detail": detail})
        if number % SAVE_EVERY == 0:
            write_json(self.path, self.state)

    def command(self, first: int, end: int) -> list[str]:
        """What reads these inputs."""
        own = [sys.executable, __file__, "--reader", self.name, "--seed", str(self.state["seed"])]
        return [*own, "--out", str(self.out), "--child", str(first), str(end)]

    def _child(self, first: int, end: int):
        """(outcome, detail, processor seconds) of the inputs from `first` on, as far as one process gets."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        child = subprocess.Popen(self.command(first, end), stdout=subprocess.PIPE, env=environment, text=True)
        try:
            done = 0
            for line in _lines(child):
                done += 1
                outcome, seconds, detail = line.split("\t", 2)
                yield outcome, detail.strip(), float(seconds)
            status = child.wait()
        finally:
            child.kill()
            child.wait()
            child.stdout.close()
        if first + done < end:
            if not done and status > 0:
                raise UserError(f"the child process of {self.name} does not start (status {status}): see above")
            _keep(self.out, self.name, first + done)
            slow = status in (-signal.SIGPROF, -signal.SIGKILL)
            yield (HANG if slow else CRASH), f"ended with status {status}", float(SECONDS if slow else 0)


def _lines(child: subprocess.Popen):
    """Lines of a child's output, until it ends; one that says nothing for PATIENCE_S is killed."""
    with selectors.DefaultSelector() as waiting:
        waiting.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not waiting.select(PATIENCE_S):
                child.kill()
            line = child.stdout.readline()
            if not line.endswith("\n"):
                return
            yield line


def table(out: Path) -> str:
    """The counts of every reader in the folder, as Markdown."""
    head = ("reader", "inputs", *OUTCOMES, "CPU minutes")
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    total: Counter[str] = Counter()
    for path in sorted(out.glob("*.json")):
        state = json.loads(path.read_text(encoding="utf-8"))
        own = {"inputs": state["inputs"], **state["counts"], "seconds": state["cpu_seconds"]}
        total.update(own)
        lines.append(_row(state["reader"], own))
    return "\n".join([*lines, _row("all", total)]) + "\n"


def _row(name: str, counts: dict) -> str:
    cells = [name, *(str(counts.get(key, 0)) for key in ("inputs", *OUTCOMES)), f"{counts.get('seconds', 0) / 60:.1f}"]
    return f"| {' | '.join(cells)} |"


# --- in the child: reading --------------------------------------------------------------------------------------------


def _place(out: Path, name: str) -> Path:
    return out / name / "work"


def _keep(out: Path, name: str, number: int) -> None:
    """Copy the input that was read last to where those that fail are kept."""
    kept = out / name / "failures" / str(number)
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(_place(out, name), kept, symlinks=True)


def serve(name: str, seed: int, numbers: range, out: Path) -> None:
    """Read some inputs, and say of each how it went: a line of outcome, processor seconds and detail."""
    import logging

    from scripts.fuzz_targets import READERS

    reader, home, work = READERS[name], (out / name).resolve(), _place(out, name).resolve()
    told = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:  # what scripts and decoders print
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    logging.disable(logging.CRITICAL)
    valid = home / f"valid-{os.getpid()}"
    valid.mkdir(parents=True)
    guard = Guard(home)
    try:
        reader.make(valid)
        try_one(reader, valid, work, seed, name, numbers.start, guard)  # what is imported late is no input's cost
        guard.limit()
        for number in numbers:
            outcome, detail, seconds = try_one(reader, valid, work, seed, name, number, guard)
            if outcome not in (READ, REFUSED):
                _keep(out, name, number)
            told.write(f"{outcome}\t{seconds:.4f}\t{' '.join(detail.split())}\n")
    finally:
        shutil.rmtree(valid, ignore_errors=True)


def try_one(reader, valid: Path, work: Path, seed: int, name: str, number: int, guard) -> tuple[str, str, float]:
    """(outcome, detail, processor seconds) of an input."""
    from util.data.images import BadImage
    from util.run.seed import rng_for

    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    victim = reader.damage(valid, work / "in", rng_for(seed, name, number))
    guard.begin()
    started = time.process_time()
    try:
        reader.read(work / "in", victim)
        outcome, detail = READ, ""
    except (UserError, BadImage) as error:
        outcome, detail = REFUSED, str(error)
        if any(isinstance(cause, MemoryError) for cause in causes(error)):
            outcome = MEMORY_OVER
    except MemoryError:
        outcome, detail = MEMORY_OVER, traceback.format_exc(limit=-3)
    except BaseException:  # panics of Rust and SystemExit included
        outcome, detail = FAILED, f"{victim.name}: {traceback.format_exc(limit=-4)}"
    seconds = time.process_time() - started
    trouble = guard.end()
    return (*trouble, seconds) if trouble else (outcome, detail, seconds)


class Guard:
    """Watches what an input makes this process do. home: the folder whose files may be touched."""

    def __init__(self, home: Path):
        self.home, self.found, self.watching = str(home), [], False
        sys.addaudithook(self._hook)

    def limit(self) -> None:
        """From now on so much memory at most, and death after SECONDS of processor time between begin and end."""
        import resource

        signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a handler would wait for a decoder to return
        self.timed = True
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
        if pages:
            most = pages * resource.getpagesize() + ADDRESSES
            resource.setrlimit(resource.RLIMIT_AS, (most, most))

    timed = False

    def begin(self) -> None:
        """Before an input."""
        self.found.clear()
        self.before = _memory(reset=True)
        self.watching = True
        if self.timed:
            signal.setitimer(signal.ITIMER_PROF, SECONDS)

    def end(self) -> tuple[str, str] | None:
        """After it: (outcome, detail) if it did what it may not."""
        if self.timed:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.watching = False
        if self.found:
            return ESCAPE, "; ".join(self.found)
        grown = _memory() - self.before
        return (MEMORY_OVER, f"{grown >> 20} MiB") if self.timed and grown > MEMORY else None

    def _hook(self, event: str, args: tuple) -> None:
        if not self.watching:
            return
        if event in _COMMANDS:
            self.found.append(f"{event} {args!r}"[:200])
        elif event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            writes = (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            allowed = (self.home, "/dev/") if writes else (self.home, *_PROGRAM)
            if path in _PRIVATE or not _lies_in(path, allowed):
                self.found.append(f"open {path}")
        elif event in _CHANGES:
            for path in _changed(event, args):
                if not _lies_in(path, (self.home,)):
                    self.found.append(f"{event} {path}")


def _lies_in(path: str, folders: Iterable[str]) -> bool:
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)


def _changed(event: str, args: tuple) -> list[str]:
    """The files that a call changes or makes, where it names them: by a path, or by one within an open folder.

    Of a link it is also what it leads to.
    """
    named = [name for name in args[: 2 if event in _OF_TWO else 1] if isinstance(name, (str, bytes))]
    inside = args[1] if event in ("os.remove", "os.rmdir") else -1
    if inside != -1 and not os.path.exists("/proc/self/fd"):
        return []
    base = os.readlink(f"/proc/self/fd/{inside}") if inside != -1 else ""
    return [os.path.realpath(os.path.join(base, os.fsdecode(name))) for name in named]


_COMMANDS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "socket.connect", "pty.spawn"}
_OF_TWO = {"os.rename", "os.link", "os.symlink", "shutil.move"}
_CHANGES = {
    "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.truncate", "os.utime", "os.setxattr", *_OF_TWO,
    "shutil.rmtree",
}  # fmt: skip
_PRIVATE = {"/etc/passwd"}  # what the names in scripts/fuzz_mutations.py lead to
# what the interpreter and its libraries read: themselves, the machine, the system's settings
_PROGRAM = tuple(
    os.path.realpath(folder)
    for folder in (
        *(sys.prefix, sys.base_prefix, sys.exec_prefix, Path(__file__).parents[1], *filter(os.path.isdir, sys.path)),
        *("/proc", "/sys", "/dev", "/usr", "/lib", "/lib64", "/opt", "/etc/localtime", "/etc/mime.types"),
    )
)


def _memory(reset: bool = False) -> int:
    """The most memory that this process had since it was last reset, bytes; since it began where that cannot be."""
    import torch

    from util.run.device import peak_memory_bytes

    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory_bytes(torch.device("cpu"))


def show(name: str, seed: int, number: int, out: Path) -> None:
    """Read one input without limits, and let its exception through."""
    from scripts.fuzz_targets import READERS
    from util.run.seed import rng_for

    valid, work = out / name / f"valid-{os.getpid()}", _place(out, name)
    valid.mkdir(parents=True)
    try:
        READERS[name].make(valid)
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        victim = READERS[name].damage(valid, work / "in", rng_for(seed, name, number))
        print(f"damaged: {victim}")
        READERS[name].read(work / "in", victim)
        print("read")
    finally:
        shutil.rmtree(valid, ignore_errors=True)


if __name__ == "__main__":
    main()
