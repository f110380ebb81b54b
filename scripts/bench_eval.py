"""Speed of embedding and probing: the real pipeline beside the bare network, cached features beside none.

python scripts/bench_eval.py --out bench.json --model vit_base_patch16 --images 512
python scripts/bench_eval.py --out bench.json --ckpt RUN/checkpoint-best.pth --data_path DIR PACKED --what extraction

What is compared takes turns within one process, so that whatever else the machine does falls on all of it; the medians
count. Without --data_path the pictures are ToonFaces, drawn into a temporary folder.
"""

import argparse
import contextlib
import copy
import io
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

import main_linprobe
from models_transfer import load_recogniser, start_backbone
from models_vit import Backbone
from util.data.augment import EvalCrop, to_unit
from util.data.sources import Source, Subset, open_source
from util.run import args as flags
from util.run.device import (
    autocast,
    describe_device,
    inference_batch,
    pick_device,
    pick_precision,
    synchronize,
)
from util.run.dist import World
from util.run.errors import UserError, cli
from util.run.log import RunFolder, provenance, write_json
from util.toonfaces.dataset import Recipe, write_faces
from util.toonfaces.split import Sizes
from util.training.session import Session
from util.transfer.features import cached_features
from util.transfer.lora import LoRAConfig, add_lora, merge_lora

TARGETS = {"extraction": 0.8, "probe": 20.0}  # of the ratios
LORA_TOLERANCE = 1e-3  # of embeddings, relative to their deviation, fp32


class Bench:
    """What every comparison needs: the network, a batch of pictures on the device, and turns for those who compete."""

    def __init__(self, args: argparse.Namespace, scratch: Path):
        self.args, self.scratch, self.device = args, scratch, pick_device(args.device)
        self.precision = pick_precision(args.precision, self.device)
        self.model, self.name, self.size = open_model(args, self.device)
        self.args.model = self.name
        self.paths = {str(path): path for path in args.data_path or ()}
        if not self.paths:
            self.paths = {"toonfaces": draw_faces(scratch / "toonfaces", args, max(self.size))}
        self.first = next(iter(self.paths.values()))
        self.batch = inference_batch(args.batch_size, self.device)
        source, crop = self.source(self.first), EvalCrop(self.size)
        rows = np.arange(self.batch) % len(source)
        self.pictures = torch.stack([crop(source.load(row), source.record(row)) for row in rows]).to(self.device)

    def source(self, path: Path) -> Source:
        """The first --images training pictures of a data path."""
        source = open_source(path, "train")
        return Subset(source, np.arange(min(self.args.images, len(source))))

    def forward(self, model: Backbone | Callable, precision: str | None = None) -> torch.Tensor:
        """Embed the batch that lies on the device; model: a Backbone, or its compiled `embed`."""
        embed = model.embed if isinstance(model, Backbone) else model
        with torch.inference_mode(), autocast(self.device, precision or self.precision):
            return embed(to_unit(self.pictures))

    def take_turns(self, runs: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each run in each round, after a round to warm up. The order changes from round to round."""
        names, seconds = list(runs), {name: [] for name in runs}
        for turn in range(1 + self.args.rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                synchronize(self.device)
                started = time.perf_counter()
                runs[name]()
                synchronize(self.device)
                if turn:
                    seconds[name].append(time.perf_counter() - started)
        return seconds

    def compare(self, runs: dict[str, Callable[[], object]]) -> dict:
        """Images/s of forward passes over the batch: {name: {"images_per_s", "seconds_of_each_round"}}."""
        return {name: speed_of(times, self.batch) for name, times in self.take_turns(runs).items()}


def speed_of(times: list[float], images: int) -> dict:
    return {"images_per_s": images / statistics.median(times), "seconds_of_each_round": times}


def open_model(args: argparse.Namespace, device: torch.device) -> tuple[Backbone, str, tuple[int, int]]:
    """(network in eval mode, its name, (H, W) px of its pictures)."""
    if args.ckpt:
        trained = load_recogniser(args.ckpt, model=args.model, input_size=args.input_size, device=device)
        size = args.input_size or trained.args["input_size"]
        return trained.model.requires_grad_(False), trained.args["model"], flags.height_width(size)
    size, name = args.input_size or 224, args.model or "vit_base_patch16"
    facts = {"model": name, "init": None, "input_size": size, "global_pool": True, "seed": args.seed}
    model = start_backbone(facts).to(device).eval().requires_grad_(False)
    return model, name, flags.height_width(size)


def draw_faces(folder: Path, args: argparse.Namespace, side: int) -> Path:
    """ToonFaces with --images pictures to train on, somewhat larger than what is cut from them."""
    identities = max(2, min(20, args.images // 10))
    sizes = Sizes(identities, max(10 * identities, -(-args.images * 10 // 8)), 1.0, 0, 1, 0, 1)
    write_faces(folder, Recipe(sizes, max(64, side * 5 // 4), args.seed), max(1, args.num_workers))
    return folder


# --- the comparisons --------------------------------------------------------------------------------------------


def extraction(bench: Bench) -> dict:
    """Pictures on disk to embeddings on disk, beside the network alone on a batch in memory."""
    sources = {name: bench.source(path) for name, path in bench.paths.items()}
    passes = max(1, max(map(len, sources.values())) // bench.batch)
    folders = iter(range(10**9))
    here = Session(bench.args, World(), bench.device, RunFolder(str(bench.scratch), is_main=False), None)

    def extract(source: Source) -> None:
        folder = bench.scratch / f"features-{next(folders)}"
        cached_features(here, folder, bench.model, "bench", source, EvalCrop(bench.size))

    def ceiling() -> None:
        for _ in range(passes):
            bench.forward(bench.model)

    times = bench.take_turns({"": ceiling} | {name: lambda s=s: extract(s) for name, s in sources.items()})
    top = speed_of(times.pop(""), passes * bench.batch)
    found = {}
    for name, source in sources.items():
        figures = speed_of(times[name], len(source))
        found[name] = {"images": len(source), **figures, "ratio": figures["images_per_s"] / top["images_per_s"]}
    return {
        "what": "whole pass, workers' start and cache files included, over forward passes on a batch on the device",
        "ceiling": top,
        "paths": found,
        "ratio": min(block["ratio"] for block in found.values()),
    }


def probe(bench: Bench) -> dict:
    """Linear probing with cached features, beside one that runs the encoder in every epoch."""
    args = bench.args
    results = run_probe(bench, "cached", args.epochs, args.views)
    epochs, one_pass, cached = results["epochs"], results["encoder_pass_seconds"], results["seconds_per_epoch"]
    how, rerun = (
        f"one pass of the encoder measured, times {epochs} epochs",
        one_pass + cached - args.views * one_pass / epochs,
    )
    if args.rerun_epochs:
        how = f"the encoder really run in each of {args.rerun_epochs} epochs, on views of its own"
        rerun = run_probe(bench, "rerun", args.rerun_epochs, args.rerun_epochs)["seconds_per_epoch"]
    return {
        "what": f"heads trained in both; rerun: {how}",
        "epochs": epochs,
        "views": args.views,
        "encoder_pass_seconds": one_pass,
        "cached_seconds": cached * epochs,
        "rerun_seconds": rerun * epochs,
        "ratio": rerun / cached,
    }


def run_probe(bench: Bench, name: str, epochs: int, views: int) -> dict:
    """results.json of main_linprobe.py on the first data path: random weights, which cost what trained ones do."""
    args, run = bench.args, bench.scratch / name
    height, width = bench.size
    command = {
        "data_path": bench.first, "model": bench.name, "input_size": f"{height}x{width}", "epochs": epochs,
        "views": views, "batch_size": args.batch_size, "num_workers": args.num_workers, "seed": args.seed,
        "device": args.device, "precision": args.precision, "compile": args.compile,
        "output_dir": run, "feature_cache": bench.scratch / f"{name}-features",
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()):
        main_linprobe.main([str(word) for flag, value in command.items() for word in (f"--{flag}", value)])
    return json.loads((run / "results.json").read_text())


def lora(bench: Bench) -> dict:
    """Adapters beside the weights that they adapt, against adapters merged into them."""
    unmerged = copy.deepcopy(bench.model)
    try:
        add_lora(unmerged, LoRAConfig(bench.args.lora_rank))
    except UserError as error:
        return {"skipped": str(error)}
    torch.manual_seed(bench.args.seed)
    for name, parameter in unmerged.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.02)
    unmerged = unmerged.eval().requires_grad_(False)
    merged = copy.deepcopy(unmerged)
    merge_lora(merged)
    one, other = (bench.forward(model, "fp32").float() for model in (unmerged, merged))
    difference = float((one - other).abs().max() / one.std())
    if difference > LORA_TOLERANCE:
        raise AssertionError(f"merged adapters do not embed as unmerged ones do: {difference:.2g} of a deviation apart")
    found = bench.compare({"unmerged": lambda: bench.forward(unmerged), "merged": lambda: bench.forward(merged)})
    return {
        "rank": bench.args.lora_rank,
        "difference": difference,
        **found,
        "ratio": _gain(found, "merged", "unmerged"),
    }


def precision(bench: Bench) -> dict:
    """The precision of this run against fp32."""
    if bench.precision == "fp32":
        return {
            "skipped": f"fp32 is the precision for {describe_device(bench.device)}: give --precision bf16 to try it"
        }
    names = ("fp32", bench.precision)
    found = bench.compare({name: lambda name=name: bench.forward(bench.model, name) for name in names})
    return {**found, "ratio": _gain(found, bench.precision, "fp32")}


def compilation(bench: Bench) -> dict:
    """torch.compile against none, and after how many images it has paid for its warm-up."""
    compiled = torch.compile(bench.model.embed, dynamic=False)
    started = time.perf_counter()
    try:
        bench.forward(compiled)
    except Exception as error:  # whatever compilers and their drivers raise where one of them is missing
        return {"skipped": f"torch.compile fails here: {str(error).strip().splitlines()[0]}"}
    synchronize(bench.device)
    warmup = time.perf_counter() - started
    found = bench.compare({"off": lambda: bench.forward(bench.model), "on": lambda: bench.forward(compiled)})
    saved = 1 / found["off"]["images_per_s"] - 1 / found["on"]["images_per_s"]
    pays = round(warmup / saved) if saved > 0 else None
    return {**found, "warmup_seconds": warmup, "pays_after_images": pays, "ratio": _gain(found, "on", "off")}


def _gain(found: dict, ours: str, other: str) -> float:
    return found[ours]["images_per_s"] / found[other]["images_per_s"]


COMPARISONS: dict[str, Callable[[Bench], dict]] = {
    "extraction": extraction,
    "probe": probe,
    "lora": lora,
    "precision": precision,
    "compile": compilation,
}


def lines(name: str, block: dict) -> list[str]:
    """A comparison as rows of the printed table: what, how fast, ratio."""
    if "skipped" in block:
        return [f"{name:12} skipped: {block['skipped']}"]
    parts = {}
    if name == "extraction":
        parts = {"network alone": block["ceiling"], **block["paths"]}
    elif name != "probe":
        parts = {what: part for what, part in block.items() if isinstance(part, dict)}
    rows = [f"{name:12} {what:40} {part['images_per_s']:10.1f} images/s" for what, part in parts.items()]
    if name == "probe":
        rows = [f"{name:12} {what:40} {block[f'{what}_seconds']:10.1f} s" for what in ("cached", "rerun")]
    if name == "compile":
        rows.append(f"{name:12} {'warm-up':40} {block['warmup_seconds']:10.1f} s")
    target = f" (target {TARGETS[name]:g})" if name in TARGETS else ""
    return [*rows, f"{name:12} {'ratio':40} {block['ratio']:10.2f}{target}"]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser("Speed of embedding and probing")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    add("--ckpt", default=None, metavar="W", help="a transfer run's checkpoint, or weights of an encoder")
    add(
        "--model",
        default=None,
        metavar="NAME",
        help="random weights of it, or what --ckpt is of; default: vit_base_patch16",
    )
    add("--data_path", type=Path, nargs="+", default=None, metavar="DIR",
        help="data with a train split: extraction takes all, the probe the first; default: ToonFaces")  # fmt: skip
    add("--what", nargs="+", choices=COMPARISONS, default=[name for name in COMPARISONS if name != "compile"],
        metavar="NAME", help=", ".join(COMPARISONS))  # fmt: skip
    add(
        "--input_size",
        type=flags.image_size,
        default=None,
        help="px, a side or HEIGHTxWIDTH; default: that of --ckpt, or 224",
    )
    add("--images", type=flags.count, default=512, help="pictures of an extraction, at most")
    add("--batch_size", type=flags.count, default=64, help="images at a time")
    add("--num_workers", type=flags.count0, default=2, help="processes that decode images; 0 = in the main one")
    add("--rounds", type=flags.count, default=5, help="timed rounds; everything that is compared has a turn in each")
    add("--epochs", type=flags.count, default=50, help="of the probe")
    add("--views", type=flags.count, default=2, help="of the probe: random crops of each image")
    add(
        "--rerun_epochs",
        type=flags.count0,
        default=0,
        help="really run the encoder in so many epochs; 0: one, multiplied",
    )
    add("--lora_rank", type=flags.count, default=8, help="of each adapter, from 1 to the width of the layer")
    add("--threads", type=flags.count0, default=0, help="CPU threads; 0: as torch chooses")
    flags.add_device_args(parser)
    flags.add_compile_arg(parser)
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    given = {**vars(args), "out": str(args.out), "data_path": [str(path) for path in args.data_path or ()]}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        result = {name: COMPARISONS[name](bench) for name in dict.fromkeys(args.what)}
        facts = {"model": bench.name, "input_size": list(bench.size), "batch_size": bench.batch}
        fingerprint = bench.source(bench.first).fingerprint
    result |= {**facts, "precision_used": bench.precision, "targets": TARGETS}
    result["provenance"] = provenance(given, bench.device, fingerprint)
    result["wall_seconds"] = time.perf_counter() - started
    write_json(args.out, result)
    for name in dict.fromkeys(args.what):
        print("\n".join(lines(name, result[name])))
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
