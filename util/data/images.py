"""Any picture file to an RGB image, and the part of it that a model is shown."""

import io
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from util.data.smart_crop import salient_centre
from util.run.untrusted import reason_of

MAX_PIXELS = 100_000_000
# fewer where the decoder holds the picture several times over: a gigabyte, as others take at MAX_PIXELS
_COSTLY = {"WEBP": 40_000_000, "AVIF": 40_000_000, "JPEG2000": 40_000_000}
_STRIP = 1 << 20  # pixels that are converted at a time
SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2"}
# all that is decoded, whatever a file is called: those of the suffixes, and grey maps of 16 bits as scanners write
# them. Of the others that Pillow knows one starts Ghostscript
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")

_ORIENTATION = 0x0112  # the EXIF tag; its values 2..8 say how the stored rows lie in the upright picture
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_FACE_HEIGHT = 0.42  # where the centre of the face comes to lie in a crop that is cut in height, from the top
_HEAD_ROOM = 0.5  # hair and hat above the face box, in heights of the box


class BadImage(Exception):
    """A picture that cannot be decoded. `path` (str) names it, `reason` (str) says why."""

    def __init__(self, path: str | Path, reason: str):
        super().__init__(str(path), reason)  # both in args: exceptions cross process borders as pickles
        self.path, self.reason = str(path), reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_image(source: Path | str | bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a file, or the bytes of one, to an upright 8-bit RGB image.

    EXIF orientation is applied; transparency is laid over white; 16-bit grey is scaled, not clipped; CMYK is
    converted; of an animation the first frame is taken. Raises BadImage where the data are empty, truncated or
    not a picture of FORMATS, or where the header announces more than `max_pixels` pixels (nothing is decoded then).
    """
    return _decode(source, max_pixels)[0]


def decode_with_alpha(
    source: Path | str | bytes, max_pixels: int = MAX_PIXELS
) -> tuple[Image.Image, np.ndarray | None]:
    """The same, and how opaque each pixel is: uint8 (h, w), upright; None where the whole picture is opaque."""
    image, alpha = _decode(source, max_pixels)
    return image, None if alpha is None else np.array(alpha)


def alpha_of(source: Path | str | bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray | None:
    """How opaque each pixel of a picture is: as `decode_with_alpha` says, without the picture."""
    return decode_with_alpha(source, max_pixels)[1]


def _decode(source: Path | str | bytes, max_pixels: int) -> tuple[Image.Image, Image.Image | None]:
    name = "(bytes)" if isinstance(source, bytes) else str(source)
    try:
        size = len(source) if isinstance(source, bytes) else os.stat(source).st_size
        if not size:
            raise BadImage(name, "the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on odd EXIF and palettes; what matters is raised
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=FORMATS) as image:
                most = min(max_pixels, _COSTLY.get(image.format, max_pixels))
                if image.width * image.height > most:
                    raise BadImage(name, f"{image.width} x {image.height} pixels, more than {most}")
                image.load()
                return _to_rgb_and_alpha(_upright(image))
    except BadImage:
        raise
    except Image.DecompressionBombError as error:  # Pillow has a limit of its own, which may be the lower one
        raise BadImage(name, f"more than {min(max_pixels, 2 * Image.MAX_IMAGE_PIXELS)} pixels") from error
    except Exception as error:  # on damaged data the decoders raise almost anything: OSError, SyntaxError, struct.error
        raise BadImage(name, reason_of(error)) from error


def image_size(path: Path | str) -> tuple[int, int]:
    """(width, height) in px of a picture file as it is stored, from its header; nothing is decoded.

    Raises FileNotFoundError where there is none, BadImage where it is no picture.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for ever
            raise BadImage(path, "it is no file")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                return image.size
    except (FileNotFoundError, BadImage):
        raise
    except Exception as error:  # as in _decode
        raise BadImage(path, reason_of(error)) from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged EXIF block is no reason to lose the picture
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb_and_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    if image.mode.startswith("I") or image.mode == "F":
        return _deep_grey_to_rgb(image), None
    if not image.has_transparency_data:
        return image.convert("RGB"), None  # a copy, also of an RGB image: the file is closed when we return
    canvas, alpha = Image.new("RGB", image.size, "white"), Image.new("L", image.size)
    for top, strip in _strips(image):
        strip = strip.convert("RGBA")
        opacity = strip.getchannel("A")
        alpha.paste(opacity, (0, top))
        canvas.paste(strip.convert("RGB"), (0, top), mask=opacity)
    return canvas, None if alpha.getextrema()[0] == 255 else alpha


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """(top in px, part) of a picture, from top to bottom: converted at once, a large one is in memory many times."""
    rows = max(1, _STRIP // image.width)
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits. 16-bit files are 0..65535; the range of others is told by their largest value."""
    ranges = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
    largest = max(float(_finite(strip).max()) for _, strip in _strips(image))
    full_scale = next((top for top in ranges if largest <= top), largest)
    canvas = Image.new("RGB", image.size)
    for top, strip in _strips(image):
        grey = np.clip(_finite(strip) * (255.0 / full_scale), 0.0, 255.0)
        canvas.paste(Image.fromarray((grey + 0.5).astype(np.uint8)).convert("RGB"), (0, top))
    return canvas


def _finite(image: Image.Image) -> np.ndarray:
    """The values of a picture of one channel, float64 (h, w), 0 where they are no finite number."""
    return np.nan_to_num(np.asarray(image).astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)


Picture = Image.Image | np.ndarray  # decoded: an RGB image, or uint8 (H, W, 3), perhaps a view of a file on disk


def size_of(picture: Picture) -> tuple[int, int]:
    """(width, height) of a picture, px."""
    return picture.size if isinstance(picture, Image.Image) else (picture.shape[1], picture.shape[0])


def cut(picture: Picture, box: tuple[int, int, int, int]) -> np.ndarray:
    """The region x1, y1, x2, y2 (px, inside the picture) as uint8 (h, w, 3); a view where the picture is an array."""
    if isinstance(picture, Image.Image):
        return np.array(picture.crop(box))
    x1, y1, x2, y2 = box
    return picture[y1:y2, x1:x2]


def crop_region(
    image: Picture, aspect: float, box: tuple[float, float, float, float] | None = None
) -> tuple[int, int, int, int]:
    """The largest region of an image that has the proportions `aspect` (width / height) and keeps the character.

    box: the face, x1 y1 x2 y2 in px, if it is known; else the region is put where the picture is most salient
    (`util.data.smart_crop`). Returns x1, y1, x2, y2 in px inside the image. Deterministic.
    """
    width, height = size_of(image)
    if width > height * aspect:
        length = max(1, round(height * aspect))
        centre = (box[0] + box[2]) / 2 if box is not None else _salient(image, length, axis=0)
        left = _clamp(round(centre - length / 2), 0, width - length)
        return left, 0, left + length, height
    length = min(height, max(1, round(width / aspect)))
    if length == height:
        return 0, 0, width, height
    top = _top_for_face(box, length) if box is not None else _salient(image, length, axis=1) - length / 2
    top = _clamp(round(top), 0, height - length)
    return 0, top, width, top + length


def _salient(picture: Picture, length: float, axis: int) -> float:
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    return salient_centre(image, length, axis)


def _top_for_face(box: tuple[float, float, float, float], length: int) -> float:
    height = box[3] - box[1]
    room = min(_HEAD_ROOM * height, max(0.0, length - height))  # hair gives way before the chin does
    return min((box[1] + box[3]) / 2 - _FACE_HEIGHT * length, box[1] - room)


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)
