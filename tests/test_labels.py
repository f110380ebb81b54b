"""Classes and their samples: who is in, which share is taken, and the batches that carry their numbers.

Run: python -m pytest tests/test_labels.py
"""

import argparse
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from util.data.augment import EvalCrop
from util.data.labels import open_labelled, stratified
from util.data.loader import Samples, collate, in_order, readable
from util.data.manifest import write_manifest
from util.data.sources import Subset, open_source
from util.run.errors import UserError

CPU = torch.device("cpu")


def flags(data_path, **options) -> argparse.Namespace:
    usual = {"labels": "auto", "val_fraction": 0.0, "nb_classes": None, "label_fraction": 1.0, "seed": 0}
    return argparse.Namespace(data_path=str(data_path), **{**usual, "face_padding": None, **options})


def colour_of(i: int) -> tuple[int, int, int]:
    return (i * 7 % 256, i * 31 % 256, i)


def save_pictures(folder, names: list[str]):
    """PNG files of one colour each, which tells their number in `names`."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), colour_of(i)).save(folder / name)
    return folder


def class_folders(folder, **counts: dict[str, int]):
    """class_folders(tmp, train={"rin": 3}, val={"rin": 1}): pictures in ROLE/IDENTITY/N.png."""
    names = [f"{role}/{who}/{i}.png" for role, people in counts.items() for who, n in people.items() for i in range(n)]
    return save_pictures(folder, names)


def prepared(folder, rows: list[tuple[str, str | None]]):
    """A prepared folder with a picture for each (split, identity)."""
    names = [f"{i:03d}.png" for i in range(len(rows))]
    save_pictures(folder, names)
    write_manifest(
        folder,
        [
            {"sample_id": name, "file_name": name, "split": split, "identity": identity}
            for name, (split, identity) in zip(names, rows, strict=True)
        ],
    )
    return folder


def files_of(source) -> list[str]:
    return source.column("file_name")


def test_class_folders_give_sorted_classes_and_their_numbers(tmp_path):
    people = {"rin": 3, "Ann": 2, "len": 4}
    task = open_labelled(flags(class_folders(tmp_path, train=people, val={"len": 2, "rin": 1}, test={"Ann": 1})))
    assert task.classes == ("Ann", "len", "rin")
    assert task.numbers == {"Ann": 0, "len": 1, "rin": 2}
    for source, size in ((task.train, 9), (task.val, 3), (task.test, 1)):
        labels = task.labels(source)
        assert labels.shape == (size,) and labels.dtype == np.int64
        assert [task.classes[label] for label in labels] == [name.split("/")[1] for name in files_of(source)]


def test_a_prepared_folder_gives_its_labelled_rows_alone(tmp_path):
    rows = [("train", "b"), ("train", None), ("pretrain", "a"), ("pretrain", None), ("val", "a"), ("val", None)]
    rows += [("test", "b"), ("open_test", "stranger"), ("novel", "newcomer")]
    task = open_labelled(flags(prepared(tmp_path, rows)))
    assert task.classes == ("a", "b")
    assert files_of(task.train) == ["000.png", "002.png"]
    assert files_of(task.val) == ["004.png"] and files_of(task.test) == ["006.png"]
    assert task.train.load(1).getpixel((0, 0)) == colour_of(2)
    assert task.train.record(1)["identity"] == "a"


def test_data_without_a_test_split_have_none(tmp_path):
    rows = [("train", "a"), ("train", "b"), ("train", None), ("val", "a"), ("val", None)]
    assert open_labelled(flags(prepared(tmp_path / "prepared", rows))).test is None
    folders = class_folders(tmp_path / "folders", train={"a": 2, "b": 2}, val={"a": 1, "b": 1})
    assert open_labelled(flags(folders)).test is None


def test_validation_is_held_out_where_the_data_have_none(tmp_path):
    names = [f"{who}/{i}.png" for who in ("a", "b", "c") for i in range(30)]
    task = open_labelled(flags(save_pictures(tmp_path, names), val_fraction=0.3))
    assert task.test is None and len(task.val) > 10
    assert sorted(files_of(task.train) + files_of(task.val)) == sorted(names)


@pytest.mark.parametrize("role", ["val", "test"])
def test_an_identity_without_training_image_is_refused_by_name(tmp_path, role):
    rows = [("train", "a"), ("train", "b"), ("val", "a"), ("test", "b"), (role, "stranger")]
    with pytest.raises(UserError, match=f"'stranger' is in {role} but has no training image") as error:
        open_labelled(flags(prepared(tmp_path, rows)))
    assert "\n" not in str(error.value)


def test_a_wrong_number_of_classes_is_refused(tmp_path):
    folder = prepared(tmp_path, [("train", "a"), ("train", "b"), ("val", "a")])
    assert open_labelled(flags(folder, nb_classes=2)).classes == ("a", "b")
    with pytest.raises(UserError, match=r"--nb_classes 3 does not fit .* which has 2 identities"):
        open_labelled(flags(folder, nb_classes=3))


def test_one_identity_or_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="one identity only, 'a'"):
        open_labelled(flags(prepared(tmp_path / "one", [("train", "a"), ("val", "a")])))
    with pytest.raises(UserError, match="no labels for 'train'"):
        open_labelled(flags(prepared(tmp_path / "none", [("train", None), ("val", "a")])))
    with pytest.raises(UserError, match="no labels for 'val'"):
        open_labelled(flags(prepared(tmp_path / "val", [("train", "a"), ("train", "b"), ("val", None)])))


def test_a_share_of_the_labels_keeps_every_class_and_leaves_validation_alone(tmp_path):
    folder = class_folders(tmp_path, train={"a": 20, "b": 8, "c": 1}, val={"a": 3, "b": 3, "c": 3})
    whole, part = open_labelled(flags(folder)), open_labelled(flags(folder, label_fraction=0.25))
    assert part.classes == whole.classes and part.val.fingerprint == whole.val.fingerprint
    assert Counter(part.train.column("identity")) == {"a": 5, "b": 2, "c": 1}
    assert set(files_of(part.train)) < set(files_of(whole.train))
    assert part.train.fingerprint != whole.train.fingerprint


IDENTITIES = ["a"] * 40 + ["b"] * 11 + ["c"] * 3 + ["d"]


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_the_share_of_each_identity_is_the_asked_one(fraction):
    rows = stratified(IDENTITIES, fraction, 0)
    assert (np.diff(rows) > 0).all()
    taken = Counter(IDENTITIES[row] for row in rows)
    for name, count in Counter(IDENTITIES).items():
        assert taken[name] >= 1
        assert abs(taken[name] - fraction * count) <= 0.5 or taken[name] == 1


def test_a_smaller_share_is_a_part_of_a_larger_one():
    rows = [set(stratified(IDENTITIES, fraction, 3)) for fraction in (0.05, 0.1, 0.25, 0.5, 1.0)]
    assert all(small < large for small, large in pairwise(rows))
    assert rows[-1] == set(range(len(IDENTITIES)))


def test_the_share_follows_the_seed():
    first = stratified(IDENTITIES, 0.25, 0)
    assert np.array_equal(first, stratified(IDENTITIES, 0.25, 0))
    assert not np.array_equal(first, stratified(IDENTITIES, 0.25, 1))
    chosen = np.concatenate([stratified(IDENTITIES, 0.25, seed) for seed in range(400)])
    often = np.bincount(chosen, minlength=55)[:40] / 400  # 10 of 40, each equally often: sd 0.022
    assert np.abs(often - 0.25).max() < 0.09


def test_other_identities_do_not_change_what_is_taken_of_one():
    def taken(identities: list[str], name: str) -> list[int]:
        """Which of the samples of `name`, counted among themselves."""
        own = [row for row, identity in enumerate(identities) if identity == name]
        return [own.index(row) for row in stratified(identities, 0.25, 5) if identities[row] == name]

    shuffled = np.random.default_rng(0).permutation(IDENTITIES).tolist()
    for identities in (IDENTITIES[::-1], shuffled, ["z"] * 7 + IDENTITIES, IDENTITIES[:51]):
        for name in ("a", "b"):
            assert taken(identities, name) == taken(IDENTITIES, name)
    alike = ["a"] * 40 + ["b"] * 40
    assert taken(alike, "a") == taken(IDENTITIES, "a") != taken(alike, "b")


@pytest.fixture
def source(tmp_path):
    """11 pictures of three identities, told apart by their colour."""
    names = [f"{who}/{i}.png" for who, n in (("a", 5), ("b", 4), ("c", 2)) for i in range(n)]
    return open_source(save_pictures(tmp_path, names), "train", val_fraction=0.0)


def batches_of(source, **options) -> list[dict]:
    options = {"batch_size": 4, "num_workers": 0, "classes": {"a": 0, "b": 1, "c": 2}, **options}
    return list(in_order(source, EvalCrop((16, 16)), device=CPU, **options))


def test_samples_carry_the_number_of_their_identity(source):
    samples = Samples(source, EvalCrop((16, 16)), 0, {"c": 7, "a": 0, "b": 3})
    batch = collate([samples[2, row] for row in (10, 0, 5)])
    assert batch["label"].tolist() == [7, 0, 3] and batch["label"].dtype == torch.int64
    assert batch["index"].tolist() == [10, 0, 5] and batch["epoch"] == 2
    assert batch["image"].shape == (3, 3, 16, 16) and batch["image"].dtype == torch.uint8
    assert [tuple(image[:, 0, 0].tolist()) for image in batch["image"]] == [colour_of(10), colour_of(0), colour_of(5)]
    assert "label" not in collate([Samples(source, EvalCrop((16, 16)), 0)[0, 0]])


def test_every_row_comes_once_and_in_order_whatever_the_workers(source):
    alone, shared = batches_of(source), batches_of(source, num_workers=2)
    for batches in (alone, shared):
        assert [len(batch["image"]) for batch in batches] == [4, 4, 3]
        assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(11))
        assert torch.cat([batch["label"] for batch in batches]).tolist() == [0] * 5 + [1] * 4 + [2] * 2
        pixels = torch.cat([batch["image"] for batch in batches])[:, :, 3, 3]
        assert [tuple(pixel.tolist()) for pixel in pixels] == [colour_of(i) for i in range(11)]
        assert all(readable(batch).all() and not batch["bad"] for batch in batches)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["image"], other["image"])


def test_chosen_rows_alone_come_in_their_order(source):
    batches = batches_of(source, rows=[9, 2, 3, 0, 7], view=6)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == [9, 2, 3, 0, 7]
    assert {batch["epoch"] for batch in batches} == {6}
    assert batches_of(source, rows=[]) == []


def test_a_picture_in_the_place_of_a_damaged_one_is_flagged(source):
    for row in (3, 6, 7, 10):  # at the end of a batch, two in a row, and the very last
        source.manifest.path(row).write_bytes(b"no picture")
    batches = batches_of(source)
    good = torch.cat([readable(batch) for batch in batches])
    assert (~good).nonzero().flatten().tolist() == [3, 6, 7, 10]
    assert {place for batch in batches for place, _, _ in batch["bad"]} == {3, 6, 7, 10}
    # in its place stands the next readable one, with its own label
    images, labels = (torch.cat([batch[name] for batch in batches]) for name in ("image", "label"))
    for row, shown in ((3, 4), (6, 8), (7, 8), (10, 0)):
        assert torch.equal(images[row], images[shown]) and labels[row] == labels[shown]


def test_a_subset_is_known_by_its_choice(source, tmp_path):
    subset = Subset(source, np.array([4, 1, 9]))
    assert len(subset) == 3 and subset.column("identity") == ["a", "a", "c"]
    assert subset.record(2)["file_name"] == source.record(9)["file_name"]
    assert subset.load(0).getpixel((0, 0)) == colour_of(4)
    choices = ([4, 1, 9], [1, 4, 9], [4, 1], [4, 1, 8], range(11))
    prints = [Subset(source, np.array(choice)).fingerprint for choice in choices]
    assert prints[0] == subset.fingerprint
    assert len({source.fingerprint, *prints}) == 6
    other = open_source(save_pictures(tmp_path / "x", [f"a/{i}.png" for i in range(11)]), "train", val_fraction=0.0)
    assert Subset(other, np.array([4, 1, 9])).fingerprint != subset.fingerprint
