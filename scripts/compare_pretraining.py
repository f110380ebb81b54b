"""Is one way of pre-training worse than another? Paired: the same pictures, masks and folds for both.

python scripts/compare_pretraining.py --a runs/exact-*/checkpoint-last.pth --b runs/cross-*/checkpoint-last.pth \
    --pictures data/real_pool --labelled data/moeimouto --out compare.json

The i-th checkpoint of --b stands against the i-th of --a (same seed, say). Two figures: PSNR of held-out pictures with
the visible patches pasted, dB; and a linear probe (logistic regression on the frozen encoder's mean patch token,
cross-validated so that every picture is tested once, pictures of one source in one fold), in points of accuracy. The
differences b - a are averaged over the checkpoints; their intervals are a bootstrap over pictures for PSNR and over
characters for the probe.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from models_mae import load_mae
from models_transfer import load_recogniser
from util.benchmark.bootstrap import mean_interval
from util.benchmark.reconstruction import psnr
from util.data.augment import EvalCrop, to_unit
from util.data.loader import in_order, readable
from util.data.roles import MissingRole
from util.data.sources import open_source
from util.mae.masking import random_mask
from util.run import args as flags
from util.run.device import autocast, pick_device, pick_precision
from util.run.errors import UserError, cli
from util.run.log import progress, provenance, write_json
from util.run.seed import rng_for, uniform_for

FOLDS = 5


def picture_psnr(ckpt: str, args, device: torch.device) -> np.ndarray:
    """PSNR of each held-out picture, dB (N,), visible patches pasted, under masks that depend on the seed alone."""
    model = load_mae(ckpt, device=device)
    side = model.patch_size
    crop = EvalCrop((model.grid[0] * side, model.grid[1] * side))
    source = open_source(args.pictures, "test", labels=args.labels, val_fraction=args.val_fraction)
    values = []
    for batch in in_order(source, crop, batch_size=args.batch_size, num_workers=args.num_workers, device=device):
        images = to_unit(batch["image"].to(device))
        noise = uniform_for(args.seed, 0, batch["index"].to(device), model.num_patches(images))
        pasted = model.reconstruct(images, random_mask(noise, args.mask_ratio))["pasted"]
        values.append(psnr(images, pasted).cpu()[readable(batch)])
    return torch.cat(values).double().numpy()


def labelled_sources(args) -> list:
    """The labelled pictures of all roles that the data have."""
    sources = []
    for role in ("train", "val", "test", "open_val", "open_test"):
        try:
            sources.append(open_source(args.labelled, role, labels=args.labels, val_fraction=args.val_fraction))
        except MissingRole:
            continue
    return sources


@torch.inference_mode()
def embeddings(ckpt: str, sources: list, args, device: torch.device) -> np.ndarray:
    """The frozen encoder's embeddings of all labelled pictures, (N, D) float32."""
    recogniser = load_recogniser(ckpt, model=args.model, device=device)
    crop = EvalCrop(flags.height_width(recogniser.args["input_size"]))
    precision, parts = pick_precision("auto", device), []
    for source in sources:
        for batch in in_order(source, crop, batch_size=args.batch_size, num_workers=args.num_workers, device=device):
            if batch["bad"]:
                raise UserError(f"{batch['bad'][0][1]} cannot be read: leave it out of --labelled")
            with autocast(device, precision):
                parts.append(recogniser.model.embed(to_unit(batch["image"].to(device))).float().cpu())
    return torch.cat(parts).numpy()


def fold_of(labels: np.ndarray, sources: np.ndarray, seed: int) -> np.ndarray:
    """The fold (N,) of each picture; pictures of one source share one, and so are never trained and tested on."""
    fold, shuffled = np.empty(len(labels), dtype=np.int64), rng_for(seed, "folds").permutation(len(labels))
    for number, (_, test) in enumerate(GroupKFold(FOLDS).split(shuffled, groups=sources[shuffled])):
        fold[shuffled[test]] = number
    return fold


def probe_hits(features: np.ndarray, labels: np.ndarray, fold: np.ndarray) -> np.ndarray:
    """Whether a linear probe trained on the other folds names each picture rightly, (N,) bool."""
    hits = np.zeros(len(labels), dtype=bool)
    for number in range(FOLDS):
        test = fold == number
        judge = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=300))
        hits[test] = judge.fit(features[~test], labels[~test]).predict(features[test]) == labels[test]
    return hits


def paired(a: list[np.ndarray], b: list[np.ndarray], groups: np.ndarray, scale: float = 1.0) -> dict:
    """Means of two ways of training and of their difference.

    a, b: for each checkpoint, the value of each sample (N,). groups: (N,) what the bootstrap draws.
    """
    first, second = np.mean(a, axis=0, dtype=np.float64) * scale, np.mean(b, axis=0, dtype=np.float64) * scale
    runs = [float((y.mean(dtype=np.float64) - x.mean(dtype=np.float64)) * scale) for x, y in zip(a, b, strict=True)]
    return {
        "a": float(first.mean()),
        "b": float(second.mean()),
        "difference": float((second - first).mean()),
        "difference_ci95": mean_interval(second - first, groups),
        "difference_of_each_pair": runs,
        "samples": len(groups),
    }


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Paired comparison of two ways of pre-training")
    parser.add_argument("--a", nargs="+", required=True, metavar="CKPT", help="checkpoints of one way")
    parser.add_argument("--b", nargs="+", required=True, metavar="CKPT", help="as many of the other, in the same order")
    parser.add_argument("--pictures", metavar="DIR", help="any --data_path whose test part is reconstructed")
    parser.add_argument("--labelled", metavar="DIR", help="any --data_path with labels, for the linear probe")
    parser.add_argument("--model", default=None, metavar="NAME", help="the encoder, for weights that do not say it")
    parser.add_argument("--mask_ratio", type=flags.ratio, default=0.75, help="removed patches, fraction in 0..1")
    parser.add_argument("--labels", choices=("auto", "none", "folders", "metadata"), default="auto", help="of folders")
    parser.add_argument("--val_fraction", type=flags.fraction, default=0.1, help="held out without a split, 0..1")
    parser.add_argument("--batch_size", type=flags.count, default=128, help="images at a time")
    parser.add_argument("--num_workers", type=flags.count0, default=0, help="processes that decode images")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    flags.add_device_args(parser)
    args = parser.parse_args(argv)
    if len(args.a) != len(args.b):
        raise UserError(f"--a names {len(args.a)} checkpoints and --b {len(args.b)}: give as many of each")
    if not args.pictures and not args.labelled:
        raise UserError("nothing to compare on: give --pictures, --labelled, or both")
    return args


def compare_pictures(args, device: torch.device) -> dict:
    """The paired PSNR of held-out pictures."""
    a, b = ([picture_psnr(ckpt, args, device) for ckpt in progress(way, desc="PSNR")] for way in (args.a, args.b))
    return paired(a, b, np.arange(len(a[0])))


def compare_probes(args, device: torch.device) -> dict:
    """The paired accuracy of linear probes, points."""
    sources = labelled_sources(args)
    columns = ([value for source in sources for value in source.column(name)] for name in ("source", "file_name"))
    origins = np.array([origin or file_name for origin, file_name in zip(*columns, strict=True)])
    labels = np.array([identity for source in sources for identity in source.column("identity")])
    fold = fold_of(labels, origins, args.seed)
    hits = [
        [probe_hits(embeddings(ckpt, sources, args, device), labels, fold) for ckpt in progress(way, desc="probe")]
        for way in (args.a, args.b)
    ]
    return paired(*hits, labels, scale=100.0)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    started, device = time.perf_counter(), pick_device(args.device)
    result = {}
    if args.pictures:
        result["psnr_db"] = compare_pictures(args, device)
    if args.labelled:
        result["probe_points"] = compare_probes(args, device)
    for name, figure in result.items():
        interval = ", ".join(f"{bound:+.2f}" for bound in figure["difference_ci95"])
        print(f"{name}: a {figure['a']:.2f}, b {figure['b']:.2f}, b - a {figure['difference']:+.2f} [{interval}]")
    result |= provenance({**vars(args), "out": str(args.out)}, device)
    result["wall_seconds"] = time.perf_counter() - started
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)


if __name__ == "__main__":
    main()
