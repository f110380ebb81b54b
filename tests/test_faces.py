"""Run: python -m pytest tests/test_faces.py"""

import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import fails
from PIL import Image, ImageDraw
from sklearn.metrics import precision_recall_curve
from torchvision.ops import box_iou

from util.data.faces import (
    FACEBOXES_FRAMING,
    CascadeFinder,
    Face,
    Framing,
    NetworkFinder,
    StoredFinder,
    UnionFinder,
    find_faces,
    overlaps,
    settle_eye,
    vote,
)
from util.data.manifest import write_manifest
from util.run.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CASCADE = ROOT.parent / "shared" / "data" / "weights" / "lbpcascade_animeface.xml"


@pytest.fixture(scope="module")
def measure():
    import importlib.util

    spec = importlib.util.spec_from_file_location("measure_faces", ROOT / "scripts" / "measure_faces.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Fixed:
    """A finder that always finds the same."""

    needs_name = False

    def __init__(self, *faces: Face):
        self.faces = faces

    def find(self, image, name=None):
        return list(self.faces)


def random_boxes(rng, count: int) -> np.ndarray:
    corner = rng.uniform(0, 60, (count, 2))
    return np.hstack((corner, corner + rng.uniform(10, 40, (count, 2))))


def test_overlaps_are_those_of_torchvision():
    rng = np.random.default_rng(0)
    boxes, others = random_boxes(rng, 7), random_boxes(rng, 9)
    assert np.allclose(overlaps(boxes, others), box_iou(torch.from_numpy(boxes), torch.from_numpy(others)).numpy())
    assert overlaps([], others).shape == (0, 9)


def test_faces_come_best_first_within_the_picture():
    outside = Face((200, 200, 300, 300), 0.9)
    edge = Face((-20, 10, 60, 90), 0.6, ((-15, 20, -5, 30), (10, 20, 30, 40)))
    best, weak = Face((10, 10, 50, 50), 0.8), Face((1, 1, 9, 9), 0.1)
    found = find_faces(Image.new("L", (50, 80)), Fixed(edge, outside, weak, best), min_score=0.5)
    assert found == [best, Face((0, 10, 50, 80), 0.6, ((10, 20, 30, 40),))]


def test_votes_are_joined_as_by_hand():
    boxes = np.array([[0, 0, 10, 10], [50, 50, 60, 60], [0, 0, 10, 12], [100, 0, 110, 10]], float)
    joined, scores = vote(boxes, np.array([0.5, 0.9, 0.25, 0.1]))
    assert np.allclose(joined, [[50, 50, 60, 60], [0, 0, 10, (0.5 * 10 + 0.25 * 12) / 0.75], [100, 0, 110, 10]])
    assert np.allclose(scores, [0.9, 1 - 0.5 * 0.75, 0.1])
    empty, none = vote(np.zeros((0, 4)), np.zeros(0))
    assert empty.shape == (0, 4) and none.shape == (0,)


def test_votes_are_grouped_as_by_brute_force():
    rng = np.random.default_rng(1)
    boxes, scores = random_boxes(rng, 40), rng.uniform(0.05, 0.9, 40)
    left, expected = sorted(range(40), key=lambda i: -scores[i]), []
    while left:
        group = [i for i in left if box_iou(*(torch.from_numpy(boxes[[j]]) for j in (left[0], i))) >= 0.3]
        expected.append(sum(scores[i] * boxes[i] for i in group) / sum(scores[i] for i in group))
        left = [i for i in left if i not in group]
    joined, joint = vote(boxes, scores, 0.3)
    assert 3 < len(expected) < 35
    assert np.allclose(joined, expected) and (joint > 0).all() and (joint < 1).all()


def test_a_union_keeps_the_better_of_two_alike():
    strong, double = Face((0, 0, 100, 100), 0.9), Face((5, 0, 105, 100), 0.7)
    other, far = Face((95, 0, 195, 100), 0.5), Face((300, 0, 400, 100), 0.3)
    union = UnionFinder([Fixed(double, far), Fixed(strong, other)])
    assert union.find(Image.new("RGB", (8, 8))) == [strong, other, far] and not union.needs_name


def test_framing_mends_boxes_and_scores():
    framing = Framing((0.5, 0.25), ((0.1, 0.2, 0.3, 0.4), (0.6, 0.2, 0.9, 0.4)), (2, 4), (0.2, 1.0))
    grey = Image.new("L", (200, 200), 128)
    (face,) = framing.faces(grey, np.array([[0, 0, 80, 80], [0, 0, 9, 9]], float), np.array([3, -5.0]))[:1]
    assert face.box == (20, 30, 60, 50) and face.score == pytest.approx(0.6)
    # without any edge an eye stays where it mostly is
    assert np.allclose(face.eyes, [(24, 34, 32, 38), (44, 34, 56, 38)])


def test_a_box_that_is_hardly_ever_a_face_is_dropped():
    framing = Framing((1, 1), ((0, 0, 1, 1), (0, 0, 1, 1)), (0, 1), (0, 1))
    boxes, scores = np.array([[0, 0, 20, 20], [30, 30, 50, 50]], float), np.array([0.04, 0.06])
    assert [face.box for face in framing.faces(Image.new("RGB", (60, 60)), boxes, scores)] == [(30, 30, 50, 50)]


@pytest.mark.parametrize(("dx", "dy"), itertools.product((-8, 0, 8), (-5, 0, 5)))
def test_a_guessed_eye_moves_to_the_drawn_one(dx, dy):
    picture = Image.new("L", (200, 160), 230)
    drawn = (80 + dx, 60 + dy, 120 + dx, 84 + dy)
    pen = ImageDraw.Draw(picture)
    for inset in range(0, 12, 4):
        pen.ellipse((drawn[0] + inset, drawn[1] + inset, drawn[2] - inset, drawn[3] - inset), fill=inset % 8 * 50)
    guess = np.array([80, 60, 120, 84], float)
    settled = settle_eye(np.asarray(picture), guess)
    before, after = (overlaps([box], [drawn])[0, 0] for box in (guess, settled))
    assert after > 0.8
    assert after > before + 0.1 or (dx == dy == 0)
    assert (settled[2] - settled[0], settled[3] - settled[1]) == pytest.approx((40, 24))


@pytest.mark.parametrize("box", [(-30, -20, -10, -5), (195, 150, 230, 190), (50, 50, 50.4, 50.3)])
def test_an_eye_outside_the_picture_or_tiny_is_no_fault(box):
    noise = np.random.default_rng(2).integers(0, 255, (160, 200), np.uint8)
    settled = settle_eye(noise, np.array(box))
    assert np.abs(np.subtract(settled, box)).max() <= 0.26 * max(box[2] - box[0], box[3] - box[1])


def test_the_network_sees_each_size_and_answers_in_px_of_the_picture():
    seen = []

    def detect(pixels):
        assert pixels.dtype == torch.uint8
        seen.append(tuple(pixels.shape))
        height, width = pixels.shape[-2:]
        return [(torch.tensor([[0.25 * width, 0.5 * height, 0.75 * width, height]]), torch.tensor([0.5]))]

    finder = NetworkFinder(detect, sides=(64, 128))
    boxes, scores = finder.raw(Image.new("RGB", (400, 200)))
    assert seen == [(1, 3, 32, 64), (1, 3, 64, 128)]
    assert np.allclose(boxes, [[100, 100, 300, 200]]) and np.allclose(scores, [0.75])
    (face,) = finder.find(Image.new("RGB", (400, 200)))
    assert face.box == pytest.approx((100, 100, 300, 200)) and len(face.eyes) == 2
    assert face.score == pytest.approx(np.interp(0.75, FACEBOXES_FRAMING.raw, FACEBOXES_FRAMING.share))


PARTS = {"a/b.jpg": {"faces": [{"score": 0.5, "face": [1, 2, 30, 40], "left_eye": [20, 9, 5, 6], "right_eye": None}]}}


def test_stored_faces_are_read_by_name(tmp_path):
    (tmp_path / "parts.json").write_text(json.dumps({**PARTS, "none.jpg": {"size": [9, 9], "faces": []}}))
    finder, picture = StoredFinder(tmp_path / "parts.json"), Image.new("RGB", (99, 99))
    assert finder.needs_name
    assert find_faces(picture, finder, "a/b.jpg") == [Face((1, 2, 31, 42), 0.5, ((20, 9, 25, 15),))]
    assert find_faces(picture, finder, "none.jpg") == []
    for name in (None, "b.jpg"):
        with pytest.raises(UserError, match="does not list"):
            find_faces(picture, finder, name)


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 3}', '{"a": {"faces": [{"score": 1}]}}', None])
def test_a_file_of_another_form_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "parts.json").write_text(text)
    with pytest.raises(UserError, match=r"parts\.json holds no face boxes[^\n]*$"):
        StoredFinder(tmp_path / "parts.json")


@pytest.mark.parametrize("text", ["no cascade", "<?xml version='1.0'?><opencv_storage><a>1</a></opencv_storage>"])
def test_a_file_that_is_no_cascade_is_one_line(tmp_path, text):
    (tmp_path / "a.xml").write_text(text)
    with pytest.raises(UserError, match=r"a\.xml is no OpenCV cascade[^\n]*$"):
        find_faces(Image.new("RGB", (60, 60)), CascadeFinder(tmp_path / "a.xml"))
    with pytest.raises(UserError, match="does not exist"):
        CascadeFinder(tmp_path / "b.xml")


def test_the_published_cascade_survives_pickling_and_finds_nothing_in_grey():
    if not CASCADE.is_file():
        pytest.skip("no cascade under ../shared/data/weights")
    finder = CascadeFinder(CASCADE)
    grey = Image.new("RGB", (200, 150), (128, 128, 128))
    assert find_faces(grey, finder) == []
    assert find_faces(grey, pickle.loads(pickle.dumps(finder))) == []


def brute_force_match(found, truth, iou) -> list[int]:
    free, taken = set(range(len(truth))), []
    for box in found:
        over = {j: float(box_iou(torch.tensor([box]), torch.tensor([truth[j]]))) for j in free}
        best = max(over, key=over.get, default=-1)
        taken.append(best if over and over[best] >= iou else -1)
        free -= {taken[-1]}
    return taken


@pytest.mark.parametrize("iou", [0.3, 0.5])
def test_finds_are_matched_as_by_brute_force(measure, iou):
    rng = np.random.default_rng(3)
    for _ in range(20):
        truth = random_boxes(rng, int(rng.integers(0, 6)))
        found = np.vstack((truth + rng.normal(0, 6, truth.shape), random_boxes(rng, 4)))
        assert measure.match(found, truth, iou).tolist() == brute_force_match(found.tolist(), truth.tolist(), iou)


def test_a_true_face_is_found_only_once(measure):
    truth = np.array([[0, 0, 10, 10.0]])
    assert measure.match(np.array([[0, 0, 10, 9.0], [0, 0, 10, 10]]), truth, 0.5).tolist() == [0, -1]


def test_rates_over_thresholds_are_those_of_scikit_learn(measure):
    rng = np.random.default_rng(4)
    scores, right = rng.permutation(50) / 50, rng.random(50) < 0.4
    precision, recall, thresholds = precision_recall_curve(right, scores)
    for p, r, threshold in zip(precision, recall, thresholds, strict=False):
        row = measure.precision_recall(scores, right, int(right.sum()), threshold)
        assert (row["precision"], row["recall"]) == pytest.approx((p, r))
        assert row["f1"] == pytest.approx(2 * p * r / (p + r) if p + r else 0)
    # the area under precision made to fall; faces that nobody found count
    falling = np.maximum.accumulate(precision[:-1])
    area = float((falling * -np.diff(recall)).sum())
    assert measure.average_precision(scores, right, int(right.sum())) == pytest.approx(area)
    assert measure.average_precision(scores, right, 2 * int(right.sum())) == pytest.approx(area / 2)


def test_rates_of_nothing_are_null(measure):
    none = np.zeros(0)
    row = measure.precision_recall(none, none.astype(bool), 0, 0.5)
    assert (row["precision"], row["recall"], row["f1"], row["finds"]) == (None, None, None, 0)
    assert measure.average_precision(none, none.astype(bool), 0) is None
    assert measure.average_precision(none, none.astype(bool), 3) == 0


def test_the_script_measures_a_constructed_case(measure, tmp_path):
    """Two pictures, three true faces (two in one picture): one found well, one badly framed, one missed; one false."""
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (200, 100)).save(tmp_path / name)
    rows = [("a.png", [0, 0, 40, 40]), ("a.png", [100, 0, 140, 40]), ("b.png", [0, 0, 40, 40])]
    eyes = [[5, 5, 15, 15]]
    table = [
        {"sample_id": str(i), "file_name": name, "split": "test", "box": box, "eyes": eyes if i == 0 else None}
        for i, (name, box) in enumerate(rows)
    ]
    write_manifest(tmp_path, [*table, {"sample_id": "c", "file_name": "c.png", "split": "train"}])
    good = {"score": 0.9, "face": [0, 0, 40, 36], "left_eye": [5, 5, 10, 5]}
    bad, false = {"score": 0.8, "face": [100, 0, 40, 16]}, {"score": 0.6, "face": [60, 50, 20, 20]}
    parts = {"a.png": {"faces": [bad, false, good]}, "b.png": {"faces": [{"score": 0.1, "face": [0, 0, 40, 40]}]}}
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    spec, out = f"boxes:{tmp_path}/parts.json", tmp_path / "out.json"
    flags = f"--data_path {tmp_path} --split test --device cpu --out {out} --sheet {tmp_path}/sheet.png".split()
    measure.main(["--finder", spec, "--min_score", "0.5", *flags])
    result = json.loads(out.read_text())
    half, third = result["detection"]
    assert (result["pictures"], result["faces"], result["pictures_with_a_find"]) == (2, 3, 0.5)
    assert (half["iou"], half["finds"]) == (0.5, 3) and third["iou"] == 0.3
    assert (half["precision"], half["recall"]) == pytest.approx((1 / 3, 1 / 3))
    assert (third["precision"], third["recall"], third["f1"]) == pytest.approx((2 / 3, 2 / 3, 2 / 3))
    assert half["average_precision"] == pytest.approx((1 + 2 / 4) / 3)
    assert [row["finds"] for row in half["by_threshold"] if row["threshold"] in (0.05, 0.7, 0.95)] == [4, 2, 0]
    assert result["eyes"] == pytest.approx({"eyes": 1, "iou": 0.5, "coverage": 0.5})
    with Image.open(tmp_path / "sheet.png") as drawn:
        assert drawn.width > 400


def test_the_script_refuses_in_one_line(measure, tmp_path, capsys):
    Image.new("RGB", (20, 20)).save(tmp_path / "a.png")
    write_manifest(tmp_path, [{"sample_id": "a", "file_name": "a.png", "split": "train"}])
    (tmp_path / "parts.json").write_text("{}")
    flags = f"--data_path {tmp_path} --device cpu --out {tmp_path}/out.json".split()
    stored = f"boxes:{tmp_path}/parts.json"
    assert "no row of split test" in fails(measure.main, capsys, ["--finder", stored, "--split", "test", *flags])
    assert "does not list a.png" in fails(measure.main, capsys, ["--finder", stored, *flags])
    assert "is not known" in fails(measure.main, capsys, ["--finder", "yolo:a", *flags])
    (tmp_path / "a.png").write_bytes(b"torn")
    assert "can be read" in fails(measure.main, capsys, ["--finder", stored, *flags])
