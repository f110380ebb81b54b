"""A long run of a tiny model, watched from outside: is its memory flat, are its files, its logs and its speed?

python scripts/long_run.py --out OUT --steps 100000
python scripts/long_run.py --out OUT --steps 100000 --num_workers 2 --epoch_steps 20      # 5,000 short epochs
python scripts/long_run.py --out OUT --data stream --num_workers 2 --epoch_steps 20       # workers anew in each epoch

It starts main_pretrain.py itself and reads /proc at the ends of epochs: memory of the process and its workers, open
files, threads, processes, processor time, sizes of what is written. One picture of the data is damaged. Stopped, the
same command goes on. OUT/results.json and OUT/long_run.png hold the verdicts; status 1 unless all are "flat" and
"equal". Speed is processor time per step, in windows that other work on the machine left alone.
"""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from util.benchmark.figure_style import GREY, finish, line_style, new_figure
from util.benchmark.steadiness import EQUAL, FLAT, judge_growth, judge_speed, settled
from util.data.manifest import write_manifest
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.files import cut_to_whole_lines, only_writer
from util.run.log import progress, provenance, write_json
from util.run.process_tree import usage
from util.run.seed import rng_for

ROOT = Path(__file__).resolve().parents[1]
PICTURES, SIDE = 16, 24  # files that rows share, and their side in px
SHARDS = 4  # of a stream
HELD_OUT = 8  # rows
EVALUATIONS = 50  # in the run, at most
POLL_S = 0.02
LEAST_SHARE = 0.8  # of the processor time that a second usually holds: below it, other work disturbs
WARM_UP = 0.1  # share of a process's readings that no trend counts
HOLDS = ("memory", "handles", "threads", "children")
WRITES = ("log.txt", "events", "bad_images.jsonl", "files")
# gain over the whole run that still counts as flat; of memory and logs it depends on the flags (`bounds`)
SPARE = {"handles": 2, "threads": 2, "children": 1, "bad_images.jsonl": 1, "files": 1}
LINE_BYTES = 1024  # of log.txt, for an epoch
SCALAR_BYTES = 512  # of TensorBoard, for a reading of the loss
SHEET_BYTES = 200_000  # the same, for the picture of an evaluation


def encoded(number: int) -> bytes:
    """A noisy picture as PNG; the first one is damaged."""
    pixels = rng_for("long run", number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()[: 100 if number == 0 else None]


def make_data(folder: Path, images: int, kind: str) -> str:
    """Write `images` training rows on a few pictures; what to give as --data_path. The first row's is damaged."""
    folder.mkdir(parents=True, exist_ok=True)
    picture_of = [0, *(1 + i % (PICTURES - 1) for i in range(images - 1))]
    if kind == "stream":
        for shard in range(SHARDS):
            cells = [{"bytes": encoded(number), "path": None} for number in picture_of[shard::SHARDS]]
            pq.write_table(pa.table({"image": cells}), folder / f"train-{shard:05d}-of-{SHARDS:05d}.parquet")
        return f"hf:{folder}"
    for number in range(PICTURES):
        (folder / f"{number}.png").write_bytes(encoded(number))
    rows = [("train", number) for number in picture_of] + [("val", 1)] * HELD_OUT
    write_manifest(folder, [
        {"sample_id": str(i), "file_name": f"{number}.png", "split": split} for i, (split, number) in enumerate(rows)
    ])  # fmt: skip
    return str(folder)


def command(args, data: str) -> list[str]:
    """main_pretrain.py as it is watched."""
    epochs = args.steps // args.epoch_steps
    flags_given = {
        "data_path": data, "output_dir": args.out / "run", "model": args.model, "input_size": args.input_size,
        "batch_size": args.batch_size, "epochs": epochs, "warmup_epochs": min(1, epochs - 1), "resume": "auto",
        "num_workers": args.num_workers, "eval_images": HELD_OUT, "eval_every": max(1, epochs // EVALUATIONS),
        "log_every": args.log_every, "max_bad": 1, "device": "cpu", "precision": "fp32", "seed": args.seed,
    }  # fmt: skip
    if args.data == "stream":
        flags_given |= {"epoch_images": args.batch_size * args.epoch_steps}
    words = [word for name, value in flags_given.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "main_pretrain.py", *words, *(["--streaming"] if args.data == "stream" else [])]


def last_step(log: Path) -> int:
    """The optimizer steps that the last whole line of log.txt speaks of; 0 without one."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - 4096))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["global_step"] if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


def written(run: Path) -> dict[str, int]:
    """Bytes of each log of a run, and the number of its files."""
    sizes: dict[str, int] = {}
    for file in run.iterdir():
        with contextlib.suppress(FileNotFoundError):  # a temporary one, put in place meanwhile
            sizes[file.name] = file.stat().st_size
    events = sum(size for name, size in sizes.items() if name.startswith("events.out"))
    whole = [name for name in sizes if not name.endswith(".tmp")]
    logs = {name: sizes.get(name, 0) for name in ("log.txt", "bad_images.jsonl")}
    return {**logs, "events": events, "files": len(whole), "folder": sum(sizes.values())}


def reading(pid: int, run: Path, step: int, segment: int) -> dict:
    """One line of samples.jsonl."""
    held = usage(pid)
    return {
        "segment": segment, "step": step, "clock": time.time(), "cpu_seconds": held.cpu_seconds,
        "memory": held.memory, "resident": held.resident, "handles": held.handles, "threads": held.threads,
        "children": held.children, **written(run),
    }  # fmt: skip


def read_samples(path: Path) -> list[dict]:
    """The lines of samples.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def watch(args, data: str) -> None:
    """Start the run, or go on with it, and write a reading every so many steps until it is done."""
    path, run = args.out / "samples.jsonl", args.out / "run"
    every = max(args.steps // args.readings, args.epoch_steps)
    with open(args.out / "output.txt", "a") as output, open(path, "a+b") as samples:
        cut_to_whole_lines(samples)
        before = read_samples(path)
        segment = before[-1]["segment"] + 1 if before else 0
        child = subprocess.Popen(
            command(args, data), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output
        )
        try:
            for step in epoch_ends(child, run / "log.txt", every, args.steps):
                with contextlib.suppress(ProcessLookupError):
                    samples.write(json.dumps(reading(child.pid, run, step, segment)).encode() + b"\n")
                    samples.flush()
        finally:
            if child.poll() is None:
                child.terminate()  # it saves, and can be resumed
            status = child.wait()
    if status:
        raise UserError(f"main_pretrain.py ended with status {status}: see {args.out / 'output.txt'}")


def epoch_ends(child: subprocess.Popen, log: Path, every: int, steps: int) -> Iterator[int]:
    """The steps done, at the first end of an epoch after each `every` steps, while the child trains."""
    done = last_step(log)
    due = done + every
    with progress(total=steps, unit="step", initial=done) as bar:
        while child.poll() is None:
            time.sleep(POLL_S)
            if due <= (step := last_step(log)) < steps:  # after the last one it is busy with its results
                bar.update(step - done)
                done, due = step, step - step % every + every
                yield step


def bounds(args) -> dict[str, float]:
    """What each quantity may gain over the whole run."""
    epochs = args.steps // args.epoch_steps
    events = SCALAR_BYTES * args.steps / args.log_every + SHEET_BYTES * (EVALUATIONS + 1)
    return SPARE | {"memory": args.leak_bytes * args.steps, "log.txt": LINE_BYTES * epochs, "events": events}


def windows(samples: list[dict]) -> list[tuple[int, float, float]]:
    """Between neighbouring readings of one process: (step at the end, processor seconds per step, those per second)."""
    found = []
    for other, one in pairwise(samples):
        if other["segment"] == one["segment"] and one["step"] > other["step"]:
            spent = one["cpu_seconds"] - other["cpu_seconds"]
            found.append((one["step"], spent / (one["step"] - other["step"]), spent / (one["clock"] - other["clock"])))
    return found


def undisturbed(found: list[tuple[int, float, float]]) -> list[float]:
    """Seconds per step of the windows in which the run had its processors nearly to itself.

    Taken away and given back all the time, it finds its caches cold: the same step then takes a third more.
    """
    usual = np.quantile([share for *_, share in found], 0.9) if found else 0
    return [cost for _, cost, share in found if share >= LEAST_SHARE * usual]


def judge(samples: list[dict], args) -> dict:
    """The verdict on each quantity, and on the speed."""
    late = settled([sample["segment"] for sample in samples], WARM_UP)
    kept = [sample for sample, is_late in zip(samples, late, strict=True) if is_late]
    steps, segments = ([sample[name] for sample in kept] for name in ("step", "segment"))
    limits = bounds(args)
    try:
        found = {
            name: judge_growth(steps, [s[name] for s in kept], segments, bound=limits[name], over=args.steps)
            for name in (*HOLDS, *WRITES)
        }
        found["cpu seconds per step"] = judge_speed(undisturbed(windows(kept)), seed=args.seed)
    except ValueError as error:
        raise UserError(f"{args.out}: {error}: give more --steps, or more --readings") from error
    return found


def passed(verdicts: dict) -> bool:
    """Whether nothing grows and the speed stays."""
    return all(found["verdict"] in (FLAT, EQUAL) for found in verdicts.values())


def table(verdicts: dict) -> str:
    """The verdicts as Markdown."""
    lines = ["| quantity | level | gain over the run | 95 % interval | bound | verdict |", "|" + "---|" * 6]
    for name, found in verdicts.items():
        if "gain" in found:
            low, high = found["gain_ci95"]
            cells = (f"{found['level']:,.0f}", f"{found['gain']:,.0f}", f"{low:,.0f} to {high:,.0f}",
                     f"{found['bound']:,.0f}")  # fmt: skip
        else:
            low, high = found["ratio_ci95"]
            cells = (f"{1e3 * found['first']:.2f} ms", f"x {found['ratio']:.3f}", f"{low:.3f} to {high:.3f}",
                     f"1 +- {found['tolerance']:g}")  # fmt: skip
        lines.append("| " + " | ".join((name, *cells, found["verdict"])) + " |")
    return "\n".join(lines)


def draw(samples: list[dict], args) -> None:
    """Memory, what is open, speed and what is written, over the steps."""
    from matplotlib.ticker import MaxNLocator  # slow to import

    figure, axes = new_figure(2, rows=2, height=5.6)
    steps = np.array([sample["step"] for sample in samples])
    panels = (
        ("memory of all processes, MiB", {"memory": 2**20}),
        ("open", {"handles": 1, "threads": 1, "children": 1}),
        ("written, kB", {"log.txt": 1e3, "events": 1e3, "bad_images.jsonl": 1e3}),
    )
    for each, (title, names) in zip((axes[0, 0], axes[0, 1], axes[1, 1]), panels, strict=True):
        for number, (name, unit) in enumerate(names.items()):
            values = np.array([sample[name] for sample in samples]) / unit
            each.plot(steps, values, label=name, **line_style(number))
        each.set_title(title, fontsize=10, loc="left")
        each.set_ylim(0, 1.35 * each.get_ylim()[1])  # the legend lies above the lines
        if len(names) > 1:
            each.legend(fontsize=8, frameon=False, loc="upper left", ncols=3, columnspacing=1, handlelength=1.5)
    ends, costs, _ = zip(*windows(samples), strict=True)
    axes[1, 0].plot(ends, 1e3 * np.array(costs), **line_style(0))
    axes[1, 0].set_title("processor time per step, ms", fontsize=10, loc="left")
    axes[1, 0].set_ylim(bottom=0)
    starts = [one["step"] for other, one in pairwise(samples) if one["segment"] > other["segment"]]
    for each in axes.flat:
        each.set_xlabel("optimizer steps", fontsize=9)
        each.xaxis.set_major_locator(MaxNLocator(4))
        each.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        for start in starts:
            each.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
    title = f"{args.steps:,} steps in epochs of {args.epoch_steps}, {args.num_workers} workers"
    finish(figure, title, args.out / "long_run.png")


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Whether a long run stays as it is: memory, open files, logs, speed")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the run, the readings and the verdicts")
    add("--steps", type=flags.count, default=100_000, help="optimizer steps; cut to whole epochs")
    add("--epoch_steps", type=flags.count, default=500, help="optimizer steps in an epoch")
    add("--data", choices=("folder", "stream"), default="folder", help="prepared folder, or shards that are streamed")
    add("--num_workers", type=flags.count0, default=0, help="processes that decode images; 0 = in the main one")
    add("--model", default="mae_vit_nano_patch8", metavar="NAME", help="what is trained")
    add("--input_size", type=flags.count, default=16, help="side of the square images, px")
    add("--batch_size", type=flags.count, default=4, help="images per step")
    add("--log_every", type=flags.count, default=20, help="steps between readings of the loss")
    add("--readings", type=flags.count, default=400, help="of the process, over the run; fewer than 120 decide nothing")
    add("--leak_bytes", type=flags.rate, default=256.0, help="growth of memory that counts as a leak, bytes per step")
    add("--seed", type=flags.count0, default=0, help="of the run")
    args = parser.parse_args(argv)
    if args.steps < 2 * args.epoch_steps:
        raise UserError(
            f"--steps {args.steps} are not two epochs of --epoch_steps {args.epoch_steps}: lower the latter"
        )
    return args


def conclude(args) -> None:
    """Judge the readings, draw them, write it all down; exit status 1 where something grows."""
    samples = read_samples(args.out / "samples.jsonl")
    verdicts = judge(samples, args)
    draw(samples, args)
    # a reading's processor time is of its process so far: the last of each is nearly all of it
    last = {sample["segment"]: sample["cpu_seconds"] for sample in samples}
    write_json(args.out / "results.json", {
        "passed": passed(verdicts), "verdicts": verdicts, "readings": len(samples), "processes": len(last),
        "undisturbed_windows": len(undisturbed(windows(samples))),
        "cpu_seconds": sum(last.values()),
        **provenance({**vars(args), "out": str(args.out)}, torch.device("cpu")),
    })  # fmt: skip
    print(table(verdicts))
    print(f"{sum(last.values()) / 60:.1f} minutes of processor time; written to {args.out}")
    if not passed(verdicts):
        sys.exit(1)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    args.steps -= args.steps % args.epoch_steps
    args.out = args.out.resolve()
    # stopped by its user or by the machine, it ends the run it has started, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with only_writer(args.out, "--out"):
        data = make_data(args.out / "data", args.batch_size * args.epoch_steps, args.data)
        watch(args, data)
        conclude(args)


if __name__ == "__main__":
    main()
