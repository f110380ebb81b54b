"""visualize.detect: boxes drawn, faces cut out as a prepared folder, runs that go on where they were.

Run: python -m pytest tests/test_visualize_detect.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import fails
from PIL import Image

from models_finders import open_finder
from util.benchmark.detection import EYE, FACE
from util.benchmark.detection_files import Stored
from util.data.face_crop import FaceCrops
from util.data.faces import Face, find_faces
from util.data.manifest import read_manifest
from util.data.sources import open_source
from visualize import detect

FACES = {
    "a.png": [(0.9, (20, 30, 60, 70)), (0.7, (100, 5, 118, 40))],
    "a.jpg": [(0.8, (40, 40, 80, 90))],
    "deep/er/a.png": [(0.6, (0, 0, 30, 30)), (0.3, (60, 60, 90, 90))],
    "none.png": [],
}
EYES = {"a.png": [[28, 42, 34, 48], [46, 42, 52, 48]]}  # of its first face


@pytest.fixture
def art(tmp_path) -> Path:
    """Smooth pictures, two of one stem, three of one name; a damaged one; a file that is none."""
    folder, rng = tmp_path / "art", np.random.default_rng(0)
    for name in FACES:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((120, 100), Image.Resampling.BICUBIC).save(folder / name, quality=95)
    (folder / "damaged.png").write_bytes(b"junk")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.fixture
def boxes(tmp_path) -> Path:
    """What a finder found in them."""

    def extent(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    listed = {}
    for name, faces in FACES.items():
        rows = [{"score": score, "face": extent(box)} for score, box in faces]
        if name in EYES:
            rows[0] |= dict(zip(("left_eye", "right_eye"), map(extent, EYES[name]), strict=True))
        listed[name] = {"faces": rows}
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(listed))
    return path


def run(art, boxes, out, *flags) -> None:
    finder = ("--finder", f"boxes:{boxes}", "--device", "cpu")
    detect.main([*finder, "--images", str(art), "--out", str(out), *map(str, flags)])


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def test_each_face_is_cut_out_and_its_row_leads_back_to_the_picture(art, boxes, tmp_path):
    run(art, boxes, tmp_path / "out", "--crops", "--face_padding", 0.25, "--split", "test")
    crops = read_manifest(tmp_path / "out" / "crops")
    rows = [crops.row(i) for i in range(len(crops))]
    expected = {
        f"{name}#{k}": box for name, faces in FACES.items() for k, (score, box) in enumerate(faces) if score > 0.5
    }
    assert {row["sample_id"] for row in rows} == expected.keys() and len({row["file_name"] for row in rows}) == 4
    assert (crops.metadata["face_padding"], crops.metadata["originals"]) == ("0.25", str(art.resolve()))
    for i, row in enumerate(rows):
        x1, y1, x2, y2 = expected[row["sample_id"]]
        half, centre = 0.75 * max(x2 - x1, y2 - y1), ((x1 + x2) / 2, (y1 + y2) / 2)
        left, top = (max(0, round(each - half)) for each in centre)
        right, bottom = (
            min(end, round(each - half) + round(2 * half)) for end, each in zip((120, 100), centre, strict=True)
        )
        original = pixels(art / row["source"])
        assert np.array_equal(pixels(crops.path(i)), original[top:bottom, left:right])
        # the face itself has the pixels that it had
        a, b, c, d = map(int, row["box"])
        assert np.array_equal(pixels(crops.path(i))[b:d, a:c], original[y1:y2, x1:x2])
        assert row["split"] == "test" and row["identity"] is None
    eyes = next(row["eyes"] for row in rows if row["sample_id"] == "a.png#0")
    left, top, _, _ = next(row["box"] for row in rows if row["sample_id"] == "a.png#0")
    assert (np.array(eyes) + np.tile([20 - left, 30 - top], 2)).tolist() == EYES["a.png"]


def test_the_crops_are_data_for_training(art, boxes, tmp_path):
    run(art, boxes, tmp_path / "out", "--crops")
    source = open_source(tmp_path / "out" / "crops", "train", val_fraction=0.0)
    assert len(source) == 4 and all(min(source.load(i).size) >= 18 for i in range(4))
    tight = FaceCrops(source, 0.0)  # --face_padding of a training run finds the face in the crop
    whole = {row: source.record(row)["sample_id"] for row in range(4)}
    number = next(row for row, name in whole.items() if name == "a.png#0")
    assert np.array_equal(np.asarray(tight.load(number)), pixels(art / "a.png")[30:70, 20:60])


def test_boxes_are_drawn_and_files_of_one_stem_stay_apart(art, boxes, tmp_path):
    out = tmp_path / "out"
    run(art, boxes, out)
    drawn = {path.relative_to(out / "drawn").as_posix() for path in (out / "drawn").rglob("*.jpg")}
    assert drawn == {f"{name}.jpg" for name in FACES}
    assert not (out / "crops").exists()
    difference = np.abs(pixels(out / "drawn" / "none.png.jpg").astype(int) - pixels(art / "none.png")).mean()
    assert difference < 3
    edge = pixels(out / "drawn" / "a.jpg.jpg")[60:85, 40:42].reshape(-1, 3).mean(0)  # the left side of the box
    assert np.abs(edge - (213, 94, 0)).max() < 12
    inside = pixels(out / "drawn" / "a.jpg.jpg")[60:80, 50:70].astype(int) - pixels(art / "a.jpg")[60:80, 50:70]
    assert np.abs(inside).mean() < 3


def test_damaged_files_are_listed_and_the_lists_can_be_read(art, boxes, tmp_path, capsys):
    out = tmp_path / "out"
    run(art, boxes, out)
    bad = [json.loads(line) for line in (out / "bad_images.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in bad] == ["damaged.png"] and bad[0]["reason"]
    said = capsys.readouterr().out
    assert "4 faces in 4 pictures, 1 without one" in said and "damaged.png" in said
    before, after = open_finder(f"boxes:{boxes}"), open_finder(f"boxes:{out / 'faces.json'}")
    for name in FACES:
        picture = Image.open(art / name)
        assert find_faces(picture, after, name) == find_faces(picture, before, name, 0.5)


def test_what_is_done_is_not_done_again(art, boxes, tmp_path, monkeypatch):
    out, done = tmp_path / "out", []
    find = detect.find_faces

    def watched(picture, finder, name, min_score):
        done.append(name)
        return find(picture, finder, name, min_score)

    monkeypatch.setattr(detect, "find_faces", watched)
    run(art, boxes, out, "--crops")
    assert sorted(done) == sorted(FACES)
    lists = [(out / name).read_bytes() for name in ("faces.json", "bad_images.jsonl", "crops/metadata.parquet")]
    done.clear()
    run(art, boxes, out, "--crops")
    assert not done
    again = [(out / name).read_bytes() for name in ("faces.json", "bad_images.jsonl", "crops/metadata.parquet")]
    assert again == lists
    Image.new("RGB", (90, 90)).save(art / "a.png")
    (art / "none.png").unlink()
    run(art, boxes, out, "--crops")
    assert done == ["a.png"] and set(json.loads((out / "faces.json").read_text())) == set(FACES) - {"none.png"}


def test_a_run_that_was_stopped_ends_like_one_that_was_not(art, boxes, tmp_path, monkeypatch):
    run(art, boxes, tmp_path / "whole", "--crops")
    find, out = detect.find_faces, tmp_path / "out"

    def stopped(picture, finder, name, min_score):
        if name == "deep/er/a.png":
            raise KeyboardInterrupt
        return find(picture, finder, name, min_score)

    monkeypatch.setattr(detect, "find_faces", stopped)
    with pytest.raises(SystemExit, match="130"):
        run(art, boxes, out, "--crops")
    with open(out / detect.JOURNAL, "a") as journal:
        journal.write('{"file_name": "deep/er/a.p')  # the line that was being written
    monkeypatch.undo()
    run(art, boxes, out, "--crops")
    files = {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    assert files == {p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*") if p.is_file()}
    for file in files:
        assert (out / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file


def test_other_flags_or_weights_want_another_folder(art, boxes, tmp_path, capsys):
    out = tmp_path / "out"
    run(art, boxes, out)
    argv = ["--finder", f"boxes:{boxes}", "--images", str(art), "--out", str(out), "--device", "cpu"]
    assert "other flags or weights" in fails(detect.main, capsys, [*argv, "--min_score", "0.1"])
    boxes.write_text(boxes.read_text() + "\n")
    assert "other flags or weights" in fails(detect.main, capsys, argv)


def test_a_single_picture_and_a_folder_inside_which_the_result_lies(art, boxes, tmp_path):
    run(art / "a.jpg", boxes, tmp_path / "one")
    assert list(json.loads((tmp_path / "one" / "faces.json").read_text())) == ["a.jpg"]
    for _ in range(2):
        run(art, boxes, art / "out", "--crops")  # its own drawings are no pictures to search
    assert set(json.loads((art / "out" / "faces.json").read_text())) == set(FACES)


def test_refusals(art, boxes, tmp_path, capsys):
    def refuse(*flags) -> str:
        return fails(detect.main, capsys, [*map(str, flags), "--out", str(tmp_path / "out"), "--device", "cpu"])

    finder = ("--finder", f"boxes:{boxes}")
    assert "does not exist" in refuse(*finder, "--images", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no pictures" in refuse(*finder, "--images", tmp_path / "empty")
    assert "--size goes with --ckpt" in refuse(*finder, "--images", art, "--size", 64)
    assert "not known" in refuse("--finder", "magic:x", "--images", art)
    assert "required" in refuse("--images", art)


class Fixed:
    """A detector that always finds the same: two faces that overlap, eyes, and one eye in no face."""

    def detect(self, pictures, size=None):
        rows = [
            ((10, 10, 50, 50), 0.9, FACE), ((60, 10, 100, 50), 0.4, FACE), ((15, 20, 20, 25), 0.6, EYE),
            ((35, 20, 40, 25), 0.7, EYE), ((16, 21, 21, 26), 0.55, EYE), ((36, 36, 38, 38), 0.2, EYE),
            ((80, 80, 85, 85), 0.9, EYE),
        ]  # fmt: skip
        found, scores, labels = zip(*rows, strict=True)
        return [Stored(np.array(found, np.float32), np.array(scores), np.array(labels)) for _ in pictures]


def test_a_detector_is_a_finder_whose_eyes_lie_in_its_faces():
    faces = detect.DetectorFinder(Fixed()).find(Image.new("RGB", (120, 100)))
    assert [face.score for face in faces] == [0.9, 0.4]
    # the two surest eyes from the left, none of which is below a half
    assert faces[0] == Face((10, 10, 50, 50), 0.9, ((15, 20, 20, 25), (35, 20, 40, 25)))
    assert faces[1].eyes == ()


def test_a_checkpoint_goes_the_same_way(art, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(detect, "load_detector", lambda ckpt, device: asked.append(ckpt) or Fixed())
    out = tmp_path / "out"
    argv = ["--ckpt", "W", "--images", str(art), "--out", str(out), "--device", "cpu", "--crops", "--size", "64"]
    detect.main(argv)
    assert asked == ["W"]
    found = json.loads((out / "faces.json").read_text())
    assert all(len(found[name]["faces"]) == 1 for name in FACES)
    assert read_manifest(out / "crops").metadata["finder"] == "W" and len(read_manifest(out / "crops")) == 4
