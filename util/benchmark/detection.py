"""Average precision of a detector, as COCO defines it (arXiv 1405.0312), with intervals over pictures.

    scenes, left_out = clean([Scene(boxes, labels, found, scores, found_labels, size), ...])
    measure(scenes, FACE)["ap50"]

The figures are those of faster-coco-eval. What it does not give, intervals and the error taxonomy of
`util.benchmark.detection_errors`, comes from the matches here, which follow the same rules; tests hold them equal.

A figure of nothing is NaN: the average precision of small faces where there is no small face, or no face at all. A
detector that finds nothing among faces that are there has 0. A picture without a face counts: what is found in it is
wrong.
"""

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter
from typing import Protocol

import numpy as np

from util.benchmark.bootstrap import REPLICATES, intervals
from util.data.faces import overlaps
from util.run.errors import UserError

FACE, EYE = 1, 2
NAMES = {FACE: "face", EYE: "eye"}
OVERLAPS = np.linspace(0.5, 0.95, 10)  # IoU from which a find is right
RECALLS = np.linspace(0.0, 1.0, 101)
AT_50, AT_75 = 0, 5  # places in OVERLAPS
MOST = (1, 10, 100)  # finds of a picture that count, the best
# areas in px of the original picture, both ends included
AREAS = {"all": (0.0, 1e10), "small": (0.0, 32.0**2), "medium": (32.0**2, 96.0**2), "large": (96.0**2, 1e10)}
SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class Scene:
    """A picture: what is in it, and what was found. Boxes are x1 y1 x2 y2, px of the original picture.

    boxes: (n, 4), labels: (n,), FACE or EYE. found: (m, 4), scores: (m,), found_labels: (m,), in any order.
    size: (width, height), px; None: boxes are not cut. known: for each of NAMES whether all its boxes are there.
    occlusion: what hides each true box, a name or None; () where the data do not say.
    """

    boxes: np.ndarray
    labels: np.ndarray
    found: np.ndarray
    scores: np.ndarray
    found_labels: np.ndarray
    size: tuple[int, int] | None = None
    known: tuple[bool, bool] = (True, True)
    occlusion: Sequence[str | None] = ()


class Finds(Protocol):
    """What a detector found in a picture: boxes (m, 4), scores (m,), labels (m,), as of Scene."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def make_scene(record: Mapping, finds: Finds, size: tuple[int, int] | None = None, occlusion=()) -> Scene:
    """A scene from a record of `util.data.scenes.Scenes` and what was found in its picture."""
    labels, known = np.asarray(record["labels"]) + 1, tuple(bool(each) for each in record["known"])
    return Scene(record["boxes"], labels, finds.boxes, finds.scores, finds.labels, size, known, tuple(occlusion))


def clean(scenes: Sequence[Scene]) -> tuple[list[Scene], dict[str, int]]:
    """Scenes whose boxes can be compared, as float64, and how many were left out: {"true_boxes", "finds"}.

    Boxes are cut at the border of their picture. A true box without area, or with none inside the picture, cannot be
    found: it is left out. So is a find whose score or box is not finite: it cannot be ranked. A find without area, or
    outside the picture, stays; it is wrong.
    """
    cleaned, left_out = [], {"true_boxes": 0, "finds": 0}
    for scene in scenes:
        boxes, found = _cut(scene.boxes, scene.size), _cut(scene.found, scene.size)
        scores = np.asarray(scene.scores, np.float64).reshape(-1)
        solid = np.isfinite(boxes).all(1) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        sound = np.isfinite(found).all(1) & np.isfinite(scores)
        left_out["true_boxes"] += int((~solid).sum())
        left_out["finds"] += int((~sound).sum())
        occlusion = tuple(name for name, kept in zip(scene.occlusion, solid, strict=False) if kept)
        labels, found_labels = np.asarray(scene.labels)[solid], np.asarray(scene.found_labels)[sound]
        cleaned.append(
            replace(
                scene, boxes=boxes[solid], labels=labels, found=found[sound], scores=scores[sound],
                found_labels=found_labels, occlusion=occlusion,
            )
        )  # fmt: skip
    return cleaned, left_out


def _cut(boxes: np.ndarray, size: tuple[int, int] | None) -> np.ndarray:
    boxes = np.array(boxes, np.float64).reshape(-1, 4)
    boxes[~np.isfinite(boxes)] = np.nan  # else infinity would be cut to the border too
    if size is not None:
        boxes = boxes.clip(0, (*size, *size))
    boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2])
    return boxes


def of_label(scenes: Sequence[Scene], label: int) -> list[Scene]:
    """The scenes in which all boxes of a label are known, with that label's boxes and finds alone, best find first.

    Of finds of one score the first comes first.
    """
    chosen = []
    for scene in scenes:
        if not scene.known[label - 1]:
            continue
        own, finds = scene.labels == label, np.flatnonzero(scene.found_labels == label)
        finds = finds[np.argsort(-scene.scores[finds], kind="stable")]
        occlusion = tuple(name for name, kept in zip(scene.occlusion, own, strict=False) if kept)
        chosen.append(
            replace(
                scene, boxes=scene.boxes[own], labels=scene.labels[own], found=scene.found[finds],
                scores=scene.scores[finds], found_labels=scene.found_labels[finds], occlusion=occlusion,
            )
        )  # fmt: skip
    return chosen


def areas_of(boxes: np.ndarray) -> np.ndarray:
    """Areas (n,) of boxes (n, 4)."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1)


# --- the figures, by COCO's own rules ---------------------------------------------------------------------------


def coco_figures(scenes: Sequence[Scene], label: int = FACE) -> dict[str, float]:
    """COCO's figures of cleaned scenes, fractions in 0..1, NaN of nothing; computed by faster-coco-eval.

    "ap": mean over IoU 0.50:0.05:0.95, "ap50", "ap75"; "ap_small", "ap_medium", "ap_large" by area of the true box
    (AREAS); "ar1", "ar10", "ar100": mean recall with that many finds in a picture.
    """
    try:
        from faster_coco_eval import COCO, COCOeval_faster
    except ImportError as error:
        raise UserError("faster-coco-eval is not installed: pip install faster-coco-eval") from error
    truth, finds = coco_tables(of_label(scenes, label))
    with contextlib.redirect_stdout(io.StringIO()):
        run = COCOeval_faster(COCO(truth), COCO(finds), "bbox", print_function=lambda *_: None)
        run.params.catIds = [label]
        run.evaluate()
        run.accumulate()
    # -1 stands for nothing; precision: IoU, recall, class, area, most finds
    precision, recall = (np.where(run.eval[name] < 0, np.nan, run.eval[name]) for name in ("precision", "recall"))
    by_area = dict(zip(run.params.areaRngLbl, np.moveaxis(precision[:, :, 0, :, -1], 2, 0), strict=True))
    return _named(
        {area: by_area[area].mean(1) for area in AREAS}, [recall[:, 0, 0, i].mean() for i in range(len(MOST))]
    )


def _named(by_area: Mapping[str, np.ndarray], recalls: Sequence[float]) -> dict[str, float]:
    """by_area: average precision at each of OVERLAPS, (10,)."""
    figures = {"ap": by_area["all"].mean(), "ap50": by_area["all"][AT_50], "ap75": by_area["all"][AT_75]}
    figures |= {f"ap_{area}": by_area[area].mean() for area in SIZES}
    figures |= {f"ar{most}": recall for most, recall in zip(MOST, recalls, strict=True)}
    return {name: float(value) for name, value in figures.items()}


def coco_tables(scenes: Sequence[Scene], images: Sequence[dict] | None = None) -> tuple[dict, dict]:
    """True boxes and finds in COCO's form. images: {"id", ...} of each; default: their numbers, from 1."""
    images = [{"id": i} for i in range(1, len(scenes) + 1)] if images is None else list(images)
    frame = {"images": images, "categories": [{"id": label, "name": name} for label, name in NAMES.items()]}
    truth = [
        {"iscrowd": 0, **_annotation(image["id"], int(label), box)}
        for image, scene in zip(images, scenes, strict=True)
        for label, box in zip(scene.labels, scene.boxes, strict=True)
    ]
    finds = [
        {"iscrowd": 0, "score": float(score), **_annotation(image["id"], int(label), box)}
        for image, scene in zip(images, scenes, strict=True)
        for label, box, score in zip(scene.found_labels, scene.found, scene.scores, strict=True)
    ]
    return tuple(
        {**frame, "annotations": [{"id": i, **row} for i, row in enumerate(rows, start=1)]} for rows in (truth, finds)
    )


def _annotation(image_id: int, label: int, box: np.ndarray) -> dict:
    x1, y1, x2, y2 = box.tolist()
    size = (x2 - x1, y2 - y1)
    return {"image_id": image_id, "category_id": label, "bbox": [x1, y1, *size], "area": size[0] * size[1]}


def headline(truth: Sequence[Mapping], found: Sequence[Finds]) -> dict[str, float]:
    """{"ap", "ap50", "ap75", "ar100"} of faces, 0 where there is none. truth: records of `util.data.scenes.Scenes`."""
    figures = coco_figures(clean([make_scene(*pair) for pair in zip(truth, found, strict=True)])[0])
    return {name: float(np.nan_to_num(figures[name])) for name in ("ap", "ap50", "ap75", "ar100")}


# --- matches, for what the library does not give ----------------------------------------------------------------


@dataclass(frozen=True)
class Matches:
    """What became of the D finds of one label, best first, of true boxes of one range of areas, in P pictures.

    scores: (D,). picture: (D,), its number. rank: (D,), among those of its picture. right: (10, D) bool, at each of
    OVERLAPS. counted: (10, D) bool; a find outside the range of areas is neither right nor wrong. truths: (P,), how
    many there are to be found.
    """

    scores: np.ndarray
    picture: np.ndarray
    rank: np.ndarray
    right: np.ndarray
    counted: np.ndarray
    truths: np.ndarray


def match(scenes: Sequence[Scene], label: int = FACE, area: str = "all") -> Matches:
    """The matches of cleaned scenes, by COCO's rules: the best finds first, each with the true box it overlaps most."""
    low, high = AREAS[area]
    parts = []
    for number, scene in enumerate(of_label(scenes, label)):
        found, scores = scene.found[: MOST[-1]], scene.scores[: MOST[-1]]
        outside = [(sizes < low) | (sizes > high) for sizes in map(areas_of, (scene.boxes, found))]
        shared = overlaps(found, scene.boxes)
        taken = np.array([match_at(shared, threshold, outside[0]) for threshold in OVERLAPS]).reshape(len(OVERLAPS), -1)
        matched = taken >= 0
        # the last place stands for no true box
        counted = np.where(matched, ~np.append(outside[0], True)[taken], ~outside[1])
        places = np.arange(len(found))
        parts.append((scores, np.full(len(found), number), places, matched & counted, counted, (~outside[0]).sum()))
    columns = list(zip(*parts, strict=True)) or [[np.zeros(0)]] * 3 + [[np.zeros((len(OVERLAPS), 0), bool)]] * 2 + [()]
    scores, picture, rank, right, counted = (np.concatenate(column, axis=-1) for column in columns[:5])
    order = np.argsort(-scores, kind="stable")
    picture, rank = picture[order].astype(np.int64), rank[order].astype(np.int64)
    return Matches(scores[order], picture, rank, right[:, order], counted[:, order], np.array(columns[5], np.float64))


def match_at(shared: np.ndarray, threshold: float, ignored: np.ndarray | None = None) -> np.ndarray:
    """The true box of each find (D,), -1: none. shared: IoU (D, G), finds best first.

    A find takes the true box that it overlaps most, by `threshold` at least, of those that no better find has taken; of
    several alike the last. Those that are ignored, (G,) bool, are taken only where there is no other.
    """
    taken, gone = np.full(len(shared), -1), set()
    finds, boxes = np.nonzero(shared >= min(threshold, 1 - 1e-10))
    preferred = np.ones(len(boxes), bool) if ignored is None else ~ignored[boxes]
    pairs = zip(finds.tolist(), preferred.tolist(), shared[finds, boxes].tolist(), boxes.tolist(), strict=True)
    for find, options in groupby(pairs, key=itemgetter(0)):
        if free := [option for option in options if option[-1] not in gone]:
            taken[find] = max(free)[-1]
            gone.add(int(taken[find]))
    return taken


def precision_curves(right: np.ndarray, counted: np.ndarray, truths: float, weights: np.ndarray) -> np.ndarray:
    """Precision (T, 101) at RECALLS, made to fall with recall; NaN where there are no `truths`.

    right, counted: (T, D) bool, finds best first. weights: (D,), how often each counts.
    """
    if not truths:
        return np.full((len(right), len(RECALLS)), np.nan)
    curves = np.zeros((len(right), len(RECALLS)))
    for curve, own, asked in zip(curves, right, counted, strict=True):
        at = np.flatnonzero(own)  # precision is highest, and recall grows, at finds that are right
        hits = np.cumsum(weights[at])
        precision = hits / (np.cumsum(weights * asked)[at] + np.spacing(1))
        falling = np.maximum.accumulate(precision[::-1])[::-1]
        places = np.searchsorted(hits / truths, RECALLS, side="left")
        reached = places < len(at)
        curve[reached] = falling[places[reached]]
    return curves


def curves_of(matches: Matches, weights: np.ndarray | None = None) -> np.ndarray:
    """Precision (10, 101) at OVERLAPS and RECALLS. weights: (P,), how often each picture counts; default: once."""
    weights = np.ones(len(matches.truths)) if weights is None else weights
    return precision_curves(matches.right, matches.counted, weights @ matches.truths, weights[matches.picture])


def figures_of(matches: Mapping[str, Matches], weights: np.ndarray | None = None) -> dict[str, float]:
    """What `coco_figures` gives, from the matches of each of AREAS. weights: (P,), how often each picture counts."""
    every = matches["all"]
    weights = np.ones(len(every.truths)) if weights is None else weights
    by_area = {area: curves_of(own, weights).mean(1) for area, own in matches.items()}
    total, hits = weights @ every.truths, every.right.mean(0) * weights[every.picture]
    recalls = [hits[every.rank < most].sum() / total if total else np.nan for most in MOST]
    return _named(by_area, recalls)


def measure(
    scenes: Sequence[Scene], label: int = FACE, *, replicates: int = REPLICATES, seed: int = 0
) -> dict[str, float | list[float] | None]:
    """`coco_figures` of cleaned scenes, each with its interval by bootstrap over pictures, NAME_ci95."""
    matches = {area: match(scenes, label, area) for area in AREAS}
    pictures = len(matches["all"].truths)
    found = intervals(lambda drawn: figures_of(matches, drawn), pictures, replicates=replicates, seed=seed)
    report: dict = {}
    for name, value in coco_figures(scenes, label).items():
        report |= {name: value, f"{name}_ci95": found[name]}
    return report


# --- at a threshold ---------------------------------------------------------------------------------------------


def at_threshold(matches: Matches, threshold: float) -> dict[str, float]:
    """Precision, recall and F1 at IoU 0.5 of the finds whose score is `threshold` or more, and wrong ones a picture."""
    chosen = matches.scores >= threshold
    hits, finds, truths = int(matches.right[AT_50, chosen].sum()), int(chosen.sum()), int(matches.truths.sum())
    return {
        "score_threshold": float(threshold),
        "precision": hits / finds if finds else float("nan"),
        "recall": hits / truths if truths else float("nan"),
        "f1": 2 * hits / (finds + truths) if finds + truths else float("nan"),
        "finds": finds,
        "false_positives_per_picture": (finds - hits) / max(1, len(matches.truths)),
    }


def best_threshold(matches: Matches) -> float | None:
    """The score from which on finds have the best F1 at IoU 0.5; None where nothing was found."""
    if not len(matches.scores):
        return None
    f1 = 2 * np.cumsum(matches.right[AT_50]) / (np.arange(1, len(matches.scores) + 1) + matches.truths.sum())
    last = np.append(matches.scores[1:] < matches.scores[:-1], True)  # finds of one score come or go together
    return float(matches.scores[np.where(last, f1, -1.0).argmax()])
