"""The estimate of the figure: drawn pictures with a known mask, ToonFaces, and pictures of odd shapes.

Run: python -m pytest tests/test_foreground.py
"""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tests.conftest import ROOT
from util.data.foreground import estimate_foreground, figure_prior
from util.data.images import decode_image
from util.data.manifest import read_manifest, write_manifest
from util.data.smart_crop import saliency

SIZE = 160


def gradient() -> Image.Image:
    down, right = np.mgrid[:SIZE, :SIZE] / SIZE
    levels = np.stack([150 + 70 * down, 180 - 60 * down, 200 + 30 * right], -1)
    return Image.fromarray(levels.astype(np.uint8))


def body(width: int, top: int) -> list[tuple[int, int]]:
    """Shoulders that end at the lower border."""
    middle = SIZE // 2
    return [(middle - width, SIZE), (middle - width // 2, top), (middle + width // 2, top), (middle + width, SIZE)]


SHAPES = {
    "inside": [("ellipse", [50, 40, 110, 130])],
    "at the lower border": [("ellipse", [55, 30, 105, 90]), ("polygon", body(50, 85))],
    "at three borders": [("ellipse", [50, 25, 110, 95]), ("polygon", body(100, 85))],
}
GROUNDS = {"plain": Image.new("RGB", (SIZE, SIZE), (225, 235, 240)), "gradient": gradient()}


def drawn(shapes, ground: Image.Image) -> tuple[Image.Image, np.ndarray]:
    """A figure with outlines, hair and a face with eyes; and its mask, bool (h, w)."""
    picture, mask = ground.copy(), Image.new("L", ground.size)
    for kind, place in shapes:
        getattr(ImageDraw.Draw(picture), kind)(place, fill=(120, 60, 50), outline=(30, 15, 15), width=2)
        getattr(ImageDraw.Draw(mask), kind)(place, fill=255)
    x1, y1, x2, y2 = shapes[0][1]
    draw = ImageDraw.Draw(picture)
    draw.ellipse([x1 + 10, y1 + 18, x2 - 10, y2 - 4], fill=(250, 222, 205), outline=(30, 15, 15))
    for x in (x1 + 22, x2 - 30):
        draw.ellipse([x, (y1 + y2) // 2, x + 8, (y1 + y2) // 2 + 12], fill=(40, 60, 150))
    return picture, np.asarray(mask) > 127


def overlap(estimate: np.ndarray, mask: np.ndarray) -> float:
    """Intersection over union of the estimate above one half and the mask, at the size of the mask."""
    large = Image.fromarray(estimate).resize(mask.shape[::-1], Image.Resampling.BILINEAR)
    found = np.asarray(large) > 0.5
    return (found & mask).sum() / (found | mask).sum()


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_figure_is_found(shape, ground):
    picture, mask = drawn(SHAPES[shape], GROUNDS[ground])
    estimate = estimate_foreground(picture)
    assert estimate.dtype == np.float32 and estimate.shape == (96, 96)
    assert estimate.min() >= 0 and estimate.max() <= 1
    assert overlap(estimate, mask) > 0.85


def test_hair_that_fills_the_upper_border_is_told_by_the_face():
    picture = Image.new("RGB", (SIZE, SIZE), (235, 235, 240))
    mask = Image.new("L", (SIZE, SIZE))
    for image, hair in ((picture, (90, 50, 40)), (mask, 255)):
        ImageDraw.Draw(image).rectangle([10, 0, SIZE - 10, 110], fill=hair)
    draw = ImageDraw.Draw(picture)
    draw.ellipse([40, 40, 120, 140], fill=(250, 222, 205), outline=(30, 15, 15), width=2)
    ImageDraw.Draw(mask).ellipse([40, 40, 120, 140], fill=255)
    truth = np.asarray(mask) > 127
    alone = overlap(estimate_foreground(picture), truth)
    known = overlap(estimate_foreground(picture, [(40, 40, 120, 140)]), truth)
    assert known > alone + 0.2 and known > 0.7


def test_toonfaces_are_found_better_than_by_trivial_means(tmp_path, run_script):
    flags = "--identities 4 --images 40 --size 96 --open_identities 0 --novel_identities 0"
    run_script("datasets/prepare_toonfaces.py", "--out", tmp_path, *flags.split())
    manifest = read_manifest(tmp_path)
    y, x = (np.mgrid[:96, :96] + 0.5) / 96
    ellipse = (((y - 0.6) / 0.58) ** 2 + ((x - 0.5) / 0.35) ** 2 < 1).astype(np.float32)  # the best one, on others
    scores = []
    for i in range(0, len(manifest), 2):
        picture, record = decode_image(manifest.path(i)), manifest.row(i)
        mask = np.asarray(decode_image(manifest.mask_path(i)).convert("L")) > 127
        salient = (saliency(np.asarray(picture)) > 0.15).astype(np.float32)
        known = estimate_foreground(picture, [record["box"]])
        found = (estimate_foreground(picture), known, np.ones_like(ellipse), ellipse, salient)
        scores.append([overlap(values, mask) for values in found])
    estimate, known, *trivial = np.mean(scores, 0)
    assert estimate > max(trivial) + 0.1 and known > 0.85


def test_it_is_the_same_in_another_process():
    picture, _ = drawn(SHAPES["inside"], GROUNDS["gradient"])
    code = (
        "import sys, hashlib; from tests.test_foreground import *\n"
        "picture, _ = drawn(SHAPES['inside'], GROUNDS['gradient'])\n"
        "print(hashlib.sha256(estimate_foreground(picture).tobytes()).hexdigest())"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
        for _ in range(2)
    ]
    assert runs[0] == runs[1] and len(runs[0]) == 65
    estimate = estimate_foreground(picture)
    estimate_foreground(picture.rotate(90))
    assert np.array_equal(estimate_foreground(picture), estimate)


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (200, 1), (1, 300), (97, 13), (25, 25), (1000, 20)])
def test_any_size_and_a_picture_of_one_colour(size):
    for colour in ("white", "black"):
        estimate = estimate_foreground(Image.new("RGB", size, colour), [(0, 0, *size)])
        longest = max(size)
        assert estimate.shape == tuple(max(1, round(side * 96 / longest)) for side in size[::-1])
        assert np.isfinite(estimate).all() and estimate.min() >= 0 and estimate.max() <= 1


def test_the_prior_is_the_head_and_what_is_below_it():
    prior = figure_prior((100, 100), [(40, 20, 60, 40)])
    assert prior[30, 50] > 0.9 and prior[60, 50] > 0.5  # face, body
    assert prior[30, 90] < 0.01 and prior[5, 50] < 0.3 and prior[95, 2] < 0.3
    assert np.array_equal(prior, figure_prior((100, 100), [(40, 20, 60, 40)])[:, ::-1])
    assert not figure_prior((10, 10), []).any()


def test_the_measure_beside_its_floors(tmp_path, run_script):
    """Two pictures whose figure is a central ellipse: the floor fits it, and its best radius is found."""
    rows = []
    box = [SIZE // 2 - 32, SIZE // 2 - 32, SIZE // 2 + 32, SIZE // 2 + 32]
    for name in "ab":
        picture, mask = GROUNDS["plain"].copy(), Image.new("L", (SIZE, SIZE))
        ImageDraw.Draw(picture).ellipse(box, fill=(60, 20, 90))
        ImageDraw.Draw(mask).ellipse(box, fill=255)
        picture.save(tmp_path / f"{name}.png")
        mask.save(tmp_path / f"{name}_mask.png")
        rows.append({"sample_id": name, "file_name": f"{name}.png", "mask_file": f"{name}_mask.png", "split": "test"})
    write_manifest(tmp_path, rows)
    out = tmp_path / "new" / "a.json"
    run_script("scripts/measure_foreground.py", "--data_path", tmp_path, "--split", "test", "--out", out)
    result = json.loads(out.read_text())
    assert result["pictures"] == 2 and result["iou"]["ellipse"] > 0.95 > result["iou"]["saliency"]
    assert result["iou"]["estimate"] > 0.9 and 0 < result["iou"]["estimate_with_faces"] <= 1
