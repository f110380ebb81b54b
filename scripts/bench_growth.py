"""What a hundred million images would cost: each part at growing sizes, a power law through them, and what it says.

python scripts/bench_growth.py --out growth.json --figure growth.png
python scripts/bench_growth.py --out growth.json --parts manifest pack --rows 10000 100000 1000000 10000000

Each part and size is measured in a process of its own, with one thread: processor seconds, memory at the peak, memory
that is kept, bytes on disk. What was measured already is read from --out, so a stopped run goes on, and sizes can be
added later. Parts that grow with the square of the rows are measured up to what takes a minute.
"""

import gc
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa
import torch

from scripts.bench_protocols import make_embeddings, make_labels
from scripts.bench_scale import ROWS_PER_IDENTITY, make_folder
from util.benchmark.figure_style import GREY, finish, line_style, new_figure
from util.benchmark.growth import PowerLaw, power_law
from util.data import pack
from util.data.augment import TrainCrop
from util.data.batches import StepSampler
from util.data.loader import TrainLoader
from util.data.manifest import read_manifest
from util.data.pack_journal import CHUNK, Journal
from util.data.pack_origin import Origin
from util.data.packed import PackedFile, PackedSource, end_of_pixels
from util.data.phash import Hashes, near_pairs
from util.data.sources import FolderSource, open_source, split_key_column
from util.run import args as flags
from util.run.device import peak_memory_bytes
from util.run.dist import World
from util.run.errors import UserError, cli
from util.run.log import RunFolder, progress, provenance, write_json
from util.run.process_tree import descendants, memory
from util.run.seed import rng_for
from util.training.faults import BadImages

CPU = torch.device("cpu")
DIM = 64  # numbers in an embedding: what grows with the rows does not depend on it
PAIRS = 100_000  # of two identities, whatever the rows
RANKS, BATCH = 64, 64
WARM_UP_ROWS = 1000
METER_BYTES = 20e6  # of memory, which a process takes and gives back by itself: below it nothing can be said
LAID_OUT = (10**7, 10**8)  # rows at which "order" is measured too: it is quick, and lays out no table beyond 2**24


class Meter:
    """Costs of this process by name: {"name: what": (value, unit)}."""

    def __init__(self):
        self.costs: dict[str, tuple[float, str]] = {}

    @contextmanager
    def phase(self, name: str, keeps: bool = False):
        """Processor seconds of the block, and memory above what was held before: at its peak, files that are mapped
        included, and, where it `keeps` something, after it, files not included."""
        _forget_peak()
        before, started = memory(os.getpid()), time.process_time()
        yield
        self.costs[f"{name}: time"] = (time.process_time() - started, "s")
        peak = peak_memory_bytes(CPU) - before["Rss"]
        _release()
        kept = memory(os.getpid())["Anonymous"] - before["Anonymous"]
        self.costs[f"{name}: memory at the peak"] = (max(peak, 1), "bytes")
        if keeps:
            self.costs[f"{name}: memory kept"] = (max(kept, 1), "bytes")

    def note(self, name: str, size: float) -> None:
        """Bytes of something."""
        self.costs[name] = (size, "bytes")


def _forget_peak() -> None:
    _release()
    with suppress(OSError):  # where the kernel lets nobody: the peak is that of the whole process then
        Path("/proc/self/clear_refs").write_text("5")


def _release() -> None:
    gc.collect()
    pa.default_memory_pool().release_unused()


# --- parts: each measures `rows` in this process --------------------------------------------------------------------


def manifest(meter: Meter, rows: int, scratch: Path) -> None:
    """A prepared folder opened for training, the training rows chosen by hash."""
    folder = make_folder(scratch / "data", rows, 0)
    meter.note("manifest on disk", (folder / "metadata.parquet").stat().st_size)
    with meter.phase("manifest opened", keeps=True):
        source = open_source(folder, "train")
    assert len(source) > rows / 2


def pack_index(meter: Meter, rows: int, scratch: Path) -> None:
    """All of a packing but the pictures: its journal, its end, and the file opened. A canvas is one pixel here."""
    found = read_manifest(make_folder(scratch / "data", rows, 0))
    source = FolderSource("data", found)
    origin = Origin(source, found.table, split_key_column(found.table), "metadata")
    plan = {"samples": rows, "canvas": 1, "chunk": CHUNK, "labels": "metadata"}
    with Journal(scratch / "p", plan, end_of_pixels(rows, 1), False) as journal:
        with meter.phase("packing, journal"):
            for chunk in range(-(-rows // CHUNK)):
                size = min(CHUNK, rows - chunk * CHUNK)
                facts = [[i, chunk % 100, 1000 + i, 1000 + chunk % 100, 1200, 1600] for i in range(size)]
                journal.add({"chunk": chunk, "checksum": f"{chunk:032x}", "rows": facts})
        meter.note("packing, journal on disk", journal.path.stat().st_size)
        with meter.phase("packing, end"):
            pack.finish(origin, journal)
    meter.note("pack on disk, but for the pixels", (scratch / "p").stat().st_size - 3 * rows)
    del origin, source, found
    with meter.phase("pack opened", keeps=True):
        packed = PackedSource("p", PackedFile(scratch / "p"))
    assert len(packed) == rows


def order(meter: Meter, rows: int, scratch: Path) -> None:
    """A process of 64 enters an epoch in its middle: the first batch is named."""
    sampler = StepSampler(max(rows, RANKS * BATCH), BATCH, 1, 0, World(RANKS - 1, 0, RANKS))
    with meter.phase("epoch entered"):
        sampler.enter(3, sampler.steps // 2)
        assert len(next(iter(sampler))) == BATCH


def workers(meter: Meter, rows: int, scratch: Path) -> None:
    """What a worker process takes for itself after some batches."""
    source = open_source(make_folder(scratch / "data", rows, 0), "train")
    loader = TrainLoader(
        source, TrainCrop((64, 64)), batch_size=16, accum_iter=1, seed=0, world=World(), num_workers=2, device=CPU
    )
    try:
        with meter.phase("workers started"):
            batches = loader.enter(0, 0)
            next(batches)
        for _ in range(min(40, loader.steps - 9)):
            next(batches)
        children = []
        for pid in descendants(os.getpid()):
            with suppress(ProcessLookupError, FileNotFoundError):  # one that helped to start them may end
                children.append(memory(pid))
        own = [found["Private_Clean"] + found["Private_Dirty"] for found in children]
        meter.note("a worker's own memory", max(own))
    finally:
        loader.close()


def damaged(meter: Meter, rows: int, scratch: Path) -> None:
    """A hundredth of the images is damaged: what a checkpoint then does about the list."""
    bad = BadImages(RunFolder(str(scratch), is_main=True), rows, 1.0, resumed=False)
    for i in range(max(1, rows // 100)):
        bad.add((i, f"folder/{i:012d}.jpg", "image file is truncated"))
    with meter.phase("damaged images listed"):
        bad.merge(World())
    meter.note("list of damaged images", (scratch / "bad_images.jsonl").stat().st_size)


def _embedded(rows: int) -> tuple[np.ndarray, np.ndarray, int]:
    identities = max(2, rows // ROWS_PER_IDENTITY)
    labels = make_labels(rows, identities, 0)
    return make_embeddings(labels, identities, DIM, 0), labels, identities


def verification(meter: Meter, rows: int, scratch: Path) -> None:
    """A seeded list of pairs, 100,000 of them negative."""
    from util.benchmark.pairs import pair_scores, sample_pairs
    from util.benchmark.verification import verification_report

    embeddings, labels, _ = _embedded(rows)
    with meter.phase("verification, sampled pairs"):
        pairs = sample_pairs(labels, seed=0, positives_per_identity=5, negatives=PAIRS)
        scores = pair_scores(embeddings, pairs.a, pairs.b)
        verification_report(scores, pairs.same, labels[pairs.a], labels[pairs.b], replicates=10, seed=0)


def all_pairs(meter: Meter, rows: int, scratch: Path) -> None:
    """Every pair there is."""
    from util.benchmark.all_pairs import all_pairs_report

    embeddings, labels, _ = _embedded(rows)
    with meter.phase("verification, all pairs"):
        all_pairs_report(embeddings, labels, replicates=10)


def open_set(meter: Meter, rows: int, scratch: Path) -> None:
    """Half of the probes are unknown; their scores are there."""
    from util.benchmark.open_set import open_set_report

    half, rng = rows // 2, rng_for(0, "open set")
    scores, groups = rng.normal(0, 1, (2, half)), rng.integers(0, max(2, rows // ROWS_PER_IDENTITY), (2, half))
    with meter.phase("open set"):
        open_set_report(scores[0] + 1, rng.random(half) < 0.9, scores[1], groups[0], groups[1], replicates=10)


def identification(meter: Meter, rows: int, scratch: Path) -> None:
    """Every image against the centres of all identities, a twentieth of the rows."""
    from util.benchmark.identification import class_centres, nearest_classes

    embeddings, labels, identities = _embedded(rows)
    with meter.phase("identification"):
        nearest_classes(embeddings, class_centres(embeddings, labels, identities), 5)


def retrieval(meter: Meter, rows: int, scratch: Path) -> None:
    """Every image against all others, sorted."""
    from util.benchmark.retrieval import retrieval_ranks

    embeddings, labels, _ = _embedded(rows)
    with meter.phase("retrieval"):
        retrieval_ranks(embeddings, labels, embeddings, labels, same_set=True)


def near_duplicates(meter: Meter, rows: int, scratch: Path) -> None:
    """Hashes within 4 bits of each other, mirrored too; every tenth picture has a near-copy."""
    codes = rng_for(0, "hashes").integers(0, 2**64, (2, rows), dtype=np.uint64)
    copies = rows // 10
    codes[0, -copies:] = codes[0, :copies] ^ np.uint64(5)
    hashes = Hashes(codes[0], codes[1], codes[0], np.zeros(rows, bool), [])
    with meter.phase("near-duplicates"):
        found = near_pairs(hashes, 4)
    assert len(found.a) >= copies


# part -> what measures it, and the most rows that take about a minute or two gigabytes
PARTS: dict[str, tuple[Callable, int]] = {
    "manifest": (manifest, 10**8),
    "pack": (pack_index, 10**8),
    "order": (order, 10**12),
    "workers": (workers, 10**7),
    "damaged": (damaged, 10**8),
    "verification": (verification, 10**7),
    "all_pairs": (all_pairs, 30_000),
    "open_set": (open_set, 10**7),
    "identification": (identification, 100_000),
    "retrieval": (retrieval, 10_000),
    "near_duplicates": (near_duplicates, 10**7),
}


# --- all of them ----------------------------------------------------------------------------------------------------


def sizes_of(part: str, rows: list[int]) -> list[int]:
    """The sizes a part is measured at: those asked for, or as many that take no longer than a minute."""
    most = PARTS[part][1]
    if part == "order":
        return sorted({*rows, *LAID_OUT})
    if max(rows) <= most:
        return sorted(set(rows))
    fitting = [size for size in rows if size <= most]
    if len(fitting) >= 3:
        return sorted(set(fitting))
    return [most // 3**power for power in range(min(3, len(rows)))][::-1]


def measure(part: str, rows: int) -> dict[str, tuple[float, str]]:
    """The costs of a part at a size, in this process."""
    torch.set_num_threads(1)
    pa.set_cpu_count(1)
    for size in (min(rows, WARM_UP_ROWS), rows):  # the first one loads what is loaded once, and is forgotten
        meter = Meter()
        with tempfile.TemporaryDirectory() as scratch:
            PARTS[part][0](meter, size, Path(scratch))
    return meter.costs


def measure_apart(part: str, rows: int) -> dict[str, list]:
    """`measure` in a process of its own, forked: the libraries are loaded already."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=lambda: theirs.send(measure(part, rows)))
    process.start()
    theirs.close()
    try:
        return ours.recv()
    except EOFError as error:
        process.join()
        raise UserError(f"{part} at {rows} rows ended with status {process.exitcode}: see its words above") from error
    finally:
        process.join()


def laws(measured: dict[str, dict[str, dict]]) -> dict[str, tuple[PowerLaw, str]]:
    """Cost -> its power law and its unit."""
    found = {}
    for part in measured.values():
        for name in dict.fromkeys(name for costs in part.values() for name in costs):
            points = {int(rows): costs[name] for rows, costs in part.items() if name in costs}
            if len(points) > 1:
                found[name] = (power_law(list(points), [max(value, 1e-6) for value, _ in points.values()]),
                               next(iter(points.values()))[1])  # fmt: skip
    return found


def quantity(value: float, unit: str) -> str:
    """Seconds or bytes in words."""
    steps = ((1e-3, "us", 1e6), (1, "ms", 1e3), (120, "s", 1), (7200, "min", 1 / 60), (172_800, "h", 1 / 3600),
             (6.3e7, "days", 1 / 86_400), (np.inf, "years", 1 / 31_557_600))  # fmt: skip
    if unit == "bytes":
        steps = ((1e3, "B", 1), (1e6, "kB", 1e-3), (1e9, "MB", 1e-6), (1e12, "GB", 1e-9), (np.inf, "TB", 1e-12))
    name, scale = next((name, scale) for limit, name, scale in steps if value < limit)
    return f"{value * scale:,.3g} {name}" if value * scale < 1000 else f"{value * scale:,.0f} {name}"


def table(measured: dict, target: int) -> str:
    """What was measured at the largest size, the exponents, and what they say of `target` rows, as Markdown."""
    head = f"| cost | largest size | measured | exponent | 95 % | at the end | off the line | at {target:,} |"
    lines = [head, "|" + "---|" * 8]
    for name, (law, unit) in laws(measured).items():
        low, high = (quantity(value, unit) for value in law.at(target))
        reach = low if low == high or law.largest >= target else f"{low} to {high}"
        ends = "" if np.isinf(law.low) else f"{law.low:.2f} to {law.high:.2f}"
        lines.append(
            f"| {name} | {law.largest:,.0f} | {quantity(law.value, unit)} | {law.exponent:.2f} | {ends} "
            f"| {law.end:.2f} | {law.residual - 1:.0%} | {reach} |"
        )
    return "\n".join(lines)


def is_drawn(law: PowerLaw, unit: str) -> bool:
    """Whether a law is more than the noise of memory, and says something: no size lies twice off its line."""
    return law.residual < 2 and (unit != "bytes" or law.value > METER_BYTES)


def draw(measured: dict, target: int, path: Path) -> None:
    """Times and bytes over rows, both logarithmic, the lines drawn on to `target`."""
    figure, axes = new_figure(2, height=6.4)
    chosen = {name: law for name, law in laws(measured).items() if is_drawn(*law)}
    for each, unit in zip(axes, ("s", "bytes"), strict=True):
        names = [name for name, (_, its) in chosen.items() if its == unit]
        for number, name in enumerate(names):
            law, style = chosen[name][0], line_style(number)
            points = sorted(
                (int(rows), costs[name][0])
                for part in measured.values()
                for rows, costs in part.items()
                if name in costs
            )
            each.plot(*zip(*points, strict=True), "o", color=style["color"], markersize=4)
            reach = np.geomspace(points[0][0], max(target, points[-1][0]), 20)
            line = law.factor * reach**law.exponent
            each.plot(reach, line, label=name.removesuffix(": time"), **{**style, "linewidth": 1.2})
        each.set_xscale("log")
        each.set_yscale("log")
        each.axvline(target, color=GREY, linewidth=0.8)
        each.set_xlabel("rows")
        each.set_title({"s": "processor time, s", "bytes": "bytes"}[unit], fontsize=10, loc="left")
        each.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=1)
    finish(figure, f"Measured, and drawn on to {target:,} rows", path)


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("What grows how with the rows, and what it says of a size that was not measured")
    add = parser.add_argument
    add(
        "--out", type=Path, required=True, metavar="FILE", help="result file, JSON; what it holds is not measured again"
    )
    add("--rows", type=flags.count, nargs="+", default=[10_000, 100_000, 1_000_000], help="sizes, in rows")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured")
    add("--target", type=flags.count, default=10**8, help="the size that is asked about, in rows")
    add("--figure", type=Path, default=None, metavar="FILE", help="where to draw it, PNG")
    return parser.parse_args(argv)


def read_measured(path: Path) -> dict:
    """What an earlier run has measured."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())["measured"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of this script: give another --out") from error


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    measured = read_measured(args.out)
    todo = [(part, rows) for part in args.parts for rows in sizes_of(part, args.rows)]
    for part, rows in progress(todo, unit="size"):
        if str(rows) not in measured.setdefault(part, {}):
            measured[part][str(rows)] = measure_apart(part, rows)
            facts = provenance({**vars(args), "out": str(args.out)}, CPU)
            known = {name: law._asdict() | {"unit": unit} for name, (law, unit) in laws(measured).items()}
            write_json(args.out, {"measured": measured, "laws": known, **facts})
    print(table({part: measured[part] for part in args.parts}, args.target))
    if args.figure:
        draw(measured, args.target, args.figure)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
