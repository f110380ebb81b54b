"""A thousand visitors of the demo, 32 at once, a part of whom send slowly, break off, lie, or try to read other files.

python scripts/load_demo.py --out load.json                          # pip install -r requirements-demo.txt; Linux
python scripts/load_demo.py --out load.json --requests 50 -- --ckpt R.safetensors --mae M.safetensors --finder SPEC

It starts the demo itself, with gallery, annotations and uploads in a folder of its own; flags behind -- go to it. Each
visitor must be answered or refused in words or by an end of the connection. Afterwards the server's memory, open files
and stored bytes are compared with those after the first tenth, and every file of the folder and of this repository
with what was there before. It is one life of one server: stopped, it begins again. Status 1 where anything was wrong.
"""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from scripts.load_visitors import ANSWERED, REFUSED, Door, drawn, recognises, who_comes
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.log import provenance, write_json
from util.run.process_tree import Usage, usage
from util.run.seed import rng_for

START_S = 600  # that the server may take to open
QUIET_S = 15  # between the last visitor and the last look: connections end, caches are given back
GROWTH_BYTES = 150_000_000  # of memory, from the first tenth of the visitors to the end, and
GROWTH = 1.15  # times what it was then
GROWTH_HANDLES = 20
CHANGING = (".git", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache", "data", "runs")  # by others
SECRET = "secret-of-the-machine-1f6a"  # in files beside the demo's folders


def get_args(argv: list[str] | None = None):
    parser = flags.Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", required=True, metavar="FILE", help="JSON with the counts and the verdict")
    add("--requests", type=flags.count, default=1000, help="visitors")
    add("--at_once", type=flags.count, default=32, help="visitors that are there at the same time")
    add("--patience", type=flags.positive, default=180.0, help="s until a visitor counts as not served")
    add("--seed", type=flags.count0, default=0, help="every visitor follows from it")
    add("demo", nargs="*", metavar="FLAG", help="of python -m visualize.demo, behind --")
    return parser.parse_args(argv)


@contextmanager
def server(folder: Path, port: int, demo_flags: list[str]):
    """The demo in a process of its own, whose files lie in the folder; yields (its process, its output file)."""
    said = folder / "outside" / "server.txt"
    command = [
        sys.executable, "-m", "visualize.demo", *demo_flags, "--port", str(port), "--gallery", str(folder / "gallery"),
        "--annotations", str(folder / "annotations"),
    ]  # fmt: skip
    environment = os.environ | {"GRADIO_TEMP_DIR": str(folder / "uploads"), "TMPDIR": str(folder / "tmp")}
    (folder / "tmp").mkdir()
    with open(said, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            ends = time.monotonic() + START_S
            while "the demo is at" not in said.read_text():
                if process.poll() is not None or time.monotonic() > ends:
                    raise UserError(f"the demo did not start: {said.read_text().strip()[-300:]}")
                time.sleep(0.2)
            yield process, said
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Counts:
    """How the visitors of each kind were served, and how long it took."""

    def __init__(self):
        self.served: dict[str, Counter] = defaultdict(Counter)
        self.failures: list[str] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def serve(self, visitor: Callable, door: Door, rng: np.random.Generator) -> None:
        """Let a visitor come, and note how he was served."""
        name, started = visitor.__name__, time.monotonic()
        try:
            outcome = visitor(door, rng)
        except Exception as error:  # whatever a visitor meets that is neither an answer nor a refusal
            outcome = "failed"
            self.failures.append(f"{name}: {type(error).__name__}: {error}"[:400])
        self.served[name][outcome] += 1
        self.seconds[name].append(time.monotonic() - started)

    def table(self) -> dict[str, dict]:
        """By kind: counts, and the median and the 95th percentile of the seconds it took."""
        return {
            name: {outcome: served[outcome] for outcome in (ANSWERED, REFUSED, "failed")}
            | {f"seconds_p{q}": round(float(np.percentile(self.seconds[name], q)), 3) for q in (50, 95)}
            for name, served in sorted(self.served.items())
        }


def listing(folder: Path, left_out: tuple[str, ...] = ()) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder, by its path; nothing of the folders left out."""
    found = {}
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out]
        for name in names:
            status = os.lstat(os.path.join(place, name))
            found[os.path.join(place, name)] = (status.st_size, status.st_mtime_ns)
    return found


def outside_of(folder: Path, said: Path) -> dict[str, tuple[int, int]]:
    """What the demo has no business with: this repository, and what lies beside its own folders."""
    own = ("gallery", "annotations", "uploads", "tmp")
    rest = listing(ROOT, CHANGING) | listing(folder, own)
    return {path: facts for path, facts in rest.items() if path != str(said)}


def plant(folder: Path, rng: np.random.Generator) -> tuple[str, ...]:
    """Files that nobody may read: a text and a picture. Returns their paths, and the way to them from the uploads."""
    (folder / "outside").mkdir()
    text, picture = folder / "outside/secret.txt", folder / "outside/secret.png"
    text.write_text(SECRET)
    picture.write_bytes(drawn(rng))
    return str(text), str(picture), "../../outside/secret.png", "../outside/secret.txt"


def stored_bytes(folder: Path) -> int:
    """Of uploads and drawn answers."""
    return sum(size for part in ("uploads", "tmp") for size, _ in listing(folder / part).values())


def look(process: subprocess.Popen, folder: Path) -> dict:
    """What the server holds now."""
    now: Usage = usage(process.pid)
    return {"memory_bytes": now.memory, "handles": now.handles, "threads": now.threads,
            "cpu_seconds": round(now.cpu_seconds, 1), "stored_bytes": stored_bytes(folder)}  # fmt: skip


def send(door: Door, args, counts: Counts, watch: Callable[[], dict]) -> list[dict]:
    """Let all visitors come; returns what the server held after each tenth of them, or each half of a few."""
    visitors, looks = who_comes(args.requests, rng_for(args.seed, "visitors")), []
    parts = min(10, max(2, args.requests // (2 * args.at_once)))  # in each there are enough to fill the room
    part = -(-len(visitors) // parts)
    for first in range(0, len(visitors), part):
        with ThreadPoolExecutor(args.at_once) as pool:
            for number, visitor in enumerate(visitors[first : first + part], start=first):
                pool.submit(counts.serve, visitor, door, rng_for(args.seed, number, "visitor"))
        looks.append(watch())
        failed = len(counts.failures)
        print(
            f"{min(first + part, len(visitors))} of {len(visitors)} visitors, {failed} not served, {looks[-1]}",
            flush=True,
        )
    return looks


def faults(said: str) -> list[str]:
    """How the server's tracebacks end, but for those by which gradio prints that it has refused something."""
    parts = said.split("Traceback (most recent call last):")[1:]
    raised = [next((line for line in part.splitlines() if line and not line[0].isspace()), "") for part in parts]
    return [
        line for line in raised if not line.startswith(("gradio.exceptions.Error", "gradio.exceptions.InvalidPath"))
    ]


def verdicts(looks: list[dict], counts: Counts, said: str, touched: list[str], alive: bool) -> dict[str, bool]:
    """What was to be shown, and whether it is so."""
    first, last = looks[0], looks[-1]
    return {
        "everybody_was_answered_or_refused": not counts.failures,
        "the_server_still_answers": alive,
        "no_traceback": not faults(said),
        "memory_returns": last["memory_bytes"]
        <= max(GROWTH * first["memory_bytes"], first["memory_bytes"] + GROWTH_BYTES),
        "handles_return": last["handles"] <= first["handles"] + GROWTH_HANDLES,
        "nothing_outside_is_touched": not touched,
    }


@cli
def main(argv: list[str] | None = None) -> None:
    """Start the demo, send the visitors, judge."""
    args = get_args(argv)
    counts, started = Counts(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="animask-load-") as name:
        folder, port = Path(name).resolve(), free_port()
        outside = plant(folder, rng_for(args.seed, "secret"))
        with server(folder, port, args.demo) as (process, said):
            door = Door(port, args.patience, (SECRET.encode(),), outside)
            door.open()
            before = outside_of(folder, said)
            looks = send(door, args, counts, lambda: look(process, folder))
            time.sleep(QUIET_S)
            looks.append(look(process, folder))
            last = Counts()
            last.serve(recognises, door, rng_for(args.seed, "last"))
            after, printed = outside_of(folder, said), said.read_text()
            copied = [path for path in listing(folder / "uploads") if Path(path).name.startswith("secret")]
    touched = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    found = verdicts(looks, counts, printed, touched, not last.failures) | {"nothing_outside_is_copied": not copied}
    write_json(Path(args.out), {
        **found, "ok": all(found.values()), "requests": args.requests, "at_once": args.at_once,
        "visitors": counts.table(), "failures": counts.failures + last.failures, "looks": looks, "touched": touched,
        "server_said": printed[-5000:], "seconds": round(time.monotonic() - started, 1),
        **provenance(vars(args), torch.device("cpu")),
    })  # fmt: skip
    for what, holds in found.items():
        print(f"{what.replace('_', ' ')}: {'yes' if holds else 'NO'}")
    for failure in counts.failures[:10]:
        print(failure)
    sys.exit(0 if all(found.values()) else 1)


if __name__ == "__main__":
    main()
