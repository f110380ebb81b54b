"""Whole pictures with their faces: grouping rows, random views whose boxes fit their pixels, letterboxes.

Run: python -m pytest tests/test_scenes.py
"""

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from util.data.manifest import write_manifest
from util.data.scenes import PAD, Scenes, SceneView, Span, draw_span, letterbox
from util.data.sources import open_source
from util.run.errors import UserError
from util.run.seed import rng_for

FACES = [(30, 20, 62, 60), (80, 50, 110, 92), (4, 70, 20, 90)]
COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def painted(size=(128, 96)) -> Image.Image:
    """Faces that are rectangles of one colour each, so that a view shows by itself where they are."""
    picture = Image.new("RGB", size, (90, 90, 90))
    for (x1, y1, x2, y2), colour in zip(FACES, COLOURS, strict=True):
        ImageDraw.Draw(picture).rectangle((x1, y1, x2 - 1, y2 - 1), fill=colour)
    return picture


def record_of(boxes, labels=None) -> dict:
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    labels = np.zeros(len(boxes), np.int64) if labels is None else np.array(labels, np.int64)
    return {"boxes": boxes, "labels": labels, "known": np.array([True, True])}


def extent(image: torch.Tensor, colour: tuple) -> tuple[float, ...] | None:
    """x1, y1, x2, y2 of the pixels of (3, H, W) that have about this colour."""
    near = (image.float() - torch.tensor(colour)[:, None, None]).abs().amax(0) < 110
    if not near.any():
        return None
    rows, columns = near.any(1).nonzero()[:, 0], near.any(0).nonzero()[:, 0]
    return columns[0].item(), rows[0].item(), columns[-1].item() + 1, rows[-1].item() + 1


@pytest.mark.parametrize("size", [(96, 128), (64, 64), (160, 96)])
def test_boxes_of_a_view_are_where_its_pixels_are(size):
    """Many views, larger and smaller than the canvas, mirrored or not: each box against the pixels of its colour."""
    picture, view, seen = painted(), SceneView(size, 3), 0
    for i in range(60):
        sample = view(picture, record_of(FACES), rng_for(i))
        boxes = sample["boxes"][sample["labels"] >= 0]
        assert sample["image"].shape == (3, *size) and sample["image"].dtype == torch.uint8 and len(boxes)
        shown = [found for colour in COLOURS if (found := extent(sample["image"], colour))]
        for box in boxes:
            nearest = min(np.abs(np.array(found) - box.numpy()).max() for found in shown)
            assert nearest <= 1.5
            seen += 1
        assert (sample["boxes"][sample["labels"] < 0] == -1).all()
    assert seen > 100


def test_views_are_scaled_as_asked_and_mirrored_half_the_time():
    picture, record = painted(), record_of(FACES[:1])
    sides, mirrored = [], 0
    for i in range(300):
        sample = SceneView((96, 128), 1, scale=(0.5, 0.5))(picture, record, rng_for(i))
        x1, y1, x2, y2 = sample["boxes"][0].tolist()
        sides.append((x2 - x1, y2 - y1))
        shown = torch.nonzero((sample["image"] != torch.tensor(PAD, dtype=torch.uint8)[:, None, None]).any(0))
        left = shown[:, 1].min().item()
        mirrored += (x1 - left) > 20  # 15 px from the left of its picture, or 33
    assert np.allclose(sides, [16, 20], atol=0.01)
    assert 110 < mirrored < 190
    factors = []
    for i in range(300):
        box = SceneView((960, 1280), 1, scale=(0.25, 1.0))(picture, record, rng_for(i))["boxes"][0]
        factors.append(float(box[2] - box[0]) / 32 / 10)
    assert min(factors) > 0.24 and max(factors) < 1.01 and abs(np.median(np.log(factors)) - np.log(0.5)) < 0.15


def test_a_cut_keeps_some_face():
    picture = painted()
    for i in range(200):
        sample = SceneView((96, 128), 3, scale=(3, 4))(picture, record_of(FACES), rng_for(i))
        assert (sample["labels"] == 0).any()


def test_a_view_depends_on_its_numbers_alone():
    one, two = (SceneView((64, 64), 3, jitter=0.3)(painted(), record_of(FACES), rng_for(5)) for _ in range(2))
    other = SceneView((64, 64), 3, jitter=0.3)(painted(), record_of(FACES), rng_for(6))
    assert all(torch.equal(one[name], two[name]) for name in one) and not torch.equal(one["image"], other["image"])


def test_pictures_without_faces_and_of_odd_sizes():
    for size in ((4000, 3), (1, 1), (3, 2000)):
        sample = SceneView((64, 96), 2)(Image.new("RGB", size, "white"), record_of([]), rng_for(1))
        assert sample["image"].shape == (3, 64, 96) and (sample["labels"] == -1).all()


@pytest.mark.parametrize("size", [(200, 100), (100, 200), (4000, 3000), (33, 31)])
def test_a_letterbox_leads_back_to_the_picture(size):
    canvas, scale = letterbox(Image.new("RGB", size, "white"), 128, 32)
    assert all(side % 32 == 0 for side in canvas.shape[1:]) and max(canvas.shape[1:]) == 128
    white = extent(canvas, (255, 255, 255))
    assert np.abs(np.array(white) - [0, 0, size[0] * scale[0], size[1] * scale[1]]).max() < 0.01
    assert max(size[0] * scale[0], size[1] * scale[1]) == 128


def test_spans_by_hand():
    assert np.allclose(Span(10, 30, 5, 40).place(np.array([10.0, 20, 30])), [5, 25, 45])
    for i in range(50):
        span = draw_span(100, 50, 2.0, (70.5, 82.0), rng_for(i))
        assert span.length == 50 and span.high - span.low == 25 and span.low <= 70 and 82 <= span.high <= 100
        wide = draw_span(100, 50, 2.0, (10.0, 95.0), rng_for(i))
        assert wide.low >= 10 and wide.high <= 95  # all that is seen is of the face


@pytest.fixture
def folder(tmp_path):
    """Two faces in a.png, eyes of both known; one in b.png, without eyes; none in c.png; in d.png one outside."""
    for name in "abcd":
        painted().save(tmp_path / f"{name}.png")
    eyes = [[35, 30, 40, 35], [50, 30, 55, 35]]
    rows = [
        {"sample_id": "0", "file_name": "a.png", "box": FACES[0], "eyes": eyes, "split": "train"},
        {"sample_id": "1", "file_name": "b.png", "box": FACES[1], "split": "train"},
        {"sample_id": "2", "file_name": "a.png", "box": FACES[1], "eyes": eyes[:1], "split": "train"},
        {"sample_id": "3", "file_name": "c.png", "split": "train"},
        {"sample_id": "4", "file_name": "d.png", "box": [120, 10, 160, 30], "split": "train"},
    ]
    write_manifest(tmp_path, rows)
    return tmp_path


def test_rows_of_one_picture_are_one_sample(folder):
    scenes = Scenes(open_source(folder, "train"))
    assert scenes.files == ["a.png", "b.png", "c.png", "d.png"] and scenes.faces == 4 and scenes.most == 5
    a, b, c, d = (scenes.record(i) for i in range(4))
    assert a["boxes"].tolist() == [
        [*map(float, box)] for box in (*FACES[:2], (35, 30, 40, 35), (50, 30, 55, 35), (35, 30, 40, 35))
    ]
    assert a["labels"].tolist() == [0, 0, 1, 1, 1] and a["known"].tolist() == [True, True]
    # the eyes of b's face are not known: no reason to teach that it has none
    assert b["labels"].tolist() == [0] and b["known"].tolist() == [True, False]
    assert len(c["boxes"]) == 0 and c["known"].tolist() == [True, True]
    assert d["boxes"].tolist() == [[120, 10, 160, 30]]
    sample = SceneView((96, 128), 5, scale=(1, 1), flip=False)(scenes.load(3), d, rng_for(0))
    assert (sample["labels"] == -1).all()  # a fifth of that box lies in the picture


def test_the_fingerprint_follows_the_boxes(folder):
    before = Scenes(open_source(folder, "train")).fingerprint
    rows = [{"sample_id": "0", "file_name": "a.png", "box": (1, 2, 30, 40), "split": "train"}]
    write_manifest(folder, rows)
    assert Scenes(open_source(folder, "train")).fingerprint != before


def test_data_without_boxes_is_refused(tmp_path):
    painted().save(tmp_path / "a.png")
    write_manifest(tmp_path, [{"sample_id": "0", "file_name": "a.png", "split": "train"}])
    with pytest.raises(UserError, match="no face boxes"):
        Scenes(open_source(tmp_path, "train"))
