"""Contact sheets: a labelled table of pictures as one image. Every sheet in the project is made here."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

INK = (34, 34, 34)
PAPER = (255, 255, 255)


def to_pil(picture) -> Image.Image:
    """A PIL image from a PIL image, a (3, H, W) or (H, W, 3) array or tensor; floats are in 0..1."""
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    array = np.asarray(picture.detach().cpu() if hasattr(picture, "detach") else picture)
    if array.ndim == 3 and array.shape[0] in (1, 3) and array.shape[-1] not in (1, 3):
        array = np.moveaxis(array, 0, -1)
    if array.dtype != np.uint8:
        array = (np.nan_to_num(array).clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return Image.fromarray(np.squeeze(array)).convert("RGB")


def sheet(
    rows: Sequence[Sequence],
    *,
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    title: str = "",
    cell: int = 128,
    gap: int = 4,
    font_size: int = 13,
) -> Image.Image:
    """Lay pictures out as a table with titles.

    rows: pictures as `to_pil` takes them, or None for an empty cell. cell: side of a square cell, px;
    pictures keep their proportions inside it, and a row is as high as its highest one. Titles may hold line breaks.
    Returns an RGB image.
    """
    font = ImageFont.load_default(font_size)
    head_font = ImageFont.load_default(font_size + 3)
    probe = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def extent(text: str, used) -> tuple[int, int]:
        left, top, right, bottom = probe.multiline_textbbox((0, 0), text, font=used)
        return int(right - left) + 1, int(bottom - top) + 5

    rows = [[None if picture is None else _fitted(to_pil(picture), cell) for picture in row] for row in rows]
    heights = [max((picture.height for picture in row if picture), default=cell) for row in rows]
    columns = max(len(row) for row in rows)
    left = max((extent(text, font)[0] for text in row_titles), default=0)
    left += gap * 2 if left else gap
    head = extent(title, head_font)[1] + gap * 2 if title else gap
    top = head + (max(extent(text, font)[1] for text in column_titles) + gap if column_titles else 0)
    width = max(left + columns * (cell + gap), extent(title, head_font)[0] + 2 * gap)
    canvas = Image.new("RGB", (width, top + sum(heights) + len(rows) * gap), PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.multiline_text((gap, gap), title, fill=INK, font=head_font)
    for c, text in enumerate(column_titles):
        x = left + c * (cell + gap) + cell / 2
        draw.multiline_text((x, top - gap), text, fill=INK, font=font, anchor="md", align="center")
    y = top
    for r, (row, height) in enumerate(zip(rows, heights, strict=True)):
        if r < len(row_titles):
            draw.multiline_text((gap, y + height / 2), row_titles[r], fill=INK, font=font, anchor="lm")
        for c, picture in enumerate(row):
            if picture is not None:
                x = left + c * (cell + gap)
                canvas.paste(picture, (x + (cell - picture.width) // 2, y + (height - picture.height) // 2))
        y += height + gap
    return canvas


def _fitted(picture: Image.Image, cell: int) -> Image.Image:
    scale = cell / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.NEAREST)
