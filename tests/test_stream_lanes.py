"""The order of streamed batches, by process and by worker. Run: python -m pytest tests/test_stream_lanes.py"""

import math

import numpy as np
import pytest
import torch

from tests.stream_data import all_indices, fake_stream, to_pixels
from util.data.lanes import Lane, Lanes, lay_out, plain_index
from util.data.stream import SHARD
from util.data.stream_loader import StreamLoader
from util.run.dist import World
from util.run.errors import UserError
from util.run.seed import rng_for

CPU = torch.device("cpu")


def open_loader(source, *, epoch_images, batch_size=2, accum_iter=4, rank=0, size=1, workers=0, seed=0) -> StreamLoader:
    return StreamLoader(
        source,
        to_pixels,
        epoch_images=epoch_images,
        batch_size=batch_size,
        accum_iter=accum_iter,
        seed=seed,
        world=World(rank, 0, size),
        num_workers=workers,
        device=CPU,
    )


def batches(loader: StreamLoader, epoch: int = 0, step: int = 0) -> list[tuple[list[int], bytes]]:
    """(indices, pixels) of each batch to the epoch's end."""
    found = [(batch["index"].tolist(), batch["image"].numpy().tobytes()) for batch in loader.enter(epoch, step)]
    loader.close()
    return found


def indices(loader: StreamLoader, epoch: int = 0, step: int = 0) -> list[list[int]]:
    return [index for index, _ in batches(loader, epoch, step)]


def flat(loader: StreamLoader) -> list[int]:
    return [index for batch in indices(loader) for index in batch]


@pytest.mark.parametrize(
    ("micro_batches", "shards", "expected"),
    [
        (1, 3, Lanes(1, 1)),
        (1, 8, Lanes(2, 1)),  # two lanes of four shards
        (1, 32, Lanes(8, 1)),
        (1, 4000, Lanes(8, 1)),
        (8, 40, Lanes(8, 1)),  # sixteen lanes would have two or three shards: too uneven
        (8, 64, Lanes(16, 1)),
        (8, 8, Lanes(8, 1)),
        (8, 4, Lanes(8, 2)),  # two lanes a shard
        (8, 3, Lanes(8, 3)),
        (64, 1, Lanes(64, 64)),
    ],
)
def test_lanes(micro_batches, shards, expected):
    assert lay_out(micro_batches, shards) == expected


@pytest.mark.parametrize("shards", [1, 2, 4, 8, 32])
def test_an_epoch_holds_every_sample_once_where_sizes_divide(shards):
    counts = [128 // shards] * shards
    seen = flat(open_loader(fake_stream(counts), epoch_images=128))
    assert sorted(seen) == all_indices(counts)


def test_batches_are_of_the_order_the_documentation_states():
    """Brute force: micro-batch g is the next of lane g mod L, whose shards are every L-th of the permutation."""
    counts, batch, micro_batches = [12] * 16, 3, 4
    lanes = []
    permutation = rng_for(5, 2, "shards").permutation(16)
    for lane in range(4):
        samples = []
        for shard in permutation[lane::4]:
            rows = rng_for(5, 2, int(shard), 0, 0, 0, "rows").permutation(12)
            samples += [int(shard) * SHARD + int(row) for row in rows]
        lanes.append(samples)
    loader = open_loader(fake_stream(counts), epoch_images=192, batch_size=batch, accum_iter=micro_batches, seed=5)
    found = indices(loader, epoch=2)
    assert len(found) == 64
    for number, index in enumerate(found):
        time, lane = divmod(number, 4)
        assert index == lanes[lane][time * batch : (time + 1) * batch]


@pytest.mark.parametrize("counts", [[16] * 32, [5, 9, 40, 3, 17, 30, 8, 20, 2, 11], [30, 31]])
def test_processes_share_out_the_same_steps(counts):
    whole = batches(open_loader(fake_stream(counts), epoch_images=128))  # 16 steps of 4 x 2 images
    for size, accum_iter in ((2, 2), (4, 1)):
        parts = [
            batches(open_loader(fake_stream(counts), epoch_images=128, accum_iter=accum_iter, rank=rank, size=size))
            for rank in range(size)
        ]
        together = []
        for step in range(16):
            for part in parts:
                together += part[step * accum_iter : (step + 1) * accum_iter]
        assert together == whole


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("workers", "shards"), [(1, 40), (2, 2), (2, 40), (3, 40)])
def test_workers_change_nothing(workers, shards):
    counts = [10 + shard % 3 for shard in range(shards)]
    options = {"epoch_images": 64, "accum_iter": 1, "batch_size": 4}
    assert batches(open_loader(fake_stream(counts), workers=workers, **options)) == batches(
        open_loader(fake_stream(counts), **options)
    )


@pytest.mark.parametrize("counts", [[20] * 16, [5, 9, 40, 3, 17, 30, 8, 20, 2, 11], [7, 9]])
def test_every_step_can_be_resumed(counts):
    """Also where lanes have come to their end once and again before the step."""
    for accum_iter in (1, 4):
        options = {"epoch_images": 160, "accum_iter": accum_iter}
        whole = batches(open_loader(fake_stream(counts), **options), epoch=3)
        for step in range(0, 160 // (2 * accum_iter), 3):
            resumed = batches(open_loader(fake_stream(counts), **options), epoch=3, step=step)
            assert resumed == whole[step * accum_iter :]


def test_a_resumed_process_skips_shards_without_holding_their_pictures(monkeypatch):
    source = fake_stream([50] * 8)
    monkeypatch.setattr("util.data.stream.count_rows", lambda file: 50)
    source.files = [f"far://{shard}" for shard in range(8)]
    whole = indices(open_loader(source, epoch_images=400, accum_iter=1))
    source.dataset.opened.clear()
    source._counts.clear()
    assert indices(open_loader(source, epoch_images=400, accum_iter=1), step=150) == whole[150:]
    assert len(source.dataset.opened) == 2 * math.ceil((400 - 300) / 2 / 50)  # two lanes, each its last shard


@pytest.mark.parametrize(("size", "accum_iter"), [(1, 4), (2, 2), (4, 1)])
def test_each_process_opens_only_its_own_shards(size, accum_iter):
    counts = [16] * 32
    opened = []
    for rank in range(size):
        source = fake_stream(counts)
        batches(open_loader(source, epoch_images=512, accum_iter=accum_iter, rank=rank, size=size))
        assert len(source.dataset.opened) == 32 // size
        opened += source.dataset.opened
    assert sorted(opened) == list(range(32))  # each shard was read once, by one process


def test_each_worker_opens_only_its_own_lanes(monkeypatch):
    """A worker's share, without the process: get_worker_info is what tells it its place."""
    from types import SimpleNamespace

    opened = []
    for worker in range(4):
        source = fake_stream([16] * 32)
        loader = open_loader(source, epoch_images=512, accum_iter=1)
        info = SimpleNamespace(id=worker, num_workers=4)
        monkeypatch.setattr("util.data.stream_loader.get_worker_info", lambda info=info: info)
        assert len(list(loader._samples)) == 64
        opened += source.dataset.opened
    assert sorted(opened) == list(range(32))


def test_lanes_that_share_a_shard_take_different_rows(caplog):
    source = fake_stream([32, 32])
    seen = flat(open_loader(source, epoch_images=64, accum_iter=8, batch_size=1))
    assert sorted(seen) == all_indices([32, 32])
    assert sorted(source.dataset.opened) == [0] * 4 + [1] * 4
    assert "each shard is read 4 times" in caplog.text


def test_workers_that_share_lanes_are_mentioned(caplog):
    loader = open_loader(fake_stream([16] * 16), epoch_images=64, accum_iter=1, workers=3)  # four lanes
    loader.close()
    assert "3 workers share 4 lanes, so each shard is read 3 times; --num_workers 2 would not" in caplog.text
    caplog.clear()
    open_loader(fake_stream([16] * 16), epoch_images=64, accum_iter=1, workers=4).close()
    assert not caplog.text


def test_a_lane_begins_again_in_another_order_and_says_so_once(caplog):
    loader = open_loader(fake_stream([6]), epoch_images=24, accum_iter=1)
    for epoch in range(2):
        seen = np.array(indices(loader, epoch)).reshape(4, 6)
        turns, rows = seen // (2**52), np.vectorize(plain_index)(seen)
        assert (turns == np.arange(4)[:, None]).all()  # so that crops and masks differ as well
        assert all(sorted(row) == list(range(6)) for row in rows.tolist())
        assert len({tuple(row) for row in rows.tolist()}) > 1
    assert caplog.text.count("begins them again") == 1


def test_nothing_is_said_where_shards_suffice(caplog):
    indices(open_loader(fake_stream([6] * 4), epoch_images=24, accum_iter=1))
    assert not caplog.text


def test_a_big_shard_is_read_in_windows():
    counts = [3000]
    lane = Lane(fake_stream(counts), Lanes(1, 1), 0, 0, 0)
    rows = [index for index, _, _ in lane.take(0, 3000)]
    assert sorted(rows) == list(range(3000)) and rows != sorted(rows)
    for first in range(0, 3000, 1024):
        assert sorted(rows[first : first + 1024]) == list(range(first, min(first + 1024, 3000)))


def test_windows_are_of_so_many_bytes(monkeypatch):
    source = fake_stream([200])
    monkeypatch.setattr("util.data.lanes._WINDOW_BYTES", 60 * len(source.dataset.picture))
    rows = [index for index, _, _ in Lane(source, Lanes(1, 1), 0, 0, 0).take(0, 200)]
    assert sorted(rows[:64]) == list(range(64)) and sorted(rows[64:128]) == list(range(64, 128))


def test_the_held_out_part_is_left_out_of_the_lanes():
    counts = [40] * 4
    held = {index for index, _, _ in fake_stream(counts, "val", 0.25).iterate(0, 0)}
    source = fake_stream(counts, "train", 0.25)
    train = set(flat(open_loader(source, epoch_images=160 - len(held), accum_iter=1, batch_size=1)))
    assert 20 < len(held) < 60 and sorted(held | train) == all_indices(counts) and not held & train
    resumed = open_loader(fake_stream(counts, "train", 0.25), epoch_images=100, accum_iter=1, batch_size=1)
    assert indices(resumed, step=70) == indices(open_loader(source, epoch_images=100, accum_iter=1, batch_size=1))[70:]


def test_held_out_order_is_shards_then_rows():
    """What it was before there were lanes: earlier runs were evaluated on these pictures."""
    counts = [40, 30, 50]
    source = fake_stream(counts, "val", 0.3)
    expected = []
    for shard in rng_for(1, 0, "shards").permutation(3).tolist():
        rows = np.array(source.own(shard, range(counts[shard])))
        expected += [shard * SHARD + row for row in rng_for(1, 0, shard, "rows").permutation(rows).tolist()]
    assert [index for index, _, _ in source.iterate(1, 0)] == expected


def test_a_lane_without_pictures_is_an_error():
    with pytest.raises(UserError, match="without a picture"):
        indices(open_loader(fake_stream([4], "val", 0.0), epoch_images=8, accum_iter=1))
