"""Every kind of picture file against the picture it must give, and what the crop keeps.

Run: python -m pytest tests/test_images.py
"""

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from util.data.images import BadImage, crop_region, decode_image

ROWS, COLUMNS = 12, 20


def picture() -> np.ndarray:
    """(12, 20, 3) uint8 without any symmetry."""
    y, x = np.mgrid[:ROWS, :COLUMNS]
    return np.stack([x * 12, y * 20, (x * 7 + y * 5) % 256], -1).astype(np.uint8)


def ramp(top: float) -> np.ndarray:
    """(12, 20) values from 0 to `top`."""
    return np.linspace(0, top, ROWS * COLUMNS).reshape(ROWS, COLUMNS)


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def check(data: bytes, expected: np.ndarray, tolerance: int = 0) -> None:
    image = decode_image(data)
    assert image.mode == "RGB"
    got = np.asarray(image).astype(int)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= tolerance


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_rgb(kind):
    check(encode(Image.fromarray(picture()), kind), picture())


def test_jpeg_equals_plain_pillow():
    data = encode(Image.fromarray(picture()), "JPEG", quality=95)
    check(data, np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_alpha_is_laid_over_white(kind):
    alpha = ramp(255).round().astype(np.uint8)
    opacity = alpha[..., None] / 255
    expected = (picture() * opacity + 255 * (1 - opacity)).round()
    check(encode(Image.fromarray(np.dstack([picture(), alpha])), kind), expected, tolerance=1)


def test_opaque_alpha_changes_nothing():
    check(encode(Image.fromarray(picture()).convert("RGBA"), "PNG"), picture())


def test_grey_with_alpha():
    grey, alpha = picture()[..., 0], picture()[..., 1]
    image = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    expected = (grey * (alpha / 255.0) + 255 - alpha).round()
    check(encode(image, "PNG"), grey_to_rgb(expected), tolerance=1)


def palette_image() -> tuple[Image.Image, np.ndarray, np.ndarray]:
    indices = (np.arange(ROWS * COLUMNS) % 5).reshape(ROWS, COLUMNS).astype(np.uint8)
    colours = np.array([[10, 20, 30], [250, 0, 0], [0, 250, 0], [0, 0, 250], [90, 90, 0]], np.uint8)
    image = Image.frombytes("P", (COLUMNS, ROWS), indices.tobytes())
    image.putpalette(colours.tobytes())
    return image, indices, colours


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette(kind):
    image, indices, colours = palette_image()
    check(encode(image, kind), colours[indices])


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palette_with_a_transparent_colour(kind):
    image, indices, colours = palette_image()
    colours[2] = 255
    check(encode(image, kind, transparency=2), colours[indices])


def test_palette_with_an_alpha_for_each_colour():
    image, indices, colours = palette_image()
    alphas = np.array([255, 0, 128, 255, 64], np.uint8)
    blended = (colours * (alphas[:, None] / 255.0) + 255 - alphas[:, None]).round()
    check(encode(image, "PNG", transparency=alphas.tobytes()), blended[indices], tolerance=1)


def test_rgb_with_a_transparent_colour():
    expected = picture()
    expected[3, 4] = 255
    colour = tuple(int(value) for value in picture()[3, 4])
    check(encode(Image.fromarray(picture()), "PNG", transparency=colour), expected)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey(kind):
    grey = ramp(255).round().astype(np.uint8)
    check(encode(Image.fromarray(grey), kind), grey_to_rgb(grey), tolerance=0 if kind == "PNG" else 4)


def test_one_bit():
    bits = picture()[..., 2] > 90
    check(encode(Image.fromarray(bits), "PNG"), grey_to_rgb(bits * 255))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("top", [65535, 9000, 200])
def test_16_bit_grey_is_scaled_not_clipped(kind, top):
    values = ramp(top).round().astype(np.uint16)
    check(encode(Image.fromarray(values), kind), grey_to_rgb((values / 257.0).round()))


def test_16_bit_portable_greymap():
    values = ramp(65535).round().astype(">u2")
    data = b"P5 %d %d 65535\n" % (COLUMNS, ROWS) + values.tobytes()
    check(data, grey_to_rgb((values / 257.0).round()))


def test_16_bit_rgb_png():
    samples = picture().astype(">u2") * 257
    lines = b"".join(b"\0" + line.tobytes() for line in samples)
    header = struct.pack(">IIBBBBB", COLUMNS, ROWS, 16, 2, 0, 0, 0)
    check(png(("IHDR", header), ("IDAT", zlib.compress(lines)), ("IEND", b"")), picture())


@pytest.mark.parametrize(("top", "full_scale"), [(0.9, 1), (200.0, 255), (60000.0, 65535), (1e6, 1e6)])
def test_float_grey(top, full_scale):
    values = ramp(top).astype(np.float32)
    check(encode(Image.fromarray(values), "TIFF"), grey_to_rgb((values / full_scale * 255).round()), tolerance=1)


def test_float_grey_that_is_not_a_number_is_black():
    values = ramp(1).astype(np.float32)
    values[0, 5], values[1, 5] = np.nan, -np.inf
    expected = (ramp(1) * 255).round()
    expected[0, 5] = expected[1, 5] = 0
    check(encode(Image.fromarray(values), "TIFF"), grey_to_rgb(expected), tolerance=1)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])  # JPEG stores CMYK inverted, after Adobe
def test_cmyk(kind):
    inks = np.dstack([picture(), np.full((ROWS, COLUMNS), 60, np.uint8)])
    inks[:, :10] = (255, 0, 0, 0)  # pure cyan, black-free: fails loudly if an inversion is missed
    expected = (255 - inks[..., :3].astype(float)) * (255 - inks[..., 3:]) / 255
    data = encode(Image.fromarray(inks, "CMYK"), kind, **({"quality": 100} if kind == "JPEG" else {}))
    if kind == "JPEG":
        assert b"Adobe" in data
        assert np.abs(np.asarray(decode_image(data))[:, :8].astype(int) - (0, 255, 255)).max() <= 3
        check(data, expected, tolerance=40)  # chroma is stored at half resolution, so edges differ
    else:
        check(data, expected, tolerance=1)


# what a viewer must do with the stored rows for each EXIF orientation, inverted: upright -> stored
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", STORED)
def test_exif_orientation(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](picture())))
    options = {"lossless": True} if kind == "WEBP" else {}
    check(encode(stored, kind, exif=exif, **options), picture())


def test_exif_orientation_of_a_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6
    big = np.asarray(Image.fromarray(picture()).resize((160, 96), Image.Resampling.BICUBIC))
    stored = Image.fromarray(np.ascontiguousarray(STORED[6](big)))
    check(encode(stored, "JPEG", quality=100, subsampling=0, exif=exif), big, tolerance=8)


def test_damaged_exif_does_not_cost_the_picture():
    data = encode(Image.fromarray(picture()), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    check(data, picture())


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (COLUMNS, ROWS), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50, **options)
    assert getattr(Image.open(io.BytesIO(data)), "n_frames", 1) == 3
    check(data, np.broadcast_to(np.uint8([255, 0, 0]), (ROWS, COLUMNS, 3)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncated_files_are_bad(tmp_path, kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(BadImage) as caught:
        decode_image(path)
    assert caught.value.path == str(path)
    assert caught.value.reason


@pytest.mark.parametrize("content", [b"", b"just some text", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"])
def test_what_is_no_picture_is_bad(tmp_path, content):
    path = tmp_path / "no.png"
    path.write_bytes(content)
    for source in (path, str(path), content):
        with pytest.raises(BadImage):
            decode_image(source)


def test_missing_file_is_bad(tmp_path):
    with pytest.raises(BadImage, match="gone"):
        decode_image(tmp_path / "gone.png")


def png(*chunks: tuple[str, bytes]) -> bytes:
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        tagged = name.encode() + body
        data += struct.pack(">I", len(body)) + tagged + struct.pack(">I", zlib.crc32(tagged))
    return data


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_decompression_bomb_is_refused_from_its_header(side):
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    with pytest.raises(BadImage, match="pixels"):
        decode_image(png(("IHDR", header), ("IDAT", zlib.compress(b"\0" * 100)), ("IEND", b"")))


def test_max_pixels_is_a_limit():
    data = encode(Image.fromarray(picture()), "PNG")
    assert decode_image(data, max_pixels=ROWS * COLUMNS).size == (COLUMNS, ROWS)
    with pytest.raises(BadImage):
        decode_image(data, max_pixels=ROWS * COLUMNS - 1)


def test_pillow_s_own_lower_limit_is_told_in_the_same_words(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage) as refused:
        decode_image(encode(Image.new("RGB", (30, 10)), "PNG"))
    assert refused.value.reason == "more than 200 pixels"


def test_bad_image_survives_pickling():
    error = pickle.loads(pickle.dumps(BadImage("a.png", "why")))
    assert (error.path, error.reason, str(error)) == ("a.png", "why", "a.png: why")


def test_crop_is_the_largest_of_its_proportions():
    image = Image.new("RGB", (1920, 1080))
    for aspect in (1.0, 0.5, 3.0, 1920 / 1080):
        x1, y1, x2, y2 = crop_region(image, aspect)
        assert 0 <= x1 < x2 <= 1920 and 0 <= y1 < y2 <= 1080
        assert (x2 - x1) / (y2 - y1) == pytest.approx(aspect, rel=2e-3)
        assert x2 - x1 == 1920 or y2 - y1 == 1080


@pytest.mark.parametrize("left", [0, 300, 900, 1500, 1800])
def test_crop_of_wide_art_holds_the_face(left):
    face = (left, 400, left + 120, 520)
    x1, y1, x2, y2 = crop_region(Image.new("RGB", (1920, 1080)), 1.0, face)
    assert (y1, y2, x2 - x1) == (0, 1080, 1080)
    assert x1 <= face[0] and face[2] <= x2
    if 540 <= left + 60 <= 1380:  # away from the borders the face is in the middle
        assert (x1 + x2) / 2 == left + 60


@pytest.mark.parametrize("top", [0, 100, 500, 1200, 1700])
def test_crop_of_tall_art_leaves_room_for_hair(top):
    face = (400, top, 600, top + 200)
    x1, y1, x2, y2 = crop_region(Image.new("RGB", (1000, 1900)), 1.0, face)
    assert (x1, x2, y2 - y1) == (0, 1000, 1000)
    assert y1 <= max(0, top - 100) and face[3] <= y2


def test_crop_around_a_large_face_keeps_hair_and_chin():
    image = Image.new("RGB", (1000, 1900))
    _, top, _, bottom = crop_region(image, 1.0, (50, 700, 950, 1300))
    assert top <= 700 - 300 and bottom >= 1300
    _, top, _, bottom = crop_region(image, 1.0, (50, 700, 950, 1600))  # no room for all of the hair
    assert top <= 700 and bottom >= 1600


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (3, 2)])
@pytest.mark.parametrize("aspect", [1.0, 0.25, 4.0])
def test_crop_of_tiny_pictures_is_not_empty(size, aspect):
    x1, y1, x2, y2 = crop_region(Image.new("RGB", size), aspect)
    assert 0 <= x1 < x2 <= size[0] and 0 <= y1 < y2 <= size[1]
