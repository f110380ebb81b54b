"""A supersampled drawing surface that knows which pixels belong to the figure."""

from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageDraw

from util.toonfaces.geometry import ribbon, taper

BODY = 1  # label of what lies behind or beside the eyes
FRONT = 2  # label of what may lie over the eyes: hair, hats, hands


class Canvas:
    """Draws polygons given in px of the final picture on a surface `scale` times as large.

    image: RGB. labels: L, 0 where no part of the figure was drawn, else BODY or FRONT.
    """

    def __init__(self, image: Image.Image, scale: int, labels: Image.Image | None = None, offset=(0, 0)):
        self.image, self.scale, self.offset = image, scale, offset
        self.labels = Image.new("L", image.size) if labels is None else labels
        self.height = image.height / scale  # px of the final picture
        self._opaque = ImageDraw.Draw(image)
        self._blend = ImageDraw.Draw(image, "RGBA")
        self._label = ImageDraw.Draw(self.labels)

    def _grid(self, shape: np.ndarray) -> np.ndarray:
        # Pillow cuts coordinates to whole numbers; rounding here keeps shapes where they were meant to be.
        return np.rint(shape * self.scale - self.offset).astype(np.float32)

    def fill(self, shape: np.ndarray, colour, label: int = 0, alpha: float = 1.0) -> None:
        """Fill a polygon (N, 2). With a label the polygon is part of the figure's outline."""
        grid = self._grid(shape)
        if alpha < 1.0:
            self._blend.polygon(grid, fill=(*colour, round(255 * alpha)))
        else:
            self._opaque.polygon(grid, fill=colour)
        if label:
            self._label.polygon(grid, fill=label)

    def stroke(self, path: np.ndarray, width: float, colour, ends=(0.15, 0.15), peak=0.5, label=0, alpha=1.0) -> None:
        """A brush stroke, `width` px at its widest, with pressure ends[0] and ends[1] (0..1) at its ends."""
        self.fill(ribbon(path, width * taper(len(path), ends[0], ends[1], peak)), colour, label, alpha)

    def outline(self, shape: np.ndarray, width: float, colour, label: int = 0) -> None:
        """A closed line of even width."""
        self.fill(ribbon(shape, width, closed=True), colour, label)

    def inked(self, shape: np.ndarray, colour, ink, width: float, label: int = 0) -> None:
        """A filled shape with its line."""
        self.fill(shape, colour, label)
        self.outline(shape, width, ink, label)

    @contextmanager
    def clip(self, shape: np.ndarray):
        """A canvas whose drawing reaches this one only inside the polygon. Labels do not change."""
        grid = self._grid(shape)
        low = np.maximum(grid.min(axis=0), 0).astype(int)
        high = np.minimum(grid.max(axis=0) + 1, self.image.size).astype(int)
        if (high <= low).any():
            low, high = np.array([0, 0]), np.array([1, 1])
        box = (*low.tolist(), *high.tolist())
        tile = Canvas(self.image.crop(box), self.scale, offset=np.add(self.offset, low))
        yield tile
        stencil = Image.new("L", tile.image.size)
        ImageDraw.Draw(stencil).polygon(grid - low.astype(np.float32), fill=255)
        self.image.paste(tile.image, box[:2], stencil)
