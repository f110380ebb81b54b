"""THE grid runner: every combination of some flags, for one or several scripts, into one table and one figure.

python -m util.run.grid --out runs/lora_ranks --command "lora: main_lora.py --data_path DIR --init W" \\
    --vary rank=4,8,16,32 seed=0,1,2 --figure trainable_params:test.top1

A run lives in OUT/NAME/rank=4,seed=0 and is known by its whole command. The same call again skips what is
finished, goes on with what was stopped, and tries again what failed. --then "eval_recognition.py --ckpt
{run}/checkpoint-best.pth ..." runs a second script on each run that is done, in OUT/then/NAME/rank=4,seed=0; the table
and the figure have its numbers too. With {out}, its own folder, it is given no --output_dir, and leaves metrics.json.
"""

import itertools
import re
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm  # not util.run.log's bar: it comes with torch, half a GB that would lie beside the runs

from util.run import grid_report as report
from util.run.args import Parser, count, count0
from util.run.errors import UserError, cli
from util.run.files import LOCK_PATIENCE_S
from util.run.grid_run import Job, Run

OWN_FLAGS = ("output_dir", "resume")  # what the grid itself gives to every run
POLL_S = 0.1


@dataclass(frozen=True)
class Axis:
    """Flags that change together, and their values. only: the command it is for; None: every one."""

    flags: tuple[str, ...]
    values: tuple[tuple[str, ...], ...]
    only: str | None = None


def parse_vary(text: str) -> Axis:
    """[NAME:]FLAG=V1,V2 or [NAME:]FLAG/FLAG=V1/W1,V2/W2. UserError for anything else."""
    match = re.fullmatch(r"(?:([\w.-]+):)?([A-Za-z]\w*(?:/[A-Za-z]\w*)*)=(.+)", text)
    if not match:
        raise UserError(f"--vary {text} is not of the form [NAME:]FLAG=VALUE,VALUE such as rank=4,8 or lora:rank=4,8")
    flags = tuple(match[2].split("/"))
    values = tuple(tuple(v.split("/")) if len(flags) > 1 else (v,) for v in match[3].split(","))
    for value in values:
        if len(value) != len(flags) or not all(value):
            raise UserError(f"--vary {text}: {'/'.join(value)!r} is no value of {match[2]}: write it like 5 or 5/1")
    return Axis(flags, values, match[1])


def parse_command(text: str) -> tuple[str, tuple[str, ...]]:
    """The name and the words of "NAME: SCRIPT --FLAG ..."; UserError for anything else."""
    name, colon, command = text.partition(":")
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"--command {text}: {error}: mend the quotes") from None
    if not colon or not words or not re.fullmatch(r"\w[\w.-]*", name.strip()):
        raise UserError(f'--command {text} is not of the form "NAME: SCRIPT FLAGS" such as "lora: main_lora.py"')
    return name.strip(), words


def expand(out: Path, commands: dict[str, tuple[str, ...]], axes: list[Axis], extra: tuple[str, ...] = ()) -> list[Run]:
    """Every command with every combination of its axes, in their order, the last one fastest.

    extra: flags added to every command. UserError for an axis of an unknown command, a flag that is given twice,
    and runs that would share a folder.
    """
    for axis in axes:
        if axis.only not in (None, *commands):
            raise UserError(
                f"--vary {axis.only}:{'/'.join(axis.flags)}: no command of that name; {', '.join(commands)}"
            )
    runs = []
    for name, words in commands.items():
        words = (*words, *extra)
        own = [axis for axis in axes if axis.only in (None, name)]
        _check_flags(name, words, [flag for axis in own for flag in axis.flags])
        for combination in itertools.product(*(axis.values for axis in own)):
            settings = {}
            for axis, values in zip(own, combination, strict=True):
                settings.update(zip(axis.flags, values, strict=True))
            flags = [word for flag, value in settings.items() for word in (f"--{flag}", value)]
            runs.append(Run(name, (*words, *flags), settings, out / name / folder_name(settings)))
    shared = [folder for folder, times in Counter(run.folder for run in runs).items() if times > 1]
    if shared:
        raise UserError(f"--vary gives several runs the folder {shared[0]}: name each value once, and tell them apart")
    return runs


def folder_name(settings: dict[str, str]) -> str:
    """Such as "rank=4,seed=0"; what makes no good file name becomes "-"."""
    return ",".join(f"{flag}={re.sub(r'[^a-zA-Z0-9_.+-]+', '-', value)}" for flag, value in settings.items())


def _check_flags(name: str, words: tuple[str, ...], varied: list[str]) -> None:
    given = [word[2:].split("=")[0] for word in words if word.startswith("--")]
    for flag, times in Counter(varied).items():
        if times > 1:
            raise UserError(f"--vary gives {name} the flag {flag} twice: join the values by commas")
        if flag in given:
            raise UserError(f"--{flag} is both varied and in the command of {name}: leave one of them out")
    for flag in OWN_FLAGS:
        if flag in given or flag in varied:
            raise UserError(f"{name}: the grid itself gives --{flag}: leave it out")


def run_all(
    runs: list[Run],
    *,
    jobs: int = 1,
    devices: tuple[str, ...] = (),
    retry: int = 0,
    on_change: Callable[[], None] = lambda: None,
    needs: Callable[[Run], Iterable[Run]] = lambda run: (),
    display: "Display | None" = None,
) -> int:
    """Start what is not done, `jobs` at a time, each on one of the CUDA `devices` if there are any; cores are shared.

    A run that fails is started up to `retry` times more, unless it was a user's error; the others go on.
    on_change is called after every run. needs: the runs that have to be done before one can start; where one of them
    fails, it is left waiting. display: what shows how it goes. SIGINT, SIGTERM and SIGHUP are passed on, and the runs
    waited for. Returns the number of the signal that stopped it, or 0; how the runs ended is in their folders.
    """
    for run in runs:
        run.check()
        if run.is_running(LOCK_PATIENCE_S):
            raise run.in_use()
    waiting = [run for run in runs if run.state() != "done"]
    slots, active, failures = list(range(jobs)), [], Counter()
    with _Signals() as signals, closing(display or Display(len(runs), len(runs) - len(waiting))) as display:
        try:
            while active or (waiting and not signals.received):
                while slots and not signals.received and (run := _next_ready(waiting, needs)):
                    waiting.remove(run)
                    slot = slots.pop(0)
                    active.append(Job(run, slot, devices[slot % len(devices)] if devices else None, jobs))
                    display.say(f"start      {active[-1].run.label}")
                if not active:
                    break  # what waits needs a run that failed
                for signum in signals.take():
                    for job in active:
                        job.send(signum)
                for job in [job for job in active if job.has_ended()]:
                    active.remove(job)
                    slots.insert(0, job.slot)
                    failures[job.run.label] += 1
                    again = job.finish(stopped=signals.received) and failures[job.run.label] <= retry
                    if again:
                        waiting.insert(0, job.run)
                    display.ended(job, again)
                    on_change()
                display.watch(active)
                time.sleep(POLL_S)
        finally:
            # empty, unless something here went wrong: nothing may stay behind
            for job in active:
                job.send(signal.SIGTERM)
            for job in active:
                job.wait()
    return signals.received


def _next_ready(waiting: list[Run], needs: Callable[[Run], Iterable[Run]]) -> Run | None:
    return next((run for run in waiting if all(need.state() == "done" for need in needs(run))), None)


class _Signals:
    """Collects SIGINT, SIGTERM and SIGHUP instead of dying of them; one that is ignored (nohup) stays so."""

    def __enter__(self):
        self.received, self._fresh, self._before = 0, [], {}
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._note)
        return self

    def _note(self, signum: int, frame) -> None:
        self.received = self.received or signum
        self._fresh.append(signum)

    def take(self) -> list[int]:
        """The signals since the last call."""
        fresh, self._fresh = self._fresh, []
        return fresh

    def __exit__(self, *_) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)


class Display:
    """A line when a run starts or ends; on a terminal a bar, too, with the last word of a running one."""

    def __init__(self, total: int, done: int):
        quiet = not sys.stderr.isatty()
        self.bar = tqdm(total=total, initial=done, unit="run", disable=quiet, dynamic_ncols=True, leave=False)
        self.shown = 0.0

    def say(self, message: str) -> None:
        tqdm.write(message, file=sys.stdout)
        sys.stdout.flush()

    def ended(self, job: Job, again: bool) -> None:
        self.say(f"{job.state:<10} {job.run.label}: {job.note}" + (" (once more)" if again else ""))
        self.bar.update(not again)

    def watch(self, active: list[Job]) -> None:
        if active and not self.bar.disable and time.monotonic() > self.shown + 1:
            self.shown = time.monotonic()
            self.bar.set_postfix_str(f"{active[0].run.label}: {(active[0].lines() or ['starting'])[-1]}")

    def close(self) -> None:
        self.bar.close()


def parse_runner_args(parser: Parser, argv: list[str] | None):
    """Parse with --jobs and --devices as `run_all` takes them; `extra` has the words after a lone --."""
    add = parser.add_argument
    add("--jobs", type=count, help="runs at the same time; default: one, or one per device")
    add("--devices", default="", metavar="0,1", help="CUDA cards that the runs are spread over, one card each")
    argv = sys.argv[1:] if argv is None else argv
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.extra = tuple(argv[cut + 1 :])
    args.devices = tuple(args.devices.split(",")) if args.devices else ()
    args.jobs = args.jobs or len(args.devices) or 1
    return args


def get_args(argv: list[str] | None = None):
    parser = Parser("Run a grid of trainings; flags after a lone -- are added to every command")
    add = parser.add_argument
    add("--out", required=True, type=Path, metavar="DIR", help="folder for the runs, results.csv, .md and .png")
    add("--command", action="append", required=True, metavar='"NAME: SCRIPT FLAGS"', help="once per method; see --vary")
    add(
        "--vary", nargs="+", action="extend", default=[], metavar="[NAME:]FLAG=V,V",
        help="values of a flag of all commands, or of one; FLAG/FLAG=V/W,V/W: flags that change together",
    )  # fmt: skip
    add("--then", metavar='"SCRIPT FLAGS"', help="what follows each run; {run} and {out} in it: its folders")
    add("--figure", metavar="X:Y", help="plot figure Y of results.json against X, a varied flag or another figure")
    add("--columns", nargs="+", metavar="FIGURE", help=f"of the table; default: {' '.join(report.COLUMNS)}")
    add("--retry", type=count0, default=0, help="further attempts at a run that fails")
    add("--dry_run", action="store_true", help="print the commands and what is done of them, and start nothing")
    args = parse_runner_args(parser, argv)
    if args.figure and not re.fullmatch(r"[^:]+:[^:]+", args.figure):
        raise UserError(f"--figure {args.figure} is not of the form X:Y such as rank:test.top1")
    return args


def plan(args) -> list[Run]:
    """The runs that the flags ask for."""
    commands = [parse_command(text) for text in args.command]
    if len(dict(commands)) < len(commands):
        raise UserError("two of the --command have the same name: give each its own")
    return expand(args.out, dict(commands), [parse_vary(text) for text in args.vary], args.extra)


def follower(args, run: Run) -> Run:
    """What --then makes of a run. UserError where it does not name the run's folder."""
    if "{run}" not in args.then:
        raise UserError(f"--then {args.then} does not say what it works on: put {{run}} where the run's folder goes")
    _, words = parse_command(f"then: {args.then}")
    _check_flags("--then", words, [])
    folder = args.out / "then" / run.name / run.folder.name
    command = tuple(word.replace("{run}", str(run.folder)).replace("{out}", str(folder)) for word in words)
    return Run(run.name, command, run.settings, folder, names_folder="{out}" in args.then)


def collect(args, runs: list[Run]) -> list[report.Row]:
    """How each run stands; with --then, each that is done stands as what followed it, with the numbers of both."""
    rows = report.collect(runs)
    if not args.then:
        return rows
    second = report.collect(follower(args, run) for run in runs)
    return [
        report.Row(then.run, then.state, then.error, row.figures | then.figures) if row.state == "done" else row
        for row, then in zip(rows, second, strict=True)
    ]


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    runs = plan(args)
    if args.dry_run:
        for run in [*runs, *(follower(args, run) for run in runs if args.then)]:
            run.check()
            print(f"# {run.label}: {run.state()}\n{shlex.join(run.argv())}")
        return
    if args.then:
        follower(args, runs[0]).check()
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be made ({error.strerror}): choose another") from error

    def write_tables() -> None:
        report.write_tables(args.out, collect(args, runs), args.columns or report.COLUMNS)

    options = {"jobs": args.jobs, "devices": args.devices, "retry": args.retry}
    signum = run_all(runs, **options, on_change=write_tables)
    if args.then and not signum:
        done = [follower(args, run) for run in runs if run.state() == "done"]
        signum = run_all(done, **options, on_change=write_tables)
    write_tables()
    _conclude(args, runs, signum)


def _conclude(args, runs: list[Run], signum: int) -> None:
    """Draw the figure, say how it went, and leave with the status that says so."""
    rows = collect(args, runs)
    if args.figure and not report.draw(args.out / "results.png", rows, *args.figure.split(":")):
        print(f"no figure: no run that is done has both of {args.figure}")
    failed = [row for row in rows if row.state == "failed"]
    for row in failed:
        print(f"failed: {row.run.label}: {row.error} (see {row.run.output})", file=sys.stderr)
    done = sum(row.state == "done" for row in rows)
    print(f"{done} of {len(rows)} runs are done, {len(failed)} failed; table: {args.out / 'results.md'}")
    if signum:
        print(f"stopped by {signal.Signals(signum).name}: the same command goes on from here")
        sys.exit(128 + signum)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
