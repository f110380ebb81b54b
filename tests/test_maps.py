"""Semantic maps as data: how they are drawn, opened, refused and sent.

Run: python -m pytest tests/test_maps.py
"""

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.data import pack
from util.data.face_crop import FaceCrops
from util.data.faces import Face
from util.data.images import BadImage, alpha_of, decode_image, decode_with_alpha
from util.data.manifest import write_manifest
from util.data.map_rows import MapChunks, cell_means, coverage, predicted_eyes
from util.data.maps import ROWS_FILE, MappedSource, file_stamp, open_maps, row_keys
from util.data.pack_origin import open_origin
from util.data.sources import FolderSource, Subset, open_folder, open_source, reader
from util.run.errors import UserError

# --- drawing


@pytest.mark.parametrize("size", [(64, 96), (100, 41), (7, 300)])  # width, height
def test_coverage_is_that_of_supersampling(size):
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 5):
        corners = rng.uniform(-0.2, 1.2, (count, 2, 2)) * size
        boxes = np.concatenate([corners.min(1), corners.max(1)], 1)
        fine = 64  # samples a cell and axis
        x, y = ((np.arange(32 * fine) + 0.5) * side / (32 * fine) for side in size)
        inside = np.zeros((32 * fine, 32 * fine), bool)
        for x1, y1, x2, y2 in boxes:
            inside |= ((y >= y1) & (y < y2))[:, None] & (x >= x1) & (x < x2)
        expected = inside.reshape(32, fine, 32, fine).mean((1, 3)) * 255
        assert np.abs(coverage(boxes.tolist(), size) - expected).max() <= 255 * 2 / fine + 0.5


def test_coverage_of_simple_boxes_is_exact():
    assert not coverage([], (32, 32)).any()
    assert (coverage([(-5, -5, 500, 500)], (40, 90)) == 255).all()
    found = coverage([(0, 0, 1.5, 1), (0.5, 0, 1.5, 1)], (32, 32))  # overlapping: their union
    assert found[0, :3].tolist() == [255, 128, 0] and not found[1:].any()


def test_means_of_a_mask_are_exact():
    mask = np.zeros((64, 96), np.uint8)
    mask[:2, :3] = 255
    mask[2, 3] = 255
    found = cell_means(mask)
    assert found[0, 0] == 255 and found[1, 1] == round(255 / 6) and found.sum() == 255 + round(255 / 6)
    uneven = np.zeros((5, 48), np.uint8)
    uneven[:, 0] = 255  # two thirds of a cell in width
    assert set(cell_means(uneven)[:, 0]) == {170} and not cell_means(uneven)[:, 1:].any()


def test_predicted_eyes_lie_side_by_side_in_the_upper_face():
    image = Image.new("RGB", (200, 200), "white")
    (left, right), x = predicted_eyes([(10, 20, 110, 120)], image), [10, 110]
    for eye in (left, right):
        assert x[0] < eye[0] < eye[2] < x[1] and 20 < eye[1] < eye[3] < 120
    assert left[2] <= right[0]
    assert abs((left[0] + right[2]) / 2 - 60) < 15 and left[1] + left[3] < 2 * 95
    moved = predicted_eyes([(60, 70, 160, 170), (10, 20, 110, 120)], image)
    assert np.allclose(moved[:2], np.add((left, right), 50)) and np.allclose(moved[2:], (left, right))
    assert predicted_eyes([], image) == []


# --- alpha


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def cut_out() -> tuple[Image.Image, np.ndarray]:
    alpha = (np.arange(20)[:, None] * 9 + np.arange(12) * 5).astype(np.uint8)
    image = Image.new("RGB", (12, 20), (200, 30, 30))
    image.putalpha(Image.fromarray(alpha))
    return image, alpha


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("TIFF", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_alpha_is_the_channel(kind, options, tmp_path):
    image, alpha = cut_out()
    (tmp_path / "file").write_bytes(encoded(image, kind, **options))
    found = alpha_of(tmp_path / "file")
    assert found.dtype == np.uint8 and np.array_equal(found, alpha)
    seen, also = decode_with_alpha(tmp_path / "file")
    assert np.array_equal(also, alpha)
    assert np.array_equal(np.asarray(seen), np.asarray(decode_image(tmp_path / "file")))


def test_alpha_is_turned_upright_like_the_picture():
    image, alpha = cut_out()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    assert np.array_equal(alpha_of(encoded(image, "PNG", exif=exif)), np.rot90(alpha, -1))


def test_a_transparent_colour_is_alpha_and_opaque_pictures_have_none():
    palette = Image.new("P", (4, 2))
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((1, 0), 1)
    found = alpha_of(encoded(palette, "PNG", transparency=1))
    assert found.tolist() == [[255, 0, 255, 255], [255] * 4]
    for mode in ("RGB", "L", "RGBA", "I;16"):
        colour = (9, 9, 9, 255) if mode == "RGBA" else 9 if mode in ("L", "I;16") else (9, 9, 9)
        assert alpha_of(encoded(Image.new(mode, (4, 4), colour), "PNG")) is None


def test_alpha_has_the_limits_of_the_picture(tmp_path):
    image, _ = cut_out()
    with pytest.raises(BadImage, match="more than 10"):
        alpha_of(encoded(image, "PNG"), max_pixels=10)
    with pytest.raises(BadImage):
        alpha_of(encoded(image, "PNG")[:60])
    with pytest.raises(BadImage):
        alpha_of(tmp_path / "nowhere.png")


# --- where each map comes from


@pytest.fixture
def priorities(tmp_path) -> Path:
    """A cut-out with a mask, a picture with a mask, one with neither, and one whose corners alone are clear."""
    size = (64, 64)
    whole = Image.new("RGB", size, "white")
    whole.paste((200, 60, 60), (16, 16, 48, 64))
    whole.save(tmp_path / "plain.png")
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, 32, 64))
    (tmp_path / "masks").mkdir()
    mask.save(tmp_path / "masks/left.png")
    alpha = Image.new("L", size)
    alpha.paste(255, (0, 32, 64, 64))
    clear = whole.copy()
    clear.putalpha(alpha)
    clear.save(tmp_path / "clear.png")
    corners = whole.copy()
    corner = Image.new("L", size, 255)
    corner.putpixel((0, 0), 0)
    corners.putalpha(corner)
    corners.save(tmp_path / "corners.png")
    rows = [
        {"sample_id": "alpha", "file_name": "clear.png", "mask_file": "masks/left.png"},
        {"sample_id": "mask", "file_name": "plain.png", "mask_file": "masks/left.png"},
        {"sample_id": "estimate", "file_name": "plain.png"},
        {"sample_id": "corners", "file_name": "corners.png"},
    ]
    write_manifest(tmp_path, [{**row, "split": "train"} for row in rows])
    return tmp_path


def draw(folder: Path, names, find=None) -> tuple[np.ndarray, list[list[str]]]:
    source = FolderSource(str(folder), *open_folder(str(folder)))
    chunks = MapChunks(source, folder / "unused", names, find)
    values = np.zeros((len(source), len(names), 32, 32), np.uint8)
    return values, [chunks.fill(values[i], i) for i in range(len(source))]


def test_alpha_goes_before_the_mask_and_the_mask_before_the_estimate(priorities):
    values, origins = draw(priorities, ["foreground"])
    assert [origin for (origin,) in origins] == ["alpha", "mask", "estimate", "estimate"]
    assert not values[0, 0, :16].any() and (values[0, 0, 16:] == 255).all()
    assert (values[1, 0, :, :16] == 255).all() and not values[1, 0, :, 16:].any()
    inside, outside = values[2, 0, 10:, 9:23], values[2, 0, :6]
    assert inside.mean() > 200 > 50 > outside.mean()


class Finder:
    """Finds one face with one eye in the right half of every picture, and counts."""

    def __init__(self):
        self.asked = []

    def __call__(self, image, name):
        self.asked.append(name)
        return [Face((32, 0, 64, 32), 0.9, ((40, 8, 44, 12), (2, 2, 6, 6)))]  # the other eye lies in no face


def test_faces_of_a_picture_are_on_the_map_of_each_of_its_rows(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "two.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "one.png")
    Image.new("RGB", (64, 64)).save(tmp_path / "none.png")
    rows = [
        {"sample_id": "a", "file_name": "two.png", "box": [0, 0, 16, 16], "eyes": [[2, 2, 4, 4]]},
        {"sample_id": "c", "file_name": "one.png", "box": [32, 0, 64, 32]},
        {"sample_id": "b", "file_name": "two.png", "box": [48, 48, 64, 64], "eyes": [[50, 50, 52, 52]]},
        {"sample_id": "d", "file_name": "none.png"},
    ]
    write_manifest(tmp_path, [{**row, "split": "train"} for row in rows])
    names = ["face", "eyes"]
    values, origins = draw(tmp_path, names)
    assert origins == [["metadata"] * 2, ["metadata", "predicted"], ["metadata"] * 2, ["none"] * 2]
    two = coverage([(0, 0, 16, 16), (48, 48, 64, 64)], (64, 64))
    assert np.array_equal(values[0, 0], two) and np.array_equal(values[2], values[0])
    assert np.array_equal(values[0, 1], coverage([(2, 2, 4, 4), (50, 50, 52, 52)], (64, 64)))
    assert np.array_equal(
        values[1, 1], coverage(predicted_eyes([(32, 0, 64, 32)], Image.new("RGB", (64, 64))), (64, 64))
    )
    assert not values[3].any()
    finder = Finder()
    found, origins = draw(tmp_path, names, finder)
    assert origins == [["metadata"] * 2, ["metadata", "finder"], ["metadata"] * 2, ["finder"] * 2]
    assert np.array_equal(found[[0, 2]], values[[0, 2]]) and np.array_equal(found[1, 0], values[1, 0])
    assert np.array_equal(found[3], found[1])
    assert np.array_equal(found[3, 1], coverage([(40, 8, 44, 12)], (64, 64)))
    assert finder.asked == ["one.png", "none.png"]  # not where the metadata know all


def test_a_face_whose_eyes_the_finder_has_not_found_gets_predicted_ones(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "two.png")
    boxes = [[32, 0, 64, 32], [0, 32, 24, 56]]
    rows = [{"sample_id": str(i), "file_name": "two.png", "box": box, "split": "train"} for i, box in enumerate(boxes)]
    write_manifest(tmp_path, rows)
    values, origins = draw(tmp_path, ["eyes"], Finder())
    predicted = predicted_eyes(boxes[1:], Image.new("RGB", (64, 64)))
    assert origins == [["finder"]] * 2
    assert np.array_equal(values[0, 0], coverage([(40, 8, 44, 12), *predicted], (64, 64)))


# --- opening


NAMES = ("face", "eyes")


@pytest.fixture
def mapped(tmp_path, make_images) -> Path:
    """12 pictures in three splits, with maps that hold the row number."""
    folder = make_images(tmp_path / "data", 12)
    splits = ["train", "val", "test"]
    write_rows(folder, [(f"s{i}", f"{i:03d}.png", splits[i % 3]) for i in range(12)])
    write_maps(folder / "maps", [f"s{i}" for i in range(12)])
    return folder


def write_rows(folder: Path, rows) -> None:
    write_manifest(folder, [dict(zip(("sample_id", "file_name", "split"), row, strict=True)) for row in rows])


def write_maps(folder: Path, ids: list[str]) -> None:
    folder.mkdir(exist_ok=True)
    for k, name in enumerate(NAMES):
        values = np.arange(len(ids), dtype=np.uint8)[:, None, None] + np.zeros((32, 32), np.uint8) + 100 * k
        np.save(folder / f"{name}.npy", values.astype(np.uint8))
    with open(folder / ROWS_FILE, "wb") as file:
        np.save(file, row_keys(ids))


def rows_seen(maps, count: int) -> list[int]:
    found = [maps.of(i) for i in range(count)]
    assert all(one.dtype == np.uint8 and one.shape == (2, 32, 32) and (one[1] == one[0] + 100).all() for one in found)
    return [int(one[0, 0, 0]) for one in found]


def test_each_sample_gets_the_maps_of_its_row(mapped):
    test = open_source(mapped, "test")
    assert rows_seen(open_maps(test, NAMES), len(test)) == [2, 5, 8, 11]
    part = Subset(Subset(test, [3, 1, 0]), [2, 0])
    maps = open_maps(part, NAMES)
    assert maps.names == NAMES and len(maps) == 2 and rows_seen(maps, 2) == [2, 11]
    assert open_maps(test, ["eyes"]).of(0).shape == (1, 32, 32)


def test_maps_in_another_folder(mapped, tmp_path):
    (mapped / "maps").rename(tmp_path / "elsewhere")
    test = open_source(mapped, "test")
    assert rows_seen(open_maps(test, NAMES, tmp_path / "elsewhere"), 4) == [2, 5, 8, 11]
    with pytest.raises(
        UserError, match=r"no map face eyes: run datasets/prepare_maps.py --data_path .* --maps face eyes$"
    ):
        open_maps(test, NAMES)
    with pytest.raises(UserError, match=r"--maps foreground --out .*elsewhere"):
        open_maps(test, ["foreground"], tmp_path / "elsewhere")


def test_maps_are_sent_small_and_opened_there(mapped):
    maps = open_maps(open_source(mapped, "test"), NAMES)
    maps.of(0)
    sent = pickle.dumps(maps)
    assert len(sent) < 1000 + 8 * len(maps)
    assert rows_seen(pickle.loads(sent), 4) == [2, 5, 8, 11]
    assert isinstance(maps._arrays[0], np.memmap)


def test_a_mapped_source_is_the_source_with_maps(mapped):
    test = open_source(mapped, "test")
    source = MappedSource(test, open_maps(test, NAMES))
    assert len(source) == 4 and source.column("sample_id") == ["s2", "s5", "s8", "s11"]
    assert np.array_equal(source.record(1)["maps"], source.maps.of(1)) and source.record(1)["sample_id"] == "s5"
    assert source.array("split").to_pylist() == ["test"] * 4 and source.stamp() == test.stamp()
    assert np.array_equal(np.asarray(reader(source)(2)), np.asarray(test.load(2)))
    assert not hasattr(source, "view") and not hasattr(source, "picture_size")
    part = Subset(source, [1, 3])
    assert rows_seen(open_maps(part, NAMES), 2) == [5, 11] and part.record(1)["maps"][0, 0, 0] == 11
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint and np.array_equal(again.record(0)["maps"], source.maps.of(0))


def test_the_fingerprint_changes_with_the_maps(mapped):
    test = open_source(mapped, "test")

    def mark(names=NAMES) -> str:
        return MappedSource(test, open_maps(test, names)).fingerprint

    first = mark()
    assert first == mark() != test.fingerprint and mark(["face"]) != first != mark(NAMES[::-1])
    values = np.load(mapped / "maps/eyes.npy")
    values[0, 0, 0] += 1
    np.save(mapped / "maps/eyes.npy", values)
    assert mark() != first


def test_the_note_of_the_maps_is_trusted_only_for_the_files_it_saw(mapped):
    test = open_source(mapped, "test")
    real = open_maps(test, NAMES).fingerprint
    stamps = {name: file_stamp(mapped / f"maps/{name}.npy") for name in NAMES}
    note = {"checksums": dict.fromkeys(NAMES, "0" * 16), "stamps": stamps}
    (mapped / "maps/maps.json").write_text(json.dumps(note))
    assert open_maps(test, NAMES).fingerprint != real  # the listed sums
    for name in NAMES:
        os.utime(mapped / f"maps/{name}.npy", ns=(1, 1))
    assert open_maps(test, NAMES).fingerprint == real  # the files were replaced: their own


def test_maps_of_other_rows_are_refused(mapped):
    rows = [(f"s{i}", f"{i:03d}.png", ["train", "val", "test"][i % 3]) for i in range(12)]
    write_rows(mapped, rows[::-1])
    with pytest.raises(UserError, match=r"other rows than the data has now.*--overwrite"):
        open_maps(open_source(mapped, "test"), NAMES)
    write_rows(mapped, rows[1:])
    with pytest.raises(UserError, match="other rows"):
        open_maps(open_source(mapped, "train"), NAMES)
    with pytest.raises(UserError, match=r"12 maps for the 11 rows|other rows"):
        open_origin(str(mapped), "auto")
    write_rows(mapped, [*rows, ("new", "000.png", "train")])
    assert rows_seen(open_maps(open_source(mapped, "test"), NAMES), 4) == [2, 5, 8, 11]  # these rows are the same
    with pytest.raises(UserError, match="too few"):
        open_maps(open_source(mapped, "train"), NAMES)


def test_a_reordered_manifest_is_not_packed_with_its_old_maps(mapped):
    open_origin(str(mapped), "auto")
    write_rows(mapped, [(f"s{i}", f"{i:03d}.png", "train") for i in reversed(range(12))])
    with pytest.raises(UserError, match="other rows"):
        open_origin(str(mapped), "auto")


def test_maps_made_by_hand_are_taken_in_the_order_of_the_rows(mapped, caplog):
    (mapped / "maps" / ROWS_FILE).unlink()
    assert rows_seen(open_maps(open_source(mapped, "test"), NAMES), 4) == [2, 5, 8, 11]
    assert "taken to be in the order" in caplog.text


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((12, 16, 16), np.uint8), "not uint8"),
        (np.zeros((12, 32, 32), np.float32), "float32"),
        (np.zeros((3, 32, 32), np.uint8), "too few"),
        (b"\x93NUMPY junk", "cannot be read"),
        (b"", "cannot be read"),
    ],
)
def test_files_that_are_no_maps_are_named(mapped, values, message):
    path = mapped / "maps/face.npy"
    path.write_bytes(values) if isinstance(values, bytes) else np.save(path, values)
    with pytest.raises(UserError, match=message) as caught:
        open_maps(open_source(mapped, "test"), NAMES)
    assert "face.npy" in str(caught.value) and "\n" not in str(caught.value)


def test_sources_that_have_no_maps_are_refused(mapped):
    test = open_source(mapped, "test")
    with pytest.raises(UserError, match="--face_padding"):
        open_maps(FaceCrops(test, 0.5), NAMES)
    with pytest.raises(UserError, match="--face_padding"):
        open_maps(Subset(FaceCrops(test, 0.5), [0]), NAMES)


# --- packed


def packed(folder: Path, out: Path) -> Path:
    pack.main(["--data_path", str(folder), "--out", str(out), "--canvas", "40", "--num_workers", "0"])
    return out


def test_a_packed_file_has_the_maps_of_its_folder(mapped, tmp_path):
    source = open_source(packed(mapped, tmp_path / "p"), "test")
    maps = open_maps(Subset(source, [1, 3]), NAMES)
    assert source.file.names("maps") == ["eyes", "face"]
    assert rows_seen(maps, 2) == [5, 11] and rows_seen(pickle.loads(pickle.dumps(maps)), 2) == [5, 11]
    whole = MappedSource(source, open_maps(source, NAMES))
    assert whole.picture_size == (40, 40) and np.array_equal(whole.view(0), source.view(0))
    assert whole.fingerprint != MappedSource(source, open_maps(source, ["face"])).fingerprint


def test_a_packed_file_without_maps_and_maps_given_to_it_are_refused(mapped, tmp_path, make_images):
    bare = open_source(packed(make_images(tmp_path / "bare", 3), tmp_path / "q"), "train", val_fraction=0.0)
    with pytest.raises(UserError, match=r"no map eyes: .*pack DIR again"):
        open_maps(bare, ["eyes"])
    source = open_source(packed(mapped, tmp_path / "p"), "test")
    with pytest.raises(UserError, match="leave out --maps"):
        open_maps(source, NAMES, mapped / "maps")
