"""Streams of Parquet and of tar shards, whole and damaged. Run: python -m pytest tests/test_stream_formats.py"""

import json
import logging
import multiprocessing
import os
import pickle
import sys
from functools import partial

import pytest
from PIL import Image

import main_pretrain
from tests import helpers
from tests.helpers import assert_same, outcome
from tests.stream_data import (
    all_indices,
    fake_stream,
    json_bytes,
    number_of,
    png_bytes,
    write_parquet,
    write_tar,
)
from util.data.hub import find_columns
from util.data.images import BadImage
from util.data.lanes import Lane, Lanes
from util.data.manifest import COLUMNS
from util.data.sources import open_source
from util.data.stream import count_rows, open_stream
from util.run.errors import UserError

fails = partial(helpers.fails, main_pretrain.main)
COUNTS = (5, 9, 7, 11)


def sample(number: int) -> dict[str, bytes]:
    """A sample of a tar: every third has no box, and from the eighth on there is a key that is not ours."""
    facts = {"identity": f"id{number % 3}", "style": "sketch"}
    if number % 3:
        facts["box"] = [0, 1, 2, 3.5]
    if number > 7:
        facts["note"] = "added later"
    return {"png": png_bytes(number), "json": json_bytes(**facts), "cls": b"%d" % (number % 2)}


def key_of(number: int) -> str:
    return f"{number:04d}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The same 32 pictures in four shards: "parquet" and "tar"."""
    root, first = tmp_path_factory.mktemp("data"), 0
    for shard, count in enumerate(COUNTS):
        numbers = range(first, first + count)
        write_parquet(root / "parquet" / f"train-{shard}.parquet", [png_bytes(number) for number in numbers])
        write_tar(root / "tar" / f"train-{shard}.tar", {key_of(number): sample(number) for number in numbers})
        first += count
    return root


def stream_of(folder, role="train", val_fraction=0.0):
    return open_stream(f"hf:{folder}", role, val_fraction=val_fraction)


def test_tars_and_parquet_show_the_same_pictures_in_the_same_order(data):
    tar, parquet = stream_of(data / "tar"), stream_of(data / "parquet")
    assert tar.num_shards == parquet.num_shards == 4
    shown = [[(index, number_of(load())) for index, _, load in source.iterate(0, 0)] for source in (tar, parquet)]
    assert shown[0] == shown[1]
    assert sorted(index for index, _ in shown[0]) == all_indices(COUNTS)
    assert sorted(number for _, number in shown[0]) == list(range(32))


def test_records_of_a_tar(data):
    stored = open_source(f"hf:{data / 'tar'}", "train", val_fraction=0.0)
    by_number = {number_of(stored.load(i)): stored.record(i) for i in range(len(stored))}
    streamed = {number_of(load()): record for _, record, load in stream_of(data / "tar").iterate(0, 0)}
    for records in (by_number, streamed):
        assert sorted(records) == list(range(32))
        for number, record in records.items():
            assert tuple(record) == COLUMNS
            assert record["sample_id"] == key_of(number) and record["file_name"] == f"{key_of(number)}.png"
            assert record["identity"] == f"id{number % 3}" and record["style"] == "sketch"
            assert record["box"] == ([0, 1, 2, 3.5] if number % 3 else None)


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ({"box": [0, 1, 2, 3]}, {"box": [0.5, 1, 2, 3.5]}, {"box": [0.5, 1, 2, 3.5]}),
        ({"eyes": [[0, 1, 2, 3]] * 2}, {"eyes": [[0.5, 1, 2, 3]]}, {"eyes": [[0.5, 1, 2, 3]]}),
        ({"box": None, "style": None}, {"box": [1, 2, 3, 4], "style": "x"}, {"box": [1, 2, 3, 4], "style": "x"}),
        ({}, {"identity": "rin", "box": [1, 2, 3, 4]}, {"identity": "rin", "box": [1, 2, 3, 4]}),
        ({"label": 3}, {"label": "rin"}, {"identity": "rin"}),
        ({"source": {"url": "a"}}, {"source": {"url": "b"}, "style": "x"}, {"style": "x", "source": None}),
    ],
)
def test_json_is_read_by_our_types_not_by_its_first_samples(tmp_path, first, later, expected):
    facts = [first] * 6 + [later]
    samples = {key_of(i): {"png": png_bytes(i), "json": json_bytes(**fact)} for i, fact in enumerate(facts)}
    write_tar(tmp_path / "train-0.tar", samples)
    stored = open_source(f"hf:{tmp_path}", "train", val_fraction=0.0)
    streamed = {index: record for index, record, _ in stream_of(tmp_path).iterate(0, 0)}
    for record in (stored.record(6), streamed[6]):
        assert expected.items() <= record.items()


@pytest.mark.parametrize(
    ("files", "identity"),
    [
        ({"jpg": b"", "cls": b"7"}, "7"),
        ({"jpg": b"", "json": json_bytes(label="rin"), "cls": b"7"}, "rin"),
        ({"jpg": b"", "json": json_bytes(character="len")}, "len"),
        ({"jpg": b"", "txt": b"a girl with green hair"}, None),
        ({"jpg": b"", "json": json_bytes(prompt="rin")}, None),
        ({"mask.png": b"", "jpg": b""}, None),
    ],
)
def test_labels_of_a_tar(tmp_path, files, identity):
    picture = png_bytes(300)
    pictures = {name: data or picture for name, data in files.items()}
    pictures |= {name: png_bytes(0) for name in files if name.startswith("mask")}
    write_tar(tmp_path / "train-0.tar", {"a": pictures})
    ((_, record, load),) = stream_of(tmp_path).iterate(0, 0)
    assert record["identity"] == identity and record["sample_id"] == "a"
    assert number_of(load()) == 300


def test_a_column_called_json_means_nothing_outside_a_tar():
    from datasets import Image as ImageFeature
    from datasets import Value

    columns = find_columns({"image": ImageFeature(), "json": {"identity": Value("string")}}, "hf:x")
    assert columns.identities == () and not columns.is_tar and columns.facts == []


def test_split_names_of_tars_are_roles(tmp_path):
    for split, number in (("train", 1), ("validation", 2), ("test", 3)):
        write_tar(tmp_path / f"{split}-0.tar", {"a": sample(number)})
    for role, number in (("train", 1), ("val", 2), ("test", 3)):
        ((_, _, load),) = stream_of(tmp_path, role).iterate(0, 0)
        assert number_of(load()) == number
        assert number_of(open_source(f"hf:{tmp_path}", role).load(0)) == number


def test_held_out_pictures_of_a_tar_are_no_training_pictures(data):
    parts = [{index for index, _, _ in stream_of(data / "tar", role, 0.3).iterate(0, 0)} for role in ("train", "val")]
    assert sorted(parts[0] | parts[1]) == all_indices(COUNTS) and not parts[0] & parts[1] and len(parts[1]) > 2


def test_rows_are_counted_without_reading(data, tmp_path):
    for kind, suffix in (("parquet", "parquet"), ("tar", "tar")):
        stream = stream_of(data / kind)
        for shard, count in enumerate(COUNTS):
            assert count_rows(str(data / kind / f"train-{shard}.{suffix}")) == count
            assert stream.files[shard].endswith(f"train-{shard}.{suffix}")
            assert sum(map(len, stream.read(shard))) == count
    odd = {"a/1.b": {"png": b"1", "json": b"{}"}, "a/2": {"png": b"2"}, "b": {"png": b"3"}}  # 1.b.png: key 1
    write_tar(tmp_path / "odd.tar", odd)
    assert count_rows(str(tmp_path / "odd.tar")) == 3
    assert count_rows(str(tmp_path / "none.tar")) is None and count_rows("far://a.tar") is None


def test_a_tar_stream_can_be_sent_to_a_worker(data):
    stream = pickle.loads(pickle.dumps(stream_of(data / "tar")))
    assert sorted(number_of(load()) for _, _, load in stream.iterate(0, 0)) == list(range(32))


def test_a_damaged_or_missing_picture_is_bad_and_nothing_else(tmp_path):
    samples = {"a": {"png": png_bytes(1), "cls": b"0"}, "b": {"png": b"no picture", "cls": b"0"}}
    write_tar(tmp_path / "train-0.tar", samples)
    write_tar(tmp_path / "train-1.tar", {"c": {"cls": b"1"}, "d": {"png": png_bytes(4), "cls": b"1"}})
    good, bad = [], []
    for _, record, load in stream_of(tmp_path).iterate(0, 0):
        try:
            good.append(number_of(load()))
        except BadImage as error:
            bad.append((record["sample_id"], error.reason))
    assert sorted(good) == [1, 4] and [key for key, _ in sorted(bad)] == ["b", "c"]
    assert "empty" in dict(bad)["c"]


# --- shards that cannot be read


def cut(path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


@pytest.mark.parametrize(
    ("kind", "share", "workers"),
    [("tar", 0.6, 0), ("tar", 0.61, 1), ("parquet", 0.6, 0), ("parquet", 0.6, 1)],  # a tar between and within files
)
def test_a_truncated_shard_is_named_in_one_line(tmp_path, capsys, kind, share, workers):
    for shard in range(4):
        numbers = range(shard * 10, shard * 10 + 10)
        write_parquet(tmp_path / "parquet" / f"train-{shard}.parquet", [png_bytes(number) for number in numbers])
        write_tar(tmp_path / "tar" / f"train-{shard}.tar", {key_of(number): sample(number) for number in numbers})
    damaged = tmp_path / kind / f"train-3.{kind}"
    cut(damaged, share)
    message = fails(capsys, flags(tmp_path / kind, tmp_path / "run", "--num_workers", workers, "--eval_images", 0))
    assert f"shard {damaged} of hf:{tmp_path / kind} cannot be read" in message
    assert not multiprocessing.active_children()  # one that is left would be waited for at exit, forever


@pytest.mark.parametrize("share", [0.6, 0.61])
def test_a_truncated_tar_is_not_stored(tmp_path, share):
    write_tar(tmp_path / "train-0.tar", {key_of(number): sample(number) for number in range(10)})
    cut(tmp_path / "train-0.tar", share)
    with pytest.raises(UserError, match=r"train-0.tar of .* is cut short"):
        open_source(f"hf:{tmp_path}:train[:50%]", "train", val_fraction=0.0)


def test_what_stops_the_library_from_storing_is_said(tmp_path):
    labels = [b"1"] * 8 + [b"rin"]  # a .cls file holds a number
    write_tar(tmp_path / "train-0.tar", {key_of(i): {"png": png_bytes(i), "cls": cls} for i, cls in enumerate(labels)})
    with pytest.raises(UserError, match=r"invalid literal for int\(\).*rin"):
        open_source(f"hf:{tmp_path}", "train", val_fraction=0.0)


def test_a_shard_that_has_gone_is_named(data, tmp_path):
    write_tar(tmp_path / "train-0.tar", {"a": sample(0)})
    stream = stream_of(tmp_path)
    os.remove(tmp_path / "train-0.tar")
    with pytest.raises(UserError, match=r"train-0\.tar of .*cannot be read") as caught:
        list(stream.iterate(0, 0))
    assert "\n" not in str(caught.value)


def test_a_network_fault_is_tried_again_from_the_same_row(monkeypatch, caplog):
    waits = []
    monkeypatch.setattr("util.data.stream.time.sleep", waits.append)
    source = fake_stream([100, 100])
    whole = Lane(source, Lanes(1, 1), 0, 0, 0).take(0, 200)
    source.dataset.fails[1] = [ConnectionError("reset\nby peer"), TimeoutError()]
    again = Lane(source, Lanes(1, 1), 0, 0, 0).take(0, 200)
    assert [index for index, _, _ in again] == [index for index, _, _ in whole]
    assert waits == [1, 5] and "shard 1 of hf:fake: reset; trying again in 1 s" in caplog.text
    source.dataset.fails[1] = [ConnectionError("reset")] * 4
    with pytest.raises(UserError, match=r"shard 1 of hf:fake cannot be read after row 64 \(reset\)"):
        Lane(source, Lanes(1, 1), 0, 0, 0).take(0, 200)
    assert waits == [1, 5, 1, 5, 25]


def test_a_file_on_disk_is_not_tried_again(data, monkeypatch):
    monkeypatch.setattr("util.data.stream.time.sleep", lambda seconds: pytest.fail("waited"))
    source = fake_stream([100])
    source.files, source.dataset.fails[0] = ["/data/a.tar"], [OSError("gone")]
    with pytest.raises(UserError, match=r"shard /data/a.tar of hf:fake"):
        list(source.read(0))


# --- memory


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_and_open_files_do_not_grow_with_the_number_of_shards(tmp_path):
    picture = Image.effect_noise((64, 64), 90).tobytes()  # 4 KB
    for shard in range(300):
        (write_tar if shard % 2 else write_parquet)(*_shard(tmp_path, shard, picture))
    for kind in ("tar", "parquet"):
        stream = stream_of(tmp_path / kind)
        lane = Lane(stream, Lanes(1, 1), 0, 0, 0)
        seen = []
        for batch in range(150):
            assert len(lane.take(batch * 16, 16)) == 16
            if batch >= 50:  # what is loaded and cached on the way is there by now
                seen.append((_resident_kb(), len(os.listdir("/proc/self/fd"))))
        assert lane.turn == 0 and len(stream._counts) == 150
        # 100 shards of 64 KB hold 6.4 MB
        assert seen[-1][0] - seen[0][0] < 3000
        assert seen[-1][1] <= seen[0][1] + 1


def _shard(root, shard: int, picture: bytes) -> tuple:
    if shard % 2:
        return root / "tar" / f"train-{shard:03d}.tar", {f"{i}": {"png": picture} for i in range(16)}
    return root / "parquet" / f"train-{shard:03d}.parquet", [picture] * 16


def _resident_kb() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))


# --- main_pretrain.py


def flags(folder, run, *more) -> list[str]:
    """Three steps of 8 images in each of two epochs, of 32 or so in four shards."""
    recipe = "--model mae_vit_nano_patch8 --input_size 16 --batch_size 8 --epochs 2 --warmup_epochs 1 --lr 1e-3"
    recipe += " --device cpu --num_workers 0 --eval_images 2 --log_every 2 --streaming --epoch_images 24 --max_bad 0.2"
    return ["--data_path", f"hf:{folder}", "--output_dir", str(run), *recipe.split(), *map(str, more)]


@pytest.mark.parametrize("more", [[], ["--accum_iter", 2, "--batch_size", 4]])
def test_pretraining_on_tars_resumes_bit_for_bit(data, tmp_path, more):
    main_pretrain.main(flags(data / "tar", tmp_path / "whole", *more))
    for workers, steps in ((2, 2), (0, 2), (1, 9)):
        argv = ["--num_workers", workers, "--max_steps", steps, "--resume", "auto", *more]
        main_pretrain.main(flags(data / "tar", tmp_path / "parts", *argv))
    assert_same(outcome(tmp_path / "parts"), outcome(tmp_path / "whole"))
    assert outcome(tmp_path / "whole")[2]["global_step"] == 6
    results = json.loads((tmp_path / "whole" / "results.json").read_text())
    assert results["finished"] and results["val"]["psnr_db"] > 0


def test_another_batch_size_inside_an_epoch_is_refused(data, tmp_path, capsys):
    main_pretrain.main(flags(data / "tar", tmp_path, "--max_steps", 1))
    message = fails(capsys, flags(data / "tar", tmp_path, "--resume", "auto", "--batch_size", 4, "--accum_iter", 2))
    assert "inside an epoch of a stream" in message and "--batch_size 8" in message
    main_pretrain.main(flags(data / "tar", tmp_path, "--resume", "auto", "--max_steps", 2))  # to the epoch's end
    main_pretrain.main(flags(data / "tar", tmp_path, "--resume", "auto", "--batch_size", 4, "--accum_iter", 2))
    assert outcome(tmp_path)[2]["global_step"] == 6


def test_the_library_does_not_speak_of_a_damaged_file_first(data):
    stream_of(data / "parquet")
    assert logging.getLogger("datasets.packaged_modules.parquet.parquet").level == logging.CRITICAL
