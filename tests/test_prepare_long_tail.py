"""datasets/prepare_long_tail.py: train becomes long-tailed, nothing else changes.

Run: python -m pytest tests/test_prepare_long_tail.py
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.helpers import fails
from util.data.manifest import read_manifest, write_manifest
from util.data.trials import read_protocol, write_protocol

IDENTITIES, EACH = 12, 40


@pytest.fixture(scope="module")
def thin(import_script):
    """thin(flag, ...): the script's main(), in this process."""
    module = import_script("datasets/prepare_long_tail.py")
    return lambda *flags: module.main([str(flag) for flag in flags])


@pytest.fixture
def balanced(tmp_path) -> Path:
    """40 train pictures of each of 12 identities, beside other splits, unlabelled train rows and a mask."""
    rows = []
    for who in range(IDENTITIES):
        for split, count in (("train", EACH), ("val", 3), ("test", 5)):
            rows += [
                {"sample_id": f"{split}-{who}-{i}", "file_name": "a.png", "identity": f"c{who}", "split": split}
                for i in range(count)
            ]
    for split in ("pretrain", "train"):
        rows += [{"sample_id": f"{split}-{i}", "file_name": "a.png", "split": split} for i in range(7)]
    rows += [{"sample_id": "open", "file_name": "a.png", "identity": "new", "split": "open_test", "box": [1, 1, 5, 5]}]
    rows[-1]["mask_file"] = "masks/a.png"
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures/a.png")
    write_manifest(tmp_path / "in", rows, str(tmp_path / "pictures"), {"writer": "test"})
    return tmp_path / "in"


def rows_of(folder: Path) -> dict[str, dict]:
    return {row["sample_id"]: row for row in read_manifest(folder).table.to_pylist()}


def counts_of(folder: Path) -> Counter:
    rows = rows_of(folder).values()
    return Counter(row["identity"] for row in rows if row["split"] == "train" and row["identity"])


def test_train_follows_the_power_law(thin, balanced, tmp_path, capsys):
    thin("--data_path", balanced, "--out", tmp_path / "out", "--imbalance", 20)
    found = sorted(counts_of(tmp_path / "out").values(), reverse=True)
    expected = [round(EACH * 20 ** (-rank / (IDENTITIES - 1))) for rank in range(IDENTITIES)]
    assert found == expected and found[0] == 40 and found[-1] == 2
    said = capsys.readouterr().out
    mid = [count for count in expected if count >= 20]
    tail = [count for count in expected if count < 20]
    assert "12 identities of 2 to 40 pictures" in said
    assert f"mid   {len(mid)} identities, {sum(mid)} pictures" in said
    assert f"tail  {len(tail)} identities, {sum(tail)} pictures" in said and "head  0 identities" in said
    assert "without an identity, left as they are: 7" in said


def test_nothing_else_changes(thin, balanced, tmp_path, capsys):
    thin("--data_path", balanced, "--out", tmp_path / "out")
    before, after = rows_of(balanced), rows_of(tmp_path / "out")
    before["open"]["mask_file"] = None  # masks lie in the other folder, which is said
    assert all(row == before[name] for name, row in after.items())
    lost = [row for name, row in before.items() if name not in after]
    assert lost and all(row["split"] == "train" and row["identity"] for row in lost)
    assert "masks of 1 rows" in capsys.readouterr().out
    manifest = read_manifest(tmp_path / "out")
    assert manifest.root == (tmp_path / "pictures").resolve() and manifest.path(0).is_file()
    assert manifest.metadata["imbalance"] == "50" and manifest.metadata["seed"] == "0"


def test_imbalance_one_keeps_everything(thin, balanced, tmp_path):
    thin("--data_path", balanced, "--out", tmp_path / "out", "--imbalance", 1)
    assert set(rows_of(tmp_path / "out")) == set(rows_of(balanced))


def test_the_choice_follows_the_seed_and_not_the_file_order(thin, balanced, tmp_path):
    def kept(folder: Path, seed: int) -> set[str]:
        out = tmp_path / f"{folder.name}-{seed}"
        thin("--data_path", folder, "--out", out, "--seed", seed)
        return set(rows_of(out))

    first = kept(balanced, 0)
    assert kept(balanced, 0) == first != kept(balanced, 1)
    rows = list(rows_of(balanced).values())
    order = np.random.default_rng(0).permutation(len(rows))
    write_manifest(tmp_path / "shuffled", [rows[i] for i in order], str(tmp_path / "pictures"))
    assert kept(tmp_path / "shuffled", 0) == first


def test_running_twice_gives_the_same_file(thin, balanced, tmp_path):
    flags = ("--data_path", balanced, "--out", tmp_path / "out")
    thin(*flags)
    first = (tmp_path / "out/metadata.parquet").read_bytes()
    thin(*flags)
    assert (tmp_path / "out/metadata.parquet").read_bytes() == first


def test_protocols_that_still_hold_come_along(thin, balanced, tmp_path, capsys):
    trial = {"label": [1], "kind": ["trial"]}
    write_protocol(balanced, "pairs", {"id_a": ["test-0-0"], "id_b": ["test-0-1"], **trial})
    every = [name for name in rows_of(balanced) if name.startswith("train-")]
    many = {"id_a": every, "id_b": [None] * len(every), "label": [0] * len(every), "kind": ["x"] * len(every)}
    write_protocol(balanced, "train_list", many)
    thin("--data_path", balanced, "--out", tmp_path / "out")
    assert read_protocol(tmp_path / "out", "pairs") == read_protocol(balanced, "pairs")
    assert read_protocol(tmp_path / "out", "train_list") is None
    assert "protocols left out, for they name removed rows: train_list" in capsys.readouterr().out


def test_faults_are_one_line(thin, balanced, tmp_path, capsys):
    def refused(*flags) -> str:
        return fails(lambda argv: thin(*argv), capsys, [str(flag) for flag in flags])

    assert "is the folder that is read" in refused("--data_path", balanced, "--out", balanced)
    assert "metadata.parquet" in refused("--data_path", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert "at least 1" in refused("--data_path", balanced, "--out", tmp_path / "out", "--imbalance", 0.5)
    write_manifest(tmp_path / "other", [{"sample_id": "a", "file_name": "a.png", "split": "test", "identity": "rin"}])
    assert "another program" in refused("--data_path", balanced, "--out", tmp_path / "other")
    assert "nothing to thin" in refused("--data_path", tmp_path / "other", "--out", tmp_path / "out")
    assert len(read_manifest(tmp_path / "other")) == 1 and not (tmp_path / "out").exists()
