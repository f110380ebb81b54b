"""Label noise that was planted is found, by each rule and by scripts/denoise_labels.py; what is clean stays.

Run: python -m pytest tests/test_denoise.py
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image

from tests.helpers import fails
from util.benchmark.long_tail import band_names
from util.data import denoise
from util.data.manifest import read_manifest, write_manifest

CLASSES = 24


class World(NamedTuple):
    """embeddings (N, D), the labels that are given (N,), which of them are wrong (N,) bool, names of the rows."""

    embeddings: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray
    ids: list[str]

    def found(self, flags: denoise.Flags) -> tuple[float, float]:
        """Precision and recall of the planted noise."""
        hits = (flags.flagged & self.wrong).sum()
        return hits / max(flags.flagged.sum(), 1), hits / self.wrong.sum()


def make_world(noise: float, mixed: bool = False, spread: float = 1.0, dim: int = 48, seed: int = 0) -> World:
    """Clusters with a long tail of 150 ... 6 rows, of which the share `noise` has another's label.

    mixed: wrong labels are those of the next class only, as where two characters are taken for each other; else the
    labels of the wrong rows are shuffled among them.
    """
    rng = np.random.default_rng(seed)
    counts = np.geomspace(150, 6, CLASSES).round().astype(int)
    truth = np.repeat(np.arange(CLASSES), counts)
    centres = rng.normal(size=(CLASSES, dim))
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    rows = centres[truth] + spread * rng.normal(size=(len(truth), dim)) / np.sqrt(dim)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    chosen = rng.random(len(truth)) < noise
    labels = truth.copy()
    labels[chosen] = (truth[chosen] + 1) % CLASSES if mixed else rng.permutation(truth[chosen])
    return World(rows.astype(np.float32), labels, labels != truth, [f"s{i:05d}" for i in range(len(truth))])


def centroid(world: World) -> denoise.Flags:
    found = denoise.fit_centroids(world.embeddings, world.labels, CLASSES)
    return denoise.spare(denoise.centroid_flags(world.labels, found, found.own, found.other), world.labels, 5)


def confident(world: World) -> denoise.Flags:
    folds = denoise.grouped_folds(world.labels, world.ids)
    shares = denoise.out_of_sample_probabilities(world.embeddings, world.labels, folds, CLASSES, 0.01)
    return denoise.spare(denoise.confident_flags(shares, world.labels), world.labels, 5)


def subcentre(world: World) -> denoise.Flags:
    found = denoise.fit_centroids(world.embeddings, world.labels, CLASSES)
    return denoise.spare(denoise.subcentre_flags(world.embeddings, world.labels, found), world.labels, 5)


RULES = {"centroid": centroid, "confident": confident, "subcentre": subcentre}


@pytest.fixture(scope="module", params=[0.1, 0.25])
def noisy(request) -> World:
    return make_world(request.param)


# --- planted noise ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "precision", "recall"), [("centroid", 0.8, 0.95), ("confident", 0.95, 0.8)])
def test_wrong_labels_are_found(noisy, rule, precision, recall):
    found = noisy.found(RULES[rule](noisy))
    assert found[0] >= precision and found[1] >= recall


@pytest.mark.parametrize("noise", [0.1, 0.25])
def test_a_part_of_another_identity_is_found(noise):
    world = make_world(noise, mixed=True)
    precision, recall = world.found(subcentre(world))
    assert precision >= 0.95 and recall >= 0.95


@pytest.mark.parametrize(("rule", "share"), [("centroid", 0.06), ("confident", 0.005), ("subcentre", 0.01)])
@pytest.mark.parametrize("spread", [0.8, 1.4])
def test_clean_data_lose_little(rule, share, spread):
    world = make_world(0.0, spread=spread)
    flags = RULES[rule](world)
    assert flags.flagged.mean() <= share
    # no class in particular is eaten, the rare ones neither
    gone = np.bincount(world.labels[flags.flagged], minlength=CLASSES) / np.bincount(world.labels)
    assert gone.max() <= 0.35


@pytest.mark.parametrize("rule", RULES)
def test_no_rare_identity_is_emptied(rule):
    world = make_world(0.4, seed=3)
    left = world.labels[~RULES[rule](world).flagged]
    before, after = (np.bincount(labels, minlength=CLASSES) for labels in (world.labels, left))
    assert (after >= np.minimum(before, 5)).all()
    assert RULES[rule](world).flagged.any()


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_the_rows_does_not_matter(noisy, rule):
    order = np.random.default_rng(5).permutation(len(noisy.labels))
    shuffled = World(*(column[order] for column in noisy[:3]), [noisy.ids[row] for row in order])
    one, other = RULES[rule](noisy), RULES[rule](shuffled)
    assert (one.reason[order] == other.reason).all() and one.flagged.any()


def test_rows_of_a_small_class_are_not_judged_and_take_nobody():
    world = make_world(0.0)
    # two rows of class 0 stand, wrongly, as a class of their own: theirs is the nearest centre to many of class 0
    labels = world.labels.copy()
    labels[:2] = CLASSES
    found = denoise.fit_centroids(world.embeddings, labels, CLASSES + 1)
    flags = denoise.centroid_flags(labels, found, found.own, found.other)
    assert not flags.flagged[:2].any() and not found.judged[CLASSES]
    assert flags.flagged[labels == 0].mean() < 0.1
    assert not denoise.subcentre_flags(world.embeddings, labels, found).flagged[:2].any()


@pytest.mark.filterwarnings("error")
def test_one_identity_alone_has_no_other_to_go_to():
    world = make_world(0.0)
    rows = world.embeddings[world.labels == 0]
    found = denoise.fit_centroids(rows, np.zeros(len(rows), dtype=np.int64), 1)
    labels = np.zeros(len(rows), dtype=np.int64)
    flags = denoise.centroid_flags(labels, found, found.own, found.other)
    assert np.isnan(found.agreement) and set(flags.reason) == {None, "far from its centre"}
    assert not denoise.subcentre_flags(rows, labels, found).flagged.any()
    shares = denoise.out_of_sample_probabilities(rows, labels, np.arange(len(rows)) % 5, 1)
    assert np.isnan(shares).all() and not denoise.confident_flags(shares, labels).flagged.any()


def test_a_wrong_row_of_a_small_class_stays():
    world = make_world(0.0)
    four = np.flatnonzero(world.labels == CLASSES - 1)[:4]
    keep = (world.labels != CLASSES - 1) | np.isin(np.arange(len(world.labels)), four)
    embeddings, labels = world.embeddings.copy()[keep], world.labels[keep]
    embeddings[-1] = embeddings[0]  # one of the four shows class 0
    found = denoise.fit_centroids(embeddings, labels, CLASSES)
    assert found.other[-1] - found.own[-1] > 0.3
    assert not denoise.centroid_flags(labels, found, found.own, found.other).flagged[-4:].any()
    found = denoise.fit_centroids(embeddings, labels, CLASSES, floor=4)
    assert denoise.centroid_flags(labels, found, found.own, found.other).flagged[-1]


def test_an_encoder_that_mixes_two_identities_up_does_not_strip_them():
    rng = np.random.default_rng(0)
    rows = np.array([1.0, 0, 0, 0]) + 0.6 * rng.normal(size=(400, 4))  # two identities in one place
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    labels = np.repeat([0, 1], 200)
    found = denoise.fit_centroids(rows.astype(np.float32), labels, 2)
    assert found.agreement < 0.7  # which is said to whoever asks for it
    assert (found.other > found.own).mean() > 0.4  # what a plain comparison of centres would remove
    assert denoise.centroid_flags(labels, found, found.own, found.other, 0.0).flagged.mean() < 0.15


# --- spare ------------------------------------------------------------------------------------------------------


def test_the_worst_stay_flagged_where_a_class_would_get_too_small():
    labels = np.array([0] * 6 + [1] * 3)
    reason = np.array(["x"] * 5 + [None] + ["x"] * 3, dtype=object)
    score = np.array([0.1, 0.5, 0.3, 0.9, 0.2, 0.0, 3.0, 2.0, 1.0])
    flags = denoise.spare(denoise.Flags(reason, score), labels, 4)
    assert np.flatnonzero(flags.flagged).tolist() == [1, 3]  # 6 - 2 = 4; class 1 has three and keeps them
    flags = denoise.spare(denoise.Flags(reason, score), labels, np.array([0, 2]))
    assert np.flatnonzero(flags.flagged).tolist() == [0, 1, 2, 3, 4, 6]
    assert reason[0] == "x"  # the argument is as it was


# --- duplicates -------------------------------------------------------------------------------------------------


def test_copies_are_flagged_and_the_first_by_name_stays():
    pictures = ["p", "q", "p", "p", "r"]
    flags = denoise.duplicate_flags(pictures, np.array([0, 0, 0, 0, 1]), ["d", "b", "c", "a", "e"])
    assert flags.reason.tolist() == ["same picture as another", None, "same picture as another", None, None]


def test_a_picture_under_two_names_leaves_both_unless_it_is_all_they_have():
    labels = np.array([0, 0, 1, 1, 1])
    flags = denoise.duplicate_flags(["p", "a", "p", "b", "c"], labels, list("vwxyz"))
    assert np.flatnonzero(flags.flagged).tolist() == [0, 2]
    assert set(flags.reason[[0, 2]]) == {"same picture under several identities"}
    alone = denoise.duplicate_flags(["p", "p", "b"], np.array([0, 1, 1]), list("xyz"))
    assert np.flatnonzero(alone.flagged).tolist() == [1]  # identity 0 would have no row left


def test_near_copies_of_one_identity_are_thinned_not_chained_away():
    # a - b - c - d: b is near a, and c near b only; c stays, for b is gone, and so d goes
    near = ([1, 2, 3, 2], [0, 1, 2, 4])  # e is near c, but is somebody else
    flags = denoise.duplicate_flags(list("pqrstu"), np.array([0, 0, 0, 0, 1, 1]), list("abcdef"), near)
    assert flags.reason.tolist() == [None, *["nearly the same picture as another", None] * 2, None]
    near = ([4, 3, 2, 3], [5, 4, 3, 1])
    backwards = denoise.duplicate_flags(list("utsrqp"), np.array([1, 1, 0, 0, 0, 0]), list("fedcba"), near)
    assert (backwards.flagged[::-1] == flags.flagged).all()


def test_groups_link_through_any_column():
    ids = ["e", "d", "c", "b", "a", "f"]
    sources = ["1", "1", None, None, "2", None]
    digests = ["x", "y", "y", "z", "w", None]
    # e-d by their source, d-c by their picture; b, a and f alone: an unknown value links nothing
    assert denoise.link_groups(ids, sources, digests) == ["c", "c", "c", "b", "a", "f"]
    assert denoise.link_groups(ids, sources, digests, pairs=([3, 5], [4, 3])) == ["c", "c", "c", "a", "a", "a"]


# --- centroid ---------------------------------------------------------------------------------------------------


def test_centres_against_brute_force(noisy):
    z, labels = noisy.embeddings.astype(np.float64), noisy.labels
    found = denoise.fit_centroids(noisy.embeddings, labels, CLASSES, drop=0.1)

    def unit(row):
        return row / np.linalg.norm(row)

    kept, centres = np.ones(len(z), dtype=bool), []
    for c in range(CLASSES):
        own = np.flatnonzero(labels == c)
        fit = z[own] @ unit(z[own].mean(axis=0))
        kept[own[np.argsort(fit)[: int(0.1 * len(own))]]] = False
        centres.append(unit(z[own][kept[own]].mean(axis=0)))
    assert np.allclose(found.directions, centres, atol=1e-5)
    for row in range(0, len(z), 37):
        others = [i for i in np.flatnonzero(labels == labels[row]) if i != row and kept[i]]
        assert found.own[row] == pytest.approx(z[row] @ unit(z[others].mean(axis=0)), abs=1e-5)
        elsewhere = max(z[row] @ centres[c] for c in range(CLASSES) if c != labels[row])
        assert found.other[row] == pytest.approx(elsewhere, abs=1e-5)


def test_what_is_usual_is_a_robust_two_sigma(monkeypatch):
    rng = np.random.default_rng(0)
    values, labels = rng.normal(3.0, 0.5, 20000), np.zeros(20000, dtype=np.int64)
    values[:3000] = -100.0  # wrong rows widen a standard deviation to 37, and this not by much
    low = denoise._least_usual(values, labels, np.array([20000]), np.array([True]), 2.0)
    assert low[0] == pytest.approx(3.0 - 2 * 0.5, abs=0.4)


def test_blocks_do_not_change_the_nearest_other(noisy, monkeypatch):
    found = denoise.fit_centroids(noisy.embeddings, noisy.labels, CLASSES)
    monkeypatch.setattr(denoise, "_BLOCK_SCORES", 100)
    again = denoise.nearest_other(noisy.embeddings, noisy.labels, found.directions, found.judged)
    assert np.allclose(again, found.other, atol=1e-6)


# --- confident learning -----------------------------------------------------------------------------------------


def test_a_group_is_never_split_and_classes_are_spread_evenly():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(30), 20)
    groups = [f"g{label}-{number}" for label, number in zip(labels, rng.integers(0, 8, len(labels)), strict=True)]
    groups[0] = groups[25] = "shared"  # a picture of two characters
    folds = denoise.grouped_folds(labels, groups, 5, seed=1)
    assert all(len({folds[row] for row in range(600) if groups[row] == name}) == 1 for name in set(groups))
    for label in range(30):
        own = {group: fold for group, fold, home in zip(groups, folds, labels, strict=True) if home == label}
        counts = Counter(fold for group, fold in own.items() if group != "shared")
        assert max(counts.values()) - min(counts[fold] for fold in range(5)) <= 2
    assert np.bincount(folds).min() > 80
    order = rng.permutation(600)
    assert (denoise.grouped_folds(labels[order], [groups[i] for i in order], 5, 1) == folds[order]).all()
    assert (denoise.grouped_folds(labels, groups, 5, 2) != folds).any()


def test_probabilities_are_out_of_sample():
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import PredefinedSplit, cross_val_predict

    world = make_world(0.1, dim=16)
    folds = denoise.grouped_folds(world.labels, world.ids, 4)
    shares = denoise.out_of_sample_probabilities(world.embeddings, world.labels, folds, CLASSES, 0.1)
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-5)
    model = LogisticRegression(C=0.1, max_iter=300)
    expected = cross_val_predict(
        model, world.embeddings * 4.0, world.labels, cv=PredefinedSplit(folds), method="predict_proba"
    )
    assert np.allclose(shares, expected, atol=1e-3)


def test_a_class_within_one_group_cannot_be_judged():
    world = make_world(0.1, dim=16)
    groups = ["one" if label == 5 else name for label, name in zip(world.labels, world.ids, strict=True)]
    folds = denoise.grouped_folds(world.labels, groups)
    shares = denoise.out_of_sample_probabilities(world.embeddings, world.labels, folds, CLASSES, 0.01)
    assert np.isnan(shares[world.labels == 5]).all() and not np.isnan(shares[world.labels != 5]).any()
    flags = denoise.confident_flags(shares, world.labels)
    assert not flags.flagged[world.labels == 5].any() and flags.flagged.any()


def random_shares(rng, rows: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(0, classes, rows)
    shares = rng.dirichlet(np.ones(classes), rows)
    shares[np.arange(rows), labels] += rng.random(rows)
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32), labels


def joint_by_the_definition(shares, labels):
    classes = shares.shape[1]
    thresholds = [np.mean([p[j] for p, y in zip(shares, labels, strict=True) if y == j]) for j in range(classes)]
    joint = np.zeros((classes, classes), dtype=int)
    for p, y in zip(shares, labels, strict=True):
        sure = [j for j in range(classes) if p[j] >= thresholds[j]]
        if sure:
            joint[y, max(sure, key=lambda j: p[j])] += 1
    return joint


@pytest.mark.parametrize("seed", range(5))
def test_confident_joint_is_that_of_the_paper(seed):
    shares, labels = random_shares(np.random.default_rng(seed), 120, 4)
    assert (denoise.confident_joint(shares, labels) == joint_by_the_definition(shares.astype(float), labels)).all()


@pytest.mark.parametrize("seed", range(5))
def test_pruning_by_noise_rate_against_the_definition(seed):
    shares, labels = random_shares(np.random.default_rng(seed), 200, 4)
    joint = joint_by_the_definition(shares.astype(float), labels)
    expected = set()
    for i in range(4):
        own = [row for row in range(200) if labels[row] == i]
        for j in range(4):
            number = round(joint[i, j] / joint[i].sum() * len(own))
            if i != j:
                worst = sorted(own, key=lambda row: shares[row, i] - shares[row, j])[:number]
                expected |= {row for row in worst if shares[row].argmax() != i}
    assert expected and set(np.flatnonzero(denoise.confident_flags(shares, labels).flagged)) == expected


def test_a_small_class_is_left_out_of_the_joint():
    shares, labels = random_shares(np.random.default_rng(0), 200, 4)
    labels[:3], shares[:3] = 4 - 1, [0.9, 0.1, 0, 0]
    few = np.where(labels == 3, 0, labels)
    few[:3] = 3
    flags = denoise.confident_flags(shares, few, floor=5)
    assert not flags.flagged[:3].any()
    rest = denoise.confident_flags(shares[3:, :3], few[3:], floor=5)
    assert (flags.flagged[3:] == rest.flagged).all()


# --- sub-centres ------------------------------------------------------------------------------------------------


def test_parts_of_a_cluster_are_found_and_their_centres_are_means():
    rng = np.random.default_rng(0)
    truth = np.repeat([0, 1, 2], [30, 12, 5])
    rows = np.eye(8)[truth * 2] + 0.1 * rng.normal(size=(47, 8))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    part, centres = denoise.spherical_kmeans(rows, 3)
    assert len(set(zip(part.tolist(), truth.tolist(), strict=True))) == 3  # one part for each cluster
    for number in range(3):
        mean = rows[part == number].mean(axis=0)
        assert np.allclose(centres[number], mean / np.linalg.norm(mean))
    assert len(denoise.spherical_kmeans(rows[:2], 3)[1]) == 2


# --- bands ------------------------------------------------------------------------------------------------------


def test_bands_have_the_bounds_of_the_long_tail():
    bands = band_names(np.array([101, 100, 20, 19, 1]))
    assert bands.tolist() == ["head", "mid", "mid", "tail", "tail"]
    labels, flagged = np.array([0, 0, 3, 4, 4]), np.array([True, False, True, True, False])
    assert denoise.removed_by_band(labels, flagged, bands) == {
        "head": {"rows": 2, "removed": 1, "fraction": 0.5},
        "mid": {"rows": 0, "removed": 0, "fraction": None},
        "tail": {"rows": 3, "removed": 2, "fraction": 2 / 3},
    }


# --- the script -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script(import_script):
    """script(flag, ...): main() of scripts/denoise_labels.py, in this process."""
    module = import_script("scripts/denoise_labels.py")
    return lambda *flags: module.main([str(flag) for flag in flags])


class Prepared(NamedTuple):
    folder: Path
    embeddings: Path
    wrong: set[str]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Prepared:
    """Pictures of 6 identities in train (5 wrong, 3 copies, one picture under two names), test, val and open_test."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    centres = rng.normal(size=(6, 32)) * 2 + 1.5  # far from zero, as a frozen encoder's embeddings are
    rows, vectors, wrong = [], {}, set()

    def add(name: str, who: int, split: str, label: int | None = None, pixels: np.ndarray | None = None) -> None:
        path = folder / "images" / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8) if pixels is None else pixels
        Image.fromarray(pixels).save(path)
        identity = f"c{who if label is None else label}"
        rows.append({"sample_id": name, "file_name": f"images/{name}.png", "identity": identity, "split": split})
        rows[-1]["source"] = name.split("+")[0]
        vectors[name] = centres[who] + rng.normal(size=32) * 0.7

    for who, count in enumerate((30, 28, 26, 24, 22, 4)):
        for number in range(count):
            is_wrong = number == 3 and who < 5
            add(f"t{who}-{number:02d}", who, "train", (who + 1) % 5 if is_wrong else None)
            wrong |= {f"t{who}-{number:02d}"} if is_wrong else set()
        for number in range(3):
            add(f"e{who}-{number}", who, "test")
        add(f"v{who}", who, "val")
    for number in range(3):
        pixels = np.asarray(Image.open(folder / f"images/t0-{10 + number}.png"))
        add(f"z-copy{number}", 0, "train", pixels=pixels)
    add("z-two", 1, "train", pixels=np.asarray(Image.open(folder / "images/t0-20.png")))
    add("e-leak", 2, "test", pixels=np.asarray(Image.open(folder / "images/t2-10.png")))
    add("e-wrong", 2, "test", 3)
    add("e-far", 5, "test", 3)
    rows[-1]["identity"] = "c3"
    add("open", 0, "open_test", 99)
    rows.append({"sample_id": "nobody", "file_name": "images/t0-00.png", "split": "train"})
    write_manifest(folder, rows, None, {"writer": "test"})
    np.savez(folder / "all.npz", embeddings=np.array(list(vectors.values()), np.float32), sample_id=list(vectors))
    return Prepared(folder, folder / "all.npz", wrong)


def ids_of(folder: Path, split: str) -> set[str]:
    manifest = read_manifest(folder).select((split,))
    return set(manifest.table.column("sample_id").to_pylist())


def test_the_ladder_cleans_train_and_leaves_the_rest(script, prepared, tmp_path, capsys):
    script("--data_path", prepared.folder, "--embeddings", prepared.embeddings, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out/denoise.json").read_text())
    gone = {entry["sample_id"]: entry for entry in report["removed"]}
    assert ids_of(prepared.folder, "train") - ids_of(tmp_path / "out", "train") == set(gone)
    assert prepared.wrong <= set(gone)
    assert {"z-copy0", "z-copy1", "z-copy2", "z-two", "t0-20"} <= set(gone)
    assert gone["z-copy1"]["step"] == "dedup" and gone["z-two"]["reason"] == "same picture under several identities"
    assert len(gone) <= 5 + 5 + 8 and "nobody" not in gone
    assert not any(name.startswith("t5") for name in gone)  # four rows are too few to judge
    for split in ("test", "val", "open_test"):
        assert ids_of(tmp_path / "out", split) == ids_of(prepared.folder, split)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.root == prepared.folder.resolve() and manifest.path(0).is_file()
    assert manifest.metadata["derived_from"] == str(prepared.folder.resolve())
    said = capsys.readouterr().out
    assert "dedup" in said and "tail" in said


def test_what_the_report_adds_up_to(script, prepared, tmp_path):
    script("--data_path", prepared.folder, "--embeddings", prepared.embeddings, "--out", tmp_path / "out")
    report = json.loads((tmp_path / "out/denoise.json").read_text())
    train, steps = report["train"], report["steps"]
    assert [step["step"] for step in steps] == ["embedding", "dedup", "centroid", "confident", "subcentre"]
    assert train["rows"] == 134 + 4 and train["without_identity"] == 1 and train["identities"] == 6
    assert train["removed"] == len(report["removed"]) == sum(step["removed"] for step in steps)
    assert train["fraction"] == pytest.approx(train["removed"] / train["rows"])
    for one, after in pairwise(steps):
        assert one["rows"] - one["removed"] == after["rows"]
        assert sum(part["removed"] for part in one["by"].values()) == one["removed"] == sum(one["reasons"].values())
    assert train["by"]["tail"] == {"rows": 4, "removed": 0, "fraction": 0.0} and train["by"]["mid"]["rows"] == 134
    assert report["agreement"] == {"train": pytest.approx(133 / 138), "test": pytest.approx(16 / 18)}
    assert train["identities_without_rows"] == []


def test_the_test_split_gets_a_second_list(script, prepared, tmp_path):
    from util.data.trials import read_protocol

    script("--data_path", prepared.folder, "--embeddings", prepared.embeddings, "--out", tmp_path / "out")
    trials = read_protocol(tmp_path / "out", "clean_test")
    kind = dict(zip(trials["id_a"], trials["kind"], strict=True))
    label = dict(zip(trials["id_a"], trials["label"], strict=True))
    assert set(kind) == ids_of(prepared.folder, "test") and set(trials["id_b"]) == {None}
    assert kind["e-leak"] == "same picture in train" and kind["e-wrong"] == "nearer another centre"
    assert kind["e5-0"] == "not judged" and kind["e0-0"] == "clean"
    assert all(label[name] == (kind[name] in ("clean", "not judged")) for name in kind)
    report = json.loads((tmp_path / "out/denoise.json").read_text())["test"]
    assert report["rows"] == len(kind) and report["accepted"] == sum(label.values())


def test_the_file_order_and_a_second_run_change_nothing(script, prepared, tmp_path):
    flags = ("--embeddings", prepared.embeddings)
    script("--data_path", prepared.folder, "--out", tmp_path / "a", *flags)
    first = {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.*")}
    script("--data_path", prepared.folder, "--out", tmp_path / "a", *flags)
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").glob("*.*")} == first
    manifest = read_manifest(prepared.folder)
    rows = [manifest.row(i) for i in np.random.default_rng(1).permutation(len(manifest))]
    write_manifest(tmp_path / "shuffled", rows, str(prepared.folder))
    script("--data_path", tmp_path / "shuffled", "--out", tmp_path / "b", *flags)
    assert ids_of(tmp_path / "b", "train") == ids_of(tmp_path / "a", "train")


def test_what_all_embeddings_have_in_common_does_not_matter(script, prepared, tmp_path):
    file = np.load(prepared.embeddings)
    flags = ("--data_path", prepared.folder, "--steps", "centroid", "subcentre")
    for name, offset in (("plain", 0.0), ("far", 40.0)):  # so far off, every cosine is above 0.99
        np.savez(
            tmp_path / f"{name}.npz", embeddings=file["embeddings"] + np.float32(offset), sample_id=file["sample_id"]
        )
        script(*flags, "--embeddings", tmp_path / f"{name}.npz", "--out", tmp_path / name)
    assert ids_of(tmp_path / "far", "train") == ids_of(tmp_path / "plain", "train") != ids_of(prepared.folder, "train")


def test_dedup_alone_needs_no_embeddings(script, prepared, tmp_path):
    script("--data_path", prepared.folder, "--out", tmp_path / "out", "--steps", "dedup")
    gone = ids_of(prepared.folder, "train") - ids_of(tmp_path / "out", "train")
    assert gone == {"z-copy0", "z-copy1", "z-copy2", "z-two", "t0-20"}


def test_faces_of_one_picture_are_no_copies(script, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    boxes = [[0, 0, 9, 9], [20, 0, 29, 9], [20.001, 0, 29.001, 9]]
    rows = [
        {"sample_id": f"s{i}", "file_name": "a.png", "identity": "rin", "split": "train", "box": box}
        for i, box in enumerate(boxes)
    ]
    rows.append({"sample_id": "s9", "file_name": "b.png", "identity": "rin", "split": "train"})
    write_manifest(tmp_path, rows)
    script("--data_path", tmp_path, "--out", tmp_path / "out", "--steps", "dedup")
    reasons = {
        entry["sample_id"]: entry["reason"]
        for entry in json.loads((tmp_path / "out/denoise.json").read_text())["removed"]
    }
    assert reasons == {"s2": "same picture as another", "s9": "file damaged or missing"}


def test_no_identity_loses_more_than_its_share(script, prepared, tmp_path):
    rng = np.random.default_rng(0)
    names = np.load(prepared.embeddings)["sample_id"]
    np.savez(tmp_path / "noise.npz", embeddings=rng.normal(size=(len(names), 8)).astype(np.float32), sample_id=names)
    flags = ("--data_path", prepared.folder, "--embeddings", tmp_path / "noise.npz", "--out", tmp_path / "out")
    steps = ("--steps", "centroid", "confident", "subcentre")

    def lost(*more) -> Counter:
        script(*flags, *steps, *more)
        report = json.loads((tmp_path / "out/denoise.json").read_text())
        return Counter(entry["identity"] for entry in report["removed"])

    counts = Counter(row["identity"] for row in rows_in(prepared.folder) if row["split"] == "train")
    capped, free = lost("--max_removed", 0.1), lost("--max_removed", 1)
    assert all(number <= 0.1 * counts[name] for name, number in capped.items()) and capped
    assert sum(free.values()) > 2 * sum(capped.values())  # that is what an encoder which knows nothing would do


def rows_in(folder: Path) -> list[dict]:
    return read_manifest(folder).table.to_pylist()


def test_a_weak_and_a_memorising_encoder_are_pointed_out(script, prepared, tmp_path, capsys):
    file = np.load(prepared.embeddings)
    names = file["sample_id"]
    flags = ("--data_path", prepared.folder, "--out", tmp_path / "out", "--steps", "centroid")
    script(*flags, "--embeddings", prepared.embeddings)
    assert "little" not in capsys.readouterr().out
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(names), 16)).astype(np.float32)
    np.savez(tmp_path / "noise.npz", embeddings=noise, sample_id=names)
    script(*flags, "--embeddings", tmp_path / "noise.npz")
    assert "that is little" in capsys.readouterr().out
    identity = {row["sample_id"]: row["identity"] for row in rows_in(prepared.folder)}
    split = {row["sample_id"]: row["split"] for row in rows_in(prepared.folder)}
    codes = {name: rng.normal(size=16) * 5 for name in sorted(set(identity.values()) - {None})}
    for row, name in enumerate(names.tolist()):
        if split[name] == "train":
            noise[row] += codes[identity[name]]
    np.savez(tmp_path / "heart.npz", embeddings=noise, sample_id=names)
    script(*flags, "--embeddings", tmp_path / "heart.npz")
    said = capsys.readouterr().out
    assert "has learned the wrong ones too" in said and "that is little" not in said


def test_embeddings_that_are_not_finite_go_first(script, prepared, tmp_path):
    file = dict(np.load(prepared.embeddings))
    file["embeddings"][file["sample_id"] == "t1-05"] = np.nan
    np.savez(tmp_path / "nan.npz", **file)
    flags = ("--data_path", prepared.folder, "--embeddings", tmp_path / "nan.npz", "--out", tmp_path / "out")
    script(*flags, "--steps", "centroid")
    first = json.loads((tmp_path / "out/denoise.json").read_text())["removed"][0]
    assert (first["sample_id"], first["reason"]) == ("t1-05", "its embedding is not finite")


def test_masks_and_protocols_of_a_part(script, tmp_path, capsys):
    from util.data.trials import read_protocol, write_protocol

    for name in "abc":
        Image.new("RGB", (4, 4), (9, 9, 9) if name == "c" else (ord(name), 0, 0)).save(tmp_path / f"{name}.png")
    Image.new("RGB", (4, 4), (9, 9, 9)).save(tmp_path / "d.png")
    rows = [{"sample_id": x, "file_name": f"{x}.png", "identity": "rin", "split": "train"} for x in "abcd"]
    rows[0]["mask_file"] = "masks/a.png"
    write_manifest(tmp_path, rows)
    write_protocol(tmp_path, "good", {"id_a": ["a"], "id_b": ["b"], "label": [1], "kind": ["trial"]})
    write_protocol(tmp_path, "alone", {"id_a": ["c"], "id_b": [None], "label": [1], "kind": ["trial"]})
    write_protocol(tmp_path, "gone", {"id_a": ["a"], "id_b": ["d"], "label": [1], "kind": ["trial"]})
    script("--data_path", tmp_path, "--out", tmp_path / "out", "--steps", "dedup")
    assert ids_of(tmp_path / "out", "train") == {"a", "b", "c"}
    assert read_protocol(tmp_path / "out", "good")["id_b"] == ["b"] and read_protocol(tmp_path / "out", "alone")
    assert read_protocol(tmp_path / "out", "gone") is None
    assert all(row["mask_file"] is None for row in rows_in(tmp_path / "out"))
    said = capsys.readouterr().out
    assert "masks of 1 rows" in said and "gone" in said


def test_faults_are_one_line(script, prepared, tmp_path, capsys):
    def refused(*flags) -> str:
        return fails(script_main, capsys, [str(flag) for flag in flags])

    def script_main(argv):
        script(*argv)

    flags = ("--data_path", prepared.folder, "--out", tmp_path / "out")
    assert "--embeddings is needed" in refused(*flags)
    assert "does not exist" in refused(*flags, "--embeddings", tmp_path / "nowhere.npz")
    file = dict(np.load(prepared.embeddings))
    np.savez(tmp_path / "few.npz", embeddings=file["embeddings"][5:], sample_id=file["sample_id"][5:])
    assert "lacks 5 of 138 train rows, the first: 't0-00'" in refused(*flags, "--embeddings", tmp_path / "few.npz")
    assert "is the folder that is read" in refused("--data_path", prepared.folder, "--out", prepared.folder)
    write_manifest(tmp_path / "other", [{"sample_id": "a", "file_name": "a.png", "split": "test"}])
    assert "another program" in refused("--data_path", prepared.folder, "--out", tmp_path / "other")
    assert "no train rows" in refused("--data_path", tmp_path / "other", "--out", tmp_path / "new")
    assert "--folds" in refused(*flags, "--folds", 1) and not (tmp_path / "out").exists()
