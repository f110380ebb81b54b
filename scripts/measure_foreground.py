"""How well the estimate of the figure agrees with true masks, beside the floors that need no estimate.

    python scripts/measure_foreground.py --data_path data/toonfaces --split test --out foreground.json

For pictures that have a mask_file: the mean IoU of the estimate (`util.data.foreground`) with and without the face
boxes of the metadata, of the saliency that smart cropping uses, and of a central ellipse. The floors are given the
threshold and the size that suit these very pictures best; the estimate is cut at 0.5. IoU is at a long side of 96 px.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from util.data.foreground import estimate_foreground
from util.data.images import decode_image
from util.data.manifest import SPLITS, Manifest, read_manifest
from util.data.smart_crop import saliency
from util.data.sources import spread
from util.run.args import Parser, count
from util.run.errors import UserError, cli
from util.run.log import progress, provenance, write_json

THRESHOLDS = np.linspace(0.02, 1.0, 50)  # of saliency, fractions of its highest value in a picture
RADII = np.linspace(0.1, 1.0, 46)  # of the ellipse, fractions of the picture's sides


def get_parser() -> Parser:
    parser = Parser("Agreement of the estimate of the figure with true masks.")
    add = parser.add_argument
    add("--data_path", required=True, metavar="DIR", help="prepared folder with mask_file")
    add("--split", nargs="+", choices=SPLITS, metavar="SPLIT", help="splits to measure on; default: all")
    add("--limit", type=count, default=None, help="measure on N pictures spread over the split")
    add("--out", required=True, type=Path, metavar="JSON", help="result file")
    return parser


def pictures(manifest: Manifest, limit: int | None) -> Iterator[tuple[Image.Image, Image.Image, list]]:
    """Each picture that has a mask, its mask, and its face boxes, px."""
    columns = (manifest.table.column(name).to_pylist() for name in ("file_name", "mask_file", "box"))
    faces: dict[tuple[str, str], list] = {}
    for name, mask, box in zip(*columns, strict=True):
        if mask:
            faces.setdefault((name, mask), []).extend([box] if box else [])
    names = list(faces)
    if not names:
        raise UserError(f"{manifest.folder} has no mask_file in these splits: there is no truth to compare with")
    chosen = [names[i] for i in spread(len(names), limit or 0)]
    for name, mask in progress(chosen, desc="figures", unit="picture"):
        yield decode_image(manifest.root / name), decode_image(manifest.folder / mask).convert("L"), faces[name, mask]


def iou(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union of two masks (H, W) bool, 0..1; 1 where both are empty."""
    union = (a | b).sum()
    return float((a & b).sum() / union) if union else 1.0


def ellipse(shape: tuple[int, int], radius: float) -> np.ndarray:
    """A central ellipse, (h, w) bool, whose half axes are `radius` times the sides."""
    y, x = np.mgrid[: shape[0], : shape[1]] + 0.5
    return ((x / shape[1] - 0.5) ** 2 + (y / shape[0] - 0.5) ** 2) <= radius**2


def overlaps_of(image: Image.Image, mask: Image.Image, boxes: list) -> dict[str, np.ndarray]:
    """The IoU of each way on one picture; of the floors for each threshold or radius."""
    estimate = estimate_foreground(image)
    size = estimate.shape[::-1]
    truth = np.asarray(mask.resize(size, Image.Resampling.BOX)) > 127
    salient = saliency(np.asarray(image.resize(size, Image.Resampling.BOX)))
    salient = salient / max(float(salient.max()), 1e-9)
    return {
        "estimate": np.array([iou(estimate > 0.5, truth)]),
        "estimate_with_faces": np.array([iou(estimate_foreground(image, boxes) > 0.5, truth)]),
        "saliency": np.array([iou(salient > threshold, truth) for threshold in THRESHOLDS]),
        "ellipse": np.array([iou(ellipse(truth.shape, radius), truth) for radius in RADII]),
    }


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    manifest = read_manifest(args.data_path)
    manifest = manifest.select(args.split) if args.split else manifest
    seen = [overlaps_of(*picture) for picture in pictures(manifest, args.limit)]
    means = {name: np.mean([one[name] for one in seen], axis=0) for name in seen[0]}
    result = {"pictures": len(seen), "iou": {name: float(values.max()) for name, values in means.items()}}
    write_json(args.out, result | provenance({**vars(args), "out": str(args.out)}, torch.device("cpu")))
    print(f"{len(seen)} pictures; IoU " + ", ".join(f"{name} {value:.3f}" for name, value in result["iou"].items()))


if __name__ == "__main__":
    main()
