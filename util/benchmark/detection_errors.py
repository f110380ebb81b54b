"""Why a detector loses average precision: the error taxonomy of TIDE (arXiv 2008.08115), for one class.

    localisation   a wrong find that overlaps a true box by an IoU of 0.1 up to 0.5
    duplicate      one that overlaps a true box by 0.5 or more, which a better find has taken
    background     one that overlaps no true box by 0.1
    missed         a true box that no find has, and no localisation error would have

With one class nothing can be classified wrongly. What a kind costs is what AP50 gains if it alone is mended: the best
localisation error of an untaken true box becomes right, the others go; duplicates and background go; missed true boxes
are no longer asked for. The gains do not add up to 1 - AP50.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from util.benchmark.bootstrap import REPLICATES, intervals
from util.benchmark.detection import FACE, MOST, SIZES, Scene, areas_of, match_at, of_label, precision_curves
from util.data.faces import overlaps

KINDS = ("localisation", "duplicate", "background", "missed")
FOREGROUND, BACKGROUND = 0.5, 0.1  # IoU
RIGHT = -1
UNKNOWN, NO_FACE = "not known", "no face"
_LOCALISATION, _DUPLICATE, _BACKGROUND, _MISSED = range(4)
_LIMITS = (32.0**2, 96.0**2)  # area, px, of small | medium | large


@dataclass(frozen=True)
class Diagnosis:
    """What became of the D finds of one label, best first, and of the G true boxes, in `pictures` pictures.

    picture, number: (D,), the picture and the place in its found boxes (`of_label`). scores: (D,). kind: (D,), RIGHT or
    a place in KINDS. overlap: (D,), the largest IoU with a true box. truth: (D,), the true box that it is about, in
    0..G, -1 for background. mended: (D,) bool, localisation errors that would be right.
    true_picture, true_number: (G,), as of finds. missed, taken: (G,) bool. size, occlusion: (D + G,), names by which
    errors are told apart: those of the true box they are about; of background the size of the find.
    """

    pictures: int
    picture: np.ndarray
    number: np.ndarray
    scores: np.ndarray
    kind: np.ndarray
    overlap: np.ndarray
    truth: np.ndarray
    mended: np.ndarray
    true_picture: np.ndarray
    true_number: np.ndarray
    missed: np.ndarray
    taken: np.ndarray
    size: np.ndarray
    occlusion: np.ndarray


def diagnose(scenes: Sequence[Scene], label: int = FACE, floor: float = -np.inf) -> Diagnosis:
    """Tell the errors of cleaned scenes apart. floor: finds of lower scores are not looked at."""
    scenes = of_label(scenes, label)
    firsts = np.cumsum([0] + [len(scene.boxes) for scene in scenes])
    finds, truths = [], []
    for number, (scene, first) in enumerate(zip(scenes, firsts[:-1], strict=True)):
        few = slice(min(MOST[-1], int((scene.scores >= floor).sum())))  # they are sorted
        kind, overlap, about, mended, missed, taken = _tell_apart(overlaps(scene.found[few], scene.boxes))
        about = np.where(about >= 0, about + first, -1)
        sizes = size_names(scene.found[few])
        places = np.arange(len(kind))
        finds.append((np.full(len(kind), number), places, scene.scores[few], kind, overlap, about, mended, sizes))
        names = [name or UNKNOWN for name in scene.occlusion] or [UNKNOWN] * len(scene.boxes)
        boxes = np.arange(len(scene.boxes))
        truths.append(
            (np.full(len(boxes), number), boxes, missed, taken, size_names(scene.boxes), np.array(names, object))
        )
    columns = [np.concatenate(column) for column in zip(*finds, strict=True)] or [np.zeros(0, np.int64)] * 8
    order = np.argsort(-columns[2], kind="stable")
    picture, number, scores, kind, overlap, about, mended, sizes = (column[order] for column in columns)
    rows = [np.concatenate(column) for column in zip(*truths, strict=True)] or [np.zeros(0, np.int64)] * 6
    true_picture, true_number, missed, taken, true_sizes, occlusion = rows
    own = about >= 0
    sizes[own] = true_sizes[about[own]]
    hidden = np.full(len(about), NO_FACE, object)
    hidden[own] = occlusion[about[own]]
    return Diagnosis(
        len(scenes), picture, number, scores, kind, overlap, about, mended.astype(bool), true_picture, true_number,
        missed.astype(bool), taken.astype(bool), np.append(sizes, true_sizes), np.append(hidden, occlusion),
    )  # fmt: skip


def _tell_apart(shared: np.ndarray):
    """Kinds, largest IoU, true boxes and what is mended (D,) of finds; missed and taken true boxes (G,).

    shared: IoU (D, G), finds best first.
    """
    matched = match_at(shared, FOREGROUND)
    taken = np.zeros(shared.shape[1], bool)
    taken[matched[matched >= 0]] = True
    overlap = shared.max(1, initial=0.0)
    nearest = shared.argmax(1) if shared.shape[1] else np.full(len(shared), -1)
    kind = np.select(
        (matched >= 0, overlap >= FOREGROUND, overlap >= BACKGROUND), (RIGHT, _DUPLICATE, _LOCALISATION), _BACKGROUND
    )
    about = np.where(matched >= 0, matched, np.where(kind == _BACKGROUND, -1, nearest))
    mended, usable = np.zeros(len(shared), bool), np.zeros(shared.shape[1], bool)
    for find in np.flatnonzero(kind == _LOCALISATION):  # the best comes first
        mended[find] = not taken[about[find]] and not usable[about[find]]
        usable[about[find]] = True
    return kind, overlap, about, mended, ~taken & ~usable, taken


def size_names(boxes: np.ndarray) -> np.ndarray:
    """small, medium or large, (n,), by area: below 32 x 32 px, up to 96 x 96 px, larger."""
    return np.array(SIZES, object)[np.digitize(areas_of(boxes), _LIMITS)]


def ap50(diagnosis: Diagnosis, weights: np.ndarray | None = None) -> float:
    """Average precision at IoU 0.5, NaN without true boxes. weights: (P,), how often each picture counts."""
    none = np.zeros(len(diagnosis.scores), bool)
    return _average_precision(diagnosis, none, none, np.zeros(len(diagnosis.missed), bool), weights)


def _average_precision(diagnosis, dropped, mended, excused, weights) -> float:
    """Without the finds `dropped` (D,), with those `mended` (D,) right, the true boxes `excused` (G,) not asked for."""
    weights = np.ones(diagnosis.pictures) if weights is None else weights
    right, kept = (diagnosis.kind == RIGHT) | mended, ~dropped
    truths = weights[diagnosis.true_picture[~excused]].sum()
    counted = kept[None]
    return float(precision_curves((right & kept)[None], counted, truths, weights[diagnosis.picture]).mean())


def gain(diagnosis: Diagnosis, kind: str, chosen: np.ndarray | None = None, weights: np.ndarray | None = None) -> float:
    """What AP50 gains if the errors of a kind are mended, 0 or more; NaN without true boxes.

    chosen: (D + G,) bool, the finds and true boxes that are meant; default: all. Where no true box is left that is
    asked for, the gain is 0, as in TIDE.
    """
    return _gained(ap50(diagnosis, weights), _mended(diagnosis, kind, chosen, weights))


def gains(diagnosis: Diagnosis, weights: np.ndarray | None = None) -> dict[str, float]:
    """{kind: its `gain`} for all of KINDS."""
    before = ap50(diagnosis, weights)
    return {kind: _gained(before, _mended(diagnosis, kind, None, weights)) for kind in KINDS}


def _mended(diagnosis: Diagnosis, kind: str, chosen: np.ndarray | None, weights: np.ndarray | None) -> float:
    """AP50 without the errors of a kind."""
    chosen = np.ones(len(diagnosis.size), bool) if chosen is None else chosen
    finds, truths = chosen[: len(diagnosis.kind)], chosen[len(diagnosis.kind) :]
    own = (diagnosis.kind == KINDS.index(kind)) & finds
    mended = own & diagnosis.mended & (kind == "localisation")
    return _average_precision(diagnosis, own & ~mended, mended, diagnosis.missed & truths & (kind == "missed"), weights)


def _gained(before: float, after: float) -> float:
    return before if np.isnan(before) else max(0.0, float(np.nan_to_num(after)) - before)


def special_gains(diagnosis: Diagnosis) -> dict[str, float]:
    """What AP50 gains without any wrong find, and if no untaken true box were asked for."""
    none, asked = np.zeros(len(diagnosis.kind), bool), np.zeros(len(diagnosis.taken), bool)
    clear = _average_precision(diagnosis, diagnosis.kind != RIGHT, none, asked, None)
    whole = _average_precision(diagnosis, none, none, ~diagnosis.taken, None)
    before = ap50(diagnosis)
    return {"false_positives": _gained(before, clear), "false_negatives": _gained(before, whole)}


def is_kind(diagnosis: Diagnosis, kind: str) -> np.ndarray:
    """Which finds and true boxes (D + G,) are errors of a kind."""
    finds = diagnosis.kind == KINDS.index(kind)
    truths = diagnosis.missed if kind == "missed" else np.zeros(len(diagnosis.missed), bool)
    return np.append(finds, truths)


def taxonomy(
    scenes: Sequence[Scene],
    label: int = FACE,
    *,
    score_threshold: float = 0.5,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> dict:
    """{kind: {"dap50": what AP50 gains if it is mended, "dap50_ci95", "count": errors among the finds of
    `score_threshold` or more, "by_size", "by_occlusion": {name: {"dap50", "count"}}}}, for each of KINDS.

    Also {"false_positives", "false_negatives": {"dap50"}}, "score_threshold", and "faces": {"by_size",
    "by_occlusion": {name: true boxes}}. by_occlusion is {"skipped": why} where the data do not know it.
    """
    every, above = diagnose(scenes, label), diagnose(scenes, label, score_threshold)
    bounds = intervals(lambda drawn: gains(every, drawn), every.pictures, replicates=replicates, seed=seed)
    report: dict = {}
    for kind in KINDS:
        report[kind] = {
            "dap50": gain(every, kind),
            "dap50_ci95": bounds[kind],
            "count": int(is_kind(above, kind).sum()),
            "by_size": _by(every, above, kind, "size"),
            "by_occlusion": _by(every, above, kind, "occlusion"),
        }
    report |= {name: {"dap50": value} for name, value in special_gains(every).items()}
    truths = {f"by_{what}": _count(getattr(every, what)[len(every.kind) :]) for what in ("size", "occlusion")}
    return report | {"score_threshold": score_threshold, "faces": truths}


def _by(every: Diagnosis, above: Diagnosis, kind: str, what: str) -> Mapping[str, dict]:
    names, names_above = getattr(every, what), getattr(above, what)
    if what == "occlusion" and (not len(every.taken) or set(names[len(every.kind) :]) == {UNKNOWN}):
        return {"skipped": "the data do not say what is hidden"}
    shown = SIZES if what == "size" else sorted(set(names))
    return {
        name: {
            "dap50": gain(every, kind, names == name),
            "count": int((is_kind(above, kind) & (names_above == name)).sum()),
        }
        for name in shown
        if what == "size" or (is_kind(every, kind) & (names == name)).any()
    }


def _count(names: np.ndarray) -> dict[str, int]:
    return {name: int((names == name).sum()) for name in sorted(set(names))}
