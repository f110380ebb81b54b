"""scripts/check_leakage.py as a user runs it: constructed leaks of each kind, clean data, repair, and refusals.

Run: python -m pytest tests/test_check_leakage.py
"""

import csv
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import fails
from PIL import Image, ImageOps

from util.data.manifest import read_manifest, write_manifest

# a folder of pictures with splits.csv, the split of the project's own experiments
REAL = Path(os.environ.get("ANIMASK_REAL_DATA", "nowhere"))
needs_pictures = pytest.mark.skipif(
    not (REAL / "splits.csv").is_file(), reason="ANIMASK_REAL_DATA does not name the folder of splits.csv"
)


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("scripts/check_leakage.py")


@pytest.fixture
def check(script, capsys):
    """check(flag, ...): exit status and what was printed."""

    def run(*flags) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            script.main([str(flag) for flag in flags])
        return stop.value.code, capsys.readouterr().out

    return run


def picture(seed: int, size=(72, 64)) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def save(image: Image.Image, path: Path, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


@pytest.fixture
def faces(tmp_path) -> Path:
    """Class folders without a leak: 3 identities, 4 train, 2 val and 2 test pictures each."""
    folder, seed = tmp_path / "faces", 0
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        for who in ("asuka", "misato", "rei"):
            for i in range(count):
                save(picture(seed := seed + 1), folder / split / who / f"{i}.png")
    return folder


def report_of(folder: Path) -> dict:
    return json.loads((folder / "leaks.json").read_text())


# --- leaks of each kind -----------------------------------------------------------------------------------------


def test_clean_folders_are_clean(check, faces, tmp_path):
    status, said = check("--data_path", faces, "--out", tmp_path / "out")
    assert status == 0 and "clean" in said and "LEAK" not in said
    report = report_of(tmp_path / "out")
    assert report["clean"] and report["pictures"] == 24 and report["components"] == 24 and report["leaks"] == []
    assert {side["split"]: side["pictures"] for side in report["sides"]} == {"test": 6, "train": 12, "val": 6}


def leak_bytes(source: Path, target: Path) -> None:
    shutil.copy(source, target)


def leak_encoded(source: Path, target: Path) -> None:
    save(Image.open(source), target.with_suffix(".jpg"), quality=55)


def leak_resized(source: Path, target: Path) -> None:
    save(Image.open(source).resize((140, 128), Image.Resampling.BICUBIC), target)


def leak_mirrored(source: Path, target: Path) -> None:
    save(ImageOps.mirror(Image.open(source)).crop((1, 0, 72, 64)), target.with_suffix(".jpg"), quality=80)


@pytest.mark.parametrize(
    "leak, kind",
    [(leak_bytes, "identical"), (leak_encoded, "near"), (leak_resized, "near"), (leak_mirrored, "mirrored")],
)
def test_a_copy_in_another_split_is_found(check, faces, tmp_path, leak, kind):
    leak(faces / "train" / "rei" / "2.png", faces / "test" / "rei" / "copy.png")
    status, said = check("--data_path", faces, "--out", tmp_path / "out")
    assert status == 1 and f"LEAK {kind}: 1 pairs" in said and "1 components straddle" in said
    (pair,) = report_of(tmp_path / "out")["pairs"]
    assert pair["kind"] == kind and pair["distance"] <= 4
    ends = {(pair[end]["split"], pair[end]["sample_id"].rsplit(".", 1)[0]) for end in "ab"}
    assert ends == {("train", "train/rei/2"), ("test", "test/rei/copy")}
    with Image.open(tmp_path / "out" / "examples.png") as shown:
        assert shown.width > 2 * 128 and shown.height > 128
    assert "train/rei/2.png" in (tmp_path / "out" / "leaks.md").read_text()


def test_a_copy_within_a_split_is_no_leak(check, faces, tmp_path):
    leak_bytes(faces / "train" / "rei" / "2.png", faces / "train" / "asuka" / "copy.png")
    status, _ = check("--data_path", faces, "--out", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert status == 0 and report["links"]["identical"] == 1 and report["components"] == 24


def test_a_kind_can_be_ignored(check, faces):
    leak_encoded(faces / "train" / "rei" / "2.png", faces / "test" / "rei" / "copy.png")
    assert check("--data_path", faces, "--ignore", "near")[0] == 0
    assert check("--data_path", faces, "--ignore", "mirrored", "alias")[0] == 1
    assert check("--data_path", faces, "--distance", 0, "--ignore", "identical")[0] in (0, 1)


def prepared(folder: Path, rows: list[dict]) -> Path:
    """A prepared folder; rows without a file get a picture of their own."""
    for seed, row in enumerate(rows):
        row.setdefault("file_name", f"{row['sample_id']}.png")
        if not (folder / row["file_name"]).exists():
            save(picture(1000 + seed), folder / row["file_name"])
    write_manifest(folder, rows)
    return folder


def test_one_source_on_two_sides_is_found(check, tmp_path):
    rows = [
        {"sample_id": f"s{i}", "split": split, "source": source}
        for i, (split, source) in enumerate([("train", "album"), ("val", "album"), ("train", None), ("val", "other")])
    ]
    status, said = check("--data_path", prepared(tmp_path / "x", rows))
    assert status == 1 and "LEAK source: 1 pairs" in said and "x:train (1 pictures) - x:val (1 pictures)" in said


def test_two_faces_of_one_file_on_two_sides_are_found(check, tmp_path):
    rows = [
        {"sample_id": "a", "file_name": "scene.png", "split": "train", "box": [0, 0, 30, 30]},
        {"sample_id": "b", "file_name": "scene.png", "split": "test", "box": [40, 30, 70, 60]},
        {"sample_id": "c", "split": "val"},
    ]
    status, said = check("--data_path", prepared(tmp_path / "x", rows))
    assert status == 1 and "LEAK identical: 1 pairs" in said


def test_one_face_on_two_backgrounds_is_found(check, tmp_path):
    scenes = [picture(1, (300, 200)), picture(2, (300, 200))]
    face = picture(3, (80, 80))
    for i, scene in enumerate(scenes):
        scene.paste(face, (20 + 150 * i, 30 + 60 * i))
        save(scene, tmp_path / "x" / f"s{i}.png")
    rows = [
        {"sample_id": "s0", "split": "train", "box": [20, 30, 100, 110]},
        {"sample_id": "s1", "split": "test", "box": [170, 90, 250, 170]},
    ]
    status, said = check("--data_path", prepared(tmp_path / "x", rows))
    assert status == 1 and "LEAK face: 1 pairs" in said
    for row in rows:
        del row["box"]
    assert check("--data_path", prepared(tmp_path / "x", rows))[0] == 0


def test_aliases_of_open_identities_are_found(check, tmp_path):
    people = [("train", "lancer"), ("test", "lancer"), ("train", "kasumi_(doa)"), ("open_test", "kasumi_(pokemon)")]
    rows = [{"sample_id": f"s{i}", "split": split, "identity": who} for i, (split, who) in enumerate(people)]
    folder = prepared(tmp_path / "x", rows)
    assert check("--data_path", folder)[0] == 0
    prepared(folder, [*rows, {"sample_id": "new", "split": "open_test", "identity": "lancer_(fate/zero)"}])
    status, said = check("--data_path", folder, "--out", tmp_path / "out")
    assert status == 1 and "'lancer_(fate/zero)' of x:open_test may be 'lancer' of x:train (alias)" in said
    (leak,) = report_of(tmp_path / "out")["identities"]
    assert leak["identity"] == "lancer_(fate/zero)" and leak["pictures"] == 1
    assert [(own["split"], own["reason"]) for own in leak["seen"]] == [("train", "alias"), ("test", "alias")]
    assert check("--data_path", folder, "--ignore", "alias")[0] == 0


def test_a_pool_that_holds_test_pictures_is_found(check, faces, tmp_path):
    pool = tmp_path / "pool"
    for seed in range(6):
        save(picture(500 + seed), pool / f"{seed}.png")
    leak_encoded(faces / "train" / "rei" / "0.png", pool / "of_train.png")
    assert check("--data_path", faces, "--pool", pool)[0] == 0  # both are trained on
    leak_mirrored(faces / "test" / "rei" / "0.png", pool / "of_test.png")
    status, said = check("--data_path", faces, "--pool", pool)
    assert status == 1 and "LEAK mirrored: 1 pairs, faces:test (1 pictures) - pool:train (1 pictures)" in said


def test_a_pool_without_a_training_split_is_trained_on(check, faces, tmp_path):
    rows = [{"sample_id": f"s{i}", "split": "test"} for i in range(3)]
    pool = prepared(tmp_path / "pool", rows)
    leak_bytes(faces / "test" / "rei" / "0.png", pool / "s1.png")
    status, said = check("--data_path", faces, "--pool", pool)
    assert status == 1 and "faces:test (1 pictures) - pool:pretrain (1 pictures)" in said


def test_pools_of_one_name_are_told_apart(check, faces, tmp_path):
    for place in ("one", "two"):
        leak_bytes(faces / "test" / "rei" / "0.png", save(picture(9), tmp_path / place / "pool" / "a.png"))
    status, said = check("--data_path", faces, "--pool", tmp_path / "one/pool", "--pool", tmp_path / "two/pool")
    assert status == 1 and "pool:train" in said and "pool-2:train" in said


def test_without_a_val_split_the_one_that_training_would_hold_out_is_checked(check, tmp_path):
    folder = tmp_path / "flat"
    for i in range(40):
        save(picture(i), folder / f"{i}.png")
    status, _ = check("--data_path", folder, "--val_fraction", 0.3, "--out", tmp_path / "out")
    assert status == 0
    sides = {side["split"]: side["pictures"] for side in report_of(tmp_path / "out")["sides"]}
    from util.data.sources import open_source

    held = open_source(folder, "val", val_fraction=0.3)
    assert sides == {"train": 40 - len(held), "val": len(held)}
    shutil.copy(held.manifest.path(0), folder / "copy.png")
    kept = open_source(folder, "train", val_fraction=0.3).column("file_name")
    assert check("--data_path", folder, "--val_fraction", 0.3)[0] == int("copy.png" in kept)


def test_a_data_set_of_the_library_is_read(check, faces, tmp_path):
    leak_bytes(faces / "train" / "rei" / "2.png", faces / "test" / "rei" / "copy.png")
    status, said = check("--data_path", f"hf:{faces}")
    assert status == 1 and "LEAK identical: 1 pairs" in said
    (faces / "test" / "rei" / "copy.png").unlink()
    assert check("--data_path", f"hf:{faces}", "--pool", f"hf:{faces}")[0] == 0  # its train split
    status, said = check("--data_path", f"hf:{faces}", "--pool", f"hf:{faces}:test")
    assert status == 1 and "LEAK identical: 6 pairs" in said


# --- embeddings -------------------------------------------------------------------------------------------------


def test_embeddings_find_what_hashes_do_not(check, faces, tmp_path):
    names = sorted(str(path.relative_to(faces)) for path in faces.rglob("*.png"))
    embeddings = np.random.default_rng(0).normal(size=(24, 64)).astype(np.float32)
    a, b = names.index("train/rei/0.png"), names.index("val/misato/1.png")
    embeddings[b] = embeddings[a] * 3 + 0.01
    np.savez(tmp_path / "e.npz", embeddings=embeddings, sample_id=np.array(names))
    assert check("--data_path", faces)[0] == 0
    status, said = check("--data_path", faces, "--embeddings", tmp_path / "e.npz", "--out", tmp_path / "out")
    assert status == 1 and "LEAK embedding: 1 pairs" in said and "cosines, centred" in said
    (pair,) = report_of(tmp_path / "out")["pairs"]
    assert {pair["a"]["sample_id"], pair["b"]["sample_id"]} == {names[a], names[b]} and pair["cosine"] > 0.95


def test_embeddings_are_joined_by_name_and_pool(script):
    def join(names: list[str], sample_id: list[str], pool: list[str]) -> np.ndarray:
        rows = np.arange(len(names), dtype=np.float32)[:, None]
        np.savez(path, embeddings=rows, sample_id=np.array(names))
        return script.join_embeddings(str(path), sample_id, pool)[:, 0]

    path = Path("e.npz")
    with pytest.MonkeyPatch.context() as patch:
        import tempfile

        patch.chdir(tempfile.mkdtemp())
        got = join(["b", "a", "p:c", "q:c"], ["a", "b", "c", "c", "d"], ["p", "p", "p", "q", "q"])
        assert got[:4].tolist() == [1, 0, 2, 3] and np.isnan(got[4])
        with pytest.raises(script.UserError, match="more than one pool"):
            join(["a", "c"], ["c", "c"], ["p", "q"])
        with pytest.raises(script.UserError, match="none of the samples"):
            join(["x"], ["a"], ["p"])


# --- lists ------------------------------------------------------------------------------------------------------


def write_csv(path: Path, header: str, *rows: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


HEADER = "path,set,identity,component,split,width,height"


@pytest.fixture
def listed(tmp_path) -> Path:
    """A list in the form of the project's own: two sets, splits of several names."""
    folder = tmp_path / "data"
    for seed in range(8):
        save(picture(seed), folder / f"{seed}.png")
    rows = ["0.png,faces,rei,0,train,72,64", "1.png,faces,rei,0,train,72,64", "2.png,faces,rei,2,test,72,64"]
    rows += ["3.png,faces,asuka,3,open_test,72,64", "4.png,art,,4,pretrain,72,64", "5.png,art,,5,recon_test,72,64"]
    return write_csv(folder / "splits.csv", HEADER, *rows)


def test_a_clean_list(check, listed, tmp_path):
    status, _ = check("--splits", listed, "--out", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert status == 0 and report["pictures"] == 6 and report["components"] == 5
    assert {(side["pool"], side["split"]) for side in report["sides"]} == {
        ("faces", "train"), ("faces", "test"), ("faces", "open_test"), ("art", "pretrain"), ("art", "recon_test")
    }  # fmt: skip


@pytest.mark.parametrize(
    "row, said",
    [
        ("6.png,faces,rei,0,test,72,64", "LEAK source: 2 pairs"),  # a declared component on two sides
        ("copy.png,faces,rei,9,train,72,64", "faces:train (1 pictures) - faces:test (1 pictures)"),
        ("copy.png,art,,9,pretrain,72,64", "faces:test (1 pictures) - art:pretrain (1 pictures)"),  # across sets
        ("7.png,art,asuka,9,train,72,64", "'asuka' of faces:open_test may be 'asuka' of art:train (name)"),
    ],
)
def test_leaks_of_a_list(check, listed, row, said):
    leak_resized(listed.parent / "2.png", listed.parent / "copy.png")
    with open(listed, "a") as file:
        file.write(row + "\n")
    status, text = check("--splits", listed, "--data_root", listed.parent)
    assert status == 1 and said in text


def test_held_out_pictures_may_be_in_the_test_of_another_set(check, listed):
    shutil.copy(listed.parent / "2.png", listed.parent / "copy.png")
    with open(listed, "a") as file:
        file.write("copy.png,art,,9,recon_test,72,64\n")
    assert check("--splits", listed)[0] == 0


def test_what_is_trained_on_can_be_named(check, listed):
    shutil.copy(listed.parent / "2.png", listed.parent / "copy.png")
    with open(listed, "a") as file:
        file.write("copy.png,art,,9,pretrain,72,64\n")
    assert check("--splits", listed)[0] == 1
    assert check("--splits", listed, "--training", "faces:train")[0] == 0
    assert check("--splits", listed, "--training", "train", "art:pretrain")[0] == 1


# --- repair -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["drop", "move"])
def test_a_repaired_folder_is_clean(check, faces, tmp_path, by):
    leak_encoded(faces / "train" / "rei" / "2.png", faces / "test" / "rei" / "copy.png")
    leak_mirrored(faces / "val" / "rei" / "1.png", faces / "test" / "asuka" / "copy.png")
    before = {path: path.read_bytes() for path in faces.rglob("*") if path.is_file()}
    status, said = check("--data_path", faces, "--repair", tmp_path / "clean", "--repair_by", by)
    assert status == 1 and ("2 dropped" if by == "drop" else "2 pictures moved, 0 dropped") in said
    assert check("--data_path", tmp_path / "clean")[0] == 0
    rows = {row["sample_id"]: row for row in read_manifest(tmp_path / "clean").table.to_pylist()}
    assert rows["test/rei/copy.jpg"]["split"] == rows["test/asuka/copy.jpg"]["split"] == "test"
    assert ("train/rei/2.png" in rows) == (by == "move") and len(rows) == (24 if by == "drop" else 26)
    if by == "move":  # a later split by chance keeps them together
        assert rows["train/rei/2.png"]["source"] == rows["test/rei/copy.jpg"]["source"] is not None
    assert rows["train/asuka/0.png"]["source"] is None
    assert before == {path: path.read_bytes() for path in faces.rglob("*") if path.is_file()}


def test_a_repaired_list_keeps_its_columns(check, listed, tmp_path):
    leak_resized(listed.parent / "2.png", listed.parent / "6.png")
    with open(listed, "a") as file:
        file.write("6.png,faces,rei,6,train,72,64\n7.png,art,asuka,7,train,72,64\n")
    assert check("--splits", listed, "--repair", tmp_path / "clean")[0] == 1
    path = tmp_path / "clean" / "splits.csv"
    assert check("--splits", path, "--data_path", listed.parent)[0] == 0
    with open(path, newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert list(rows["0.png"]) == HEADER.split(",") and rows["0.png"]["width"] == "72"
    assert set(rows) == {"0.png", "1.png", "2.png", "4.png", "5.png", "7.png"}  # 3: asuka is trained on in art
    assert rows["0.png"]["component"] == rows["1.png"]["component"] != rows["2.png"]["component"]


def test_a_repaired_pool_is_written_too(check, faces, tmp_path):
    pool = tmp_path / "art"
    for seed in range(6):
        save(picture(500 + seed), pool / f"{seed}.png")
    leak_encoded(faces / "test" / "rei" / "0.png", pool / "leak.png")
    check("--data_path", faces, "--pool", pool, "--repair", tmp_path / "clean")
    assert len(read_manifest(tmp_path / "clean" / "pools" / "art")) == 6
    assert len(read_manifest(tmp_path / "clean")) == 24
    assert check("--data_path", tmp_path / "clean", "--pool", tmp_path / "clean" / "pools" / "art")[0] == 0


# --- refusals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, said",
    [
        ([], "nothing to check"),
        (["--data_path", "nowhere"], "nowhere does not exist"),
        (["--splits", "nowhere.csv"], "nowhere.csv does not exist"),
        (["--splits", "{folder}/splits.csv", "--data_path", "nowhere"], "nowhere does not exist"),
        (["--splits", "{folder}/no_split.csv"], "no column 'split': it has path, part"),
        (["--splits", "{folder}/no_path.csv"], "no column 'path'"),
        (["--splits", "{folder}/empty.csv"], "lists no pictures"),
        (["--splits", "{folder}/hole.csv"], "hole.csv, row 3"),
        (["--splits", "{folder}/wide.csv"], "wide.csv, row 2"),
        (["--splits", "{folder}/0.png"], "is no CSV"),
        (["--splits", "{folder}/one_side.csv"], "there is only data:train, nothing that could leak"),
        (["--data_path", "{folder}", "--val_fraction", "0"], "nothing that could leak"),
        (["--splits", "{folder}/missing.csv"], "2 of 3 pictures cannot be read"),
        (["--splits", "{folder}/splits.csv", "--training", "faces:val"], "no such split, only faces:train"),
        (["--splits", "{folder}/splits.csv", "--pool", "nowhere"], "nowhere does not exist"),
        (["--splits", "{folder}/splits.csv", "--embeddings", "nowhere.npz"], "nowhere.npz does not exist"),
        (["--splits", "{folder}/splits.csv", "--distance", "17"], "out of range"),
        (["--splits", "{folder}/splits.csv", "--ignore", "all"], "invalid choice"),
    ],
)
def test_refusals_are_one_line(script, capsys, listed, flags, said):
    folder = listed.parent
    write_csv(folder / "no_split.csv", "path,part", "0.png,train")
    write_csv(folder / "no_path.csv", "file,split", "0.png,train")
    write_csv(folder / "empty.csv", "path,split")
    write_csv(folder / "hole.csv", "path,split", "0.png,train", "1.png,")
    write_csv(folder / "wide.csv", "path,split", "0.png,train,more", "1.png,test")
    write_csv(folder / "one_side.csv", "path,split", "0.png,train", "1.png,train")
    write_csv(folder / "missing.csv", "path,split", "0.png,train", "gone.png,test", "lost.png,test")
    assert said in fails(script.main, capsys, [flag.format(folder=folder) for flag in flags])


def test_a_few_damaged_pictures_are_listed(check, faces, tmp_path):
    (faces / "train" / "rei" / "0.png").write_bytes(b"nothing")
    status, said = check("--data_path", faces, "--max_bad", 0.1, "--out", tmp_path / "out")
    assert status == 0 and "1 cannot be read" in said
    assert [bad["path"].endswith("train/rei/0.png") for bad in report_of(tmp_path / "out")["bad"]] == [True]


def test_the_hub_is_not_repaired(script, faces, capsys, tmp_path):
    said = fails(script.main, capsys, ["--data_path", f"hf:{faces}", "--repair", str(tmp_path / "clean")])
    assert "folders of pictures" in said


# --- the real split ---------------------------------------------------------------------------------------------


@needs_pictures
@pytest.mark.slow
def test_the_split_of_all_experiments_is_clean_and_its_components_are_ours(check, tmp_path):
    """Without the declared components: those that are found are exactly these."""
    with open(REAL / "splits.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    path = tmp_path / "splits.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["path", "set", "identity", "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    status, _ = check("--splits", path, "--data_path", REAL, "--out", tmp_path / "out")
    report = report_of(tmp_path / "out")
    assert status == 0 and report["clean"] and report["leaks"] == []
    assert report["components"] == len({row["component"] for row in rows}) == 15_132
    assert check("--splits", REAL / "splits.csv")[0] == 0
