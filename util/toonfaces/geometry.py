"""Curves, brush strokes and the turning head: everything here is points in, points out.

Model units: half a face is 1 wide. x points to the right of the picture, y down, z out of the
picture towards the viewer; the origin is the middle of the head, a little above the eyes.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np


def points(*pairs) -> np.ndarray:
    """(N, 2) float64 from pairs of numbers."""
    return np.array(pairs, dtype=np.float64)


def placed(shape: np.ndarray, centre=(0.0, 0.0), angle: float = 0.0, size: float = 1.0) -> np.ndarray:
    """The shape made `size` times as large, turned clockwise by `angle` (radians), and moved to centre."""
    # written out: a matrix product may round differently from one linear algebra library to the next
    cos, sin = size * np.cos(angle), size * np.sin(angle)
    moved = np.empty(shape.shape)
    moved[:, 0] = shape[:, 0] * cos - shape[:, 1] * sin + centre[0]
    moved[:, 1] = shape[:, 0] * sin + shape[:, 1] * cos + centre[1]
    return moved


def mirror(shape: np.ndarray) -> np.ndarray:
    """The shape reflected left to right, in reverse order, so that a half outline can be closed with it."""
    return shape[::-1] * (-1.0, 1.0)


_STEPS = {n: np.linspace(0.0, 1.0, n, endpoint=False)[:, None] for n in range(2, 33)}


def bezier(controls: np.ndarray, n: int = 6) -> np.ndarray:
    """A chain of quadratic Bezier curves. controls: (K, 3, 2). Returns (K * n + 1, 2), last end point included."""
    t = _STEPS[n]
    start, middle, end = (controls[:, None, i] for i in range(3))
    curve = start * (1 - t) ** 2 + middle * (2 * t * (1 - t)) + end * t**2
    return np.concatenate([curve.reshape(-1, 2), controls[-1, 2:]])


def spline(knots: np.ndarray, closed: bool = False, n: int = 6) -> np.ndarray:
    """A smooth Catmull-Rom curve through knots (K, 2), n points for each span."""
    knots = np.asarray(knots, dtype=np.float64)
    if closed:
        padded = np.concatenate([knots[-1:], knots, knots[:2]])
    else:
        padded = np.concatenate([2 * knots[:1] - knots[1:2], knots, 2 * knots[-1:] - knots[-2:-1]])
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    t = _STEPS[n]
    curve = p1 + 0.5 * t * ((p2 - p0) + t * ((2 * p0 - 5 * p1 + 4 * p2 - p3) + t * (3 * (p1 - p2) + p3 - p0)))
    curve = curve.reshape(-1, 2)
    return curve if closed else np.concatenate([curve, knots[-1:]])


def ellipse(centre, radii, n: int = 24, start: float = 0.0, turn: float = 1.0) -> np.ndarray:
    """Points on an ellipse; start and turn in full turns, 0 = right, 0.25 = down."""
    return _unit_circle(n, start, turn) * radii + centre


@lru_cache(maxsize=256)
def _unit_circle(n: int, start: float, turn: float) -> np.ndarray:
    angle = 2 * np.pi * (start + np.linspace(0.0, turn, n, endpoint=turn < 1.0))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def ribbon(path: np.ndarray, width, closed: bool = False) -> np.ndarray:
    """The polygon of a brush stroke along path (N, 2). width: scalar or (N,), the full width at each point."""
    if closed:
        path = np.concatenate([path, path[:1]])
    n = len(path)
    tangent = np.empty((n, 2))
    tangent[1:-1] = path[2:] - path[:-2]
    tangent[0], tangent[-1] = path[1] - path[0], path[-1] - path[-2]
    if closed:
        tangent[0] = tangent[-1] = path[1] - path[-2]
    across = tangent[:, 0] ** 2 + tangent[:, 1] ** 2
    across = width / (2 * np.sqrt(across) + 1e-9)
    sides = np.empty((2 * n, 2))
    sides[:n, 0] = path[:, 0] - tangent[:, 1] * across
    sides[:n, 1] = path[:, 1] + tangent[:, 0] * across
    sides[n:] = (2 * path - sides[:n])[::-1]
    return sides


def sausage(path: np.ndarray, width: float) -> np.ndarray:
    """The outline of a thick line with round ends."""
    line = spline(path, n=4)
    body = ribbon(line, width)
    n = len(line)

    def dome(first, last):
        middle, arm = (first + last) / 2, (first - last) / 2
        normal = np.array([arm[1], -arm[0]])
        angle = np.linspace(0, np.pi, 8)[1:-1, None]
        return middle + arm * np.cos(angle) + normal * np.sin(angle)

    return np.concatenate([body[:n], dome(body[n - 1], body[n]), body[n:], dome(body[-1], body[0])])


@lru_cache(maxsize=1024)
def taper(n: int, start: float = 0.0, end: float = 0.0, peak: float = 0.5) -> np.ndarray:
    """Brush pressure along a stroke of n points: from start to 1 at `peak` (0..1) to end."""
    t = np.linspace(0.0, 1.0, n)
    return np.where(
        t < peak, start + (1 - start) * t / max(peak, 1e-9), 1 - (1 - end) * (t - peak) / max(1 - peak, 1e-9)
    )


def lock_edge(valleys: np.ndarray, tips: np.ndarray, bulge: float = 0.55, n: int = 5) -> np.ndarray:
    """The lower edge of a row of hair locks: valley, tip, valley, ... each lock swelling before its tip.

    valleys: (K + 1, 2), tips: (K, 2). Returns (2 * K * n + 1, 2).
    """
    before, after = valleys[:-1], valleys[1:]
    left = np.stack([before, swell(before, tips, bulge), tips], axis=1)
    right = np.stack([tips, swell(after, tips, bulge), after], axis=1)
    return bezier(np.stack([left, right], axis=1).reshape(-1, 3, 2), n)


def swell(valley: np.ndarray, tip: np.ndarray, bulge: float) -> np.ndarray:
    """The control point of the edge of a lock between its valley and its tip; bulge 0: nearly straight, 1: round."""
    # near the valley's x and the tip's y: that is what makes a lock leaf-shaped
    along = np.array([0.45 - 0.4 * bulge, 0.45 + 0.25 * bulge])
    return valley + (tip - valley) * along


@dataclass(frozen=True)
class View:
    """Where the head is in the picture and which way it looks.

    centre: px; unit: px of one model unit; yaw, pitch, roll: radians (yaw > 0 looks to the right of the
    picture, pitch > 0 up, roll > 0 leans clockwise).
    """

    centre: tuple[float, float]
    unit: float
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    sines: tuple[float, ...] = field(init=False, repr=False)

    PIVOT = 0.9  # the head rolls about the neck, this far below its middle

    def __post_init__(self):
        trig = [f(a) for a in (self.yaw, self.pitch, self.roll) for f in (np.sin, np.cos)]
        object.__setattr__(self, "sines", tuple(float(v) for v in trig))

    def flat(self, shape: np.ndarray, depth=0.0) -> np.ndarray:
        """To px, for an outline at a depth (scalar or (N,)): it shifts with the turn but keeps its width,
        because the outline of something round does."""
        sin_yaw, _, sin_pitch, _, _, _ = self.sines
        return self._to_px(shape[:, 0] + depth * sin_yaw, shape[:, 1] - depth * sin_pitch)

    def surface(self, shape: np.ndarray, radii=(1.18, 1.38), depth: float = 0.66, centre_y: float = 0.0) -> np.ndarray:
        """To px, for marks on the round front of the head: they shift, and narrow towards the far side."""
        sin_yaw, cos_yaw, sin_pitch, cos_pitch, _, _ = self.sines
        x, y = shape[:, 0], shape[:, 1] - centre_y
        z = depth * np.sqrt(np.maximum(0.0, 1 - (x / radii[0]) ** 2 - (y / radii[1]) ** 2))
        turned_z = z * cos_yaw - depth * x * sin_yaw
        return self._to_px(x * cos_yaw + z * sin_yaw, y * cos_pitch - turned_z * sin_pitch + centre_y)

    def hair(self, shape: np.ndarray) -> np.ndarray:
        """To px, for marks on the hair over the skull, which stands out further than the face."""
        return self.surface(shape, radii=(1.2, 1.36), depth=0.78, centre_y=-0.08)

    def _to_px(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        sin, cos = self.sines[4:]
        y = y - self.PIVOT
        placed = np.empty((len(x), 2))
        placed[:, 0] = self.centre[0] + self.unit * (x * cos - y * sin)
        placed[:, 1] = self.centre[1] + self.unit * (x * sin + y * cos + self.PIVOT)
        return placed

    def body(self) -> "View":
        """The view of the shoulders, which follow the head only in part."""
        return View(self.centre, self.unit, 0.4 * self.yaw, 0.0, 0.25 * self.roll)
