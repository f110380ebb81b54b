"""Average precision against pycocotools, the error taxonomy against boxes that were really mended.

Run: python -m pytest tests/test_detection_metrics.py
"""

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from util.benchmark import detection
from util.benchmark.detection import (
    AREAS,
    EYE,
    FACE,
    Scene,
    at_threshold,
    best_threshold,
    clean,
    coco_figures,
    coco_tables,
    curves_of,
    figures_of,
    headline,
    match,
    measure,
    of_label,
)
from util.benchmark.detection_errors import KINDS, ap50, diagnose, gain, gains, is_kind, special_gains, taxonomy
from util.benchmark.detection_files import Stored

STATS = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10", "ar100")  # in COCO's order


def scene(boxes=(), found=(), scores=None, label=FACE, **more) -> Scene:
    """A scene of one label; scores fall from 0.9 where none are given."""
    boxes, found = (np.array(each, float).reshape(-1, 4) for each in (boxes, found))
    scores = 0.9 - 0.1 * np.arange(len(found)) if scores is None else np.array(scores, float)
    return Scene(boxes, np.full(len(boxes), label), found, scores, np.full(len(found), label), **more)


def random_boxes(rng, count: int, whole: bool) -> np.ndarray:
    corner = rng.uniform(0, 300, (count, 2))
    boxes = np.hstack((corner, corner + np.exp(rng.uniform(2, 5.2, (count, 2)))))
    return np.rint(boxes) if whole else boxes


def random_scenes(seed: int, pictures: int = 25, whole: bool = False, levels: int | None = None) -> list[Scene]:
    """Faces and eyes; finds near them, some twice, and elsewhere. whole: px without fractions, so that IoUs are equal
    now and then; levels: of the scores, so that they are too."""
    rng, scenes = np.random.default_rng(seed), []
    for _ in range(pictures):
        boxes = random_boxes(rng, rng.integers(0, 6), whole)
        labels = rng.choice([FACE, FACE, EYE], len(boxes))
        near = np.concatenate([boxes + rng.integers(-15, 16, boxes.shape) for _ in range(2)])
        found = np.concatenate((near[rng.random(len(near)) < 0.8], random_boxes(rng, rng.integers(0, 6), whole)))
        scores = rng.random(len(found)) if levels is None else rng.integers(0, levels, len(found)) / levels
        found_labels = rng.choice([FACE, FACE, FACE, EYE], len(found))
        scenes.append(Scene(boxes, labels, found, scores, found_labels))
    return clean(scenes)[0]


def oracle(scenes: list[Scene], label: int) -> COCOeval:
    """pycocotools on the same boxes."""
    with contextlib.redirect_stdout(io.StringIO()):
        tables = []
        for table in coco_tables(scenes):
            tables.append(COCO())
            tables[-1].dataset = table
            tables[-1].createIndex()
        run = COCOeval(*tables, "bbox")
        run.params.catIds = [label]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run


def oracle_figures(scenes: list[Scene], label: int) -> dict[str, float]:
    return {
        name: np.nan if value < 0 else value for name, value in zip(STATS, oracle(scenes, label).stats, strict=False)
    }


CASES = {
    "plain": {}, "equal scores": {"levels": 4}, "equal overlaps": {"whole": True},
    "both": {"whole": True, "levels": 2}, "one picture": {"pictures": 1}, "few": {"pictures": 3},
}  # fmt: skip


@pytest.mark.parametrize("label", (FACE, EYE))
@pytest.mark.parametrize("case", CASES)
def test_the_figures_are_those_of_pycocotools(case, label):
    for seed in range(3):
        scenes = random_scenes(seed, **CASES[case])
        expected = oracle_figures(scenes, label)
        matches = {area: match(scenes, label, area) for area in AREAS}
        for found in (coco_figures(scenes, label), figures_of(matches)):
            assert list(found) == list(STATS)
            assert found == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_the_curves_are_those_of_pycocotools():
    scenes = random_scenes(3)
    expected = oracle(scenes, FACE).eval["precision"][:, :, 0, 0, -1]
    np.testing.assert_allclose(curves_of(match(scenes)), expected, atol=1e-9)


def test_average_precision_by_hand():
    faces = [[0, 0, 50, 50], [100, 0, 150, 50]]
    scenes = clean([scene(faces, [faces[0], [0, 200, 50, 250], faces[1]])])[0]
    # precision 1 up to a recall of a half (51 of the 101 points), 2/3 beyond
    assert coco_figures(scenes)["ap50"] == pytest.approx((51 + 50 * 2 / 3) / 101)


def test_nothing_found_is_zero_and_nothing_there_is_no_figure():
    nothing_found = clean([scene([[0, 0, 50, 50]]), scene()])[0]
    nothing_there = clean([scene(found=[[0, 0, 50, 50]]), scene()])[0]
    for scenes, large, small in ((nothing_found, 0.0, np.nan), (nothing_there, np.nan, np.nan)):
        matches = {area: match(scenes, area=area) for area in AREAS}
        for found in (coco_figures(scenes), figures_of(matches)):
            for name, value in found.items():
                wanted = small if name in ("ap_small", "ap_large") else large  # the face is of medium size
                assert value == pytest.approx(wanted, nan_ok=True), name
    report = measure(nothing_there, replicates=5)
    assert np.isnan(report["ap"]) and report["ap_ci95"] is None
    assert gains(diagnose(nothing_there)) == pytest.approx(dict.fromkeys(KINDS, np.nan), nan_ok=True)
    assert gains(diagnose(nothing_found)) == dict.fromkeys(KINDS, 0.0)  # as in TIDE: nobody is left to be found


def test_no_picture_at_all():
    assert np.isnan(list(coco_figures([]).values())).all()
    assert len(match([]).scores) == 0 and best_threshold(match([])) is None
    assert diagnose([]).pictures == 0


def test_a_find_in_a_picture_without_a_face_is_wrong():
    face = [0, 0, 50, 50]
    alone = scene([face], [face], [0.5])
    assert coco_figures(clean([alone])[0])["ap50"] == 1
    assert coco_figures(clean([alone, scene(found=[face], scores=[0.6])])[0])["ap50"] == pytest.approx(0.5)


def test_what_cannot_be_compared_is_left_out_and_counted():
    true = [[10, 10, 60, 60], [20, 20, 20, 40], [-30, -30, -5, -5], [80, 80, 140, 120], [np.nan, 0, 1, 1]]
    found = [[10, 10, 60, 60], [85, 80, 130, 100], [200, 200, 250, 250], [30, 30, 20, 20], [np.inf, 0, 5, 5]]
    given = scene([*true], [*found, found[0]], [0.9, 0.8, 0.7, 0.6, 0.5, np.nan], size=(100, 100), occlusion="abcde")
    (cleaned,), left_out = clean([given])
    assert left_out == {"true_boxes": 3, "finds": 2}
    assert cleaned.boxes.tolist() == [[10, 10, 60, 60], [80, 80, 100, 100]] and cleaned.occlusion == ("a", "d")
    # beyond the border, and inside out: they stay, without area, and are wrong
    assert cleaned.found[:2].tolist() == [[10, 10, 60, 60], [85, 80, 100, 100]]
    assert cleaned.scores.tolist() == [0.9, 0.8, 0.7, 0.6]
    assert (detection.areas_of(cleaned.found)[2:] == 0).all()
    diagnosis = diagnose([cleaned])
    assert [diagnosis.kind[i] for i in range(4)] == [-1, -1, KINDS.index("background"), KINDS.index("background")]


def test_a_face_of_32_px_is_small_and_medium_as_in_coco():
    scenes = clean([scene([[0, 0, 32, 32]], [[0, 0, 32, 32]])])[0]
    found = coco_figures(scenes)
    assert (found["ap_small"], found["ap_medium"]) == (1, 1) and np.isnan(found["ap_large"])
    assert diagnose(scenes).size[-1] == "medium"  # for the errors each box has one size


def test_only_the_best_hundred_finds_of_a_picture_count():
    face, aside = [0, 0, 50, 50], [[200 + i, 0, 230 + i, 30] for i in range(100)]
    late = clean([scene([face], [*aside, face], np.linspace(1, 0.5, 101))])[0]
    early = clean([scene([face], [*aside[1:], face], np.linspace(1, 0.5, 100))])[0]
    for scenes, recall in ((late, 0), (early, 1)):
        assert coco_figures(scenes)["ar100"] == recall and match(scenes).right.any() == recall
        assert len(diagnose(scenes).scores) == 100
    tenth = clean([scene([face], [*aside[:9], face], np.linspace(1, 0.5, 10))])[0]
    assert (coco_figures(tenth)["ar1"], coco_figures(tenth)["ar10"]) == (0, 1)


def test_a_picture_drawn_twice_counts_like_its_copy():
    scenes = random_scenes(5, pictures=12)
    drawn = np.random.default_rng(0).integers(0, 3, len(scenes))
    repeated = [each for each, count in zip(scenes, drawn, strict=True) for _ in range(count)]
    matches = {area: match(scenes, FACE, area) for area in AREAS}
    assert figures_of(matches, drawn) == pytest.approx(coco_figures(repeated), abs=1e-9, nan_ok=True)
    assert gains(diagnose(scenes), drawn) == pytest.approx(gains(diagnose(repeated)), abs=1e-9)


def test_intervals_hold_the_figures_and_come_from_the_seed():
    scenes = random_scenes(6, pictures=40)
    report = measure(scenes, FACE, replicates=60, seed=1)
    again = measure(scenes, FACE, replicates=60, seed=1)
    other = measure(scenes, FACE, replicates=60, seed=2)
    assert report == again and report["ap_ci95"] != other["ap_ci95"]
    for name in STATS:
        low, high = report[f"{name}_ci95"]
        assert low <= report[name] <= high, name


def test_pictures_whose_eyes_are_not_known_are_not_asked_for_eyes():
    eye = [10, 10, 30, 30]
    known = scene([eye], [eye], label=EYE)
    unknown = replace(scene(found=[eye], scores=[0.95], label=EYE), known=(True, False))
    scenes = clean([unknown, known])[0]
    assert len(of_label(scenes, EYE)) == 1 and len(of_label(scenes, FACE)) == 2
    assert coco_figures(scenes, EYE)["ap"] == 1
    assert coco_figures([replace(each, known=(True, True)) for each in scenes], EYE)["ap"] == pytest.approx(0.5)


def test_the_headline_of_records_is_that_of_scenes():
    scenes = random_scenes(7)
    records = [{"boxes": s.boxes, "labels": s.labels - 1, "known": np.array([True, False])} for s in scenes]
    found = [Stored(s.found, s.scores, s.found_labels) for s in scenes]
    expected = oracle_figures(scenes, FACE)
    assert headline(records, found) == pytest.approx({name: expected[name] for name in ("ap", "ap50", "ap75", "ar100")})
    empty = [{**record, "boxes": np.zeros((0, 4)), "labels": np.zeros(0)} for record in records]
    assert headline(empty, found) == {"ap": 0.0, "ap50": 0.0, "ap75": 0.0, "ar100": 0.0}


@pytest.mark.parametrize("levels", (None, 7))
def test_rates_at_a_threshold_are_counted(levels):
    scenes = random_scenes(8, levels=levels)
    matches = match(scenes)
    best = best_threshold(matches)
    candidates = sorted({float(s) for s in matches.scores})
    f1 = {}
    for threshold in candidates:
        kept = [
            replace(s, found=s.found[k], scores=s.scores[k], found_labels=s.found_labels[k])
            for s in of_label(scenes, FACE)
            for k in [s.scores >= threshold]
        ]
        hits = sum((taken >= 0).sum() for taken in (greedy(s) for s in kept))
        finds, faces = sum(len(s.found) for s in kept), sum(len(s.boxes) for s in kept)
        found = at_threshold(matches, threshold)
        assert (found["precision"], found["recall"]) == pytest.approx((hits / finds, hits / faces))
        assert found["false_positives_per_picture"] == pytest.approx((finds - hits) / len(scenes))
        f1[threshold] = 2 * hits / (finds + faces)
        assert found["f1"] == pytest.approx(f1[threshold])
    assert f1[best] == pytest.approx(max(f1.values()))


def iou(a, b) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def greedy(each: Scene) -> np.ndarray:
    """The true box of each find of a scene, best first, at IoU 0.5, by loops."""
    taken = np.full(len(each.found), -1)
    for i in np.argsort(-each.scores, kind="stable"):
        free = [(iou(each.found[i], box), j) for j, box in enumerate(each.boxes) if j not in taken]
        if free and max(free)[0] >= 0.5:
            taken[i] = max(free)[1]
    return taken


# --- the error taxonomy -----------------------------------------------------------------------------------------

FACES = [[0, 0, 100, 100], [200, 0, 300, 100], [0, 200, 20, 220]]  # two large, one small
MADE = {
    "localisation": (FACES, [[60, 0, 160, 100], FACES[1], FACES[2]]),  # IoU 0.25
    "duplicate": (FACES, [FACES[0], [2, 0, 102, 100], FACES[1], FACES[2]]),
    "background": (FACES, [[400, 400, 500, 500], *FACES]),
    "missed": (FACES, FACES[:2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_that_was_made_is_named(kind):
    scenes = clean([scene(*MADE[kind])])[0]
    report = taxonomy(scenes, score_threshold=0.0, replicates=2)
    assert {name: report[name]["count"] for name in KINDS} == {name: int(name == kind) for name in KINDS}
    for name in KINDS:
        # every other error costs nothing, and with this one mended nothing is wrong
        expected = 1 - coco_figures(scenes)["ap50"] if name == kind else 0
        assert report[name]["dap50"] == pytest.approx(expected)
    where = "small" if kind == "missed" else "large"
    assert {size: block["count"] for size, block in report[kind]["by_size"].items() if block["count"]} == {where: 1}
    assert "skipped" in report[kind]["by_occlusion"]


def mend(each: Scene, diagnosis, number: int, kind: str) -> Scene:
    """A scene whose errors of a kind are mended in the boxes themselves."""
    own = diagnosis.picture == number
    keep, found = np.ones(len(each.found), bool), each.found.copy()
    for place in np.flatnonzero(own & (diagnosis.kind == KINDS.index(kind))):
        at = diagnosis.number[place]
        if kind == "localisation" and diagnosis.mended[place]:
            found[at] = each.boxes[diagnosis.true_number[diagnosis.truth[place]]]
        else:
            keep[at] = False
    asked = np.ones(len(each.boxes), bool)
    if kind == "missed":
        asked[diagnosis.true_number[(diagnosis.true_picture == number) & diagnosis.missed]] = False
    return replace(
        each, found=found[keep], scores=each.scores[keep], found_labels=each.found_labels[keep],
        boxes=each.boxes[asked], labels=each.labels[asked],
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_what_an_error_costs_is_what_mended_boxes_gain(kind):
    gained = []
    for seed in range(4):
        scenes = random_scenes(seed)
        diagnosis, own = diagnose(scenes), of_label(scenes, FACE)
        mended = [mend(each, diagnosis, number, kind) for number, each in enumerate(own)]
        before, after = coco_figures(scenes)["ap50"], coco_figures(mended)["ap50"]
        assert ap50(diagnosis) == pytest.approx(before)
        gained.append(gain(diagnosis, kind))
        assert gained[-1] == pytest.approx(max(0, after - before), abs=1e-9)
    assert max(gained) > 1e-3


def test_kinds_are_those_of_the_definition():
    for seed in range(4):
        scenes = random_scenes(seed)
        diagnosis = diagnose(scenes)
        assert (np.diff(diagnosis.scores) <= 0).all()
        for number, each in enumerate(of_label(scenes, FACE)):
            taken, covered = greedy(each), set()
            kinds = {}
            for i, find in enumerate(each.found):
                best = max(((iou(find, box), j) for j, box in enumerate(each.boxes)), default=(0, -1))
                if taken[i] >= 0:
                    kinds[i] = "right"
                elif best[0] >= 0.5:
                    kinds[i] = "duplicate"
                elif best[0] >= 0.1:
                    kinds[i] = "localisation"
                    covered.add(best[1])
                else:
                    kinds[i] = "background"
            own = np.flatnonzero(diagnosis.picture == number)
            found = {int(diagnosis.number[p]): (*KINDS, "right")[diagnosis.kind[p]] for p in own}
            assert found == kinds
            missed = set(diagnosis.true_number[(diagnosis.true_picture == number) & diagnosis.missed].tolist())
            assert missed == set(range(len(each.boxes))) - set(taken.tolist()) - covered


def test_strata_share_the_errors_out():
    rng = np.random.default_rng(1)
    scenes = [replace(s, occlusion=tuple(rng.choice(["none", "hat"], len(s.boxes)))) for s in random_scenes(9)]
    report = taxonomy(scenes, score_threshold=0.3, replicates=5)
    above = diagnose(scenes, floor=0.3)
    for counts in report["faces"].values():
        assert sum(counts.values()) == len(above.taken)
    for kind in KINDS:
        block = report[kind]
        assert block["count"] == is_kind(above, kind).sum() > 0
        assert block["count"] == sum(part["count"] for part in block["by_size"].values())
        assert block["count"] == sum(part["count"] for part in block["by_occlusion"].values())
        assert set(block["by_occlusion"]) <= ({"no face"} if kind == "background" else {"none", "hat"})
        assert 0 <= max(part["dap50"] for part in block["by_size"].values()) <= block["dap50"] + 1e-9
        low, high = block["dap50_ci95"]
        assert low <= block["dap50"] <= high


def test_a_stratum_gains_what_its_own_boxes_gain():
    small, large = [0, 0, 20, 20], [100, 100, 300, 300]
    scenes = clean([scene([small, large], [])])[0]
    scenes += clean([scene([small, large], [small, large])])[0]
    diagnosis = diagnose(scenes)
    assert gain(diagnosis, "missed") == pytest.approx(1 - 51 / 101)  # recall ends at a half
    for name in ("small", "large"):
        chosen = diagnosis.size == name
        assert gain(diagnosis, "missed", chosen) == pytest.approx((67 - 51) / 101)  # at 2 of 3


def test_the_special_gains():
    scenes = random_scenes(2)
    diagnosis = diagnose(scenes)
    right = [
        replace(s, found=s.found[k], scores=s.scores[k], found_labels=s.found_labels[k])
        for s in of_label(scenes, FACE)
        for k in [greedy(s) >= 0]
    ]
    found = [replace(s, boxes=s.boxes[k], labels=s.labels[k]) for s in of_label(scenes, FACE)
             for k in [np.isin(np.arange(len(s.boxes)), greedy(s))]]  # fmt: skip
    before = coco_figures(scenes)["ap50"]
    expected = [coco_figures(each)["ap50"] - before for each in (right, found)]
    assert list(special_gains(diagnosis).values()) == pytest.approx(expected, abs=1e-9)
