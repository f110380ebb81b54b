"""A Hugging Face data set that is larger than the disk, read shard by shard in an order that can be resumed.

The order of an epoch is a permutation of the shards and, inside each shard, of its rows, both functions of
(seed, epoch). Every process walks through this one order and takes the positions start, start + step, ...,
so it does not depend on how many processes there are. The price: each of them reads every shard (but decodes
only pictures of its own), and to resume, the shards before the start are read once to be counted. So give a
stream few workers.
"""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np
import pyarrow as pa
from PIL import Image

from util.data.hub import decode_cell, find_columns, load, locate, undecoded
from util.data.roles import Share, in_part
from util.run.seed import rng_for

SHARD = 2**32  # the index of a sample is its shard * SHARD + its row in it
_READ_ROWS = 256


class StreamSource:
    """The shards of a data set that is not stored. It can be sent to worker processes (pickled).

    name: the data path, for messages. fingerprint: 16 hex digits, from the name, the columns and the shards.
    num_shards: files of the data set.
    """

    def __init__(self, name: str, dataset, share: Share, val_fraction: float):
        self.name, self.share, self.val_fraction = name, share, val_fraction
        self.columns = find_columns(dataset.features, name)
        self.num_shards = dataset.num_shards
        dataset = dataset.select_columns([*self.columns.facts, self.columns.image])
        self._dataset = undecoded(dataset, self.columns.image).with_format("arrow")
        self._counts: dict[int, int] = {}  # rows of the shards that were read
        described = f"{name}\0{sorted(dataset.features)}\0{self.num_shards}\0{share}\0{val_fraction}"
        self.fingerprint = hashlib.blake2b(described.encode(), digest_size=8).hexdigest()

    def iterate(
        self, seed: int, epoch: int, start: int = 0, step: int = 1
    ) -> Iterator[tuple[int, dict, Callable[[], Image.Image]]]:
        """The samples at the positions start, start + step, ... of an epoch's order, to its end.

        Yields (index, record, load): index = shard * 2**32 + row; record has the manifest's columns; load()
        decodes the picture (RGB) or raises BadImage.
        """
        first = start  # the next position to hand out
        begin = 0  # the position of the next shard's first sample
        for shard in rng_for(seed, epoch, "shards").permutation(self.num_shards).tolist():
            counted = self._counts.get(shard)
            if counted is not None and first >= begin + counted:
                begin += counted  # all of it lies before the start
                continue
            table, rows = self._read(shard)
            rows = rng_for(seed, epoch, shard, "rows").permutation(rows)
            for place in range(first - begin, len(rows), step):
                yield self._sample(table, shard, int(rows[place]))
                first += step
            begin += len(rows)

    def _read(self, shard: int) -> tuple[pa.Table, np.ndarray]:
        """A shard with its pictures undecoded, and the numbers of the rows that belong to this source."""
        # iter() rather than iteration: in a DataLoader worker the latter hands a lone shard to worker 0 only
        batches = self._dataset.shard(self.num_shards, shard).iter(_READ_ROWS)
        table = pa.concat_tables(list(batches))
        keys = (f"{self.share.of}/{shard}/{row}" for row in range(len(table)))
        rows = np.flatnonzero(in_part(keys, self.share.part, self.val_fraction))
        self._counts[shard] = len(rows)
        return table, rows

    def _sample(self, table: pa.Table, shard: int, row: int) -> tuple[int, dict, Callable[[], Image.Image]]:
        cells = table.slice(row, 1).to_pylist()[0]
        key = f"{self.share.of}/{shard}/{row}"
        load_picture = partial(decode_cell, cells[self.columns.image], f"{self.name}#{shard}/{row}")
        return shard * SHARD + row, self.columns.record(cells, key, self.share.of), load_picture


def open_stream(data_path: str, role: str, *, val_fraction: float = 0.1) -> StreamSource:
    """Open "hf:OWNER/NAME[:SPLIT]" or "hf:FOLDER[:SPLIT]" for a role without storing it. Raises UserError."""
    path, split, share = locate(str(data_path), role)
    return StreamSource(str(data_path), load(str(data_path), path, split, streaming=True), share, val_fraction)
