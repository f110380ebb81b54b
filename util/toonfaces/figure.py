"""One character on a canvas: what every part that draws needs to know."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from util.toonfaces import style as palette
from util.toonfaces.canvas import BODY, FRONT, Canvas
from util.toonfaces.geometry import View
from util.toonfaces.identity import Identity, Traits
from util.toonfaces.look import Look
from util.toonfaces.style import mix

Box = tuple[float, float, float, float]


@dataclass
class Figure:
    """A character, how it is shown, and where it is drawn.

    Filled in while drawing: `box` of the face, `eyes` (side -1 or 1 -> box), x1, y1, x2, y2 in px.
    """

    canvas: Canvas
    identity: Identity
    look: Look
    view: View
    box: Box = (0.0, 0.0, 0.0, 0.0)
    eyes: dict[int, Box] = field(default_factory=dict)

    @property
    def style(self) -> palette.Style:
        return self.look.style

    @property
    def traits(self) -> Traits:
        return self.identity.traits

    @cached_property
    def skin(self) -> palette.Colour:
        return self.style.tone(palette.SKIN[self.identity.skin])

    @cached_property
    def hair(self) -> palette.Colour:
        return self.style.tone(palette.HAIR[self.identity.hair_colour])

    @cached_property
    def iris(self) -> palette.Colour:
        return self.style.tone(palette.EYE[self.identity.eye_colour])

    @cached_property
    def accent(self) -> palette.Colour:
        return self.style.tone(palette.ACCENT[self.identity.accent])

    @cached_property
    def cloth(self) -> palette.Colour:
        return self.style.tone(self.look.cloth)

    @cached_property
    def trim(self) -> palette.Colour:
        return self.style.tone(self.look.trim)

    @cached_property
    def body(self) -> View:
        return self.view.body()

    def line(self, factor: float = 1.0) -> float:
        """Line width in px, never so thin that it vanishes."""
        return max(0.6, self.style.line * factor * self.view.unit)

    def solid(self, shape: np.ndarray, colour, front: bool = False, line: float = 1.0) -> None:
        """A part of the figure: polygon in px, filled and outlined."""
        label = FRONT if front else BODY
        ink = self.style.line_of(colour)
        self.canvas.inked(shape, colour, ink, self.line(line), label)
        if self.style.hatch and line > 0.75:  # a pencil goes over its line twice
            again = shape + np.array([0.022, -0.026]) * self.view.unit
            self.canvas.outline(again, self.line(0.5), mix(ink, colour, 0.5))

    def strand(self, path: np.ndarray, colour, width: float, ends=(0.1, 0.1), peak=0.5, alpha=1.0, label=0) -> None:
        """A tapered stroke; path in px, width in model units."""
        px = max(0.5, width * self.view.unit)
        self.canvas.stroke(path, px, colour, ends, peak, label, alpha)
