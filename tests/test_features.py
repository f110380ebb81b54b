"""Cached embeddings: they are the backbone's own, they are computed once, and nothing else is taken for them.

Run: python -m pytest tests/test_features.py
"""

import argparse
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models_vit import VisionTransformer
from util.data.augment import EvalCrop, TrainCrop, TrainView, to_unit
from util.data.loader import in_batches
from util.data.sources import Subset, open_source
from util.run.dist import World
from util.run.errors import UserError
from util.run.log import RunFolder
from util.run.seed import rng_for
from util.training.pretrained import fingerprint_of
from util.training.session import Session
from util.transfer import features
from util.transfer.encoder import Encoder
from util.transfer.features import FeatureLoader, Features, cached_features
from util.transfer.subject import Subject

IMAGES = 10
STILL = EvalCrop((16, 16))
VIEW = TrainView(TrainCrop((16, 16), scale=(0.5, 1.0)), jitter=0.1, erase=0.3)


class Counting(VisionTransformer):
    """A small backbone that remembers how many images it has embedded; it fails after `limit` of them."""

    def __init__(self):
        super().__init__(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=2)
        self.seen, self.limit = 0, IMAGES * 100

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        if self.seen + len(images) > self.limit:
            raise KeyboardInterrupt
        self.seen += len(images)
        return super().embed(images)


class Bench:
    """A data set, a backbone and a cache folder, with `bench()` for cached_features."""

    def __init__(self, folder: Path, pictures: Path):
        torch.manual_seed(0)
        self.cache, self.model = folder / "features", Counting().eval()
        self.weights = fingerprint_of(self.model.state_dict())
        self.source = open_source(pictures, "train", val_fraction=0.0)
        self.args = argparse.Namespace(model="counting", precision="fp32", seed=0, batch_size=2, num_workers=0)
        self.run = RunFolder(str(folder / "run"), is_main=True)

    def __call__(self, transform=STILL, view: int = 0, source=None, weights=None, **flags) -> Features:
        args = argparse.Namespace(**{**vars(self.args), **flags})
        here = Session(args, World(), torch.device("cpu"), self.run, None)
        return cached_features(
            here, self.cache, self.model, weights or self.weights, source or self.source, transform, view
        )

    def computed(self, *args, **options) -> int:
        """The number of images that a call embeds."""
        before = self.model.seen
        self(*args, **options)
        return self.model.seen - before

    def direct(self, transform, view: int = 0, seed: int = 0, rows=range(IMAGES)) -> torch.Tensor:
        """The embeddings as anyone would compute them, an image at a time."""
        parts = []
        for row in rows:
            rng = rng_for(seed, view, row, "augment")
            pixels = transform(self.source.load(row), self.source.record(row), rng)
            with torch.inference_mode():
                parts.append(VisionTransformer.embed(self.model, to_unit(pixels[None])))
        return torch.cat(parts)

    def chunks(self) -> list[Path]:
        return sorted(self.cache.glob("*/*.npz"))


@pytest.fixture
def bench(tmp_path, make_images, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4)
    return Bench(tmp_path, make_images(tmp_path / "pictures", IMAGES))


@pytest.mark.parametrize(("transform", "view", "seed"), [(STILL, 0, 0), (VIEW, 0, 0), (VIEW, 3, 5)])
def test_embeddings_are_those_of_the_transformed_pictures(bench, transform, view, seed):
    got = bench(transform, view, seed=seed)
    assert got.embeddings.shape == (IMAGES, 16) and got.embeddings.dtype == torch.float32
    assert torch.allclose(got.embeddings, bench.direct(transform, view, seed), atol=1e-6)
    assert got.bad == [] and got.readable.all() and got.seconds > 0
    assert got.embeddings.std(dim=0).min() > 1e-3  # the pictures are told apart


def test_random_views_differ(bench):
    first, second = bench(VIEW, 0).embeddings, bench(VIEW, 1).embeddings
    assert ((first - second).abs().amax(dim=1) > 1e-3).all()


def test_a_replaced_picture_is_seen(bench):
    first = bench()
    pixels = np.array(Image.open(bench.source.manifest.path(3)))
    Image.fromarray(255 - pixels).save(bench.source.manifest.path(3))
    second = bench()
    assert not torch.equal(first.embeddings[3], second.embeddings[3])
    assert torch.equal(first.embeddings[:3], second.embeddings[:3])


def test_the_second_call_reads_the_same_bits_without_the_network(bench):
    first = bench(VIEW)
    bench.model.limit = 0
    # neither the size of the batches nor the number of processes makes other embeddings of them
    for flags in ({}, {"batch_size": 7}, {"num_workers": 2}):
        again = bench(VIEW, **flags)
        assert torch.equal(again.embeddings, first.embeddings)
        assert (again.bad, again.seconds) == (first.bad, first.seconds)


def test_workers_compute_the_same_bits(bench):
    alone = bench(VIEW)
    bench.cache = bench.cache.with_name("other")
    assert torch.equal(bench(VIEW, num_workers=2).embeddings, alone.embeddings)


@pytest.mark.parametrize(
    "other",
    [
        {"weights": "0" * 16},
        {"view": 1},
        {"seed": 1},
        {"transform": STILL},
        {"transform": TrainView(VIEW.crop, jitter=0.1, erase=0.31)},
        {"precision": "bf16"},
    ],
    ids=lambda other: "-".join(other),
)
def test_what_the_numbers_depend_on_makes_another_entry(bench, other):
    usual = {"transform": VIEW, "view": 0}
    first = bench(**usual)
    assert bench.computed(**{**usual, **other}) == IMAGES
    assert len(list(bench.cache.iterdir())) == 2
    assert bench.computed(**usual) == 0 and torch.equal(bench(**usual).embeddings, first.embeddings)


def test_other_data_make_another_entry(bench):
    whole = bench().embeddings
    rows = np.array([7, 0, 3])
    part = Subset(bench.source, rows)
    assert bench.computed(source=part) == 3
    assert torch.allclose(bench(source=part).embeddings, whole[rows], atol=1e-6)
    assert bench.computed(source=Subset(bench.source, rows[::-1])) == 3
    (bench.source.manifest.path(0)).write_bytes(bench.source.manifest.path(1).read_bytes() + b" ")
    changed = open_source(bench.source.name, "train", val_fraction=0.0)
    assert bench.computed(source=changed) == IMAGES


@pytest.mark.parametrize("damage", ["truncated", "empty", "flipped", "text", "gone", "incomplete"])
def test_a_damaged_chunk_alone_is_computed_again(bench, damage):
    first = bench(VIEW)
    chunk, content = bench.chunks()[1], bench.chunks()[1].read_bytes()
    flipped = bytearray(content)
    flipped[content.index(b"embeddings") + 200] ^= 1
    with np.load(chunk) as parts:
        incomplete = {"embeddings": parts["embeddings"], "seconds": parts["seconds"]}
    damaged = {"truncated": content[: len(content) // 2], "empty": b"", "flipped": bytes(flipped), "text": b"hello"}
    if damage == "gone":
        chunk.unlink()
    elif damage == "incomplete":
        np.savez(chunk, **incomplete)
    else:
        chunk.write_bytes(damaged[damage])
    assert bench.computed(VIEW) == 4
    assert torch.equal(bench(VIEW).embeddings, first.embeddings)
    assert [path.stat().st_size for path in bench.chunks()] == [len(content)] * 2 + [bench.chunks()[2].stat().st_size]


def test_a_computation_that_was_stopped_goes_on(bench):
    bench.model.limit = 6  # one batch into the second chunk
    with pytest.raises(KeyboardInterrupt):
        bench(VIEW)
    assert [path.name for path in bench.chunks()] == ["00000.npz"]
    bench.model.limit = IMAGES * 100
    assert bench.computed(VIEW) == IMAGES - 4
    assert torch.allclose(bench(VIEW).embeddings, bench.direct(VIEW), atol=1e-6)
    assert not list(bench.cache.glob("*/.*"))  # no temporary file is left


@pytest.mark.parametrize("workers", [0, 2])
def test_a_computation_that_was_stopped_leaves_no_process(bench, workers):
    bench.model.limit = 6
    with pytest.raises(KeyboardInterrupt):
        bench(VIEW, num_workers=workers)
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_the_size_of_a_batch_is_not_seen(bench, batch_size):
    """fp32 on a CPU: within 1e-5 of single pictures, and the very bits of a plain loop over the same batches."""
    got = bench(VIEW, batch_size=batch_size).embeddings
    assert (got - bench.direct(VIEW)).abs().max() < 1e-5
    parts = []
    for chunk in (range(0, 4), range(4, 8), range(8, 10)):
        for first in range(0, len(chunk), batch_size):
            rows = chunk[first : first + batch_size]
            pixels = [
                VIEW(bench.source.load(row), bench.source.record(row), rng_for(0, 0, row, "augment")) for row in rows
            ]
            with torch.inference_mode():
                parts.append(VisionTransformer.embed(bench.model, to_unit(torch.stack(pixels))))
    assert torch.equal(got, torch.cat(parts))


def test_one_loader_serves_all_chunks_that_are_missing(bench, monkeypatch):
    """So that its workers are started once, and decode ahead while a chunk is written."""
    asked = []
    monkeypatch.setattr(
        features,
        "in_batches",
        lambda source, transform, batches, **options: (
            asked.append([list(rows) for rows in batches]) or in_batches(source, transform, batches, **options)
        ),
    )
    first = bench(batch_size=3)
    assert asked == [[[0, 1, 2], [3], [4, 5, 6], [7], [8, 9]]]  # no batch is of two chunks
    bench.chunks()[1].unlink()
    again = bench(batch_size=3)
    assert asked[1:] == [[[4, 5, 6], [7]]] and torch.equal(again.embeddings, first.embeddings)
    bench()
    assert len(asked) == 2


def pictures_of(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def encoder_of(model, **options) -> Encoder:
    return Encoder(model, torch.device("cpu"), "fp32", **{"most": 8, **options})


def test_batches_that_memory_does_not_hold_are_halved_for_good(bench, monkeypatch):
    shown, embed = [], bench.model.embed

    def small(images):
        shown.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("none left")
        return embed(images)

    expected = encoder_of(bench.model)(pictures_of(8))
    monkeypatch.setattr(bench.model, "embed", small)
    encoder = encoder_of(bench.model)
    assert torch.allclose(encoder(pictures_of(8)), expected, atol=1e-6)
    assert shown == [8, 4, 2, 2, 2, 2]
    assert torch.allclose(encoder(pictures_of(8)[:5]), expected[:5], atol=1e-6)
    assert shown[6:] == [2, 2, 1]


def test_memory_for_no_picture_at_all_is_an_error(bench, monkeypatch):
    def none(images):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(bench.model, "embed", none)
    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        encoder_of(bench.model)(pictures_of(5))


def test_a_compiled_network_sees_one_shape_only(bench, monkeypatch):
    shown = []
    monkeypatch.setattr(
        torch, "compile", lambda embed, **_: lambda images: shown.append(tuple(images.shape)) or embed(images)
    )
    expected = encoder_of(bench.model)(pictures_of(11))
    encoder = encoder_of(bench.model, compiled=True)
    got = torch.cat([encoder(part) for part in pictures_of(11).split(4)])
    assert set(shown) == {(8, 3, 16, 16)} and torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(bench(compile="on").embeddings, bench.direct(STILL), atol=1e-6)
    assert shown[-1] == (2, 3, 16, 16)  # --batch_size


def test_a_compiler_that_fails_costs_a_line_and_no_more(bench, monkeypatch):
    def fail(images):
        raise RuntimeError("no compiler here")

    said = []
    expected = encoder_of(bench.model)(pictures_of(5))
    monkeypatch.setattr(torch, "compile", lambda embed, **_: fail)
    encoder = encoder_of(bench.model, compiled=True, say=said.append)
    assert torch.allclose(encoder(pictures_of(5)), expected, atol=1e-6)
    assert len(said) == 1 and "no compiler here" in said[0]


def test_a_mirrored_picture_is_half_of_the_mean(bench):
    pictures = pictures_of(5)
    both = torch.cat([pictures, pictures.flip(-1)])
    one, other = encoder_of(bench.model)(both).split(5)
    assert torch.allclose(encoder_of(bench.model, flip=True)(pictures), (one + other) / 2, atol=1e-6)
    assert (one - other).abs().max() > 1e-3


def test_colours_are_never_compiled(bench, monkeypatch):
    monkeypatch.setattr(torch, "compile", None)
    args = argparse.Namespace(**vars(bench.args), compile="on")
    here = Session(args, World(), torch.device("cpu"), bench.run, None)
    split = argparse.Namespace(name="train", rows=np.arange(3))
    looks = Subject(here, lambda role: bench.source, bench.cache).looks(split)
    assert looks.shape[0] == 3 and (looks != 0).any(axis=1).all()


def test_damaged_pictures_are_rows_of_nan_and_are_listed(bench):
    whole = bench.direct(VIEW)
    damaged = [3, 4, 9]  # two in a row across two chunks, and the last of all
    paths = [bench.source.manifest.path(row) for row in damaged]
    for path in paths:
        path.write_bytes(b"no picture")
    for got in (bench(VIEW), bench(VIEW)):  # computed, then read
        assert (~got.readable).nonzero().flatten().tolist() == damaged
        assert got.embeddings[damaged].isnan().all()
        assert torch.allclose(got.embeddings[got.readable], whole[got.readable], atol=1e-6)
        assert [(row, path) for row, path, _ in got.bad] == list(zip(damaged, map(str, paths), strict=True))
        assert all(isinstance(entry, tuple) and entry[2] for entry in got.bad)


def features_of(values: np.ndarray, bad: list | None = None) -> Features:
    return Features(torch.tensor(values, dtype=torch.float32), bad or [], 1.0)


def numbered_views(count: int, rows: int = 10) -> list[Features]:
    """Row r of view v is (r, v)."""
    return [features_of(np.column_stack([np.arange(rows), np.full(rows, v)])) for v in range(count)]


def loader_of(views: list[Features], rows: int = 10, batch_size: int = 3, seed: int = 0) -> FeatureLoader:
    return FeatureLoader(views, np.arange(rows) + 100, "data", batch_size=batch_size, seed=seed, world=World())


def test_epochs_take_turns_at_the_views():
    loader = loader_of(numbered_views(3))
    for epoch in range(7):
        batches = list(loader.enter(epoch, 0))
        assert len(batches) == loader.steps == 3 and loader.step_images == 3
        for batch in batches:
            assert batch["epoch"] == epoch
            assert (batch["features"][:, 1] == epoch % 3).all()
            assert torch.equal(batch["features"][:, 0].long(), batch["index"])
            assert torch.equal(batch["label"], batch["index"] + 100) and batch["label"].dtype == torch.int64
        rows = torch.cat([batch["index"] for batch in batches]).tolist()
        assert len(set(rows)) == 9 and set(rows) <= set(range(10))


def test_the_order_is_of_seed_and_epoch():
    def order(seed: int, epoch: int) -> list[int]:
        return torch.cat([batch["index"] for batch in loader_of(numbered_views(1), seed=seed).enter(epoch, 0)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0))}) == 3


def test_entering_an_epoch_midway_equals_skipping():
    loader = loader_of(numbered_views(2))
    whole, late = list(loader.enter(1, 0)), list(loader.enter(1, 2))
    assert len(late) == 1
    for name in ("features", "label", "index"):
        assert torch.equal(whole[2][name], late[0][name])
    assert list(loader.enter(1, 3)) == []


def test_damaged_rows_are_left_out_and_told_once_in_an_epoch():
    views = numbered_views(2)
    bad = [(2, "2.png", "empty"), (5, "5.png", "empty")]
    views = [features_of(view.embeddings.numpy(), bad) for view in views]
    for view in views:
        view.embeddings[[2, 5]] = torch.nan
    loader = loader_of(views, batch_size=4)
    assert loader.images == 10 and loader.fingerprint == "data"
    for epoch in (0, 1):
        batches = list(loader.enter(epoch, 0))
        rows = torch.cat([batch["features"][:, 0] for batch in batches]).long()
        assert sorted(rows.tolist()) == [0, 1, 3, 4, 6, 7, 8, 9]
        assert torch.equal(torch.cat([batch["label"] for batch in batches]), rows + 100)
        assert [batch["bad"] for batch in batches] == [bad, []]


def test_a_batch_larger_than_the_data_is_all_of_them():
    loader = loader_of(numbered_views(1), batch_size=256)
    (batch,) = loader.enter(0, 0)
    assert (loader.steps, loader.step_images) == (1, 10)
    assert sorted(batch["index"].tolist()) == list(range(10))


def test_a_network_whose_embeddings_are_no_numbers_is_refused(bench):
    torch.nn.init.constant_(bench.model.cls_token, torch.nan)
    with pytest.raises(UserError, match="not finite"):
        bench(weights="diverged")
