"""What hides a face in one picture and not in the next: hats, hands, masks, blown hair."""

import numpy as np

from util.toonfaces.canvas import FRONT
from util.toonfaces.figure import Figure
from util.toonfaces.front_hair import draw_blown_bangs
from util.toonfaces.geometry import ellipse, placed, points, sausage, spline
from util.toonfaces.hats import draw_hat


def draw_occlusion(fig: Figure) -> None:
    """Whatever the look says lies over this face."""
    _OCCLUSION[fig.look.occlusion](fig)


def _draw_hand(fig: Figure) -> None:
    """A hand: sleeve, palm, four fingers and a thumb, drawn for the right and mirrored for the left."""
    place_at, tilt, size = {
        "mouth": ((0.16, 0.92), 0.55, 0.92),
        "cheek": ((0.82, 0.78), 0.12, 0.9),
        "eye": ((0.5, 0.34), 0.3, 0.95),
        "wave": ((1.1, 0.5), -0.25, 1.0),
    }[fig.look.hand]
    side = fig.look.hidden_side

    def place(shape):
        return fig.view.flat(placed(shape, place_at, -tilt, size) * (side, 1), 0.6)

    def capsule(path, width, colour, line=0.8):
        fig.solid(place(sausage(points(*path), width)), colour, front=True, line=line)

    capsule(((0.02, 0.4), (0.1, 1.2), (0.2, 2.6)), 0.56, fig.cloth, 1.0)
    fig.solid(place(points((-0.32, 0.5), (0.34, 0.42), (0.4, 0.66), (-0.28, 0.74))), fig.trim, front=True)
    for x, length, lean in ((0.27, 0.42, 0.1), (0.1, 0.54, 0.03), (-0.08, 0.56, -0.03), (-0.25, 0.46, -0.1)):
        capsule(((x, -0.02), (x + lean, -0.2 - length)), 0.17, fig.skin)
    palm = spline(
        points((-0.32, -0.1), (0.0, -0.2), (0.34, -0.1), (0.32, 0.2), (0.2, 0.48), (-0.2, 0.5), (-0.34, 0.2)),
        closed=True,
        n=3,
    )
    fig.canvas.fill(place(palm), fig.skin, FRONT)
    ink = fig.style.line_of(fig.skin)
    fig.canvas.stroke(place(palm[9:]), fig.line(0.8), ink, (0.5, 0.5))
    capsule(((-0.28, 0.3), (-0.46, 0.04), (-0.44, -0.16)), 0.18, fig.skin)
    fig.canvas.fill(place(ellipse((0.05, 0.25), (0.18, 0.13), 14)), fig.style.shadow(fig.skin, 0.5))


def _draw_mask(fig: Figure) -> None:
    """A cloth mask over nose and mouth."""
    cloth = fig.style.tone((236, 242, 248) if fig.look.hidden_side > 0 else fig.look.cloth)
    half = points((0.0, 0.5), (0.3, 0.52), (0.66, 0.6), (0.7, 0.84), (0.42, 1.06), (0.0, 1.14))
    shape = np.concatenate([spline(half, n=3), spline(half, n=3)[::-1] * (-1, 1)])
    for side in (-1, 1):
        for y in (0.62, 0.82):
            loop = points((0.66 * side, y), (0.86 * side, y - 0.12), (1.0 * side, 0.34))
            fig.strand(fig.view.surface(spline(loop, n=3)), cloth, 0.045, (1, 1))
    fig.solid(fig.view.surface(shape, depth=0.74), cloth, front=True)
    for y in (0.7, 0.84, 0.96):
        fold = spline(points((-0.5, y - 0.04), (0.0, y + 0.02), (0.5, y - 0.04)), n=4)
        fig.strand(fig.view.surface(fold, depth=0.74), fig.style.shadow(cloth, 1.3), 0.03)


_OCCLUSION = {
    "none": lambda fig: None,
    "hat": draw_hat,
    "hand": _draw_hand,
    "bangs": draw_blown_bangs,
    "mask": _draw_mask,
}
