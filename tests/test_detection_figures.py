"""The picture of what a detector found: each box in the colour of what became of it.

Run: python -m pytest tests/test_detection_figures.py
"""

import numpy as np
import pytest
from PIL import Image, ImageColor

from util.benchmark.detection import FACE, Scene, clean
from util.benchmark.detection_errors import diagnose
from util.benchmark.detection_figures import FOUND, OTHER, TRUE, found_sheet
from util.data.sheet import PAPER, sheet

HOUSE = (10, 100, 60, 150)  # true boxes and finds, px of a picture of 300 x 200
TREE, MOON = (120, 100, 170, 150), (230, 20, 280, 70)


def a_scene(boxes, found, scores) -> Scene:
    boxes, found = (np.array(each, float).reshape(-1, 4) for each in (boxes, found))
    return Scene(boxes, np.full(len(boxes), FACE), found, np.array(scores, float), np.full(len(found), FACE))


def coloured(picture: np.ndarray, colour: str, box) -> bool:
    """Whether the lower edge of the box has that colour, up to the rounding of a resize."""
    x1, _, x2, y2 = box
    edge = picture[y2 - 2 : y2, x1 + 5 : x2 - 5].reshape(-1, 3).astype(int)
    return bool((np.abs(edge - ImageColor.getrgb(colour)).max(1) < 30).any())


@pytest.fixture
def drawn(tmp_path) -> np.ndarray:
    """The first of three pictures: a right find, a wrong one, and a true box that only a find of a low score has."""
    first = a_scene([HOUSE, MOON], [HOUSE, TREE, MOON], [0.9, 0.8, 0.1])
    scenes, _ = clean([first, a_scene([HOUSE], [], []), a_scene([], [], [])])
    name = found_sheet(tmp_path, diagnose(scenes, FACE, 0.5), scenes, lambda _: Image.new("RGB", (300, 200)))
    whole = np.asarray(Image.open(tmp_path / name))
    rows = np.flatnonzero((whole[:, 4:304] == 0).all(2).any(1) & (whole[:, 250] == 0).all(1))
    return whole[rows[0] : rows[0] + 200, 4:304]


def test_boxes_have_the_colour_of_what_became_of_them(drawn):
    colours = {"right": OTHER, "wrong": FOUND, "not found": TRUE}
    seen = {
        name: {what for what, colour in colours.items() if coloured(drawn, colour, box)}
        for name, box in {"house": HOUSE, "tree": TREE, "moon": MOON}.items()
    }
    assert seen == {"house": {"right"}, "tree": {"wrong"}, "moon": {"not found"}}


def test_pictures_are_spread_over_the_data_and_the_last_is_among_them(tmp_path):
    shown = []

    def load(number: int) -> Image.Image:
        shown.append(number)
        return Image.new("RGB", (30, 20))

    scenes, _ = clean([a_scene([HOUSE], [], [])] * 11)
    found_sheet(tmp_path, diagnose(scenes), scenes, load, most=6)
    assert shown == [0, 2, 4, 6, 8, 10]
    shown.clear()
    found_sheet(tmp_path, diagnose(scenes), scenes, load, most=50)
    assert shown == list(range(11))


def test_a_row_of_a_sheet_is_as_high_as_its_highest_picture():
    red, blue = (Image.new("RGB", size, colour) for size, colour in (((200, 50), "red"), ((100, 100), "blue")))
    made = sheet([[red, None], [red, blue]], cell=100, gap=4)
    assert made.size == (4 + 2 * 104, 4 + (25 + 4) + (100 + 4))
    assert made.getpixel((50, 4)) == made.getpixel((50, 28)) == (255, 0, 0) and made.getpixel((50, 29)) == PAPER
    middle = 4 + 25 + 4 + 50  # of the second row, where the low picture stands
    assert made.getpixel((50, middle)) == (255, 0, 0) and made.getpixel((50, middle - 14)) == PAPER
    assert made.getpixel((150, middle - 49)) == (0, 0, 255)
