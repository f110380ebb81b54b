"""Backgrounds: what anime puts behind a face."""

import numpy as np
from PIL import Image

from util.toonfaces.canvas import Canvas
from util.toonfaces.geometry import ellipse, placed, points
from util.toonfaces.look import Look
from util.toonfaces.style import WHITE, mix

_STAR = points((0, -1), (0.2, -0.2), (1, 0), (0.2, 0.2), (0, 1), (-0.2, 0.2), (-1, 0), (-0.2, -0.2))

_PETAL = points((-1.2, 0), (-0.2, -0.7), (1.0, -0.35), (0.75, 0), (1.0, 0.35), (-0.2, 0.7))


def paint_background(canvas: Canvas, look: Look, width: int, height: int) -> None:
    """Fill the canvas behind every figure. width, height: px of the final picture."""
    top, bottom = (look.style.tone(c) for c in (look.backdrop, mix(look.backdrop, look.backdrop_2, 0.55)))
    if look.style.hatch:  # a pencil drawing is mostly bare paper
        top, bottom = (mix(c, look.style.paper, 0.6) for c in (top, bottom))
    _ramp(canvas.image, top, bottom)
    _PATTERN[look.background](canvas, look, width, height, top, bottom)
    if look.style.sparkle > 2:
        _sparkles(canvas, look, width, height)


def _ramp(image: Image.Image, top, bottom) -> None:
    """A vertical gradient over the whole picture."""
    column = np.linspace(top, bottom, image.height).round().astype(np.uint8)[:, None]
    image.paste(Image.fromarray(column).resize(image.size, Image.Resampling.NEAREST))


def _sparkles(canvas: Canvas, look: Look, width: int, height: int) -> None:
    rng = look.rng("sparkles")
    for _ in range(7):
        middle = np.array([rng.uniform(0, width), rng.uniform(0, height)])
        canvas.fill(_STAR * rng.uniform(0.015, 0.05) * height + middle, WHITE, alpha=0.85)


def _plain(canvas, look, width, height, top, bottom) -> None:
    pass


def _sky(canvas, look, width, height, top, bottom) -> None:
    _ramp(canvas.image, look.style.tone((120, 176, 240)), look.style.tone((224, 240, 252)))
    rng = look.rng("background")
    cloud = look.style.tone((252, 253, 255))
    for _ in range(3):
        x, y, size = rng.uniform(0, width), rng.uniform(0, 0.8 * height), rng.uniform(0.08, 0.16) * height
        for dx, dy, r in ((-1.3, 0.2, 0.7), (-0.5, -0.2, 1.0), (0.5, -0.1, 0.9), (1.3, 0.25, 0.6)):
            canvas.fill(ellipse((x + dx * size, y + dy * size), (r * size * 1.2, r * size * 0.8), 16), cloud)


def _rays(canvas, look, width, height, top, bottom) -> None:
    rng = look.rng("background")
    count = int(rng.integers(12, 26))
    pale = mix(top, WHITE, 0.45)
    centre = np.array([width * 0.5, height * 0.5])
    reach = width + height
    for k in range(count):
        a = 2 * np.pi * (k + rng.uniform(-0.2, 0.2)) / count
        b = a + np.pi / count * rng.uniform(0.5, 1.2)
        ray = np.array([[0, 0], [np.cos(a), np.sin(a)], [np.cos(b), np.sin(b)]]) * reach + centre
        canvas.fill(ray, pale)


def _bokeh(canvas, look, width, height, top, bottom) -> None:
    rng = look.rng("background")
    for _ in range(14):
        spot = ellipse((rng.uniform(0, width), rng.uniform(0, height)), [rng.uniform(0.03, 0.13) * height] * 2, 20)
        canvas.fill(spot, mix(look.style.tone(look.backdrop_2), WHITE, rng.uniform(0.3, 0.8)), alpha=0.5)


def _dots(canvas, look, width, height, top, bottom) -> None:
    step, pale = height / 7, mix(bottom, WHITE, 0.5)
    for row in range(9):
        for column in range(int(width / step) + 2):
            x = (column + 0.5 * (row % 2)) * step
            canvas.fill(ellipse((x, row * step), (step * 0.24, step * 0.24), 10), pale)


def _stripes(canvas, look, width, height, top, bottom) -> None:
    step, pale = height / 8, mix(top, WHITE, 0.4)
    lean = look.rng("background").uniform(-0.8, 0.8) * height
    for k in range(-8, int(width / step) + 9, 2):
        x = k * step
        canvas.fill(points((x, 0), (x + step, 0), (x + step + lean, height), (x + lean, height)), pale)


def _rectangle(x: float, y: float, width: float, height: float) -> np.ndarray:
    return points((x, y), (x + width, y), (x + width, y + height), (x, y + height))


def _room(canvas, look, width, height, top, bottom) -> None:
    rng = look.rng("background")
    wall, floor = mix(top, WHITE, 0.3), look.style.shadow(bottom, 0.8)
    canvas.fill(_rectangle(0, 0, width, height), wall)
    canvas.fill(_rectangle(0, 0.78 * height, width, 0.22 * height), floor)
    x, w = rng.uniform(-0.1, 0.7) * width, 0.46 * height
    frame, glass = look.style.tone((250, 246, 240)), look.style.tone((176, 214, 244))
    canvas.fill(_rectangle(x, 0.08 * height, w, 0.52 * height), frame)
    for column in (0, 1):
        for row in (0, 1):
            left, high = x + w * (0.07 + 0.46 * column), height * (0.11 + 0.24 * row)
            canvas.fill(_rectangle(left, high, w * 0.4, height * 0.22), glass)


def _petals(canvas, look, width, height, top, bottom) -> None:
    rng = look.rng("background")
    pink = look.style.tone((252, 190, 206))
    for _ in range(18):
        middle = (rng.uniform(0, width), rng.uniform(0, height))
        canvas.fill(placed(_PETAL, middle, rng.uniform(0, 2 * np.pi), rng.uniform(0.025, 0.055) * height), pink)


def _night(canvas, look, width, height, top, bottom) -> None:
    _ramp(canvas.image, look.style.tone((34, 38, 84)), look.style.tone((98, 84, 150)))
    rng = look.rng("background")
    for _ in range(30):
        centre = np.array([rng.uniform(0, width), rng.uniform(0, height)])
        canvas.fill(_STAR * rng.uniform(0.006, 0.022) * height + centre, look.style.tone((255, 250, 220)))


_PATTERN = {
    "gradient": _plain, "plain": _plain, "sky": _sky, "rays": _rays, "bokeh": _bokeh, "dots": _dots,
    "stripes": _stripes, "room": _room, "petals": _petals, "night": _night,
}  # fmt: skip
