"""eval_detection.py as a user runs it: on a detector, on a finder, on the finds of a file.

Run: python -m pytest tests/test_eval_detection.py
"""

import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy as np
import pytest
from PIL import Image, ImageDraw
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

import eval_detection
from util.benchmark.detection import EYE, FACE
from util.benchmark.detection_files import Stored, read_predictions
from util.data.manifest import write_manifest
from util.run.errors import UserError

FAST = ["--replicates", "20", "--device", "cpu"]
SKIN, PUPIL = (250, 200, 170), (20, 20, 120)
# a face of each size, two in one picture, none in the last
FACES = {
    "a/0.png": [(10, 10, 130, 130)],
    "a/1.png": [(20, 20, 44, 44), (100, 60, 160, 120)],
    "b/0.png": [(70, 70, 150, 150)],
    "b/2.png": [(5, 100, 65, 160)],
    "b/empty.png": [],
}


def eyes_of(face) -> list[tuple]:
    x1, y1, x2, _ = face
    side = (x2 - x1) / 6
    return [(x1 + k * side, y1 + 2 * side, x1 + (k + 1) * side, y1 + 3 * side) for k in (1, 4)]


def make(folder: Path, eyes: bool = True) -> Path:
    """A prepared folder whose faces are squares."""
    rows = []
    for name, faces in FACES.items():
        picture = Image.new("RGB", (200, 180), (90, 120, 90))
        pen = ImageDraw.Draw(picture)
        for face in faces:
            pen.rectangle(face, fill=SKIN)
            for eye in eyes_of(face):
                pen.rectangle(eye, fill=PUPIL)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture.save(folder / name)
        row = {"file_name": name, "split": "test"}
        rows += [
            {**row, "sample_id": f"{name}#{k}", "box": face, "eyes": eyes_of(face) if eyes else None,
             "occlusion": "hat" if k else "none"}
            for k, face in enumerate(faces)
        ] or [{**row, "sample_id": name}]  # fmt: skip
    write_manifest(folder, rows)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make(tmp_path_factory.mktemp("data"))


class Colours:
    """A detector by colour: the largest face, moved a little; at 64 px nothing; and at 32 px a find everywhere."""

    size = 256

    def detect(self, pictures, size=None):
        return [self.one(np.asarray(picture), size or self.size) for picture in pictures]

    def one(self, pixels: np.ndarray, size: int) -> Stored:
        skin = (np.abs(pixels.astype(int) - SKIN).sum(2) < 30).nonzero()
        boxes, scores, labels = [], [], []
        if size != 64 and len(skin[0]):
            left, right = skin[1].min(), skin[1].max() + 1
            boxes += [[left, skin[0].min(), right, skin[0].max() + 1], [left + 3, 0, left + 13, 10]]
            scores, labels = [0.9, 0.4], [FACE, EYE]
        if size == 32:
            boxes, scores, labels = [*boxes, [150, 0, 190, 40]], [*scores, 0.99], [*labels, FACE]
        return Stored(np.array(boxes, np.float32).reshape(-1, 4), np.array(scores), np.array(labels, np.int64))


def evaluate(out: Path, data: Path, *flags) -> dict:
    eval_detection.main([*map(str, flags), "--data_path", str(data), "--output_dir", str(out), *FAST])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def report(data, tmp_path_factory) -> tuple[Path, dict]:
    """A detector at three sizes, of which 256 px is the headline."""
    patch = pytest.MonkeyPatch()
    patch.setattr(eval_detection, "load_detector", lambda ckpt, device: Colours())
    out = tmp_path_factory.mktemp("report") / "out"
    results = evaluate(out, data, "--ckpt", "W", "--sizes", 256, 64, 32)
    patch.undo()
    return out, results


def test_the_report_is_whole(report):
    out, results = report
    fixed = {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar100", "errors", "images_per_s"}
    assert fixed <= results.keys() and results["finished"] is True
    assert {"localisation", "duplicate", "background", "missed"} <= results["errors"].keys()
    assert {"git_commit", "seed", "device", "versions", "data_fingerprint", "wall_seconds"} <= results.keys()
    text = (out / "report.md").read_text()
    pictures = [line.split("(")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert {"figures/precision_recall.png", "figures/sizes.png", "figures/errors_missed.png"} <= set(pictures)
    for name in pictures:
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    assert results["data"] == {
        "pictures": 5, "pictures_without_a_face": 1, "faces": 5, "eyes": 10,
        "left_out": {"true_boxes": 0, "finds": 0, "pictures": 0, "finds_elsewhere": 0},
    }  # fmt: skip


def coco_stats(out: Path, label: int) -> np.ndarray:
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(out / "annotations.json"))
        run = COCOeval(truth, truth.loadRes(str(out / "predictions.json")), "bbox")
        run.params.catIds = [label]
        run.evaluate()
        run.accumulate()
        run.summarize()
    return run.stats


def test_coco_s_own_tool_says_the_same_of_the_files(report):
    out, results = report
    for label, name in ((FACE, "face"), (EYE, "eye")):
        block, stats = results["classes"][name], coco_stats(out, label)
        found = [block[key] for key in ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ar1", "ar10")]
        expected = [None if value < 0 else pytest.approx(value) for value in stats[:8]]
        assert found == expected
    assert results["classes"]["face"]["ap50"] == results["ap50"] > results["ap50_ci95"][0]


def test_every_size_has_its_figures_and_its_pace(report):
    _, results = report
    assert list(results["sizes"]) == ["256", "64", "32"] and results["subject"]["size"] == 256
    assert results["sizes"]["256"]["ap"] == results["ap"] > results["sizes"]["32"]["ap"] > 0
    assert results["sizes"]["64"]["ap"] == 0
    for block in results["sizes"].values():
        assert 0 < block["latency_ms_p50"] <= block["latency_ms_p95"] and block["images_per_s"] > 0
    assert results["images_per_s"] == results["sizes"]["256"]["images_per_s"]


def test_what_went_wrong_is_told_by_kind_size_and_what_hides_it(report):
    errors = report[1]["errors"]
    # in a/1.png both faces are found as one: its box lies on the larger, and the smaller is missed
    assert errors["missed"]["count"] == 1 and errors["missed"]["by_size"]["small"]["count"] == 1
    assert errors["missed"]["by_occlusion"] == {"none": {"dap50": errors["missed"]["dap50"], "count": 1}}
    assert errors["localisation"]["by_occlusion"]["hat"]["count"] == errors["localisation"]["count"] == 1
    assert errors["faces"]["by_occlusion"] == {"hat": 1, "none": 4}
    assert errors["background"]["count"] == errors["duplicate"]["count"] == 0
    assert report[1]["operating_point"]["recall"] == 3 / 5 and report[1]["operating_point"]["precision"] == 3 / 4


def figures_only(results: dict) -> dict:
    names = ("ap", "ap_ci95", "ap50", "ap_small", "ar100", "classes", "errors", "operating_point", "data")
    return {name: results[name] for name in names}


def test_its_finds_from_the_file_give_the_same_report(report, data, tmp_path):
    out, results = report
    again = evaluate(tmp_path / "out", data, "--predictions", out / "predictions.json")
    assert figures_only(again) == figures_only(results)
    assert "skipped" in again["images_per_s"] and again["sizes"] == {}


def test_finds_may_name_the_file_and_a_list_of_the_challenge_does(report, data, tmp_path):
    out, results = report
    names = {image["id"]: image["file_name"] for image in json.loads((out / "annotations.json").read_text())["images"]}
    finds = json.loads((out / "predictions.json").read_text())
    named = [{**find, "image_id": names[find["image_id"]]} for find in finds]
    (tmp_path / "named.json").write_text(json.dumps(named))
    again = evaluate(tmp_path / "named", data, "--predictions", tmp_path / "named.json")
    assert figures_only(again) == figures_only(results)
    for header in ("", "image,xmin,ymin,xmax,ymax,face,score\n"):
        lines = [
            f"{find['image_id']},{x},{y},{x + w},{y + h},face,{find['score']}\n"
            for find in named
            for x, y, w, h in [find["bbox"]]
            if find["category_id"] == FACE
        ]
        (tmp_path / "list.csv").write_text(header + "".join(lines))
        listed = evaluate(tmp_path / "listed", data, "--predictions", tmp_path / "list.csv")
        assert listed["classes"]["face"] == results["classes"]["face"]
        assert "no eye was looked for" in listed["classes"]["eye"]["skipped"]


def test_the_last_part_of_a_name_is_enough_where_it_is_the_only_one(tmp_path):
    find = {"category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}
    files = list(FACES)
    (tmp_path / "a.json").write_text(json.dumps([{**find, "image_id": name} for name in ("1.png", "0.png", 5)]))
    stored, elsewhere = read_predictions(tmp_path / "a.json", files)
    assert [len(each.scores) for each in stored] == [0, 1, 0, 0, 1] and elsewhere == 1  # two are called 0.png
    assert stored[1].boxes.tolist() == [[1, 2, 4, 6]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[{]", "cannot be read as JSON"),
        ('{"images": []}', "holds no list"),
        ('[{"image_id": 1, "category_id": 1, "score": 1}]', "result 1: KeyError: 'bbox'"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3], "score": 1}]', "result 1"),
        ('[{"image_id": 1, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 1}]', "category_id 7 is not known"),
        ('[{"image_id": "z.png", "category_id": 1, "bbox": [1, 2, 3, 4], "score": 1}]', "names none of the 5"),
        ("0.png,1,2,3,4,dog,0.5\n", "'dog' is not known"),
        ("0.png,1,2,3,x,face,0.5\n", "no numbers"),
        ("0.png,1,2,3,4,0.5\n", "6 fields, not 7"),
    ],
)
def test_a_file_of_another_form_is_refused(text, words, tmp_path):
    path = tmp_path / ("finds.csv" if text.startswith("0.png") else "finds.json")
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_predictions(path, list(FACES))
    assert words in str(refused.value) and str(path) in str(refused.value)


def test_no_finds_at_all_are_no_error(data, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    results = evaluate(tmp_path / "out", data, "--predictions", tmp_path / "none.json")
    assert results["ap50"] == 0 and results["errors"]["missed"]["count"] == 5
    assert results["operating_point"]["precision"] is None and results["operating_point"]["best_f1"] is None


def test_finds_that_cannot_be_used_are_counted(data, tmp_path):
    find = {"category_id": 1, "bbox": [10, 10, 120, 120], "score": 0.5}
    finds = [{**find, "image_id": 1}, {**find, "image_id": 1, "score": float("nan")}, {**find, "image_id": "z.png"}]
    (tmp_path / "finds.json").write_text(json.dumps(finds))
    results = evaluate(tmp_path / "out", data, "--predictions", tmp_path / "finds.json")
    assert results["data"]["left_out"]["finds"] == 1 and results["data"]["left_out"]["finds_elsewhere"] == 1
    assert results["operating_point"]["finds"] == 1 and results["operating_point"]["precision"] == 1
    assert "1 finds, 1 finds elsewhere" in (tmp_path / "out" / "report.md").read_text()


def test_a_finder_is_measured_too(tmp_path):
    data = make(tmp_path / "data", eyes=False)
    stored = {
        name: {"faces": [{"score": 0.8, "face": [x1, y1, x2 - x1, y2 - y1]} for x1, y1, x2, y2 in faces]}
        for name, faces in FACES.items()
    }
    (tmp_path / "boxes.json").write_text(json.dumps(stored))
    results = evaluate(tmp_path / "out", data, "--finder", f"boxes:{tmp_path / 'boxes.json'}")
    assert results["ap"] == pytest.approx(1) and results["images_per_s"] > 0
    assert "no eye boxes" in results["classes"]["eye"]["skipped"]
    assert not list((tmp_path / "out" / "figures").glob("errors_*"))


def test_unreadable_pictures_are_left_out_counted_and_listed(tmp_path, capsys):
    data = make(tmp_path / "data")
    (data / "a/0.png").write_bytes(b"junk")
    (tmp_path / "none.json").write_text("[]")
    flags = ("--predictions", tmp_path / "none.json", "--max_bad", 0.3)
    results = evaluate(tmp_path / "out", data, *flags)
    assert results["data"]["pictures"] == 4 and results["data"]["left_out"]["pictures"] == 1
    listed = json.loads((tmp_path / "out" / "left_out.json").read_text())
    assert [row["file_name"] for row in listed] == ["a/0.png"]
    argv = [*map(str, flags[:2]), "--data_path", str(data), "--output_dir", str(tmp_path / "out2"), *FAST]
    error = helpers.fails(eval_detection.main, capsys, argv)
    assert "1 of 5 pictures" in error and "--max_bad" in error


def test_pictures_spread_over_the_split_keep_their_numbers(data, tmp_path):
    (tmp_path / "none.json").write_text("[]")
    evaluate(tmp_path / "out", data, "--predictions", tmp_path / "none.json", "--images", 2)
    images = json.loads((tmp_path / "out" / "annotations.json").read_text())["images"]
    assert [(image["id"], image["file_name"]) for image in images] == [(1, "a/0.png"), (3, "b/0.png")]


def test_refusals(data, tmp_path, capsys):
    def refuse(*flags) -> str:
        argv = [*map(str, flags), "--data_path", str(data), "--output_dir", str(tmp_path / "out"), *FAST]
        return helpers.fails(eval_detection.main, capsys, argv)

    assert "--sizes goes with --ckpt" in refuse("--finder", "boxes:x.json", "--sizes", 64)
    assert "does not exist" in refuse("--predictions", tmp_path / "nowhere.json")
    assert "required" in refuse()
    (tmp_path / "out").mkdir(exist_ok=True)
    (tmp_path / "out" / "checkpoint-best.pth").touch()
    (tmp_path / "none.json").write_text("[]")
    assert "holds a training run" in refuse("--predictions", tmp_path / "none.json")


def test_what_hides_a_face_is_given_to_its_own_box():
    columns = {
        "file_name": ["a", "b", "a", "b"],
        "box": [[0, 0, 1, 1], None, [1, 1, 2, 2], [0, 0, 3, 3]],
        "occlusion": ["hat", "hand", None, None],
    }
    labels = {"a": [0, 0, 1], "b": [0]}
    scenes = SimpleNamespace(
        files=["a", "b"],
        source=SimpleNamespace(column=columns.get),
        record=lambda i: {"labels": np.array(labels["ab"[i]])},
    )
    assert eval_detection.occlusions(scenes) == [("hat", None, None), ()]
