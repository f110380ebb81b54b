"""Small data sets in shards, and streams that count what is read of them."""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from util.data.hub import Columns
from util.data.roles import Share
from util.data.stream import SHARD, StreamSource

SIZE = (8, 6)  # px, width x height


def png_bytes(number: int) -> bytes:
    """A picture whose red and green levels are its number."""
    buffer = io.BytesIO()
    Image.new("RGB", SIZE, (number // 256, number % 256, 90)).save(buffer, "PNG")
    return buffer.getvalue()


def number_of(picture: Image.Image) -> int:
    """The number of a picture of `png_bytes`."""
    red, green, _ = picture.getpixel((0, 0))
    return red * 256 + green


def write_parquet(path: Path, pictures: list[bytes]) -> None:
    """One Parquet file, as a program without the library's types writes it; two row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": picture, "path": None} for picture in pictures]
    pq.write_table(pa.table({"image": cells}), path, row_group_size=max(1, len(cells) // 2))


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> None:
    """One shard of WebDataset: sample key -> extension -> bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for key, files in samples.items():
            for extension, data in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def json_bytes(**facts) -> bytes:
    return json.dumps(facts).encode()


class FakeDataset:
    """What StreamSource needs of the library's streams, without files. counts: rows of each shard.

    opened: numbers of the shards that were read, in their order. fails: shard -> the errors its next readings end in,
    each after 40 rows.
    """

    def __init__(self, counts: list[int]):
        self.counts, self.num_shards = counts, len(counts)
        self.features = {"image": {"bytes": None, "path": None}}
        self.opened: list[int] = []
        self.fails: dict[int, list[Exception]] = {}
        self.picture = png_bytes(0)

    def select_columns(self, names: list[str]) -> "FakeDataset":
        assert names == ["image"]
        return self

    def shard(self, num_shards: int, index: int) -> "FakeShard":
        assert num_shards == self.num_shards
        return FakeShard(self, index)


class FakeShard:
    """One shard of a FakeDataset."""

    def __init__(self, dataset: FakeDataset, index: int):
        self.dataset, self.index = dataset, index

    def iter(self, batch_size: int) -> Iterator[dict[str, list]]:
        self.dataset.opened.append(self.index)
        errors = self.dataset.fails.get(self.index)
        for first in range(0, self.dataset.counts[self.index], batch_size):
            if errors and first >= 40:
                raise errors.pop(0)
            rows = min(batch_size, self.dataset.counts[self.index] - first)
            yield {"image": [{"bytes": self.dataset.picture, "path": None}] * rows}


def fake_stream(counts: list[int], part: str = "all", val_fraction: float = 0.0) -> StreamSource:
    """A stream over a FakeDataset, which is its attribute `dataset`."""
    dataset = FakeDataset(counts)
    source = StreamSource("hf:fake", dataset, None, Share("train", part), val_fraction)
    assert source.columns == Columns("image", (), None, ())
    source.dataset = dataset
    return source


def all_indices(counts: list[int]) -> list[int]:
    """shard * 2**32 + row of every row."""
    return [shard * SHARD + row for shard, count in enumerate(counts) for row in range(count)]


def to_pixels(picture: Image.Image, record: dict, rng: np.random.Generator):
    """A transform: the picture's mean colour beside a random number, so that a wrong `rng` shows."""
    import torch

    values = [*np.asarray(picture).mean((0, 1)).astype(np.uint8), *rng.integers(0, 256, 9, np.uint8)]
    return torch.tensor(np.array(values, np.uint8)).view(3, 2, 2)
