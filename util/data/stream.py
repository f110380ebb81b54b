"""A Hugging Face data set that is larger than the disk: sharded Parquet or WebDataset (.tar), read shard by shard.

A shard is read from its start to its end, its pictures undecoded, a few rows at a time. Who reads which shards is
settled by `util.data.lanes`.
"""

import hashlib
import logging
import re
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import compress, groupby
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from util.data.hub import decode_cell, find_columns, is_cut_short, load_stream, locate, quieten, undecoded
from util.data.roles import Share, in_part
from util.run.errors import UserError
from util.run.seed import rng_for

log = logging.getLogger(__name__)

SHARD = 2**32  # the index of a sample is its shard * SHARD + its row in it
_READ_ROWS = 32
_WAITS_S = (1, 5, 25)  # before a shard that could not be fetched is tried again
_MEMBER = re.compile(r"((?:.*/|)[^.]+)[.][^/]*")  # KEY.EXTENSION, as the library reads the names in a tar

Sample = tuple[int, dict, Callable[[], Image.Image]]


class StreamSource:
    """The shards of a data set that is not stored. It can be sent to worker processes (pickled).

    name: the data path, for messages. files: where each shard lies, None where the library does not say.
    fingerprint: 16 hex digits, from the name, the columns and the shards. num_shards: files of the data set.
    """

    def __init__(self, name: str, dataset, files: Sequence[str] | None, share: Share, val_fraction: float):
        self.name, self.share, self.val_fraction = name, share, val_fraction
        self.columns = find_columns(dataset.features, name)
        self.num_shards, self.files = dataset.num_shards, files
        dataset = dataset.select_columns([*self.columns.facts, self.columns.image])
        self._dataset = undecoded(dataset, self.columns.image)
        self._counts: dict[int, int] = {}  # rows of the shards that were counted
        names = [Path(file).name for file in files or ()]
        described = f"{name}\0{sorted(dataset.features)}\0{self.num_shards}\0{names}\0{share}\0{val_fraction}"
        self.fingerprint = hashlib.blake2b(described.encode(), digest_size=8).hexdigest()

    def iterate(self, seed: int, epoch: int) -> Iterator[Sample]:
        """Every sample once: a permutation of the shards and, inside each, of its rows.

        Yields (index, record, load): index = shard * 2**32 + row; record has the manifest's columns; load()
        decodes the picture (RGB) or raises BadImage. The samples of one shard are held undecoded.
        """
        for shard in rng_for(seed, epoch, "shards").permutation(self.num_shards).tolist():
            held = {}
            for chunk in map(dict, self.read(shard)):
                held.update((row, chunk[row]) for row in self.own(shard, chunk))
            for row in rng_for(seed, epoch, shard, "rows").permutation(np.array(list(held), np.int64)).tolist():
                yield self.sample(shard, row, held[row])

    def own(self, shard: int, rows: Iterable[int]) -> list[int]:
        """The rows of a shard that belong to this source's part of the data (training or held out), in their order."""
        rows = list(rows)
        return list(
            compress(rows, in_part((self._key(shard, row) for row in rows), self.share.part, self.val_fraction))
        )

    def count(self, shard: int) -> int:
        """All rows of a shard, of this source's part or not: as cheaply as its format allows, and only once."""
        if shard not in self._counts:
            counted = count_rows(self.files[shard]) if self.files else None
            self._counts[shard] = sum(map(len, self.read(shard))) if counted is None else counted
        return self._counts[shard]

    def read(self, shard: int) -> Iterator[list[tuple[int, dict]]]:
        """The rows of a shard in their order, undecoded: lists of (row, cells), of the same lengths every time.

        What fails on its way over the network is tried again from the same row on; UserError if that does not help.
        """
        done = 0
        for wait in (*(_WAITS_S if self._is_remote(shard) else ()), None):
            try:
                for chunk in self._chunks(shard):
                    if chunk[-1][0] >= done:
                        yield chunk
                        done += len(chunk)
                self._counts[shard] = done
                return
            except Exception as error:  # of the library, its file systems and its formats: some twenty types
                reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
                where = f"shard {self.files[shard] if self.files else shard} of {self.name}"
                if wait is None:
                    raise UserError(
                        f"{where} cannot be read after row {done} ({reason}): mend or remove it, or try again"
                    ) from error
                log.warning("%s: %s; trying again in %d s", where, reason, wait)
                time.sleep(wait)

    def _chunks(self, shard: int) -> Iterator[list[tuple[int, dict]]]:
        first = 0
        quieten()  # here too, for worker processes that start afresh
        # iter() rather than iteration: in a DataLoader worker the latter hands a lone shard to worker 0 only.
        # Python objects rather than Arrow tables: the json of a tar may lack a key in one row and not in the next
        for columns in self._dataset.shard(self.num_shards, shard).iter(_READ_ROWS):
            cells = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            yield list(enumerate(cells, first))
            first += len(cells)
        if self.files and is_cut_short(self.files[shard]):
            raise tarfile.ReadError("its end is missing")

    def sample(self, shard: int, row: int, cells: dict) -> Sample:
        """What `iterate` yields, for a row that `read` gave."""
        record = self.columns.record(cells, self._key(shard, row), self.share.of)
        load_picture = partial(decode_cell, cells[self.columns.image], f"{self.name}#{shard}/{row}")
        return shard * SHARD + row, record, load_picture

    def _key(self, shard: int, row: int) -> str:
        return f"{self.share.of}/{shard}/{row}"

    def _is_remote(self, shard: int) -> bool:
        return self.files is None or "://" in self.files[shard]


def count_rows(file: str) -> int | None:
    """Samples in a shard, from the footer of a Parquet file or the headers of a tar on disk; None if that cannot be.

    A tar far away has no list of what it holds: it can only be read.
    """
    try:
        if file.endswith(".parquet"):
            import fsspec

            with fsspec.open(file) as opened:
                return pq.read_metadata(opened).num_rows
        if file.endswith(".tar") and "://" not in file:
            with tarfile.open(file, "r:") as archive:
                matches = (_MEMBER.fullmatch(member.name) for member in archive if member.isreg())
                return sum(1 for _ in groupby(match[1] for match in matches if match))
    except Exception:  # the shard is read instead, which says what is wrong with it
        log.debug("%s cannot be counted", file, exc_info=True)
    return None


def open_stream(data_path: str, role: str, *, val_fraction: float = 0.1) -> StreamSource:
    """Open "hf:OWNER/NAME[:SPLIT]" or "hf:FOLDER[:SPLIT]" for a role without storing it. Raises UserError."""
    path, split, share = locate(str(data_path), role)
    dataset, files = load_stream(str(data_path), path, split)
    return StreamSource(str(data_path), dataset, files, share, val_fraction)
