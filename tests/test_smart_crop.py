"""The saliency-guided crop on drawn scenes whose character stands at a known place.

Run: python -m pytest tests/test_smart_crop.py
"""

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageOps
from skimage import color

from util.data.images import crop_region
from util.data.manifest import write_manifest
from util.data.smart_crop import rgb_to_lab, saliency, salient_centre
from visualize import crops

GROUNDS = {"sky": (120, 180, 235), "night": (25, 25, 45), "paper": (250, 250, 250), "wall": (170, 120, 90)}


def scene(size: tuple[int, int], face: tuple[int, int, int], ground="sky") -> Image.Image:
    """A plain ground with hills, and one simple anime head: face = (centre x, centre y, radius), px."""
    image = Image.new("RGB", size, GROUNDS[ground])
    draw = ImageDraw.Draw(image)
    width, height = size
    darker = tuple(int(c * 0.8) for c in GROUNDS[ground])
    draw.ellipse((-width * 0.2, height * 0.8, width * 1.2, height * 1.4), fill=darker)
    x, y, r = face
    draw.ellipse((x - 1.4 * r, y - 1.6 * r, x + 1.4 * r, y + 1.5 * r), fill=(90, 60, 130))
    draw.ellipse((x - r, y - r, x + r, y + 1.1 * r), fill=(250, 222, 200), outline=(40, 20, 30), width=max(1, r // 20))
    for side in (-1, 1):
        ex = x + side * 0.45 * r
        draw.ellipse((ex - 0.22 * r, y - 0.2 * r, ex + 0.22 * r, y + 0.4 * r), fill=(60, 30, 120))
        draw.ellipse((ex - 0.1 * r, y - 0.12 * r, ex + 0.02 * r, y + 0.05 * r), fill=(255, 255, 255))
    draw.line((x - 0.2 * r, y + 0.75 * r, x + 0.2 * r, y + 0.75 * r), fill=(160, 60, 60), width=max(1, r // 12))
    return image


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize("place", [0.15, 0.3, 0.5, 0.7, 0.85])
def test_wide_art_keeps_the_character(ground, place):
    x = int(1920 * place)
    x1, _, x2, _ = crop_region(scene((1920, 1080), (x, 480, 160), ground), 1.0)
    assert x1 <= max(0, x - 160) and min(1920, x + 160) <= x2


@pytest.mark.parametrize("place", [0.15, 0.3, 0.5, 0.7])
def test_tall_art_keeps_the_character(place):
    y = int(1800 * place)
    _, y1, _, y2 = crop_region(scene((900, 1800), (450, y, 150)), 1.0)
    assert y1 <= max(0, y - 100) and y + 100 <= y2


def test_it_is_deterministic_and_does_not_touch_the_picture():
    image = scene((800, 300), (650, 140, 60))
    before = image.tobytes()
    assert crop_region(image, 1.0) == crop_region(image.copy(), 1.0)
    assert image.tobytes() == before


def test_a_mirrored_picture_gets_the_mirrored_crop():
    image = scene((960, 400), (700, 180, 70))
    x1, _, x2, _ = crop_region(image, 1.0)
    m1, _, m2, _ = crop_region(ImageOps.mirror(image), 1.0)
    assert abs((960 - m2) - x1) <= 10 and abs((960 - m1) - x2) <= 10  # one cell of the thumbnail


def test_without_anything_to_see_it_is_the_usual_place():
    plain = Image.new("RGB", (1000, 400), (128, 128, 128))
    assert salient_centre(plain, 400, axis=0) == pytest.approx(500, abs=11)


@pytest.mark.parametrize("size", [(1, 1), (2, 40), (40, 2), (7, 5), (3000, 2)])
@pytest.mark.parametrize("axis", [0, 1])
def test_centre_lies_in_the_picture_whatever_its_size(size, axis):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    centre = salient_centre(Image.fromarray(noise), min(size), axis)
    assert 0 <= centre <= size[axis]


def test_saliency_is_highest_on_the_head():
    thumb = np.asarray(scene((96, 54), (70, 25, 10)))
    heat = saliency(thumb)
    assert heat.shape == (54, 96) and heat.min() >= 0
    y, x = np.unravel_index(heat.argmax(), heat.shape)
    assert abs(x - 70) <= 15 and abs(y - 25) <= 15


def test_contact_sheet(tmp_path, capsys):
    """Five wide pictures on the sheet; of their five off-centre faces a central crop would lose some."""
    places = [120, 300, 480, 800, 840]
    for i, x in enumerate(places):
        scene((960, 400), (x, 180, 60)).save(tmp_path / f"{i}.png")
    Image.new("RGB", (100, 100)).save(tmp_path / "square.png")
    rows = [
        {"sample_id": f"{i}", "file_name": f"{i}.png", "split": "train", "box": [x - 60, 120, x + 60, 240]}
        for i, x in enumerate(places)
    ]
    write_manifest(tmp_path, [*rows, {"sample_id": "square", "file_name": "square.png", "split": "train"}])
    crops.main(["--data_path", str(tmp_path), "--out", str(tmp_path / "sheets" / "crops.png"), "--input_size", "64"])
    printed = capsys.readouterr().out
    assert "5 of 5 elongated pictures" in printed
    assert "of 5 known faces the smart crop keeps 5 without their boxes, a central crop 2" in printed
    assert Image.open(tmp_path / "sheets" / "crops.png").width > 6 * 64


def test_lab_equals_scikit_image():
    rgb = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    rgb[:20] //= 16  # the dark, linear part of both curves
    assert np.abs(rgb_to_lab(rgb) - color.rgb2lab(rgb)).max() < 0.05
