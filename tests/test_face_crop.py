"""Faces cut out of scenes: the right region, boxes that go along, and a fingerprint that knows the padding.

Run: python -m pytest tests/test_face_crop.py
"""

import argparse

import numpy as np
import pytest
from PIL import Image

from util.data.face_crop import FaceCrops, face_region, open_pictures
from util.data.loader import open_loader
from util.data.manifest import write_manifest
from util.data.sources import open_source
from util.run.dist import World
from util.run.errors import UserError

RED, GREEN, BLUE = (200, 0, 0), (0, 200, 0), (0, 0, 200)


@pytest.fixture
def scene(tmp_path):
    """A picture 100 x 60 with a green face and, inside it, a blue eye; a second sample of it without a box."""
    image = Image.new("RGB", (100, 60), RED)
    image.paste(GREEN, (40, 20, 60, 40))
    image.paste(BLUE, (44, 24, 50, 28))
    image.save(tmp_path / "a.png")
    face = {"box": [40, 20, 60, 40], "eyes": [[44, 24, 50, 28]]}
    rows = [
        {"sample_id": "face", "file_name": "a.png", "split": "train", "identity": "x", **face},
        {"sample_id": "whole", "file_name": "a.png", "split": "train", "identity": "x"},
        {"sample_id": "edge", "file_name": "a.png", "split": "train", "identity": "x", "box": [90, 0, 100, 10]},
    ]
    write_manifest(tmp_path, rows)
    return tmp_path


def colours(image: Image.Image) -> set:
    return {color for _, color in image.getcolors()}


@pytest.mark.parametrize(("padding", "side", "seen"), [(0.0, 20, {GREEN, BLUE}), (0.5, 40, {GREEN, BLUE, RED})])
def test_the_crop_is_the_box_and_its_padding(scene, padding, side, seen):
    crops = FaceCrops(open_source(scene, "train", val_fraction=0.0), padding)
    image = crops.load(0)
    assert image.size == (side, side) and colours(image) == seen


@pytest.mark.parametrize("padding", [0.0, 0.25, 0.5, 3.0])
def test_boxes_go_along(scene, padding):
    crops = FaceCrops(open_source(scene, "train", val_fraction=0.0), padding)
    image, record = np.asarray(crops.load(0)), crops.record(0)
    x1, y1, x2, y2 = map(int, record["box"])
    assert {tuple(p) for p in image[y1:y2, x1:x2].reshape(-1, 3).tolist()} == {GREEN, BLUE}
    assert (x2 - x1, y2 - y1) == (20, 20)
    x1, y1, x2, y2 = map(int, record["eyes"][0])
    assert {tuple(p) for p in image[y1:y2, x1:x2].reshape(-1, 3).tolist()} == {BLUE}
    assert crops.column("eyes")[0] == record["eyes"] and crops.column("identity")[0] == "x"


def test_a_sample_without_a_box_keeps_its_picture_and_is_counted(scene, caplog):
    crops = FaceCrops(open_source(scene, "train", val_fraction=0.0), 0.0)
    assert crops.load(1).size == (100, 60) and crops.record(1)["box"] is None
    assert "1 of 3 samples have no face box" in caplog.text


def test_a_crop_ends_at_the_border_of_the_picture(scene):
    crops = FaceCrops(open_source(scene, "train", val_fraction=0.0), 0.5)
    assert crops.load(2).size == (15, 15)  # 20 px asked for, 5 of them outside on two sides
    assert crops.record(2)["box"] == [5, 0, 15, 10]


def test_a_long_box_is_shown_in_a_square():
    assert face_region([10, 20, 30, 80], 0.0) == (-10, 20, 50, 80)


def test_the_padding_is_part_of_the_fingerprint(scene):
    source = open_source(scene, "train", val_fraction=0.0)
    prints = {source.fingerprint, FaceCrops(source, 0.0).fingerprint, FaceCrops(source, 0.5).fingerprint}
    assert len(prints) == 3


def test_the_flag_decides(scene):
    args = argparse.Namespace(data_path=str(scene), labels="auto", val_fraction=0.0, face_padding=None)
    assert open_pictures(args, "train").load(0).size == (100, 60)
    args.face_padding = 0.0
    assert open_pictures(args, "train").load(0).size == (20, 20)


def test_a_stream_has_no_boxes_to_cut_to(scene):
    args = argparse.Namespace(
        streaming=True, face_padding=0.5, epoch_images=8, batch_size=2, accum_iter=1, seed=0, num_workers=0
    )
    with pytest.raises(UserError, match="--streaming"):
        open_loader(args, None, World(), None)
