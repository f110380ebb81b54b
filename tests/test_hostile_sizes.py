"""Sizes, shapes and numbers that a file announces and does not hold; numbers that are none.

What a file unpacks to is bounded by its own size, and nothing takes memory before it is checked.
Run: python -m pytest tests/test_hostile_sizes.py
"""

import json
import struct
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from models_hub import HubViT
from models_transfer import load_recogniser, load_transferred
from scripts import fuzz_corpus as corpus
from tests.hostile import MIB, linux, peak_growth, refused
from util.benchmark.embedded import FACTS, embed_split, read_embeddings
from util.benchmark.release import Release
from util.benchmark.submission import read_scores as read_submission
from util.run import untrusted
from util.run.untrusted import read_arrays
from util.training.checkpoint import read_checkpoint, save_checkpoint
from util.training.hub import load_weights
from util.transfer.gallery import Gallery
from util.transfer.lora import load_peft


@linux
def test_memory_that_was_freed_before_counts_again():
    """Before, a peak depended on the tests that ran earlier."""

    def take() -> None:
        kept = [bytearray(60_000) for _ in range(1000)]  # small enough for the heap, which keeps what is freed
        assert len(kept) == 1000

    def take_and_leave_a_lid() -> bytearray:
        kept = [bytearray(60_000) for _ in range(1000)]
        return kept[-1][:]

    lid = take_and_leave_a_lid()
    assert lid is not None and peak_growth(take) > 50 * MIB


# --- sizes that are not there ---------------------------------------------------------------------------------------


def npy(kind: str, shape: str, body: bytes = b"") -> bytes:
    text = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + body


@linux
@pytest.mark.parametrize(
    "kind, shape",
    [("<f8", "(1000000000000,)"), ("<f4", "(99999999999999999999, 9)"), ("<U9", "(-5,)"), ("<U0", "(10,)")],
)
def test_an_array_that_announces_what_it_does_not_hold(kind, shape, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("embeddings.npy", npy(kind, shape, bytes(64)))
        archive.writestr("sample_id.npy", npy(kind, shape, bytes(64)))
    assert peak_growth(lambda: refused(lambda: read_embeddings(str(tmp_path / "a.npz")), "announces")) < 16 * MIB


@linux
def test_an_archive_that_unpacks_to_far_more_than_it_holds(tmp_path):
    archive = zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("embeddings.npy", "w") as file:
        file.write(npy("|u1", f"({400 * MIB},)"))
        for _ in range(400):
            file.write(bytes(MIB))
    assert (tmp_path / "a.npz").stat().st_size < MIB
    assert peak_growth(lambda: refused(lambda: read_embeddings(str(tmp_path / "a.npz")), "unpacks to")) < 16 * MIB


def test_arrays_beside_those_that_are_wanted_are_not_looked_at(tmp_path, monkeypatch):
    """Before, one array of objects made the file unreadable."""
    rows, names = np.ones((2, 4), np.float32), np.array(["a", "b"])
    np.savez(tmp_path / "a.npz", embeddings=rows, sample_id=names, note=np.array([{"a": 1}], object))
    found = read_embeddings(str(tmp_path / "a.npz"))
    assert np.array_equal(found[0], rows) and found[1].tolist() == ["a", "b"]
    monkeypatch.setattr(untrusted, "SPARE_BYTES", MIB)
    np.savez_compressed(tmp_path / "a.npz", embeddings=rows, sample_id=names, more=np.zeros(9 * MIB, np.uint8))
    assert len(read_embeddings(str(tmp_path / "a.npz"))[0]) == 2
    with pytest.raises(ValueError, match="unpacks to"):
        read_arrays(tmp_path / "a.npz")


def test_scores_that_compress_a_thousandfold_are_read(tmp_path):
    """One-hot answers of a real model; 23,000 x 3,000 of them were refused before."""
    people = [f"c{i:04d}" for i in range(3000)]
    splits = [
        {"sample_id": f"s{i}", "split": "train", "identity": people[i % 3000], "source": ""} for i in range(23_000)
    ]
    release = Release("1.0.0", {"seed": 0}, splits, {}, {})
    scores = np.zeros((23_000, 3000), np.float32)
    scores[np.arange(23_000), np.arange(23_000) % 3000] = 1
    order = np.roll(np.arange(3000), 1)
    ids = np.array([row["sample_id"] for row in splits])
    path = str(tmp_path / "a.npz")
    np.savez_compressed(path, sample_id=ids, class_scores=scores[:, order], classes=np.array(people)[order])
    assert (tmp_path / "a.npz").stat().st_size * untrusted.RATIO < scores.nbytes
    found = read_submission(path, release).rows
    assert all(np.array_equal(found[f"s{i}"], scores[i]) for i in range(0, 23_000, 997))


def test_arrays_are_read_as_numpy_reads_them(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.random((3, 4)), "f": np.asfortranarray(rng.random((3, 4), np.float32)), "n": np.array("日本"),
        "e": np.empty((0, 4)), "s": np.array(["a", "bc"]), "i": rng.integers(0, 9, 5), "b": np.array(True),
    }  # fmt: skip
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = read_arrays(tmp_path / "a.npz")
        assert found.keys() == arrays.keys()
        for name, value in arrays.items():
            assert found[name].dtype == value.dtype and np.array_equal(found[name], value), name
            assert found[name].flags.writeable
    data = bytearray((tmp_path / "a.npz").read_bytes())
    np.savez(tmp_path / "b.npz", a=arrays["a"])
    data = bytearray((tmp_path / "b.npz").read_bytes())
    data[200] ^= 1  # inside the numbers: the checksum tells
    (tmp_path / "b.npz").write_bytes(data)
    with pytest.raises(ValueError, match="CRC"):
        read_arrays(tmp_path / "b.npz")


@pytest.mark.parametrize("character", [0x110000, 0xD800])
def test_text_of_an_array_is_unicode(character, tmp_path):
    """Before, such a name was a traceback where it was first looked at."""
    rows = np.zeros((1, 4), np.float32)
    names = np.frombuffer(struct.pack("<I", character), "<U1")
    np.savez(tmp_path / "a.npz", embeddings=rows, sample_id=names)
    refused(lambda: read_embeddings(str(tmp_path / "a.npz")), "no Unicode")


def test_embeddings_that_are_no_numbers_are_left_out_and_counted(tmp_path):
    rows = np.ones((5, 4), np.float32)
    rows[1], rows[2], rows[3] = np.nan, np.inf, 0
    np.savez(tmp_path / "a.npz", embeddings=rows, sample_id=np.array(list("abcde")))
    embeddings, names = read_embeddings(str(tmp_path / "a.npz"))
    split, left_out = embed_split("test", embeddings, {fact: list(names) for fact in FACTS})
    assert left_out.tolist() == [1, 2, 3] and np.isfinite(split.embeddings).all()


def test_a_gallery_does_not_take_embeddings_that_are_no_numbers(tmp_path):
    """Before, one NaN made every similarity NaN, and the first character in the list the answer."""
    corpus.gallery(tmp_path)
    victim = next((tmp_path / "people").glob("*.npz"))
    stored = dict(np.load(victim))
    stored["embeddings"][0, 0] = np.nan
    np.savez(victim, **stored)
    found = Gallery.open(tmp_path, "0123", corpus.DIM)
    assert list(found.broken) == [str(victim)] and len(found.people) == 1


@pytest.mark.parametrize("threshold", ["high", [1], float("nan"), 10**400])
def test_a_gallery_has_a_threshold_or_none(threshold, tmp_path):
    corpus.gallery(tmp_path)
    note = json.loads((tmp_path / "gallery.json").read_text())
    (tmp_path / "gallery.json").write_text(json.dumps(note | {"threshold": threshold}))
    refused(lambda: Gallery.open(tmp_path, "0123", corpus.DIM), "cannot be read")


# --- weights --------------------------------------------------------------------------------------------------------


@linux
def test_a_tensor_of_a_billion_elements_that_are_all_the_same_one(tmp_path):
    state = {"patch_embed.proj.weight": torch.zeros(1).expand(10**9), "cls_token": torch.zeros(1, 1, 4)}
    torch.save({"model": state}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < MIB
    assert peak_growth(lambda: refused(lambda: load_weights(str(tmp_path / "a.pth")), "no plain one")) < 16 * MIB


@pytest.mark.parametrize(
    "tensor", [torch.zeros(2, device="meta"), torch.eye(3).to_sparse(), torch.zeros(2, dtype=torch.complex64)]
)
def test_tensors_that_are_no_plain_numbers(tensor, tmp_path):
    torch.save({"model": {"patch_embed.proj.weight": tensor}}, tmp_path / "a.pth")
    refused(lambda: load_weights(str(tmp_path / "a.pth")))


@linux
def test_a_checkpoint_that_unpacks_to_far_more_than_it_holds(tmp_path):
    save_checkpoint(tmp_path / "a.pth", {"model": {"a": torch.zeros(50 * MIB, dtype=torch.uint8)}})
    with zipfile.ZipFile(tmp_path / "a.pth") as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(tmp_path / "b.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    del members
    assert (tmp_path / "b.pth").stat().st_size < MIB
    assert peak_growth(lambda: refused(lambda: read_checkpoint(tmp_path / "b.pth"), "unpacks to")) < 16 * MIB


@linux
@pytest.mark.parametrize("shape, end", [([1 << 40], 1 << 42), ([1 << 62, 8], 64), ([-1], 4), ([16], 1 << 40)])
def test_safetensors_that_announce_what_they_do_not_hold(shape, end, tmp_path):
    header = json.dumps({"patch_embed.proj.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}})
    path = tmp_path / "a.safetensors"
    for length in (len(header), 1 << 40, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + header.encode() + bytes(64))
        assert peak_growth(lambda: refused(lambda: load_weights(str(path)), "damaged")) < 16 * MIB


@linux
@pytest.mark.parametrize("size", [10**9, [10**6, 10**6], -16, 0, "224", [224], True])
def test_flags_that_no_run_can_have_had(size, tmp_path):
    corpus.weights(tmp_path)
    content = torch.load(tmp_path / "official.pth", weights_only=False)
    content["args"].input_size = size
    torch.save(content, tmp_path / "a.pth")
    growth = peak_growth(lambda: refused(lambda: load_recogniser(str(tmp_path / "a.pth")), "input_size"))
    assert growth < 32 * MIB


@linux
@pytest.mark.parametrize("key, value", [("embed_dim", 16_000), ("depth", 10_000), ("img_size", [4096, 10**7])])
def test_a_config_that_asks_for_more_than_the_weights_are(key, value, tmp_path):
    corpus.weights(tmp_path)
    config = {"img_size": 16, "patch_size": 8, "embed_dim": 192, "depth": 6, "num_heads": 3} | {key: value}
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    growth = peak_growth(lambda: refused(lambda: HubViT.from_pretrained(str(tmp_path / "hf")), key))
    assert growth < 64 * MIB


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_heads_and_adapters_that_are_no_numbers(number, tmp_path):
    """Before, such a head answered with the first of its classes."""
    corpus.transfer(tmp_path)
    content = torch.load(tmp_path / "finetune.pth", weights_only=True)
    content["model"]["head.weight"][0, 0] = number
    torch.save(content, tmp_path / "a.pth")
    refused(lambda: load_transferred(tmp_path / "a.pth"), "head.weight|holds no numbers")
    corpus.adapters(tmp_path / "lora")
    path = tmp_path / "lora/adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = number
    save_file(tensors, path)
    refused(lambda: load_peft(tmp_path / "lora"), "is damaged")


def test_a_pattern_that_takes_years(tmp_path):
    """The keys of alpha_pattern are regular expressions, as in PEFT."""
    corpus.adapters(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    for pattern in ("((.*)*)*x", "(a|a)*" * 9, ".*.*.*.*.*.*.*.*x", "(((" * 900, "["):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {pattern: 4}}))
        refused(lambda: load_peft(tmp_path), "alpha_pattern")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {r"blocks\.\d+\.attn.*": 4}}))
    load_peft(tmp_path)
