"""identify.py: clusters, names, the round trip through faces.csv, resuming, damaged pictures; and their measures.

Run: python -m pytest tests/test_identify.py
"""

import csv
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import identify
from models_vit import build_vit
from tests.helpers import fails
from util.benchmark.clustering import clustering_report
from util.transfer import clusters as clustering
from util.transfer import face_search
from util.transfer.clusters import by_size, cluster_faces
from util.transfer.face_sheet import sheet_rows
from util.transfer.gallery import Gallery, unit
from util.transfer.naming import UNKNOWN, Name, name_faces, share_names, stranger_threshold

SIZE = 16
COLOURS = {"red": (220, 40, 40), "green": (30, 200, 60), "blue": (40, 60, 220)}


def groups(counts: list[int], noise: float = 0.15, dim: int = 24, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings around random directions, of any length, shuffled; and which direction each is of."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.repeat(np.arange(len(counts)), counts))
    rows = unit(rng.normal(size=(len(counts), dim)))[truth] + noise * rng.normal(size=(len(truth), dim))
    return rows * rng.uniform(0.5, 3, (len(truth), 1)), truth


# --- measures


def test_bcubed_and_pairwise_are_those_of_brute_force_and_of_scikit_learn():
    from sklearn.metrics.cluster import pair_confusion_matrix

    rng = np.random.default_rng(1)
    found, truth = rng.integers(0, 7, 60), rng.integers(0, 5, 60)
    report = clustering_report(found, truth)
    precision = np.mean([np.mean(truth[found == found[i]] == truth[i]) for i in range(60)])
    recall = np.mean([np.mean(found[truth == truth[i]] == found[i]) for i in range(60)])
    assert report["bcubed"]["precision"] == pytest.approx(precision)
    assert report["bcubed"]["recall"] == pytest.approx(recall)
    assert report["bcubed"]["f1"] == pytest.approx(2 * precision * recall / (precision + recall))
    (_, false), (missed, right) = pair_confusion_matrix(truth, found)
    assert report["pairwise"]["precision"] == pytest.approx(right / (right + false))
    assert report["pairwise"]["recall"] == pytest.approx(right / (right + missed))
    assert (report["clusters"], report["identities"], report["samples"]) == (7, 5, 60)


def test_a_perfect_grouping_and_one_without_pairs():
    assert clustering_report(np.array([5, 5, 2]), np.array(["a", "a", "b"]))["bcubed"]["f1"] == 1.0
    alone = clustering_report(np.arange(3), np.array(["a", "a", "b"]))
    assert alone["pairwise"]["precision"] is None and alone["pairwise"]["recall"] == 0.0
    with pytest.raises(ValueError):
        clustering_report(np.arange(3), np.arange(2))


# --- clusters


def average_linkage(embeddings: np.ndarray, similarity: float) -> list[set[int]]:
    rows = unit(embeddings)
    cosines, parts = rows @ rows.T, [{i} for i in range(len(rows))]
    while len(parts) > 1:
        mean, a, b = max((cosines[np.ix_(list(a), list(b))].mean(), i, j) for (i, a), (j, b) in _pairs(parts))
        if mean < similarity:
            break
        parts[a] |= parts.pop(b)
    return parts


def _pairs(parts):
    return combinations(enumerate(parts), 2)


def sets(numbers: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(numbers == number).tolist()) for number in np.unique(numbers)}


@pytest.mark.parametrize("similarity", [0.2, 0.5, 0.8])
def test_average_linkage_is_that_of_brute_force(similarity):
    embeddings, _ = groups([6, 5, 4, 1], noise=0.2)
    found = cluster_faces(embeddings, similarity=similarity)
    assert sets(found) == set(map(frozenset, average_linkage(embeddings, similarity)))


@pytest.mark.parametrize("method", ["agglomerative", "hdbscan"])
def test_clear_groups_are_found_and_numbered_by_size(method):
    embeddings, truth = groups([12, 20, 5], noise=0.05)
    found = cluster_faces(embeddings, method=method, similarity=0.6, least=3)
    assert sets(found) == sets(truth)
    assert [int((found == number).sum()) for number in (1, 2, 3)] == [20, 12, 5]


def test_faces_that_are_like_no_other_have_numbers_of_their_own():
    embeddings = np.eye(9)[[0, 0, 0, 0, 0, 1, 1, 1, 1, 4, 7]]
    embeddings[:9] += 0.01 * np.random.default_rng(0).normal(size=(9, 9))
    for method in clustering.METHODS:
        found = cluster_faces(embeddings, method=method, least=3)
        assert found.tolist() == [1] * 5 + [2] * 4 + [3, 4]
    assert cluster_faces(np.ones((1, 9))).tolist() == [1] and cluster_faces(np.empty((0, 9))).tolist() == []


def test_more_faces_than_fit_are_joined_to_a_choice_of_them(monkeypatch):
    embeddings, truth = groups([40, 30, 20], noise=0.05)
    monkeypatch.setattr(clustering, "MOST", 30)
    assert sets(cluster_faces(embeddings, similarity=0.6)) == sets(truth)
    far = np.concatenate([embeddings, -unit(embeddings).mean(axis=0, keepdims=True)])
    assert any(len(one) == 1 for one in sets(cluster_faces(far)))


def test_numbers_by_size_then_by_first_face():
    assert by_size(np.array([7, 3, 3, 9, 7, 1])).tolist() == [1, 2, 2, 3, 1, 4]
    with pytest.raises(ValueError):
        cluster_faces(np.full((3, 4), np.nan))
    with pytest.raises(ValueError):
        cluster_faces(np.ones((3, 4)), method="magic")


# --- names


def people(**directions) -> Gallery:
    rows = {name: unit(np.asarray(value, dtype=np.float32)) for name, value in directions.items()}
    return Gallery(Path("nowhere"), "w", 3, people=rows)


def test_a_face_is_named_by_the_nearest_centre_above_the_threshold():
    gallery = people(rei=[[1, 0, 0], [1, 0.2, 0]], asuka=[[0, 1, 0]])
    faces, _ = groups([8, 8, 8], noise=0.3, dim=3, seed=3)
    names = name_faces(gallery, faces, threshold=0.5)
    for name, row in zip(names, unit(faces), strict=True):
        cosines = {who: float(row @ unit(own.mean(axis=0))) for who, own in gallery.people.items()}
        best = max(cosines, key=cosines.get)
        assert name.nearest == best and name.similarity == pytest.approx(cosines[best], abs=1e-5)
        assert name.name == (best if cosines[best] >= 0.5 else UNKNOWN)
    assert {name.name for name in names} == {UNKNOWN, "asuka"}


def test_a_cluster_shares_a_name_that_half_of_it_has():
    given = ["rei", UNKNOWN, "rei", UNKNOWN, "rei", UNKNOWN, UNKNOWN, "rei", "asuka", "rei", "rei", "asuka"]
    clusters = np.array([1, 1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4])
    shared = share_names([Name(name, "x", 0.1) for name in given], clusters)
    # 1: two of four; 2: one of three is too few; 3: no majority; 4: a majority
    expected = ["rei"] * 4 + ["rei", UNKNOWN, UNKNOWN] + ["rei", "asuka"] + ["rei"] * 3
    assert [name.name for name in shared] == expected
    assert all((name.nearest, name.similarity) == ("x", 0.1) for name in shared)


def test_nobody_is_named_from_an_empty_gallery_or_without_a_threshold():
    assert name_faces(people(), np.eye(3), 0.1) == [Name(UNKNOWN, "", 0.0)] * 3
    given = name_faces(people(rei=[[1, 0, 0]]), np.eye(3), None)
    assert [name.name for name in given] == [UNKNOWN] * 3 and given[0].nearest == "rei"


@pytest.mark.parametrize("far", [0.0, 0.05, 0.1, 0.5])
def test_the_threshold_is_the_least_that_so_few_strangers_reach(far):
    embeddings, truth = groups([7, 7, 7, 9], noise=0.4, dim=6)
    own = {str(number): unit(embeddings[truth == number].astype(np.float32)) for number in range(4)}
    gallery = Gallery(Path("nowhere"), "w", 6, people=own)
    centres = {name: unit(rows.mean(axis=0)) for name, rows in own.items()}
    scores = np.array([
        max(float(row @ centre) for other, centre in centres.items() if other != name)
        for name, rows in own.items()
        for row in rows
    ])  # fmt: skip
    threshold = stranger_threshold(gallery, far)
    assert np.mean(scores > threshold - 1e-6) <= far + 1 / len(scores)
    assert np.mean(scores >= threshold + 1e-6) <= far
    assert far == 0.0 or np.mean(scores >= threshold - 1e-3) >= far - 1 / len(scores)
    assert stranger_threshold(people(rei=[[1, 0, 0]]), far) is None


def test_rows_of_the_sheet_are_characters_then_clusters_then_single_faces():
    embeddings, truth = groups([12, 3, 4, 1, 1], noise=0.02)
    numbers = by_size(truth)
    given = [Name("Rei", "Rei", 0.9) if n == 1 else Name(UNKNOWN, "Rei", 0.1) for n in numbers.tolist()]
    rows = sheet_rows(given, numbers, embeddings)
    assert [row.title.split("\n")[0] for row in rows] == ["Rei", "unknown", "unknown", "unknown, one face each"]
    assert "12 faces, 0.90" in rows[0].title and [len(row.faces) for row in rows] == [10, 4, 3, 2]
    centre = unit(embeddings[numbers == 1]).mean(axis=0)
    assert rows[0].faces[0] == max(np.flatnonzero(numbers == 1), key=lambda i: unit(embeddings[i]) @ centre)


# --- the script


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("encoder") / "encoder.pth"
    state = build_vit("vit_nano_patch8", img_size=SIZE).state_dict()
    torch.save({"model": state, "args": {"model": "vit_nano_patch8", "input_size": SIZE}}, path)
    return path


@pytest.fixture
def pictures(tmp_path) -> Path:
    """Four pictures of each colour, one of them in a folder; a damaged one; a file that is none."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(0)
    (folder / "deep").mkdir(parents=True)
    for name, colour in COLOURS.items():
        for i in range(4):
            pixels = np.array(colour) + rng.normal(0, 6, (32, 32, 3))
            place = folder / ("deep" if i == 3 else ".") / f"{name}{i}.png"
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(place)
    (folder / "damaged.jpg").write_bytes(b"\xff\xd8\xff nothing")
    (folder / "notes.txt").write_text("no picture")
    return folder


def call(pictures, ckpt, *more) -> list[str]:
    flags = ["--finder", "whole", "--ckpt", ckpt, "--output_dir", pictures / "out", "--device", "cpu"]
    return [str(word) for word in (pictures, *flags, "--num_workers", 1, "--similarity", 0.97, *more)]


def rows_of(pictures) -> list[dict[str, str]]:
    with open(pictures / "out/faces.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def colour_of(row: dict[str, str]) -> str:
    return Path(row["picture"]).stem[:-1]


def test_from_a_folder_to_names_and_back(pictures, ckpt, capsys, monkeypatch):
    identify.main(call(pictures, ckpt))
    rows = rows_of(pictures)
    assert len(rows) == 12 and {row["name"] for row in rows} == {UNKNOWN}
    by_colour = {colour: {row["cluster"] for row in rows if colour_of(row) == colour} for colour in COLOURS}
    assert all(len(numbers) == 1 for numbers in by_colour.values()) and len(set.union(*by_colour.values())) == 3
    assert [rows[0][side] for side in ("x1", "y1", "x2", "y2")] == ["0.0", "0.0", "32.0", "32.0"]
    (line,) = (pictures / "out/bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["path"] == "damaged.jpg"
    with Image.open(pictures / "out/sheet.png") as page:
        assert page.width > 900

    # one character by --enrol, one by hand; what was embedded is not embedded again
    monkeypatch.setattr(face_search, "_decode", lambda path: pytest.fail(f"{path} was looked at again"))
    text = (pictures / "out/faces.csv").read_text().splitlines()
    edited = [line + "Blue, the 2nd" * 0 + '"Blue, the 2nd"' if line.startswith("blue") else line for line in text]
    (pictures / "out/faces.csv").write_text("\n".join(edited) + "\n", encoding="utf-8-sig")
    (red,) = by_colour["red"]
    identify.main(call(pictures, ckpt, "--enrol", f"{red}=Red", "--threshold", "0.97"))
    names = {colour: {row["name"] for row in rows_of(pictures) if colour_of(row) == colour} for colour in COLOURS}
    assert names == {"red": {"Red"}, "green": {UNKNOWN}, "blue": {"Blue, the 2nd"}}
    assert all(float(row["similarity"]) > 0.97 for row in rows_of(pictures) if row["name"] == "Red")

    # the file that was written has nothing left to enrol; nobody is enrolled twice
    identify.main(call(pictures, ckpt, "--threshold", "0.97"))
    gallery = pictures / "out/gallery/people"
    counts = sorted(len(np.load(path)["embeddings"]) for path in gallery.glob("*.npz"))
    assert counts == [3, 4]  # blue3 lies in a folder, so its line begins with another word
    assert len(list(gallery.glob("*/*.png"))) == 7
    identify.main(call(pictures, ckpt, "--threshold", "0.97", "--forget", "Red"))
    assert {row["name"] for row in rows_of(pictures)} == {UNKNOWN, "Blue, the 2nd"}
    assert "1 characters on 4 faces, 8 unknown" in capsys.readouterr().out


def test_enrolling_again_after_a_crash_adds_nobody_twice(pictures, ckpt):
    identify.main(call(pictures, ckpt))
    before = (pictures / "out/faces.csv").read_bytes()
    identify.main(call(pictures, ckpt, "--enrol", "1=Somebody"))
    (pictures / "out/faces.csv").write_bytes(before)  # as if the run had ended before it was written
    identify.main(call(pictures, ckpt, "--enrol", "1=Somebody"))
    (path,) = (pictures / "out/gallery/people").glob("*.npz")
    assert len(np.load(path)["embeddings"]) == 4


def test_a_run_that_was_stopped_goes_on(pictures, ckpt, monkeypatch):
    looked = []
    decode = face_search._decode

    def stop_at_the_ninth(path):
        looked.append(path.name)
        if len(looked) == 9:
            raise KeyboardInterrupt
        return decode(path)

    monkeypatch.setattr(face_search, "PICTURES", 3)
    monkeypatch.setattr(face_search, "AHEAD", 1)
    monkeypatch.setattr(face_search, "_decode", stop_at_the_ninth)
    with pytest.raises(SystemExit) as stop:
        identify.main(call(pictures, ckpt))
    assert stop.value.code == 130
    identify.main(call(pictures, ckpt))
    again = looked[9:]
    assert len(rows_of(pictures)) == 12 and len(again) == 13 - 6
    assert not set(again) & set(looked[:6])
    Image.new("RGB", (20, 20), "white").save(pictures / "red0.png")  # a picture that has changed
    del looked[:]
    identify.main(call(pictures, ckpt))
    assert looked == ["red0.png"]


def test_faces_are_cut_padded_and_embedded_as_by_hand(tmp_path, ckpt):
    from util.data.augment import EvalCrop, to_unit

    folder = tmp_path / "scenes"
    folder.mkdir()
    rng = np.random.default_rng(4)
    scene = Image.fromarray(rng.integers(0, 255, (12, 20, 3), dtype=np.uint8)).resize((200, 120))
    scene.save(folder / "two.png")
    Image.new("RGB", (50, 50)).save(folder / "none.png")
    found = {"two.png": [[20, 30, 40, 40], [120, 20, 60, 60]], "none.png": []}
    (tmp_path / "boxes.json").write_text(
        json.dumps({name: {"faces": [{"score": 0.9, "face": box} for box in boxes]} for name, boxes in found.items()})
    )
    argv = [folder, "--finder", f"boxes:{tmp_path / 'boxes.json'}", "--ckpt", ckpt, "--output_dir", tmp_path / "out"]
    identify.main([str(word) for word in (*argv, "--device", "cpu", "--face_padding", "0.25")])
    (shard,) = (tmp_path / "out/cache").glob("*/*.npz")
    stored = np.load(shard)
    assert stored["boxes"].tolist() == [[20, 30, 60, 70], [120, 20, 180, 80]]
    model = build_vit("vit_nano_patch8", img_size=SIZE).eval()
    model.load_state_dict(torch.load(ckpt, weights_only=True)["model"])
    crops = [scene.crop((10, 20, 70, 80)), scene.crop((105, 5, 195, 95))]
    pixels = torch.stack([EvalCrop((SIZE, SIZE))(crop, {}) for crop in crops])
    with torch.inference_mode():
        torch.testing.assert_close(torch.from_numpy(stored["embeddings"]), model.embed(to_unit(pixels)))


def test_what_a_user_can_get_wrong_is_one_line(pictures, ckpt, tmp_path, capsys):
    (tmp_path / "empty").mkdir()

    def error(*argv):
        return fails(identify.main, capsys, [str(word) for word in argv])

    usual = call(pictures, ckpt)
    assert "is no folder" in error(tmp_path / "gone", *usual[1:])
    assert "holds no pictures" in error(tmp_path / "empty", *usual[1:])
    assert "CLUSTER=NAME" in error(*usual, "--enrol", "Rei")
    assert "run once without --enrol" in error(*usual, "--enrol", "1=Rei")
    identify.main(usual)
    assert "has no cluster 99" in error(*usual, "--enrol", "99=Rei")
    assert "nobody can be enrolled as" in error(*usual, "--enrol", "1=Unknown")
    assert "nobody is called 'Rei'" in error(*usual, "--forget", "Rei")
    (pictures / "out/faces.csv").write_text("a,b\n1,2\n")
    assert "is no list of faces any more" in error(*usual)
    only_bad = tmp_path / "bad"
    only_bad.mkdir()
    (only_bad / "a.png").write_bytes(b"x")
    assert "none of 1 pictures can be read" in error(only_bad, *usual[1:5], "--output_dir", tmp_path / "o")
