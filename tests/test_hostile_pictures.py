"""Pictures that were made to do harm: bombs, a hundred megapixels, a thousand frames, pixels that are no numbers.

Run: python -m pytest tests/test_hostile_pictures.py
"""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from scripts import fuzz_corpus as corpus
from tests.hostile import MIB, linux, peak_growth, refused
from util.data.images import FORMATS, MAX_PIXELS, SUFFIXES, decode_image, decode_with_alpha, image_size
from util.data.prepare import image_sizes

# --- pictures -------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def huge_png(side: int) -> bytes:
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def huge_webp(side: int) -> bytes:
    small = corpus.encoded(corpus.picture(0), "WEBP", lossless=True)
    at = small.index(b"VP8L") + 9  # 14 bits of width - 1 and of height - 1
    rest = struct.unpack("<I", small[at : at + 4])[0] >> 28 << 28
    return small[:at] + struct.pack("<I", rest | (side - 1) | (side - 1) << 14) + small[at + 4 :]


def huge_tiff(side: int) -> bytes:
    tags = [(256, 4, 1, side), (257, 4, 1, side), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
            (278, 4, 1, side), (279, 4, 1, side * side % 2**32)]  # fmt: skip
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(tags)) + entries + bytes(4)


def huge_gif(side: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, side, side, 0) + b"\x02\x02L\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", side, side, 0x80, 0, 0) + bytes(6) + frame


@linux
@pytest.mark.parametrize("bomb", [huge_png(60_000), huge_webp(16_000), huge_tiff(60_000), huge_gif(60_000)])
def test_a_bomb_is_refused_by_its_header(bomb, tmp_path):
    (tmp_path / "a.png").write_bytes(bomb)
    assert peak_growth(lambda: refused(lambda: decode_image(bomb), "pixels, more than|more than .* pixels")) < 32 * MIB
    refused(lambda: decode_image(tmp_path / "a.png"))


@linux
def test_text_that_unpacks_to_a_lot_inside_a_picture_is_not_kept():
    text = b"".join(chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200 * MIB), 9)) for _ in range(2))
    png = corpus.encoded(corpus.picture(0), "PNG")
    assert peak_growth(lambda: refused(lambda: decode_image(png[:33] + text + png[33:]))) < 64 * MIB


@linux
@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_a_thousand_frames_one_is_decoded(kind):
    frames = [Image.new("P" if kind == "GIF" else "RGB", (64, 64), i % 200) for i in range(1000)]
    data = corpus.encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=20)
    assert peak_growth(lambda: decode_image(data)) < 16 * MIB
    assert decode_image(data).size == (64, 64)


def large(mode: str, kind: str, side: int, **options) -> bytes:
    if mode == "F":
        return corpus.encoded(Image.fromarray(np.full((side, side), 0.5, np.float32)), kind, **options)
    if mode == "I;16":
        return corpus.encoded(Image.fromarray(np.full((side, side), 500, np.uint16)), kind, **options)
    return corpus.encoded(Image.new(mode, (side, side), 77), kind, **options)


LARGE = [
    ("RGB", "PNG", {"compress_level": 1}), ("RGBA", "PNG", {"compress_level": 1}), ("LA", "PNG", {"compress_level": 1}),
    ("P", "PNG", {"compress_level": 1, "transparency": 77}), ("I;16", "PNG", {"compress_level": 1}), ("F", "TIFF", {}),
    ("RGB", "JPEG", {}), ("CMYK", "JPEG", {}), ("P", "GIF", {}), ("RGB", "BMP", {}), ("RGB", "WEBP", {"method": 0}),
    ("RGBA", "WEBP", {"method": 0, "lossless": True}), ("RGB", "JPEG2000", {}), ("RGB", "AVIF", {"speed": 10}),
]  # fmt: skip


def bytes_per_pixel(mode: str, kind: str, side: int, options: dict) -> float:
    data = large(mode, kind, side, **options)
    return peak_growth(lambda: decode_with_alpha(data)) / side**2


@linux
@pytest.mark.parametrize("mode, kind, options", LARGE)
def test_what_a_decoded_pixel_costs_fits_the_limit_of_its_format(mode, kind, options):
    """At the largest size that is read, a picture takes less than a gigabyte.

    By what a further pixel costs: strips cost the same at any size.
    """
    from util.data.images import _COSTLY

    sides = (2000, 3500)
    small, large = (bytes_per_pixel(mode, kind, side, options) * side**2 for side in sides)
    assert (large - small) / (sides[1] ** 2 - sides[0] ** 2) * _COSTLY.get(kind, MAX_PIXELS) < 1.1e9


@linux
@pytest.mark.slow
@pytest.mark.parametrize("mode, kind, options", LARGE)
def test_a_hundred_megapixels_take_less_than_a_gigabyte(mode, kind, options):
    from util.data.images import _COSTLY

    side = int(_COSTLY.get(kind, MAX_PIXELS) ** 0.5)
    assert bytes_per_pixel(mode, kind, side, options) * side**2 < 1 << 30


def test_strips_of_a_large_picture_join_without_a_seam(monkeypatch):
    from util.data import images

    soft = Image.fromarray(np.random.default_rng(0).integers(0, 256, (41, 30, 4), dtype=np.uint8))
    deep = Image.fromarray(np.random.default_rng(1).integers(0, 65536, (41, 30), dtype=np.uint16))
    whole = [decode_with_alpha(corpus.encoded(image, "PNG")) for image in (soft, deep)]
    canvas = Image.new("RGB", soft.size, "white")
    canvas.paste(soft.convert("RGB"), mask=soft.getchannel("A"))  # at once, the reference
    assert np.array_equal(whole[0][0], canvas) and np.array_equal(whole[0][1], soft.getchannel("A"))
    grey = (np.asarray(deep) * (255 / 65535) + 0.5).astype(np.uint8)
    assert np.array_equal(np.asarray(whole[1][0])[..., 0], grey)
    monkeypatch.setattr(images, "_STRIP", 90)  # three rows
    for image, (picture, alpha) in zip((soft, deep), whole, strict=True):
        again, opacity = decode_with_alpha(corpus.encoded(image, "PNG"))
        assert np.array_equal(again, picture) and np.array_equal(opacity, alpha)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%Page: 1 1\nshowpage\n%%EOF\n"


def test_no_program_is_started_for_a_picture(tmp_path, monkeypatch):
    """Before, Pillow ran Ghostscript on a y.png that holds an EPS."""
    from PIL import EpsImagePlugin

    stub = tmp_path / "bin/gs"
    corpus.save(stub, f"#!/bin/sh\ntouch {tmp_path}/started\necho 10\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(stub.parent), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # that there is none may have been found before
    corpus.save(tmp_path / "y.png", EPS)
    refused(lambda: decode_image(tmp_path / "y.png"), "cannot identify")
    refused(lambda: decode_image(EPS), "cannot identify")
    refused(lambda: image_size(tmp_path / "y.png"), "cannot identify")
    assert not (tmp_path / "started").exists()
    with Image.open(tmp_path / "y.png") as picture, pytest.raises(OSError):
        picture.load()
    assert (tmp_path / "started").exists()  # the stub is one that would have been started


@pytest.mark.parametrize("kind", ["TGA", "ICO", "PCX", "SGI", "DDS", "IM"])
def test_rare_formats_are_not_read(kind):
    data = corpus.encoded(corpus.picture(0), kind)
    assert Image.open(io.BytesIO(data)).size
    refused(lambda: decode_image(data), "cannot identify")


def test_the_formats_that_are_read_are_those_of_the_suffixes():
    known = Image.registered_extensions()
    assert {"JPEG" if known[suffix] == "MPO" else known[suffix] for suffix in SUFFIXES} == set(FORMATS) - {"PPM"}
    for kind in (*FORMATS, "MPO"):
        assert decode_image(corpus.encoded(corpus.picture(0), kind)).size == corpus.picture(0).size


def test_numbers_that_are_none_in_a_float_tiff_become_black():
    values = np.full((8, 9), 0.5, np.float32)
    values[0, :4] = np.nan, np.inf, -np.inf, -3e38
    picture = np.asarray(decode_image(corpus.encoded(Image.fromarray(values), "TIFF")))
    assert (picture[0, :4] == 0).all() and (picture[1:] == 128).all()
    values[:] = np.nan
    assert not np.asarray(decode_image(corpus.encoded(Image.fromarray(values), "TIFF"))).any()


def test_what_is_no_file_is_no_picture(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")  # opened, it would wait for a writer for ever
    for name in ("folder.png", "empty.png", "pipe.png"):
        refused(lambda name=name: decode_image(tmp_path / name))
        refused(lambda name=name: image_size(tmp_path / name))
    refused(lambda: decode_image(tmp_path / "a\0b.png"))
    assert list(image_sizes(tmp_path, ["pipe.png", "gone.png"])) == ["file damaged", "file missing"]


@pytest.mark.parametrize("error", [KeyError, IndexError, struct.error, AttributeError, TypeError, EOFError])
def test_a_header_may_raise_anything(error, tmp_path, monkeypatch):
    """Before, image_sizes let all of these through: Pillow's readers raise them on damaged files."""
    corpus.save(tmp_path / "a.png", corpus.picture(0))
    monkeypatch.setattr(Image, "open", lambda *args, **more: (_ for _ in ()).throw(error("x")))
    assert list(image_sizes(tmp_path, ["a.png"])) == ["file damaged"]
