"""Kill every long-running script again and again, start it anew, and compare what it leaves with an undisturbed run.

    python scripts/fault_campaign.py --out runs/faults --kills 200
    python scripts/fault_campaign.py --out runs/faults --jobs pretrain pack --kills 20 --seed 1

Kills are SIGKILL: at a random moment, at a change to a file of some kind (a checkpoint, a packed file, embeddings, the
data set), or within 20 ms after one. After each, every file must be readable; in the end, weights and outputs must be
those of an undisturbed run, bit for bit on the CPU, with no temporary file and no process left. OUT gets campaign.md
and results.json. The same call again goes on where it was stopped. Exit status 1 where anything was lost.
"""

import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything computes: forks must find no other threads
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.faults.forked import ask, preload
from util.faults.jobs import JOBS, Job
from util.faults.kills import WAYS, End, as_json, draw_plan, left_behind, orphans, run
from util.faults.outcome import differences, outcome
from util.faults.readable import unreadable
from util.faults.report import kills_of, markdown, passed
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.files import only_writer, write_text
from util.run.log import git_commit, progress, write_json
from util.run.process_tree import descendants

MODULES = (
    "main_pretrain", "main_simclr", "main_linprobe", "main_lora", "main_finetune", "main_detect", "eval_recognition",
    "identify", "visualize.mask_sweep", "util.data.pack", "util.toonfaces.dataset", "torch.utils.tensorboard",
    "matplotlib.figure", "torchvision.transforms.v2", "pyarrow.parquet", "pyarrow.dataset", "scipy.stats", "sklearn",
)  # fmt: skip
PATIENCE_S = 30.0  # for processes of one that was killed to notice; on a machine at rest they need six seconds
BUSY = "is in use by"  # a grid whose runs go on after it was killed is refused until they have ended


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Kill scripts, start them anew, compare")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="OUT", help="folder for results.json, campaign.md and the runs")
    add("--jobs", nargs="+", choices=JOBS, default=list(JOBS), metavar="JOB", help=", ".join(JOBS))
    add("--kills", type=flags.count, default=200, help="that hit, of all jobs together, at least")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY", help=f"of killing: {', '.join(WAYS)}")
    add("--seed", type=flags.count0, default=0, help="the kills follow from it")
    return parser.parse_args(argv)


@dataclass(frozen=True)
class Whole:
    """An undisturbed run: how it ended, and what it left."""

    end: End
    left: dict[str, str]


class Campaign:
    """Jobs, their undisturbed runs and their trials, in OUT."""

    def __init__(self, out: Path, seed: int, ways: list[str]):
        self.out, self.seed, self.ways = out.resolve(), seed, ways
        self.wholes: dict[str, Whole] = {}

    def whole(self, job: Job) -> Whole:
        """The undisturbed run of a job, and first of those that it reads from; from OUT where it is there."""
        if job.name not in self.wholes:
            for name in job.needs:
                self.whole(JOBS[name])
            self.wholes[job.name] = self._read_whole(job) or self._run_whole(job)
        return self.wholes[job.name]

    def trial(self, job: Job, number: int) -> dict:
        """Kill, look, start again, and so on; then let it end, and compare. Returns what happened, for results.json."""
        whole, folder = self.whole(job), self._fresh(job)
        result = {"job": job.name, "trial": number, "kills": [], "unreadable": [], "differs": [], "failed": ""}
        before, end = descendants(os.getpid()), None
        for attempt in range(job.kills):
            plan = draw_plan((self.seed, job.name, number, attempt), whole.end, self.ways, job.own_processes)
            end = self._start(job, plan)
            result["kills"].append(as_json(plan, end))
            if not end.killed:
                break
            result["unreadable"] += ask(partial(unreadable, folder))
        if end.killed:
            end = self._start(job)
        result["seconds"] = round(end.seconds + sum(kill["cpu_seconds"] for kill in result["kills"]), 2)
        if end.status:
            result["failed"] = f"exit status {end.status}: {self._last_line(job)}"
        elif found := ask(partial(unreadable, folder)):
            result["unreadable"] += found
        else:
            result["differs"] = differences(ask(partial(outcome, folder, job.leaves)), whole.left)
        left = left_behind(before, PATIENCE_S)
        result["left_behind"] = len(left)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if passed(result):
            shutil.rmtree(folder)
        else:
            self._keep(folder, number)
        return result

    def _start(self, job: Job, plan=None) -> End:
        """One start of the job's command. Waits for a while where what a killed one had started goes on."""
        patience_ends = time.monotonic() + PATIENCE_S
        while True:
            end = run(job.argv(self._places(job)), self._folder(job), self._log(job), plan, clock=job.own_processes)
            refused = job.own_processes and end.status == 2 and BUSY in self._last_line(job)
            if not refused or time.monotonic() > patience_ends:
                return end
            time.sleep(1)

    def _run_whole(self, job: Job) -> Whole:
        folder = self._fresh(job)
        end = self._start(job)
        if end.status:
            raise UserError(f"{job.name} fails undisturbed (exit status {end.status}): {self._last_line(job)}")
        whole = Whole(end, ask(partial(outcome, folder, job.leaves)))
        kept = self.out / "undisturbed" / job.name
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        os.replace(folder, kept)
        write_json(self._whole_file(job), asdict(whole))
        return whole

    def _read_whole(self, job: Job) -> Whole | None:
        if not self._whole_file(job).is_file():
            return None
        stored = json.loads(self._whole_file(job).read_text(encoding="utf-8"))
        end = End(**{**stored["end"], "changes": tuple(stored["end"]["changes"])})
        return Whole(end, stored["left"])

    def _whole_file(self, job: Job) -> Path:
        return self.out / f"undisturbed/{job.name}.json"

    def _places(self, job: Job) -> dict[str, str]:
        return {"out": str(self._folder(job)), **{name: str(self.out / "undisturbed" / name) for name in JOBS}}

    def _folder(self, job: Job) -> Path:
        return self.out / "work" / job.name

    def _log(self, job: Job) -> Path:
        return self.out / "work" / f"{job.name}.txt"

    def _fresh(self, job: Job) -> Path:
        folder = self._folder(job)
        shutil.rmtree(folder, ignore_errors=True)
        self._log(job).unlink(missing_ok=True)
        folder.mkdir(parents=True)
        return folder

    def _last_line(self, job: Job) -> str:
        lines = self._log(job).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def _keep(self, folder: Path, number: int) -> None:
        kept = self.out / "failed" / f"{folder.name}-{number}"
        shutil.rmtree(kept, ignore_errors=True)
        kept.parent.mkdir(exist_ok=True)
        os.replace(folder, kept)


def claim(out: Path, seed: int, ways: list[str]) -> None:
    """Note in OUT what its runs follow from. UserError where those that are there are of another seed, or code."""
    path, about = out / "campaign.json", {"seed": seed, "ways": ways, "commit": git_commit()}
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in about if stored.get(name) != about[name]]
        if changed:
            differ = ", ".join(f"{name} {stored.get(name)}, not {about[name]}" for name in changed)
            raise UserError(f"{path} is of {differ}: choose another --out")
    elif (out / "undisturbed").exists():
        raise UserError(f"{out} holds runs of an unknown commit: choose another --out")
    write_json(path, about)


def read_trials(path: Path, jobs: list[str]) -> dict[str, list[dict]]:
    """The trials that are done, by job."""
    done = {name: [] for name in jobs}
    return {**done, **json.loads(path.read_text(encoding="utf-8"))["trials"]} if path.is_file() else done


def write_results(args, trials: dict[str, list[dict]]) -> None:
    """results.json and campaign.md."""
    commit = git_commit()
    everything = [trial for own in trials.values() for trial in own]
    write_json(args.out / "results.json", {
        "seed": args.seed, "ways": args.ways, "git_commit": commit, "kills": len(kills_of(everything)),
        "passed": sum(map(passed, everything)), "trials": trials,
    })  # fmt: skip
    seconds = sum(trial["seconds"] for trial in everything)
    about = {"Command": " ".join(["python scripts/fault_campaign.py", *sys.argv[1:]]), "Commit": str(commit)}
    write_text(args.out / "campaign.md", markdown(trials, about | {"CPU": f"{seconds / 60:.0f} minutes"}))


def conduct(args) -> bool:
    """Trials of all jobs in turn until there are enough kills. Returns whether all were passed."""
    claim(args.out, args.seed, args.ways)
    trials = read_trials(args.out / "results.json", args.jobs)
    campaign = Campaign(args.out, args.seed, args.ways)
    preload(MODULES)

    def count() -> int:
        return len(kills_of(trial for own in trials.values() for trial in own))

    with progress(total=args.kills, initial=count(), unit="kill") as bar:
        while count() < args.kills:
            name = min(args.jobs, key=lambda name: len(trials[name]))  # the first of those that had the fewest
            result = campaign.trial(JOBS[name], len(trials[name]))
            trials[name].append(result)
            write_results(args, trials)
            bar.update(count() - bar.n)
            if not passed(result):
                print(f"{name}, trial {result['trial']}: {result}", file=sys.stderr)
    return all(passed(trial) for own in trials.values() for trial in own)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    with only_writer(args.out, "--out"), orphans():
        good = conduct(args)
    print(f"table: {args.out / 'campaign.md'}")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
