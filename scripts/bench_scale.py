"""What grows with the data, and what more processes bring: start-up, epochs and training at 1,000 to 1,000,000 rows.

python scripts/bench_scale.py --out scale.json --threads 1
python scripts/bench_scale.py --out scale.json --rows 1000 --processes 1 2 4

The manifests are synthetic; their rows share a handful of real pictures, so that everything is loaded and nothing is
bought. Each size lives in a process of its own, because a process's peak memory never goes down. A growth exponent is
the slope of log seconds over log rows: 0 does not grow, 1 is linear. Small sizes hold constants and pull it down, so it
is also given for the two largest alone.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from models_mae import MAE_MODELS, build_mae
from util.data.augment import TrainCrop, standardize, to_unit
from util.data.batches import StepSampler
from util.data.face_crop import open_pictures
from util.data.labels import Labelled, open_labelled
from util.data.loader import TrainLoader
from util.data.manifest import MANIFEST_NAME, SCHEMA
from util.run import args as flags
from util.run.device import peak_memory_bytes, pick_device
from util.run.dist import World
from util.run.errors import UserError, cli
from util.run.log import provenance, write_json
from util.run.seed import rng_for, uniform_for
from util.training.checkpoint import save_checkpoint
from util.training.optim import decay_groups, make_optimizer

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
PICTURES, SIDE = 16, 160  # how many files there are, and their side in px
RECORDS = 1000  # that are read one by one
ROWS_PER_IDENTITY = 20
PHASES = {
    "start-up": "manifest read and checked, training rows chosen by hash, boxes",
    "held-out rows": "the validation rows of the same manifest",
    "classes": "class numbers of all rows, training, validation and test",
    "epoch's order": "every batch of an epoch named, none loaded",
    "first batch": "workers started, first batch loaded",
    "training": "a fixed number of steps",
    "checkpoint": "weights, both moments and progress written",
    "evaluation": "held-out rows put in order, their records read",
}


def make_folder(folder: Path, rows: int, seed: int) -> Path:
    """A prepared folder: `rows` faces on PICTURES noisy pictures, three to an album, a tenth of them to test on."""
    folder.mkdir(parents=True)
    rng = rng_for(seed, "pictures")
    for i in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)
    number = np.arange(rows)
    corner = rng.uniform(0, SIDE / 2, (rows, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(SIDE / 4, SIDE / 2, (rows, 2))], axis=1)
    # coprime with 10, and each identity once in each stretch of rows: none is tested or held out as a whole
    identities = number % (max(2, rows // ROWS_PER_IDENTITY) // 10 * 10 + 1)
    known = {
        "sample_id": _names("face-", number),
        "file_name": pa.array([f"{i}.jpg" for i in range(PICTURES)]).take(pa.array(number % PICTURES)),
        "identity": _names("who-", identities),
        "split": pa.array(["train", "test"]).take(pa.array((number % 10 == 9).astype(np.int8))),
        "source": _names("album-", number // 3),
        "box": pa.FixedSizeListArray.from_arrays(boxes.astype(np.float32).ravel(), 4).cast(SCHEMA.field("box").type),
    }
    columns = [known.get(field.name, pa.nulls(rows, field.type)) for field in SCHEMA]
    pq.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), folder / MANIFEST_NAME, compression="zstd")
    return folder


def _names(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pa.array(np.char.add(prefix, numbers.astype(str)))


class Clock:
    """Seconds and processor seconds of named phases of this process, and its peak memory when each ended."""

    def __init__(self):
        self.phases: dict[str, dict] = {}

    def time(self, name: str, work: Callable):
        """The result of work()."""
        wall, cpu = time.perf_counter(), time.process_time()
        result = work()
        self.phases[name] = {
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            "peak_memory_bytes": peak_memory_bytes(CPU),
        }
        return result


def measure(folder: Path, args) -> dict:
    """All phases on one folder, in this process."""
    pick_device("cpu")
    torch.manual_seed(args.seed)
    model = build_mae(args.model, args.input_size)
    optimizer = make_optimizer(decay_groups(model.named_parameters(), 0.05), 1e-4, CPU)
    before, clock = peak_memory_bytes(CPU), Clock()
    given = argparse.Namespace(
        data_path=str(folder), labels="auto", val_fraction=0.1, face_padding=0.25, nb_classes=None, label_fraction=1.0,
        seed=args.seed,
    )  # fmt: skip
    train = clock.time("start-up", lambda: open_pictures(given, "train"))
    held_out = clock.time("held-out rows", lambda: open_pictures(given, "val"))
    clock.time("epoch's order", lambda: _name_all(len(train), args))
    crop = TrainCrop((args.input_size, args.input_size))
    loader = TrainLoader(
        train, crop, batch_size=args.batch_size, accum_iter=1, seed=args.seed, world=World(),
        num_workers=args.num_workers, device=CPU,
    )  # fmt: skip
    batches = loader.enter(0, 0)
    try:
        first = clock.time("first batch", lambda: next(batches))
        _step(model, optimizer, first, args)  # loads libraries, and is not timed
        clock.time("training", lambda: [_step(model, optimizer, next(batches), args) for _ in range(args.steps)])
    finally:
        loader.close()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "progress": {"data": train.fingerprint}}
    clock.time("checkpoint", lambda: save_checkpoint(folder / "checkpoint-last.pth", state))
    clock.time("evaluation", lambda: _read_held_out(held_out, args))
    task = clock.time("classes", lambda: _all_labels(given))
    return {
        "rows": len(task.train) + len(task.val) + len(task.test),
        "phases": clock.phases,
        "images_per_s": args.steps * args.batch_size / clock.phases["training"]["seconds"],
        "record_us": _record_microseconds(train),
        "sent_to_a_spawned_worker_bytes": len(pickle.dumps(train)),
        "classes": len(task.classes),
        "fingerprint": train.fingerprint,
        "peak_memory_bytes_before": before,
        "peak_memory_bytes": peak_memory_bytes(CPU),
    }


def _name_all(images: int, args) -> int:
    return sum(len(batch) for batch in StepSampler(images, args.batch_size, 1, args.seed, World()))


def _step(model, optimizer, batch: dict, args) -> None:
    images = standardize(to_unit(batch["image"]))
    noise = uniform_for(args.seed, batch["epoch"], batch["index"], model.num_patches(images))
    model(images, 0.75, noise, 1.0).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _read_held_out(source, args) -> None:
    order = rng_for(args.seed, "held out").permutation(len(source)).tolist()
    for i in order[:RECORDS]:
        source.record(i)


def _all_labels(given) -> Labelled:
    task = open_labelled(given)
    for source in (task.train, task.val, task.test):
        task.labels(source)
    return task


def _record_microseconds(source) -> float:
    count, started = min(RECORDS, len(source)), time.perf_counter()
    for i in range(count):
        dict(source.record(i))
    return (time.perf_counter() - started) / count * 1e6


def exponents(sizes: list[dict]) -> dict[str, float]:
    """Of each phase, the slope of log seconds over log rows, by least squares."""
    rows = np.log([size["rows"] for size in sizes])
    return {
        name: float(np.polyfit(rows, np.log([max(size["phases"][name]["seconds"], 1e-9) for size in sizes]), 1)[0])
        for name in PHASES
    }


def run_size(folder: Path, argv: list[str]) -> dict:
    """`measure` in a process of its own."""
    # a shell in between, because Linux hands the peak of a process on to what it executes
    program = [sys.executable, str(Path(__file__).resolve()), *argv, "--serve", str(folder)]
    done = subprocess.run(["sh", "-c", '"$@"; exit $?', "sh", *program], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"{folder.name} rows ended with status {done.returncode}: see its words above")
    return json.loads(done.stdout.splitlines()[-1])


def run_processes(folder: Path, scratch: Path, processes: int, threads: int, args) -> float:
    """Images/s of main_pretrain.py in several processes with so many threads each; the same images per step."""
    out = scratch / f"run-{processes}x{threads}"
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command = [
        *start, "main_pretrain.py", "--data_path", folder, "--output_dir", out, "--model", args.model,
        "--input_size", args.input_size, "--batch_size", max(1, args.process_batch // processes),
        "--max_steps", args.steps, "--epochs", 1000, "--eval_images", 0, "--num_workers", 0, "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True,
        text=True,
    )  # fmt: skip
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"main_pretrain.py in {processes} processes ended with status {done.returncode}: {last}")
    return json.loads((out / "results.json").read_text())["images_per_s"]


def scale_processes(folder: Path, scratch: Path, args) -> dict:
    """Images/s and efficiency of each number of processes: the same threads in total, and one thread each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total = args.threads or cores
    counts = list(dict.fromkeys([1, *args.processes]))
    same = {n: run_processes(folder, scratch, n, max(1, total // n), args) for n in counts}
    single = {n: same[n] if total // n <= 1 else run_processes(folder, scratch, n, 1, args) for n in counts}
    return {
        "cores": cores,
        "images_per_step": args.process_batch,
        "same_threads": {
            str(n): {"threads_each": max(1, total // n), "images_per_s": same[n], "efficiency": same[n] / same[1]}
            for n in counts
        },
        # more processes than cores cannot be faster: then cores / n is the most there is
        "one_thread_each": {
            str(n): {"images_per_s": single[n], "efficiency": single[n] / (min(n, cores) * single[1])} for n in counts
        },
    }


def table(result: dict) -> str:
    """The result as Markdown tables."""
    lines = []
    if sizes := result["sizes"]:
        heads = [f"{size['rows']:,}" for size in sizes]
        lines += ["| rows | " + " | ".join(heads) + " | growth | at the end |", "|" + "---|" * (len(sizes) + 3)]
        for name in PHASES:
            times = " | ".join(f"{size['phases'][name]['seconds']:.3f} s" for size in sizes)
            fits = [result[key][name] for key in ("exponents", "exponents_of_the_two_largest") if key in result]
            lines.append(f"| {name} | {times} | " + " | ".join(f"{fit:.2f}" for fit in fits) + " |")
        for name, unit, scale in (
            ("peak_memory_bytes", "MiB", 2**20),
            ("sent_to_a_spawned_worker_bytes", "MiB", 2**20),
            ("record_us", "us", 1),
            ("images_per_s", "images/s", 1),
        ):
            lines.append(f"| {name} | " + " | ".join(f"{size[name] / scale:,.1f} {unit}" for size in sizes) + " | | |")
    if found := result.get("processes"):
        lines += ["", f"{found['cores']} cores, {found['images_per_step']} images per step", ""]
        lines += ["| processes | same threads in total | efficiency | one thread each | efficiency |", "|" + "---|" * 5]
        for n, same in found["same_threads"].items():
            one = found["one_thread_each"][n]
            lines.append(
                f"| {n} | {same['images_per_s']:.1f} images/s | {same['efficiency']:.0%} | "
                f"{one['images_per_s']:.1f} images/s | {one['efficiency']:.0%} of {min(int(n), found['cores'])} cores |"
            )
    return "\n".join(lines)


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Start-up, epochs and training against the size of the data and the number of processes")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    add("--rows", type=flags.count, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], help="sizes, in rows")
    add("--processes", type=flags.count, nargs="*", default=[], metavar="N", help="numbers of processes to compare")
    add("--model", choices=MAE_MODELS, default="mae_vit_nano_patch16", metavar="NAME", help="what is trained")
    add("--input_size", type=flags.count, default=96, help="side of the square images, px")
    add("--batch_size", type=flags.count, default=16, help="images per step")
    add("--steps", type=flags.count, default=24, help="timed training steps")
    add("--process_batch", type=flags.count, default=64, help="images per step of all processes together")
    add("--num_workers", type=flags.count0, default=2, help="processes that decode images; 0 = in the main one")
    add("--threads", type=flags.count0, default=0, help="CPU threads; 0: as torch chooses")
    add("--seed", type=flags.count0, default=0, help="of the manifests, weights and order")
    add("--serve", type=Path, default=None, metavar="DIR", help="measure one folder (this script calls it so)")
    args = parser.parse_args(argv)
    if min(args.rows) * 0.8 < args.batch_size:
        raise UserError(f"--rows {min(args.rows)} are too few for batches of {args.batch_size}: give more")
    return args


@cli
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = get_args(argv)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    if args.threads:
        pa.set_cpu_count(args.threads)
    if args.serve:
        print(json.dumps(measure(args.serve, args)), flush=True)
        return
    started, sizes = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as scratch:
        for rows in sorted(set(args.rows)):
            folder = make_folder(Path(scratch) / str(rows), rows, args.seed)
            sizes.append(run_size(folder, argv))
        result = {"sizes": sizes, "what": PHASES}
        if len(sizes) > 1:
            result["exponents"] = exponents(sizes)
            result["exponents_of_the_two_largest"] = exponents(sizes[-2:])
        if args.processes:
            result["processes"] = scale_processes(folder, Path(scratch), args)
    result["provenance"] = provenance({**vars(args), "out": str(args.out)}, CPU, sizes[-1]["fingerprint"])
    result["wall_seconds"] = time.perf_counter() - started
    write_json(args.out, result)
    print(table(result))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
