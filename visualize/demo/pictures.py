"""Pictures on their way in and out: uploads opened within limits, boxes drawn, cards and notes as HTML.

What comes from a visitor is never trusted: a file is what its bytes decode to, whatever its name, and a character's
name is text, whatever it holds.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image

from util.benchmark.detection_figures import FOUND, draw_boxes
from util.data.images import BadImage, decode_image
from util.run.errors import UserError

SHOWN = 1280  # px, longer side of a picture that is sent back
CARD = 96  # px, side of the small pictures


@dataclass(frozen=True)
class Limits:
    """Of one upload: megabytes of the file, pixels of the picture."""

    max_mb: float = 20.0
    max_pixels: int = 40_000_000

    @property
    def max_bytes(self) -> int:
        return int(self.max_mb * 1e6)


def open_upload(source: str | bytes | None, limits: Limits) -> Image.Image:
    """An uploaded file as an upright RGB picture. UserError in one line where it is none, or larger than the limits.

    The header is looked at first: a file that would unpack to more pixels is refused before it is unpacked.
    """
    if source is None:
        raise UserError("there is no picture yet: upload one, paste one or pick an example")
    try:
        size = len(source) if isinstance(source, bytes) else Path(source).stat().st_size
    except OSError as error:  # uploads are kept for an hour or so
        raise UserError("the picture is no longer here: upload it again") from error
    if size > limits.max_bytes:
        raise UserError(f"the file has {size / 1e6:.1f} MB, and {limits.max_mb:g} are allowed: make it smaller")
    try:
        return decode_image(source, limits.max_pixels)
    except BadImage as error:
        # Pillow's messages hold the path on this machine, which is nobody's business
        reason = "it is no picture, or damaged" if "cannot identify" in error.reason else error.reason
        raise UserError(f"the picture cannot be read ({reason}): try another file") from error


def boxed(picture: Image.Image, boxes: Sequence[Sequence[float]], captions: Sequence[str] = ()) -> Image.Image:
    """A copy with boxes x1 y1 x2 y2 (px of the picture) and captions, no larger than a screen."""
    shown = picture.copy()
    shown.thumbnail((SHOWN, SHOWN))
    scale = shown.width / picture.width
    draw_boxes(shown, [[value * scale for value in box] for box in boxes], FOUND, captions)
    return shown


def enlarged(picture: Image.Image, side: int = 288) -> Image.Image:
    """A small picture at a longer side of `side` px, its pixels left to be seen."""
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.NEAREST)


def data_uri(picture: Image.Image | Path | None, side: int = CARD) -> str:
    """A picture, or a file that this program wrote, inside HTML: JPEG, at most `side` px; empty where there is none."""
    if picture is None:
        return ""
    if isinstance(picture, Path):
        with Image.open(picture) as stored:
            picture = stored.convert("RGB")
    small = picture.copy()
    small.thumbnail((side, side))
    written = io.BytesIO()
    small.save(written, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(written.getvalue()).decode()


def note(text: str, *, bad: bool = False) -> str:
    """One line for the visitor."""
    kind = "note bad" if bad else "note"
    return f'<div class="{kind}" role="status">{escape(" ".join(text.split()))}</div>'


def card(title: str, picture: Image.Image | Path | None, line: str = "", share: float | None = None) -> str:
    """A small picture with a title and a line below. share: length of a bar, 0..1."""
    uri = data_uri(picture)
    image = f'<img src="{uri}" alt="{escape(title)}">' if uri else '<div class="no-picture">no picture</div>'
    width = 100 * min(max(share or 0.0, 0.0), 1.0)
    bar = "" if share is None else f'<div class="bar"><div style="width:{width:.0f}%"></div></div>'
    return (
        f'<figure class="card">{image}<figcaption><b title="{escape(title)}">{escape(title)}</b>'
        f"<span>{escape(line)}</span></figcaption>{bar}</figure>"
    )


def cards(made: Sequence[str]) -> str:
    """Cards side by side."""
    return f'<div class="cards">{"".join(made)}</div>'
