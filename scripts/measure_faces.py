"""Precision and recall of a face finder on a prepared folder, and how well its eye boxes agree with those there.

    python scripts/measure_faces.py --finder cascade:lbpcascade_animeface.xml --data_path data/icf --out a.json

A find is right if it overlaps a true face that no better find has taken, by --iou or more. The table is over score
thresholds. Where the folder knows eyes, those of faces found (at --min_score) are compared: the mean IoU of the best
pairs, and the share of the true eyes' area that is covered. Boxes of another machine measure agreement, not truth.
Without boxes only the share of pictures with a face is told.
"""

import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw

from models_finders import KINDS, open_finder
from util.data.faces import MIN_SCORE, Face, Finder, find_faces, overlaps
from util.data.images import BadImage, decode_image
from util.data.manifest import SPLITS, Manifest, read_manifest
from util.data.sheet import sheet
from util.data.sources import spread
from util.run.args import Parser, count, count0, fraction, share
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.files import write_atomically
from util.run.log import progress, provenance, write_json

THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))
LOW_IOU = 0.3  # frames of drawn faces differ: with or without hair, chin, ears
SHEET_COLUMNS, SHEET_CELL = 8, 200  # cells, px


class Scene(NamedTuple):
    """A picture: its file, its true faces (n, 4) and eyes by face, and what was found."""

    path: Path
    boxes: np.ndarray
    eyes: list[list]
    found: list[Face]


def get_parser() -> Parser:
    parser = Parser("Precision and recall of a face finder.")
    parser.add_argument("--finder", required=True, metavar="SPEC", help=f"{', '.join(KINDS)}; + unites several")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="prepared folder")
    parser.add_argument(
        "--split", nargs="+", choices=SPLITS, metavar="SPLIT", help="splits to measure on; default: all"
    )
    parser.add_argument("--iou", type=share, default=0.5, help=f"least overlap of a right find, 0..1; also {LOW_IOU}")
    parser.add_argument("--min_score", type=fraction, default=MIN_SCORE, help="threshold of the headline figures, 0..1")
    parser.add_argument("--limit", type=count, default=None, help="measure on N pictures spread over the split")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--sheet", metavar="PNG", help="also draw finds (red), true faces (green) and eyes (blue)")
    parser.add_argument("--sheet_pictures", type=count0, default=48, help="pictures on the sheet")
    parser.add_argument("--out", required=True, metavar="JSON", help="result file")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    device = pick_device(args.device)
    finder = open_finder(args.finder, device)
    manifest = read_manifest(args.data_path)
    if args.split:
        manifest = manifest.select(args.split)
    if not len(manifest):
        raise UserError(f"{args.data_path} has no row of split {', '.join(args.split or SPLITS)}: check --split")
    started = time.process_time()
    scenes, bad = search(finder, manifest, args.limit)
    seconds = time.process_time() - started
    result = {
        **measure(scenes, args.iou, args.min_score),
        "bad_images": bad,
        "cpu_ms_per_picture": 1e3 * seconds / len(scenes),
        **provenance(vars(args), device),
    }
    write_json(Path(args.out), result)
    if args.sheet:
        drawn = draw(
            scenes[:: max(1, len(scenes) // max(1, args.sheet_pictures))][: args.sheet_pictures], args.min_score
        )
        write_atomically(Path(args.sheet), lambda temporary: drawn.save(temporary, "png"))
    print(report(result))


def search(finder: Finder, manifest: Manifest, limit: int | None) -> tuple[list[Scene], list[str]]:
    """Run the finder over the pictures of a manifest, several rows of which may share one; also the damaged files."""
    columns = (manifest.table.column(name).to_pylist() for name in ("file_name", "box", "eyes"))
    truth: dict[str, list] = {}
    for name, box, eyes in zip(*columns, strict=True):
        truth.setdefault(name, []).extend([(box, eyes or [])] if box else [])
    names = list(truth)
    chosen = [names[i] for i in spread(len(names), limit or 0)]
    scenes, bad = [], []
    for name in progress(chosen, desc="faces", unit="picture"):
        path, faces = manifest.root / name, truth[name]
        try:
            found = find_faces(decode_image(path), finder, name, min_score=0.0)
        except BadImage as error:
            bad.append(str(error))
            continue
        boxes = np.array([box for box, _ in faces], np.float64).reshape(-1, 4)
        scenes.append(Scene(path, boxes, [eyes for _, eyes in faces], found))
    if not scenes:
        raise UserError(f"no picture of {manifest.folder} can be read, the first one because: {bad[0]}")
    return scenes, bad


def match(found: np.ndarray, truth: np.ndarray, iou: float) -> np.ndarray:
    """The true box (its number, -1: none) of each find (n,), both x1 y1 x2 y2, finds best first.

    Greedy and one to one: a find takes the true box it overlaps most among those left, if by `iou` or more.
    """
    shared, taken = overlaps(found, truth), np.full(len(found), -1)
    for number in range(len(found) if len(truth) else 0):
        best = int(shared[number].argmax())
        if shared[number, best] >= iou:
            taken[number], shared[:, best] = best, -1.0
    return taken


def precision_recall(scores: np.ndarray, right: np.ndarray, faces: int, threshold: float) -> dict:
    """Rates in 0..1 of the finds (n,) with a score from `threshold` up; faces: how many there are. None: of nothing."""
    chosen = scores >= threshold
    hits, finds = int(right[chosen].sum()), int(chosen.sum())
    return {
        "threshold": threshold,
        "precision": hits / finds if finds else None,
        "recall": hits / faces if faces else None,
        "f1": 2 * hits / (finds + faces) if finds + faces else None,
        "finds": finds,
    }


def average_precision(scores: np.ndarray, right: np.ndarray, faces: int) -> float | None:
    """Area in 0..1 under the precision-recall curve, precision made to fall with recall (all points, as VOC 2010)."""
    if not faces:
        return None
    hits = right[np.argsort(-scores, kind="stable")].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    falling = np.maximum.accumulate(precision[::-1])[::-1]
    return float((np.diff(hits, prepend=0) * falling).sum() / faces)


def at_overlap(scenes: list[Scene], iou: float, min_score: float) -> dict:
    """The rates at one overlap: at `min_score`, over THRESHOLDS, and the average precision."""
    right = [match(boxes_of(scene.found), scene.boxes, iou) >= 0 for scene in scenes]
    scores = np.array([face.score for scene in scenes for face in scene.found])
    right, faces = np.concatenate(right).astype(bool), sum(len(scene.boxes) for scene in scenes)
    return {
        "iou": iou,
        **precision_recall(scores, right, faces, min_score),
        "average_precision": average_precision(scores, right, faces),
        "by_threshold": [precision_recall(scores, right, faces, threshold) for threshold in THRESHOLDS],
    }


def measure(scenes: list[Scene], iou: float, min_score: float) -> dict:
    """All figures of a result file; null where the folder has no boxes or no eyes."""
    faces = sum(len(scene.boxes) for scene in scenes)
    shown = [any(face.score >= min_score for face in scene.found) for scene in scenes]
    overlaps_asked = dict.fromkeys((iou, LOW_IOU)) if faces else {}
    return {
        "pictures": len(scenes),
        "faces": faces,
        "pictures_with_a_find": float(np.mean(shown)),
        "finds_per_picture": sum(f.score >= min_score for scene in scenes for f in scene.found) / len(scenes),
        "detection": [at_overlap(scenes, overlap, min_score) for overlap in overlaps_asked],
        "eyes": eye_agreement(scenes, min_score),
    }


def eye_agreement(scenes: list[Scene], min_score: float) -> dict | None:
    """Mean IoU of true eyes with the best found eye, and the covered share of their area, on faces found (LOW_IOU)."""
    ious, covered = [], []
    for scene in scenes:
        found = [face for face in scene.found if face.score >= min_score]
        for number, face in zip(match(boxes_of(found), scene.boxes, LOW_IOU), found, strict=True):
            eyes = scene.eyes[number] if number >= 0 else []
            if eyes and face.eyes:
                ious += overlaps(eyes, face.eyes).max(1).tolist()
                covered += [coverage(eye, face.eyes) for eye in eyes]
    return {"eyes": len(ious), "iou": float(np.mean(ious)), "coverage": float(np.mean(covered))} if ious else None


def coverage(box, others) -> float:
    """The share of a box that the best of some other boxes covers, 0..1."""
    x1, y1, x2, y2 = box
    widths = [min(x2, o[2]) - max(x1, o[0]) for o in others]
    heights = [min(y2, o[3]) - max(y1, o[1]) for o in others]
    return max(max(w, 0) * max(h, 0) for w, h in zip(widths, heights, strict=True)) / ((x2 - x1) * (y2 - y1))


def boxes_of(faces: list[Face]) -> np.ndarray:
    return np.array([face.box for face in faces], np.float64).reshape(-1, 4)


def draw(scenes: list[Scene], min_score: float) -> Image.Image:
    """A contact sheet: true faces green, finds red with their score, found eyes blue."""
    cells = []
    for scene in scenes:
        picture = decode_image(scene.path)
        scale = SHEET_CELL / max(picture.size)
        picture = picture.resize([max(1, round(length * scale)) for length in picture.size])
        pen = ImageDraw.Draw(picture)
        for box in scene.boxes:
            pen.rectangle([value * scale for value in box], outline=(0, 200, 0))
        for face in (f for f in scene.found if f.score >= min_score):
            pen.rectangle([value * scale for value in face.box], outline=(230, 0, 0))
            pen.text((face.box[0] * scale + 2, face.box[1] * scale), f"{face.score:.2f}", fill=(230, 0, 0))
            for eye in face.eyes:
                pen.rectangle([value * scale for value in eye], outline=(0, 80, 255))
        cells.append(picture)
    rows = [cells[i : i + SHEET_COLUMNS] for i in range(0, len(cells), SHEET_COLUMNS)]
    return sheet(rows or [[None]], cell=SHEET_CELL)


def report(result: dict) -> str:
    """The figures for the eye."""
    lines = [
        f"{result['pictures']} pictures, {result['faces']} faces; a find in {result['pictures_with_a_find']:.3f} "
        f"of the pictures; {result['cpu_ms_per_picture']:.0f} ms of processor time each"
    ]
    for part in result["detection"]:
        lines.append(f"IoU {part['iou']}: average precision {part['average_precision']:.3f}")
        lines.append(f"{'score':>7} {'precision':>9} {'recall':>7} {'F1':>7} {'finds':>6}")
        for row in (part, *part["by_threshold"]):
            rates = [float("nan") if row[name] is None else row[name] for name in ("precision", "recall", "f1")]
            lines.append(f"{row['threshold']:7.2f} {rates[0]:9.3f} {rates[1]:7.3f} {rates[2]:7.3f} {row['finds']:6d}")
    if result["eyes"]:
        lines.append("{eyes} eyes: IoU {iou:.3f}, covered {coverage:.3f}".format(**result["eyes"]))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
