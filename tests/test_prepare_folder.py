"""datasets/prepare_folder.py as a user runs it: folders and lists in, metadata.parquet out, nothing copied.

Run: python -m pytest tests/test_prepare_folder.py
"""

import csv
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from util.data.manifest import read_manifest
from util.data.sources import open_source

SCRIPT = Path(__file__).resolve().parents[1] / "datasets" / "prepare_folder.py"


@pytest.fixture(scope="module")
def prepare():
    """prepare(flag, ...): the script's main(), in this process."""
    spec = importlib.util.spec_from_file_location("prepare_folder", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *flags: module.main([str(flag) for flag in flags])


def save_pictures(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80)).save(path)


def rows_of(folder: Path) -> dict[str, dict]:
    manifest = read_manifest(folder)
    return {manifest.row(i)["file_name"]: manifest.row(i) for i in range(len(manifest))}


LIST = [  # path, set, identity, component, split
    ("faces/rin/1.png", "faces", "rin", "0", "train"),
    ("faces/rin/2.png", "faces", "rin", "1", "test"),
    ("faces/len/1.png", "faces", "len", "2", "train"),
    ("art/1.png", "art", "", "3", "pretrain"),
    ("art/2.png", "art", "", "3", "recon_test"),
    ("art/3.png", "art", "", "4", "figures"),
    ("more/1.png", "more", "", "5", "recon_val"),
]


@pytest.fixture
def listed(tmp_path) -> Path:
    """A folder of pictures with a list of them, splits.csv."""
    folder = tmp_path / "pictures"
    save_pictures(folder, [row[0] for row in LIST])
    with open(folder / "splits.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "set", "identity", "component", "split"), *LIST])
    return folder


def test_list_becomes_a_manifest(prepare, listed, tmp_path, capsys):
    prepare("--data_path", listed, "--out", tmp_path / "out", "--splits", listed / "splits.csv")
    rows = rows_of(tmp_path / "out")
    assert {name: row["split"] for name, row in rows.items()} == {
        "faces/rin/1.png": "train",
        "faces/rin/2.png": "test",
        "faces/len/1.png": "train",
        "art/1.png": "pretrain",
        "art/2.png": "test",
        "art/3.png": "figures",
        "more/1.png": "val",
    }
    assert rows["faces/rin/1.png"]["identity"] == "rin" and rows["art/1.png"]["identity"] is None
    assert rows["art/2.png"]["source"] == "3"
    assert "7 pictures, 2 identities" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metadata.parquet"]
    assert open_source(tmp_path / "out", "train").load(0).size == (100, 80)


def test_include_takes_sets_and_splits_of_sets(prepare, listed, tmp_path, capsys):
    flags = ("--data_path", listed, "--out", tmp_path / "out", "--splits", listed / "splits.csv")
    prepare(*flags, "--include", "art", "faces:train")
    assert sorted(rows_of(tmp_path / "out")) == [
        "art/1.png",
        "art/2.png",
        "art/3.png",
        "faces/len/1.png",
        "faces/rin/1.png",
    ]
    assert "not included 2" in capsys.readouterr().out


def test_running_twice_gives_the_same(prepare, listed, tmp_path):
    flags = ("--data_path", listed, "--out", tmp_path / "out", "--splits", listed / "splits.csv")
    prepare(*flags)
    first = (tmp_path / "out" / "metadata.parquet").read_bytes()
    prepare(*flags)
    assert (tmp_path / "out" / "metadata.parquet").read_bytes() == first


def test_boxes_of_the_best_face_are_filled_in(prepare, listed, tmp_path):
    def face(score, x, **parts):
        return {"score": score, "face": [x, 10, 30, 40], **parts}

    eyes = {"left_eye": [50, 20, 8, 6], "right_eye": [35, 20, 8, 6]}
    parts = {
        "art/1.png": {"size": [100, 80], "faces": [face(0.85, 1), face(0.9, 30, **eyes)]},
        "art/2.png": {"size": [100, 80], "faces": [face(0.99, 90)]},
        "art/3.png": {"size": [100, 80], "faces": [face(0.6, 5)]},
        "more/1.png": {"size": [100, 80], "faces": []},
    }
    (tmp_path / "parts.json").write_text(json.dumps(parts))
    flags = ("--data_path", listed, "--out", tmp_path / "out", "--splits", listed / "splits.csv")
    prepare(*flags, "--parts", tmp_path / "parts.json")
    rows = rows_of(tmp_path / "out")
    assert rows["art/1.png"]["box"] == [30, 10, 60, 50]
    assert rows["art/1.png"]["eyes"] == [[50, 20, 58, 26], [35, 20, 43, 26]]
    assert rows["art/2.png"]["box"] == [90, 10, 100, 50]  # cut at the border
    assert rows["art/2.png"]["eyes"] is None
    assert rows["art/3.png"]["box"] is rows["more/1.png"]["box"] is rows["faces/rin/1.png"]["box"] is None


def test_pictures_that_cannot_be_used_are_dropped_and_counted(prepare, listed, tmp_path, capsys):
    (listed / "art/1.png").unlink()
    (listed / "art/2.png").write_bytes(b"")
    (listed / "art/3.png").write_bytes(b"no picture")
    flags = ("--data_path", listed, "--out", tmp_path / "out", "--splits", listed / "splits.csv")
    prepare(*flags, "--verify")
    assert len(rows_of(tmp_path / "out")) == 4
    assert "damaged 1, empty 1, missing 1" in capsys.readouterr().out


def test_class_folders_get_a_held_out_part(prepare, tmp_path):
    save_pictures(tmp_path / "in", [f"{name}/{i:02d}.png" for name in ("rin", "len") for i in range(40)])
    prepare("--data_path", tmp_path / "in", "--out", tmp_path / "out", "--val_fraction", "0.25")
    rows = rows_of(tmp_path / "out")
    assert Counter(row["identity"] for row in rows.values()) == {"rin": 40, "len": 40}
    held_out = {name for name, row in rows.items() if row["split"] == "val"}
    assert 8 < len(held_out) < 32
    direct = open_source(tmp_path / "in", "val", val_fraction=0.25)  # the same rule as without preparing
    assert held_out == {direct.record(i)["file_name"] for i in range(len(direct))}


def test_split_folders_stay_splits(prepare, tmp_path):
    save_pictures(tmp_path / "in", ["train/rin/1.png", "val/rin/2.png", "test/rin/3.png"])
    prepare("--data_path", tmp_path / "in", "--out", tmp_path / "out")
    assert [row["split"] for _, row in sorted(rows_of(tmp_path / "out").items())] == ["test", "train", "val"]


def test_a_folder_prepared_in_place_can_be_moved(prepare, tmp_path):
    save_pictures(tmp_path / "in", ["a.png", "b.png"])
    prepare("--data_path", tmp_path / "in", "--out", tmp_path / "in", "--val_fraction", "0")
    (tmp_path / "in").rename(tmp_path / "moved")
    assert open_source(tmp_path / "moved", "train", val_fraction=0.0).load(0).size == (100, 80)


def test_the_manifest_of_another_program_is_not_overwritten(prepare, listed, tmp_path, capsys):
    from util.data.manifest import write_manifest

    write_manifest(tmp_path / "out", [{"sample_id": "a", "file_name": "a.png", "split": "train"}])
    with pytest.raises(SystemExit) as caught:
        prepare("--data_path", listed, "--out", tmp_path / "out", "--splits", listed / "splits.csv")
    assert caught.value.code == 2
    assert "another program" in capsys.readouterr().err
    assert len(read_manifest(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--include", "manga"), "no set 'manga'"),
        (("--include", "art:train"), "no split 'train'"),
        (("--rename",), "recon_"),
        (("--rename", "recon_val"), "OLD=NEW"),
        (("--splits", "nowhere.csv"), "nowhere.csv"),
        (("--parts", "nowhere.json"), "nowhere.json"),
        (("--val_fraction", "1"), "out of range"),
    ],
)
def test_errors_are_one_line_with_status_2(prepare, listed, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        prepare("--data_path", listed, "--out", tmp_path / "out", "--splits", listed / "splits.csv", *flags)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_it_runs_as_a_script_from_anywhere(run_script, listed, tmp_path):
    done = run_script("datasets/prepare_folder.py", "--data_path", listed / "art", "--out", tmp_path / "out")
    assert "3 pictures" in done.stdout
    failed = run_script("datasets/prepare_folder.py", "--data_path", "nowhere", "--out", tmp_path / "x", check=False)
    assert failed.returncode == 2 and failed.stderr.startswith("error: nowhere does not exist")
