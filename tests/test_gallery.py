"""Enrolled characters: who is found, what is there after a restart and a crash, odd names, damaged files.

Run: python -m pytest tests/test_gallery.py
"""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from util.run.errors import UserError
from util.transfer import gallery as module
from util.transfer.gallery import Gallery, unit

DIM = 16
NAMES = ["Hatsune Miku", "../../etc/passwd", "初音ミク", "a/b\\c:*?", "."]


def vectors(*key, count: int = 3) -> np.ndarray:
    return np.random.default_rng(key).normal(size=(count, DIM))


@pytest.fixture
def filled(tmp_path) -> Gallery:
    gallery = Gallery.open(tmp_path / "g", "w", DIM)
    for number, name in enumerate(NAMES):
        gallery.enrol(name, vectors(number), [Image.new("RGB", (300, 200), (number, 0, 0))] * 3)
    return gallery


def test_the_nearest_characters_are_those_of_brute_force(filled):
    probes = vectors(99, count=7)
    for probe, found in zip(probes, filled.identify(probes, k=3), strict=True):
        expected = []
        for number, name in enumerate(NAMES):
            rows = [row / np.linalg.norm(row) for row in vectors(number)]
            centre = np.mean(rows, axis=0)
            cosine = centre @ probe / np.linalg.norm(centre) / np.linalg.norm(probe)
            expected.append((cosine, name, int(np.argmax([row @ probe for row in rows]))))
        expected.sort(reverse=True)
        assert [(m.name, m.nearest) for m in found] == [(name, nearest) for _, name, nearest in expected[:3]]
        assert [m.similarity for m in found] == pytest.approx([cosine for cosine, *_ in expected[:3]], abs=1e-6)


def test_it_is_there_again_after_a_restart(filled):
    filled.threshold = 0.4
    filled.save()
    filled.enrol(NAMES[0], vectors(50, count=2))
    again = Gallery.open(filled.folder, "w", DIM)
    assert again.threshold == 0.4 and not again.broken and again.people.keys() == set(NAMES)
    assert all(np.array_equal(again.people[name], filled.people[name]) for name in NAMES)
    assert len(again.people[NAMES[0]]) == 5 and np.allclose(np.linalg.norm(again.people[NAMES[0]], axis=1), 1)
    probes = vectors(99, count=4)
    assert again.identify(probes) == filled.identify(probes)


def test_names_are_no_paths(filled):
    inside = {path for path in filled.folder.rglob("*") if path.is_file()}
    assert len(inside) == 1 + len(NAMES) * 4
    assert {path for path in filled.folder.parent.rglob("*") if path.is_file()} == inside
    assert filled.thumbnail("..", 0) is None and filled.thumbnail(NAMES[1], 7) is None
    with Image.open(filled.thumbnail(NAMES[1], 2)) as small:
        assert small.size == (128, 85) and small.getpixel((5, 5)) == (1, 0, 0)


@pytest.mark.parametrize("step", ["_write_thumbnail", "_write_person"])
def test_a_crash_while_enrolling_leaves_the_gallery_as_it_was(filled, monkeypatch, step):
    before = {name: rows.copy() for name, rows in filled.people.items()}
    monkeypatch.setattr(module, step, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for name in (NAMES[0], "somebody new"):
        with pytest.raises(KeyboardInterrupt):
            filled.enrol(name, vectors(7), [Image.new("RGB", (9, 9))] * 3)
    again = Gallery.open(filled.folder, "w", DIM)
    assert again.people.keys() == before.keys() and not again.broken
    assert all(np.array_equal(again.people[name], rows) for name, rows in before.items())
    assert not list(filled.folder.rglob("*.tmp"))


def test_a_character_can_be_forgotten(filled):
    filled.remove(NAMES[2])
    assert NAMES[2] not in Gallery.open(filled.folder, "w", DIM).people
    with pytest.raises(UserError, match="nobody is called"):
        filled.remove(NAMES[2])


def test_below_the_threshold_nobody_is_meant(filled):
    match = filled.identify(vectors(0, count=1))[0][0]
    assert filled.is_known(match)
    filled.threshold = match.similarity
    assert filled.is_known(match)
    filled.threshold = match.similarity + 1e-6
    assert not filled.is_known(match)


def test_another_network_and_damaged_files_are_told(filled):
    for weights, dim in (("other", DIM), ("w", DIM + 1)):
        with pytest.raises(UserError, match="another network"):
            Gallery.open(filled.folder, weights, dim)
    first, second, third, *_ = sorted((filled.folder / "people").glob("*.npz"))
    first.write_bytes(first.read_bytes()[:50])
    second.write_bytes(b"")
    with open(third, "wb") as file:
        np.savez(file, name=np.array("x"), embeddings=np.zeros((1, 3), np.float32))
    again = Gallery.open(filled.folder, "w", DIM)
    assert again.broken.keys() == {str(first), str(second), str(third)} and len(again.people) == len(NAMES) - 3
    (filled.folder / "gallery.json").write_text("{")
    with pytest.raises(UserError, match="enrol anew"):
        Gallery.open(filled.folder, "w", DIM)
    (filled.folder / "gallery.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(UserError, match="version 9"):
        Gallery.open(filled.folder, "w", DIM)


def test_a_pickle_in_place_of_a_character_is_not_run(filled, tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "run",)

    first = sorted((filled.folder / "people").glob("*.npz"))[0]
    with open(first, "wb") as file:
        np.savez(file, name=np.array(Trap(), dtype=object), embeddings=np.zeros((1, DIM), np.float32))
    assert str(first) in Gallery.open(filled.folder, "w", DIM).broken and not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused_and_an_empty_gallery_knows_nobody(tmp_path):
    gallery = Gallery.open(tmp_path, "w", DIM)
    assert gallery.identify(vectors(1)) == [[], [], []]
    for name in ("", "  ", "x" * 201):
        with pytest.raises(UserError, match="1 to 200"):
            gallery.enrol(name, vectors(1))
    for wrong in (np.zeros((2, 3)), np.zeros((0, DIM)), np.full((1, DIM), np.nan)):
        with pytest.raises(ValueError, match="do not fit"):
            gallery.enrol("a", wrong)
    with pytest.raises(ValueError, match="1 pictures for 3"):
        gallery.enrol("a", vectors(1), [Image.new("RGB", (4, 4))])
    assert gallery.enrol("  a \n b ", vectors(1)[0]) == 1 and list(gallery.people) == ["a b"]
    assert np.array_equal(unit(np.zeros((1, 2))), np.zeros((1, 2)))
