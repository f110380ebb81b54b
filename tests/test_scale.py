"""What a hundred million rows would not survive: orders that are laid out, text beyond 2 GiB, an object for each row.

Run: python -m pytest tests/test_scale.py
"""

import gc
import hashlib
import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pytest

from util.data import batches, manifest
from util.data.batches import StepSampler
from util.data.manifest import SCHEMA, cells, one_array, read_manifest, to_table, write_manifest
from util.data.pack import main as pack
from util.data.pack_journal import Journal
from util.data.packed import SAMPLES, PackedFile, PackedSource
from util.data.sources import open_source
from util.run import files
from util.run.dist import World
from util.run.errors import UserError
from util.run.log import RunFolder
from util.run.seed import permuted, rng_for
from util.training.faults import BadImages

# --- the order of an epoch ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 255, 256, 257, 4096, 5000])
def test_permuted_is_a_permutation(length):
    for key in range(3):
        assert sorted(permuted(np.arange(length), length, key, "order").tolist()) == list(range(length))


def test_permuted_is_a_function_of_the_place_and_the_key():
    whole = permuted(np.arange(1000), 1000, 7, 2, "order")
    some = np.array([3, 999, 0, 500, 3])
    assert permuted(some, 1000, 7, 2, "order").tolist() == whole[some].tolist()
    assert (permuted(np.arange(1000), 1000, 7, 3, "order") == whole).mean() < 0.02
    far = permuted(np.arange(10**12 - 50, 10**12), 10**12, 0)
    assert len(set(far.tolist())) == 50 and far.min() >= 0 and far.max() < 10**12


def test_permuted_leaves_no_pattern():
    """Places, and pairs of neighbours, are uniform over keys: chi-square against its 99.99 % point."""
    keys, length = 2000, 10
    orders = np.array([permuted(np.arange(length), length, key) for key in range(keys)])
    for place in range(length):
        counts = np.bincount(orders[:, place], minlength=length)
        assert ((counts - keys / length) ** 2).sum() / (keys / length) < 33.7  # 9 degrees of freedom
    pairs = np.bincount(orders[:, 0] * length + orders[:, 1], minlength=length**2)
    pairs = np.delete(pairs, np.arange(length) * (length + 1))
    assert ((pairs - keys / 90) ** 2).sum() / (keys / 90) < 145  # 89 degrees
    big = permuted(np.arange(20_000), 10**8, 5).astype(float)
    assert abs(np.corrcoef(big[1:], big[:-1])[0, 1]) < 0.03 and abs(big.mean() / 1e8 - 0.5) < 0.01


def named(sampler: StepSampler, epoch: int, step: int) -> list[list[int]]:
    sampler.enter(epoch, step)
    return [[index for _, index in batch] for batch in sampler]


def flat(batches: list[list[int]]) -> list[int]:
    return [index for batch in batches for index in batch]


@pytest.mark.parametrize("longest", [10, 10**6])
def test_ranks_share_an_epoch_out_and_enter_it_anywhere(monkeypatch, longest):
    monkeypatch.setattr(batches, "LONGEST_TABLE", longest)
    ranks = [StepSampler(103, 4, 2, 3, World(rank, 0, 3)) for rank in range(3)]
    whole = [named(sampler, 5, 0) for sampler in ranks]
    seen = [index for rank in whole for index in flat(rank)]
    assert len(seen) == len(set(seen)) == 96 and set(seen) <= set(range(103))
    for sampler, every in zip(ranks, whole, strict=True):
        assert named(sampler, 5, 3) == every[3 * 2 :]
    one = named(StepSampler(103, 24, 1, 3, World()), 5, 0)  # the images of a step, whatever the number of processes
    for step, images in enumerate(one):
        parts = [index for rank in whole for index in flat(rank[2 * step : 2 * step + 2])]
        assert sorted(images) == sorted(parts)


def test_an_order_that_is_laid_out_is_numpys():
    found = flat(named(StepSampler(1000, 10, 1, 3, World()), 5, 0))
    assert found == rng_for(3, 5, "order").permutation(1000).tolist()


def test_an_epoch_of_any_length_is_entered_at_once():
    sampler = StepSampler(10**12, 64, 1, 0, World(63, 7, 64))
    tracemalloc.start()
    sampler.enter(3, sampler.steps - 2)
    last = [[index for _, index in batch] for batch in sampler]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(last) == 2 and len(set(flat(last))) == 128 and peak < 2**20


# --- columns ---------------------------------------------------------------------------------------------------------


def test_cells_are_those_of_the_column(monkeypatch):
    monkeypatch.setattr(manifest, "SLICE", 7)
    values = [None if i % 5 == 0 else f"ルリ {i}" for i in range(50)]
    assert list(cells(pa.array(values))) == values
    assert list(cells(pa.chunked_array([values[:20], values[20:]]))) == values
    assert list(cells(pa.chunked_array([], pa.string()))) == []


def test_text_that_32_bits_do_not_reach_gets_64(monkeypatch):
    column = pa.chunked_array([["a" * 10, None], ["ルリ", ""]])
    assert one_array(column).type == pa.string() and one_array(column).to_pylist() == column.to_pylist()
    monkeypatch.setattr(manifest, "LONGEST_TEXT", 15)
    assert one_array(column).type == pa.large_string() and one_array(column).to_pylist() == column.to_pylist()


@pytest.mark.slow
def test_more_than_2_gib_of_text_can_be_opened(tmp_path):
    """As 100 million file names of 22 letters are; takes 5 GB of memory."""
    size = 3 * 2**28
    offsets = pa.array([0, size // 2, size], pa.int32()).buffers()[1]
    piece = pa.StringArray.from_buffers(2, offsets, pa.py_buffer(np.full(size, ord("a"), np.uint8)))
    table = pa.table({
        "sample_id": pa.chunked_array([[f"{i}-{j}" for j in range(2)] for i in range(3)]),
        "file_name": pa.chunked_array([piece] * 3), "split": pa.chunked_array([["train"] * 2] * 3),
    })  # fmt: skip
    with pytest.raises(pa.ArrowInvalid, match="overflow"):
        table.column("file_name").combine_chunks()
    found = manifest._to_schema(table, tmp_path)
    assert len(found.column("file_name")[5].as_py()) == size // 2 and found.column("sample_id")[5].as_py() == "2-1"


class Seen(dict):
    """A row that is counted while it lives."""

    alive = most = 0

    def __init__(self, *args):
        super().__init__(*args)
        Seen.alive += 1
        Seen.most = max(Seen.most, Seen.alive)

    def __del__(self):
        Seen.alive -= 1


def some_rows(count: int):
    for i in range(count):
        boxes = {"box": [1.0, 2.0, 3.0 + i, 4.0] if i % 3 else None, "eyes": [[0.0, 0.0, 1.0, 1.0]]}
        yield Seen({"sample_id": f"{i}", "file_name": f"{i % 4}.png", "split": "train", **boxes})


def test_rows_are_written_without_holding_them(tmp_path, monkeypatch):
    expected = pa.Table.from_pylist([dict(row) for row in some_rows(1000)], SCHEMA)
    monkeypatch.setattr(manifest, "SLICE", 64)
    gc.collect()
    Seen.alive = Seen.most = 0
    write_manifest(tmp_path, some_rows(1000))
    assert Seen.most <= 2 * 64 + 1
    found = read_manifest(tmp_path).table
    assert found.equals(expected) and found.column("file_name").num_chunks == 1
    assert to_table([]).num_rows == 0 and to_table(iter(())).schema == SCHEMA
    with pytest.raises(UserError, match="unknown column 'colour'"):
        write_manifest(tmp_path, [*some_rows(100), {"sample_id": "x", "colour": "red"}])


def test_the_fingerprint_is_that_of_the_serialised_rows(tmp_path):
    write_manifest(tmp_path, some_rows(500))
    source = open_source(tmp_path, "train", val_fraction=0.2)
    digest = hashlib.blake2b(digest_size=8)
    for batch in source.manifest.table.to_batches():
        digest.update(batch.serialize())
    assert source.fingerprint == digest.hexdigest() and 0 < len(source) < 500


# --- packing ---------------------------------------------------------------------------------------------------------

PLAN = {"samples": 64 * 300, "chunk": 64}


def facts(chunk: int) -> dict:
    rows = [[chunk, i, 1000 + i, 1000 + chunk, 1200, 1600] if i != chunk % 64 else "gone" for i in range(64)]
    return {"chunk": chunk, "checksum": f"{chunk:032x}", "rows": rows}


def test_a_journal_keeps_what_is_known_on_disk(tmp_path):
    chunks = [*range(10, 300), *range(10)]
    with Journal(tmp_path / "p", PLAN, 0, False) as journal:
        for chunk in chunks[:150]:
            journal.add(facts(chunk))
    (tmp_path / "p.part.jsonl").open("a").write('{"chunk": 299, "rows"')  # cut short by a crash
    with Journal(tmp_path / "p", PLAN, 0, False) as journal:
        assert sorted(journal.chunks) == sorted(chunks[:150])
        for chunk in chunks[150:]:
            journal.add(facts(chunk))
        expected = [facts(chunk) for chunk in range(300)]
        assert list(journal.in_order()) == expected
        assert list(journal.rows()) == [row for done in expected for row in done["rows"]]
        assert journal.bad == {64 * chunk + chunk % 64: "gone" for chunk in range(300)}
        journal.add(facts(0))  # after reading it still writes at the end
    lines = (tmp_path / "p.part.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in (lines[0], lines[-1])] == [PLAN, facts(0)] and len(lines) == 302


def test_a_journal_takes_no_memory_for_a_row(tmp_path):
    done = [{**facts(chunk), "rows": [[1, 2, 3000, 4000, 5000, 6000]] * 64} for chunk in range(300)]
    with Journal(tmp_path / "p", PLAN, 0, False) as journal:
        tracemalloc.start()
        for one in done:
            journal.add(json.loads(json.dumps(one)))
        grown = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
    assert grown / PLAN["samples"] < 8  # bytes; as objects of Python the rows took 400 each


@pytest.mark.parametrize("tail", [1, 7, 2**20])
def test_a_line_cut_short_is_found_however_long(tmp_path, monkeypatch, tail):
    monkeypatch.setattr(files, "_TAIL_BYTES", tail)
    path = tmp_path / "p.part.jsonl"
    with Journal(tmp_path / "p", PLAN, 0, False) as journal:
        journal.add(facts(0))
    whole = path.read_bytes()
    path.write_bytes(whole + b"x" * 40)
    with Journal(tmp_path / "p", PLAN, 0, False) as journal:
        assert list(journal.chunks) == [0] and path.read_bytes() == whole
    path.write_bytes(b"no line at all")
    with Journal(tmp_path / "p", PLAN, 0, False) as journal:
        assert not journal.chunks and json.loads(path.read_bytes()) == PLAN


def test_a_packed_table_is_the_same_in_slices(make_images, tmp_path, monkeypatch):
    folder = make_images(tmp_path / "data", 12)
    (folder / "003.png").write_bytes(b"no picture")
    argv = ["--data_path", str(folder), "--canvas", "16", "--num_workers", "0", "--max_bad", "1"]
    pack([*argv, "--out", str(tmp_path / "whole")])
    monkeypatch.setattr("util.data.pack.SLICE", 5)
    pack([*argv, "--out", str(tmp_path / "sliced")])
    assert (tmp_path / "sliced").read_bytes() == (tmp_path / "whole").read_bytes()
    file, sink = PackedFile(tmp_path / "whole"), pa.BufferOutputStream()
    with pa.ipc.new_file(sink, file.table.schema) as writer:
        writer.write_table(file.table)
    assert file.section(SAMPLES).equals(sink.getvalue()) and file.table.column("file_name").num_chunks == 1
    monkeypatch.setattr("util.data.pack.BATCH_ROWS", 7)
    pack([*argv, "--out", str(tmp_path / "pieces")])
    pieces = PackedFile(tmp_path / "pieces")
    assert pieces.table.column("file_name").num_chunks == 2 and pieces.table.equals(file.table)
    assert not list(filter(None, pieces.damage()))


def test_a_packed_file_whose_text_is_in_pieces_reads_the_same(make_images, tmp_path, monkeypatch):
    out = tmp_path / "p"
    folder = make_images(tmp_path / "data", 12)
    (folder / "007.png").write_bytes(b"no picture")
    pack(["--data_path", str(folder), "--out", str(out), "--canvas", "16", "--num_workers", "0", "--max_bad", "1"])
    file, pieces = PackedFile(out), PackedFile(out)
    pieces.table = pa.concat_tables([file.table.slice(0, 5), file.table.slice(5)])
    rows = np.array([11, 2, 7, 5])
    for chosen in (None, rows):
        whole, parted = (PackedSource("p", each, chosen) for each in (file, pieces))
        assert whole.fingerprint == parted.fingerprint and whole._bad == parted._bad == {7: whole._bad[7]}
        assert [dict(whole.record(i)) for i in range(len(whole))] == [dict(parted.record(i)) for i in range(len(whole))]
        assert whole.array("file_name").equals(parted.array("file_name"))
    monkeypatch.setattr(manifest, "LONGEST_TEXT", 30)
    limited = PackedSource("p", pieces, rows)
    assert limited.array("file_name").type == pa.large_string()
    assert limited.column("file_name") == whole.column("file_name")
    assert limited.array("box").equals(whole.array("box"))
    described = f"{file.fingerprint} True".encode() + rows.astype("<i8").tobytes()
    assert parted.fingerprint == hashlib.blake2b(described, digest_size=8).hexdigest()


# --- damaged images -------------------------------------------------------------------------------------------------


class TwoProcesses(World):
    """A world in which the other process has found what `other` says; keeps what this one sends."""

    def gather_objects(self, value):
        self.sent.append(dict(value))
        return [value, self.other]


def test_only_new_damaged_images_are_exchanged(tmp_path):
    world = TwoProcesses()
    object.__setattr__(world, "sent", [])
    object.__setattr__(world, "other", {7: {"index": 7, "path": "7.png", "reason": "cut"}})
    bad = BadImages(RunFolder(str(tmp_path), is_main=True), 1000, 0.5, resumed=False)
    bad.add((1, "1.png", "cut"))
    bad.merge(world)
    object.__setattr__(world, "other", {})
    for entry in ((1, "1.png", "cut"), (7, "7.png", "cut"), (3, "3.png", "empty")):  # those of a second epoch
        bad.add(entry)
    bad.merge(world)
    bad.merge(world)
    assert [sorted(sent) for sent in world.sent] == [[1], [3], []] and len(bad) == 3
    listed = [json.loads(line)["index"] for line in (tmp_path / "bad_images.jsonl").read_text().splitlines()]
    assert listed == [1, 3, 7]
    resumed = BadImages(RunFolder(str(tmp_path), is_main=True), 1000, 0.5, resumed=True)
    resumed.add((3, "3.png", "empty"))
    resumed.merge(world)
    assert len(resumed) == 3 and not world.sent[-1]
