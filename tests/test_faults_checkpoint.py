"""Damaged checkpoints and logs: noticed, told, and the checkpoint before is used.

Run: python -m pytest tests/test_faults_checkpoint.py
"""

import errno
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import main_pretrain
from tests.helpers import assert_same, fails, outcome
from tests.left_run import flags, images, left, whole  # noqa: F401
from util.run.dist import World
from util.run.errors import UserError
from util.run.log import RunFolder, read_json_lines
from util.training.checkpoint import damage, read_checkpoint, save_checkpoint
from util.training.faults import BadImages


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of 200 kB, and what it holds."""
    path = tmp_path_factory.mktemp("checkpoint") / "checkpoint-last.pth"
    generator = torch.Generator().manual_seed(0)
    state = {"model": {f"w{i}": torch.randn(64, 64, generator=generator) for i in range(12)}, "epoch": 3}
    save_checkpoint(path, state)
    return path, state


def test_a_flipped_bit_is_never_taken_for_weights(checkpoint, tmp_path):
    """torch.load itself returns wrong numbers for most of them."""
    path, state = checkpoint
    data, rng, wrong = path.read_bytes(), np.random.default_rng(0), 0
    for place in [*rng.integers(0, len(data), 120), *rng.integers(0, 3000, 40), *rng.integers(-2500, 0, 40)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        (tmp_path / "flipped.pth").write_bytes(flipped)
        try:
            assert_same(read_checkpoint(tmp_path / "flipped.pth"), state)  # in what fills up between two tensors
        except UserError as error:
            assert "\n" not in str(error) and "damaged" in str(error)
            wrong += _torch_is_fooled(tmp_path / "flipped.pth", state)
    assert wrong > 50, "torch.load has begun to look at checksums: `damage` may go"


def _torch_is_fooled(path: Path, state: dict) -> bool:
    try:
        assert_same(torch.load(path, weights_only=True), state)
    except AssertionError:
        return True
    except Exception:
        return False
    return False


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99, -1])
def test_a_checkpoint_that_was_cut_short_is_refused(checkpoint, tmp_path, kept):
    data = checkpoint[0].read_bytes()
    (tmp_path / "short.pth").write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(tmp_path / "short.pth")


def test_files_without_checksums_are_not_called_damaged(checkpoint, tmp_path):
    _, state = checkpoint
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(state, tmp_path / "unchecked.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert zipfile.ZipFile(tmp_path / "unchecked.pth").testzip(), "zipfile alone would refuse it"
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("unchecked.pth", "old.pth"):
        assert damage(tmp_path / name) is None
        assert_same(read_checkpoint(tmp_path / name), state)


def test_the_previous_checkpoint_is_kept(left):
    """Saved after the first epoch and, when --max_steps ended it, inside the second."""
    steps = [
        read_checkpoint(left / f"checkpoint-{name}.pth")["progress"]["global_step"] for name in ("previous", "last")
    ]
    assert steps[0] < steps[1] == 4


@pytest.mark.parametrize("harm", ["flipped", "cut", "no zip"])
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(images, whole, left, capsys, harm):
    last = left / "checkpoint-last.pth"
    data = bytearray(last.read_bytes())
    if harm == "flipped":
        data[len(data) // 2] ^= 16
    elif harm == "cut":
        del data[-5000:]
    else:
        data[0] ^= 1
    last.write_bytes(data)
    capsys.readouterr()
    main_pretrain.main(flags(images, left, "--resume", "auto"))
    said = capsys.readouterr().out
    assert f"warning: {last} cannot be used" in said and f"going on from the checkpoint before it, {left}" in said
    assert (left / "checkpoint-damaged.pth").read_bytes() == data
    assert_same(outcome(left), outcome(whole / "whole"))
    assert damage(left / "checkpoint-previous.pth") is None


@pytest.mark.parametrize("named", ["otherwise", "as a copy elsewhere"])
def test_a_damaged_last_checkpoint_never_takes_the_place_of_the_one_before(images, left, tmp_path, named):
    last, previous = left / "checkpoint-last.pth", left / "checkpoint-previous.pth"
    last.write_bytes(data := last.read_bytes()[:-5000])
    named = os.path.relpath(previous) if named == "otherwise" else shutil.copy(previous, tmp_path / "copy.pth")
    main_pretrain.main(flags(images, left, "--resume", named, "--max_steps", 1))
    assert (left / "checkpoint-damaged.pth").read_bytes() == data
    assert damage(last) is None and damage(previous) is None


def test_a_last_checkpoint_that_is_whole_is_not_called_damaged(images, left, capsys):
    data = (left / "checkpoint-last.pth").read_bytes()
    capsys.readouterr()
    main_pretrain.main(flags(images, left, "--resume", left / "checkpoint-previous.pth", "--max_steps", 1))
    assert "damaged" not in capsys.readouterr().out and not (left / "checkpoint-damaged.pth").exists()
    assert (left / "checkpoint-previous.pth").read_bytes() == data


@pytest.mark.parametrize("resume", ["auto", "named"])
def test_a_checkpoint_that_may_not_be_read_is_one_line(images, left, capsys, monkeypatch, resume):
    """Which is no damage: the one before it is not taken in its place."""
    last = left / "checkpoint-last.pth"

    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("util.training.checkpoint.open", refuse, raising=False)
    error = fails(main_pretrain.main, capsys, flags(images, left, "--resume", last if resume == "named" else "auto"))
    assert error.startswith(f"error: {last} cannot be read (Permission denied): ") and last.exists()


def test_a_run_without_a_whole_checkpoint_does_not_begin_anew(images, left, capsys):
    for name in ("last", "previous"):
        path = left / f"checkpoint-{name}.pth"
        path.write_bytes(path.read_bytes()[:-1000])
    before = {path.name: path.read_bytes() for path in left.iterdir() if path.suffix == ".pth"}
    error = fails(main_pretrain.main, capsys, flags(images, left, "--resume", "auto"))
    assert "no checkpoint in" in error and "begin anew" in error
    assert before == {path.name: path.read_bytes() for path in left.iterdir() if path.suffix == ".pth"}


def test_a_damaged_checkpoint_that_was_named_is_refused(images, left, tmp_path, capsys):
    named = left / "checkpoint-last.pth"
    named.write_bytes(named.read_bytes()[:-1000])
    error = fails(main_pretrain.main, capsys, flags(images, tmp_path / "other", "--resume", named))
    assert f"{named} is damaged" in error


def test_damaged_logs_and_results_do_not_stop_a_run(images, whole, left):
    log = left / "log.txt"
    log.write_bytes(log.read_bytes() + b'\xff{"epoch": 1}\n{"epoch"')
    (left / "results.json").write_text('{"finished": tr')
    main_pretrain.main(flags(images, left, "--resume", "auto"))
    assert_same(outcome(left), outcome(whole / "whole"))


def test_a_list_of_bad_images_that_was_cut_short_does_not_stop_a_run(tmp_path):
    run = RunFolder(str(tmp_path), is_main=True)
    bad = BadImages(run, 10, 1.0, resumed=False)
    for entry in ((1, "one\u2028line.png", "cut"), (4, "4.png", "cut")):
        bad.add(entry)
    bad.merge(World())
    listed = bad.path.read_bytes()
    bad.path.write_bytes(listed[:-9] + b"\xff")
    resumed = BadImages(run, 10, 1.0, resumed=True)
    assert list(resumed.found) == [1] and resumed.found[1]["path"] == "one\u2028line.png"
    resumed.add((4, "4.png", "cut"))
    resumed.merge(World())
    assert bad.path.read_bytes() == listed


def test_lines_in_pieces_are_left_out(tmp_path):
    (tmp_path / "log.txt").write_bytes(b'{"epoch": 0}\n\xff{"epoch": 1}\n\0\0\n7\n\n{"epoch": 2}\n{"epoch"')
    assert read_json_lines(tmp_path / "log.txt") == [{"epoch": 0}, {"epoch": 2}]
