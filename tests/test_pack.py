"""Packed data: canvases, boxes and maps against independent references, resuming, damage, and the samples of a role.

Run: python -m pytest tests/test_pack.py
"""

import io
import json
import mmap
import os
import pickle
import subprocess
import sys
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as vision

import main_pretrain
from tests import helpers
from tests.conftest import ROOT
from tests.helpers import assert_same, kill_when_written, make_identities, outcome
from util.data import pack, pack_journal
from util.data.augment import EvalCrop, TrainCrop
from util.data.augment_batch import placed
from util.data.face_crop import FaceCrops
from util.data.images import BadImage, crop_region
from util.data.loader import TrainLoader, held_out, in_order
from util.data.manifest import COLUMNS, write_manifest
from util.data.packed import ALIGNMENT, PackedFile
from util.data.roles import ROLES
from util.data.sources import Subset, open_source, reader
from util.data.trials import read_protocol, write_protocol
from util.run.dist import World
from util.run.errors import UserError
from util.run.seed import rng_for

CPU = torch.device("cpu")
fails = partial(helpers.fails, pack.main)


def flags(data, out, *more) -> list[str]:
    return ["--data_path", str(data), "--out", str(out), "--canvas", "24", "--num_workers", "0", *map(str, more)]


def packed(data, out, *more) -> Path:
    pack.main(flags(data, out, *more))
    return out


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth, with a hard edge; far from black and white, where libraries clip between two passes or after them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(60, 196, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    image.paste((190, 65, 100), (width // 3, height // 3, width // 2, height // 2))
    return image


def cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near, far = ((1.5 * x - 2.5) * x * x + 1), (((-0.5 * x + 2.5) * x - 4) * x + 2)
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_and_cut(image: Image.Image, region, side: int) -> np.ndarray:
    """The whole picture resampled by the factor of the region, then cut: levels (side, side, 3), by the definition."""
    pixels = np.asarray(image).astype(np.float64)
    scale = (region[2] - region[0]) / side
    for axis, low in ((1, region[0]), (0, region[1])):
        centres = low + (np.arange(side) + 0.5) * scale
        weights = cubic((np.arange(pixels.shape[axis]) + 0.5 - centres[:, None]) / max(scale, 1))
        weights /= weights.sum(1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
    return pixels


SIZES = {
    "wide.png": (180, 60),
    "tall.png": (55, 131),
    "square.png": (97, 97),
    "small.png": (20, 17),
    "as_is.png": (24, 24),
}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for seed, (name, size) in enumerate(SIZES.items()):
        picture(*size, seed).save(folder / name)
    return folder


@pytest.mark.parametrize("crop", ["smart", "centre"])
def test_canvases_are_the_picture_resized_and_cut(shapes, tmp_path, crop, capsys):
    source = open_source(packed(shapes, tmp_path / "p", "--crop", crop), "train", val_fraction=0.0)
    assert "1 smaller than the canvas, enlarged" in capsys.readouterr().out
    for i in range(len(source)):
        image = Image.open(shapes / source.record(i)["file_name"])
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        region = crop_region(image, 1.0) if crop == "smart" else (left, top, left + side, top + side)
        assert np.abs(source.view(i) - resize_and_cut(image, region, 24)).max() <= 1
        assert source.file.table.column("region")[i].as_py() == list(region)
        assert source.file.table.column("picture_size")[i].as_py() == list(image.size)


def test_canvases_are_those_of_torchvision(tmp_path):
    for name, size in (("wide.png", (128, 96)), ("tall.png", (48, 64))):
        picture(*size).save(tmp_path / name)
    source = open_source(packed(tmp_path, tmp_path / "p", "--crop", "centre"), "train", val_fraction=0.0)
    for i in range(2):
        pixels = torch.from_numpy(np.array(Image.open(tmp_path / source.record(i)["file_name"]))).permute(2, 0, 1)
        resized = vision.resize(pixels, 24, vision.InterpolationMode.BICUBIC, antialias=True)
        expected = vision.center_crop(resized, [24, 24]).permute(1, 2, 0)
        assert np.abs(source.view(i).astype(int) - expected.numpy()).max() <= 1


def faces(folder: Path, **extra) -> Path:
    """A prepared folder: two faces in one wide picture, one in a tall one, one row without a face; a strange split."""
    scene = Image.new("RGB", (240, 80), "black")
    scene.paste((255, 0, 0), (20, 10, 60, 50))
    scene.paste((0, 255, 0), (170, 20, 210, 60))
    tall = Image.new("RGB", (80, 200), "black")
    tall.paste((0, 0, 255), (20, 100, 60, 140))
    folder.mkdir(parents=True, exist_ok=True)
    scene.save(folder / "scene.png")
    tall.save(folder / "tall.png")
    eyes = [[30.0, 20, 36, 26], [44.0, 20, 50, 26]]
    rows = [
        {"sample_id": "a", "file_name": "scene.png", "identity": "red", "split": "train", "box": [20, 10, 60, 50],
         "eyes": eyes, "source": "album", "style": "moe"},
        {"sample_id": "b", "file_name": "scene.png", "identity": "green", "split": "test", "box": [170, 20, 210, 60],
         "source": "album"},
        {"sample_id": "c", "file_name": "tall.png", "identity": "blue", "split": "open_test",
         "box": [20, 100, 60, 140]},
        {"sample_id": "d", "file_name": "tall.png", "split": "figures", "mask_file": "masks/d.png"},
    ]  # fmt: skip
    write_manifest(folder, rows)
    return folder


def coloured(pixels: np.ndarray, channel: int) -> list[int]:
    rows, columns = np.nonzero(pixels[..., channel] > 128)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


@pytest.mark.parametrize("padding", [[], ["--face_padding", 0.5]])
def test_boxes_are_where_the_faces_are(tmp_path, capsys, padding):
    file = PackedFile(packed(faces(tmp_path / "d"), tmp_path / "p", "--canvas", 160, *padding))
    said = capsys.readouterr().out
    assert "1 foreground masks, not carried over" in said
    table = file.table.to_pylist()
    for i, channel in enumerate((0, 1, 2)):
        assert np.abs(np.array(table[i]["box"]) - coloured(file.pixels[i], channel)).max() <= 1.5
    red = np.array(table[0]["region"])
    scale = 160 / (red[2] - red[0])
    assert np.allclose(table[0]["eyes"][1], (np.array([44, 20, 50, 26]) - red[[0, 1, 0, 1]]) * scale)
    assert [row["mask_file"] for row in table] == [None] * 4 and table[3]["box"] is None
    assert [row["style"] for row in table] == ["moe", None, None, None]
    assert [row["split_key"] for row in table] == ["album", "album", "tall.png", "tall.png"]


def test_a_box_outside_the_canvas_is_left_out_and_counted(tmp_path, capsys):
    packed(faces(tmp_path / "d"), tmp_path / "p", "--crop", "centre")  # shows 80 to 160 of the scene
    assert "2 face boxes not on the canvas" in capsys.readouterr().out
    table = PackedFile(tmp_path / "p").table.to_pylist()
    assert [row["box"] is None for row in table] == [True, True, False, True] and table[0]["eyes"] is None


def test_maps_are_cut_to_what_the_canvas_shows(tmp_path):
    folder = faces(tmp_path / "d")
    (folder / "maps").mkdir()
    maps = np.zeros((4, 32, 32), np.uint8)
    maps[:] = np.arange(32)  # a label is its column
    np.save(folder / "maps/parts.npy", maps)
    file = PackedFile(packed(folder, tmp_path / "p", "--crop", "centre"))
    found = file.semantic_map("parts")
    assert found.dtype == np.uint8 and found.shape == (4, 32, 32)
    for i in (0, 1):  # the middle third of the scene's width
        expected = ((80 + (np.arange(32) + 0.5) * 80 / 32) * 32 / 240).astype(int)
        assert (found[i] == expected).all()
    assert (found[2] == np.arange(32)).all()  # the tall picture keeps its width
    np.save(folder / "maps/parts.npy", maps[:3])
    with pytest.raises(SystemExit):
        pack.main(flags(folder, tmp_path / "q"))


def test_protocols_come_along(tmp_path):
    folder = faces(tmp_path / "d")
    rows = {"id_a": ["a"], "id_b": ["b"], "label": [0], "kind": [None]}
    write_protocol(folder, "pairs", rows)
    out = packed(folder, tmp_path / "p")
    assert read_protocol(out, "pairs") == rows and read_protocol(out, "others") is None


def roles_of(path, **options) -> dict[str, list[dict]]:
    """What each role reads; a role that there is nothing for is missing."""
    found = {}
    for role in ROLES:
        try:
            source = open_source(path, role, **options)
        except UserError:
            continue
        found[role] = [dict(source.record(i)) for i in range(len(source))]
        assert [row["identity"] for row in found[role]] == source.column("identity")
    return found


def without_boxes(roles: dict[str, list[dict]]) -> dict[str, list[dict]]:
    return {
        role: [{**row, "box": None, "eyes": None, "mask_file": None} for row in rows] for role, rows in roles.items()
    }


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4])
def test_roles_are_those_of_the_folder(tmp_path_factory, make_images, fraction):
    tmp = tmp_path_factory.mktemp("roles")
    plain = make_images(tmp / "plain", 60, size=8)
    classes = make_identities(tmp / "classes", train=12)
    split = make_identities(tmp / "split")
    rows = [
        {
            "sample_id": str(i),
            "file_name": f"{i:03d}.png",
            "split": "train" if i % 3 else "pretrain",
            "source": f"s{i // 4}",
        }
        for i in range(60)
    ]
    sourced = tmp / "sourced"
    write_manifest(sourced, rows, image_root=str(plain))
    for name, data in {
        "plain": plain,
        "classes": classes,
        "split": split,
        "sourced": sourced,
        "f": faces(tmp / "f"),
    }.items():
        out = packed(data, tmp / f"{name}.pack")
        expected = without_boxes(roles_of(data, val_fraction=fraction))
        assert expected and without_boxes(roles_of(out, val_fraction=fraction)) == expected
        assert tuple(open_source(out, "test", val_fraction=0.4).record(0)) == COLUMNS


def test_hugging_face_data_are_packed_with_all_splits(tmp_path):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["rin", "len"])})
    folder = tmp_path / "hub"
    folder.mkdir()
    for split, count in (("train", 20), ("test", 6)):
        cells = []
        for i in range(count):
            stored = io.BytesIO()
            picture(30, 24, i).save(stored, format="PNG")
            cells.append({"bytes": stored.getvalue(), "path": None})
        data = {"image": cells, "label": [i % 2 for i in range(count)]}
        Dataset.from_dict(data, features=features).to_parquet(folder / f"{split}-00000.parquet")
    out = packed(f"hf:{folder}", tmp_path / "p")
    for fraction in (0.1, 0.5):
        assert roles_of(out, val_fraction=fraction) == roles_of(f"hf:{folder}", val_fraction=fraction)
    whole, unpacked = open_source(out, "test"), open_source(f"hf:{folder}", "test")
    region = whole.file.table.column("region")[20].as_py()
    assert np.abs(whole.view(0) - resize_and_cut(unpacked.load(0), region, 24)).max() <= 1


def test_labels_settled_when_packing_hold(tmp_path, capsys):
    data = make_identities(tmp_path / "d", train=4)
    out = packed(data, tmp_path / "p")
    assert open_source(out, "train", labels="none").column("identity").count(None) > 0
    assert None not in open_source(out, "train", labels="folders").column("identity")
    with pytest.raises(UserError, match="packed with --labels folders"):
        open_source(out, "train", labels="metadata")
    hidden = packed(data, tmp_path / "q", "--labels", "none")
    assert set(open_source(hidden, "train").column("identity")) == {None}


# damaged pictures


@pytest.fixture
def damaged(make_images, tmp_path) -> Path:
    folder = make_images(tmp_path / "damaged", 70, size=30)
    (folder / "005.png").write_bytes(b"no picture")
    (folder / "067.png").write_bytes(b"")
    return folder


def test_a_bad_picture_keeps_its_row_and_is_met_in_training_as_ever(damaged, tmp_path, capsys):
    out = packed(damaged, tmp_path / "p", "--max_bad", 0.1)
    listed = [json.loads(line) for line in (tmp_path / "p.bad_images.jsonl").read_text().splitlines()]
    assert [(entry["index"], entry["path"]) for entry in listed] == [(5, "005.png"), (67, "067.png")]
    assert "2 cannot be read" in capsys.readouterr().out
    source = open_source(out, "train", val_fraction=0.0)
    assert len(source) == 70
    for read in (source.view, source.load):
        with pytest.raises(BadImage, match=r"005\.png"):
            read(5)
    unpacked = open_source(damaged, "train", val_fraction=0.0)
    options = {"batch_size": 16, "num_workers": 0, "device": CPU}
    found = [bad[0] for batch in in_order(source, EvalCrop((24, 24)), **options) for bad in batch["bad"]]
    expected = [bad[0] for batch in in_order(unpacked, EvalCrop((24, 24)), **options) for bad in batch["bad"]]
    assert found == expected == [5, 67]


def test_too_many_bad_pictures_stop_it_and_more_may_be_allowed_later(damaged, tmp_path, capsys):
    error = fails(capsys, flags(damaged, tmp_path / "p"))
    assert "--max_bad 0.01" in error and "p.bad_images.jsonl" in error
    assert not (tmp_path / "p").exists()
    packed(damaged, tmp_path / "p", "--max_bad", 0.1)
    assert "going on after" in capsys.readouterr().out


# resuming


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """300 samples in 5 chunks that take some time to decode; one picture in 20 is damaged."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(20):
        picture(600 + i, 500, i).save(folder / f"{i:03d}.jpg", quality=90)
    rows = [{"sample_id": str(i), "file_name": f"{i % 20:03d}.jpg", "split": "train"} for i in range(300)]
    (folder / "007.jpg").write_bytes(b"no picture")
    write_manifest(folder, rows)
    return folder


@pytest.fixture(scope="module")
def whole(many, tmp_path_factory) -> bytes:
    return packed(many, tmp_path_factory.mktemp("whole") / "p", "--max_bad", 0.1).read_bytes()


def test_a_killed_packing_goes_on_to_the_same_bytes(many, whole, tmp_path, capsys):
    out, journal = tmp_path / "p", tmp_path / "p.part.jsonl"
    argv = flags(many, out, "--max_bad", 0.1)
    for workers, least in ((2, 2), (0, 4)):  # lines of the journal, the first is the plan
        command = [sys.executable, "-m", "util.data.pack", *argv, "--num_workers", str(workers)]
        kill_when_written(command, journal, least)
        assert not out.exists()
        for half in (tmp_path / "p.part", journal):
            with pytest.raises(UserError, match=r"half-written|not of a kind"):
                open_source(half, "train")
    with open(journal, "a") as file:
        file.write('{"chunk": 4, "checks')  # a line that a crash cut short
    pack.main([*argv, "--num_workers", "1"])
    assert "going on after" in capsys.readouterr().out
    assert out.read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p", "p.bad_images.jsonl"]


def test_a_packing_killed_before_it_got_its_name_is_finished(shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(pack_journal.os, "replace", lambda *_: sys.exit(9))
    with pytest.raises(SystemExit):
        packed(shapes, tmp_path / "p")
    monkeypatch.undo()
    monkeypatch.setattr(pack.Canvases, "__getitem__", lambda *_: pytest.fail("decoded again"))
    finished = packed(shapes, tmp_path / "p").read_bytes()
    monkeypatch.undo()
    assert finished == packed(shapes, tmp_path / "q").read_bytes()


def test_a_finished_packing_is_left_alone_until_something_changes(shapes, tmp_path, capsys):
    data = tmp_path / "d"
    data.mkdir()
    for name in SIZES:
        (data / name).write_bytes((shapes / name).read_bytes())
    out = packed(data, tmp_path / "p")
    before = out.stat().st_mtime_ns, out.read_bytes()
    packed(data, out)
    assert "complete already" in capsys.readouterr().out
    error = fails(capsys, flags(data, out, "--canvas", 16))
    assert "--canvas was 24 and is now 16" in error and "--overwrite" in error
    assert "--crop was smart and is now centre" in fails(capsys, flags(data, out, "--crop", "centre"))
    assert "40000 is out of range: it must be from 1 to 32768" in fails(capsys, flags(data, out, "--canvas", 40_000))
    picture(50, 50, 9).save(data / "square.png")
    assert "the pictures" in fails(capsys, flags(data, out))
    picture(50, 50, 9).save(data / "more.png")
    assert "the list of samples" in fails(capsys, flags(data, out))
    assert (out.stat().st_mtime_ns, out.read_bytes()) == before
    packed(data, out, "--overwrite")
    assert len(open_source(out, "train", val_fraction=0.0)) == len(SIZES) + 1


def test_other_flags_do_not_go_on_with_a_begun_packing(damaged, tmp_path, capsys):
    fails(capsys, flags(damaged, tmp_path / "p"))
    assert "begun" in fails(capsys, flags(damaged, tmp_path / "p", "--canvas", 16))
    packed(damaged, tmp_path / "p", "--canvas", 16, "--max_bad", 0.1, "--overwrite")
    assert PackedFile(tmp_path / "p").header.canvas == 16


def test_two_packings_of_one_file_are_refused(shapes, tmp_path):
    plan = {"samples": 1, "chunk": 64}
    with pack_journal.Journal(tmp_path / "p", plan, ALIGNMENT, overwrite=False):
        code = (
            "import sys; from pathlib import Path; from util.data.pack_journal import Journal\n"
            "from util.run.errors import UserError\n"
            "try:\n    Journal(Path(sys.argv[1]), {'samples': 1, 'chunk': 64}, 1, False).__enter__()\n"
            "except UserError as error:\n    print(error)"
        )
        command = [sys.executable, "-c", code, str(tmp_path / "p")]
        said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    assert "in use by another packing" in said


# damage to the file


def test_a_flipped_byte_is_found_and_named(many, whole, tmp_path, capsys):
    out = tmp_path / "p"
    out.write_bytes(whole)
    pack.main(["--out", str(out), "--check"])
    assert "every checksum is right" in capsys.readouterr().out
    header = PackedFile(out).header
    canvas = 3 * 24 * 24
    places = {
        "chunk 0 (canvases 0 to 63)": ALIGNMENT,
        "chunk 3 (canvases 192 to 255)": ALIGNMENT + 200 * canvas + 5,
        "chunk 4 (canvases 256 to 299)": ALIGNMENT + 300 * canvas - 1,
        "section 'samples'": sum(header.sections["samples"][:2]) - 400,
    }
    for name, place in places.items():
        flipped = bytearray(whole)
        flipped[place] ^= 1
        out.write_bytes(flipped)
        assert name in fails(capsys, ["--out", str(out), "--check"])
    flipped = bytearray(whole)
    flipped[60] ^= 1
    out.write_bytes(flipped)
    assert "damaged in its header" in fails(capsys, ["--out", str(out), "--check"])


def test_a_file_that_is_not_whole_is_refused(whole, tmp_path):
    path = tmp_path / "p"
    for content, word in (
        (whole[:-1], "bytes of"),
        (whole[: len(whole) // 2], "bytes of"),
        (whole[:300], "damaged"),
        (whole + b"\0", "bytes of"),
        (bytes(ALIGNMENT) + whole[ALIGNMENT:], "half-written"),
        (b"", "not of a kind"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=word):
            open_source(path, "train")


def test_what_a_user_can_get_wrong_is_one_line(shapes, tmp_path, capsys, monkeypatch):
    assert "nothing to pack" in fails(capsys, ["--out", str(tmp_path / "p")])
    assert "does not exist" in fails(capsys, flags(tmp_path / "nowhere", tmp_path / "p"))
    assert "does not exist" in fails(capsys, ["--out", str(tmp_path / "p"), "--check"])
    assert "is a folder" in fails(capsys, flags(shapes, tmp_path))
    out = packed(shapes, tmp_path / "p")
    assert "is a file" in fails(capsys, flags(out, tmp_path / "q"))
    (tmp_path / "text").write_text("hello")
    assert "not of a kind" in fails(capsys, flags(shapes, tmp_path / "text"))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(pack.shutil, "disk_usage", lambda path: usage)
    assert "GB left" in fails(capsys, flags(shapes, tmp_path / "full"))


# the reader


@pytest.fixture(scope="module")
def faces_file(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("faces")
    return packed(faces(tmp / "d"), tmp / "p", "--canvas", 64)


def test_a_view_is_the_file_itself_and_is_sent_small(many, whole, tmp_path):
    (tmp_path / "p").write_bytes(whole)
    source = open_source(tmp_path / "p", "train", val_fraction=0.0)
    view = source.view(3)
    assert view.shape == (24, 24, 3) and view.dtype == np.uint8 and not view.flags.writeable
    assert np.shares_memory(view, source.file.pixels) and view.ctypes.data % 4 == 0
    assert source.file.pixels.ctypes.data % os.sysconf("SC_PAGE_SIZE") == 0
    assert np.array_equal(np.asarray(source.load(3)), view)
    sent = pickle.dumps(source)
    assert len(sent) < 8 * len(source) + 1000 < len(whole) / 30
    again = pickle.loads(sent)
    assert again.fingerprint == source.fingerprint and again.record(9) == source.record(9)
    assert np.array_equal(again.view(3), view)
    (tmp_path / "p").write_bytes(whole[:ALIGNMENT])
    with pytest.raises(UserError, match="bytes of"):
        pickle.loads(sent)


def test_canvases_are_the_same_where_memory_is_short(many, whole, tmp_path, monkeypatch):
    (tmp_path / "p").write_bytes(whole)
    plain = open_source(tmp_path / "p", "train", val_fraction=0.0)
    monkeypatch.setattr("util.data.packed.free_memory_bytes", lambda device: 1000)
    asked = []
    monkeypatch.setattr("util.data.packed.mmap.mmap", recording(mmap.mmap, asked))
    short = open_source(tmp_path / "p", "train", val_fraction=0.0)
    for i in (0, 3, 299):  # 1,728 bytes each: they begin anywhere in a page
        assert np.array_equal(short.view(i), plain.view(i))
        start, length = asked[-1]
        assert (
            start % mmap.PAGESIZE == 0 and start <= ALIGNMENT + i * 1728 < ALIGNMENT + (i + 1) * 1728 == start + length
        )
    assert len(asked) == 3


def recording(kind, asked: list):
    """A memory map that notes which part is asked for ahead."""

    class Map(kind):
        def madvise(self, option, start, length):
            asked.append((start, length))
            return super().madvise(option, start, length)

    return Map


def test_fingerprints_tell_roles_and_content_apart_but_not_copies(shapes, tmp_path):
    data = tmp_path / "copy"
    data.mkdir()
    for name in SIZES:
        (data / name).write_bytes((shapes / name).read_bytes())
    one, copy = (packed(folder, tmp_path / name) for folder, name in ((shapes, "p"), (data, "q")))
    centre = packed(shapes, tmp_path / "r", "--crop", "centre")
    open_train = partial(open_source, role="train", val_fraction=0.0)
    assert open_train(one).fingerprint == open_train(copy).fingerprint != open_train(centre).fingerprint
    assert open_source(one, "train", val_fraction=0.5).fingerprint != open_train(one).fingerprint
    assert open_train(one).stamp() != open_train(centre).stamp()


def test_wrappers_pass_views_on(faces_file, shapes):
    packed_source, folder = open_source(faces_file, "train", val_fraction=0.0), open_source(shapes, "train")
    for source in (folder, Subset(folder, [1, 0]), FaceCrops(folder, 0.25)):
        assert not hasattr(source, "view") and not hasattr(source, "picture_size") and reader(source) == source.load
    part = Subset(packed_source, [0])
    assert part.picture_size == (64, 64) and np.shares_memory(part.view(0), packed_source.file.pixels)
    face = FaceCrops(part, 0.25)
    assert np.array_equal(face.view(0), np.asarray(face.load(0))) and not hasattr(face, "picture_size")
    assert np.shares_memory(face.view(0), packed_source.file.pixels)
    box = [round(value) for value in face.record(0)["box"]]
    shown = face.view(0)[box[1] : box[3], box[0] : box[2], 0]
    assert (shown[1:-1, 1:-1] > 128).all() and tuple(face.record(0)) == COLUMNS
    assert face.record(0)["identity"] == "red" and face.record(0).get("eyes") is not None
    crop = TrainCrop((16, 16))
    assert placed(crop, "device", part, CPU) is not crop
    with pytest.raises(UserError, match="pictures of one size"):
        placed(crop, "device", face, CPU)


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_give_the_canvases_without_a_warning(many, whole, tmp_path, workers):
    (tmp_path / "p").write_bytes(whole)
    source = open_source(tmp_path / "p", "train", val_fraction=0.0)
    options = {
        "batch_size": 50,
        "accum_iter": 1,
        "seed": 3,
        "world": World(rank=0, local_rank=0, size=1),
        "device": CPU,
    }
    crop = TrainCrop((16, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "This DataLoader will create")  # on a machine of one core
        loader = TrainLoader(source, crop, num_workers=workers, **options)
        batch = next(loader.enter(2, 1))
        loader.close()
    for pixels, index in zip(batch["image"], batch["index"].tolist(), strict=True):
        if index % 20 != 7:
            expected = crop(np.array(source.load(index)), {}, rng_for(3, 2, index, "augment"))
            assert torch.equal(pixels, expected)
    options = {"batch_size": 64, "num_workers": workers, "device": CPU}
    seen = torch.cat([batch["image"] for batch in in_order(source, EvalCrop((24, 24)), **options)])
    assert torch.equal(seen[100], torch.from_numpy(source.view(100).copy()).permute(2, 0, 1))


def test_held_out_pictures_are_views(many, whole, tmp_path):
    (tmp_path / "p").write_bytes(whole)
    args = Namespace(
        streaming=False, data_path=str(tmp_path / "p"), labels="auto", val_fraction=0.2, face_padding=None, seed=0
    )
    shown = [
        (record["sample_id"], load) for record, load in held_out(args) if not record["file_name"].startswith("007")
    ]
    source = open_source(tmp_path / "p", "val", val_fraction=0.2)
    ids = source.column("sample_id")
    assert 0 < len(shown) < 300
    for sample_id, load in shown[:5]:
        picture_there = load()
        assert not picture_there.flags.owndata and np.array_equal(picture_there, source.view(ids.index(sample_id)))


@pytest.mark.parametrize("augment_on", ["workers", "device"])
def test_training_from_a_packed_file_resumes_bit_for_bit(make_images, tmp_path, augment_on):
    out = packed(make_images(tmp_path / "images", 40), tmp_path / "p")
    recipe = "--model mae_vit_nano_patch8 --input_size 16 --batch_size 8 --epochs 2 --warmup_epochs 1 --lr 1e-3"
    recipe += f" --device cpu --num_workers 2 --eval_images 4 --log_every 2 --augment_on {augment_on} --data_path {out}"

    def train(run, *more):
        main_pretrain.main([*recipe.split(), "--output_dir", str(tmp_path / run), *map(str, more)])

    train("whole")
    train("parts", "--max_steps", 3)
    train("parts", "--resume", "auto", "--num_workers", 0)
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
