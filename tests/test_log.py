"""Run folders: what is written, and what is not lost."""

import json
import math

import pytest
from PIL import Image

from util.run.errors import UserError, cli
from util.run.files import write_atomically, write_text
from util.run.log import RunFolder, write_json


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "first")

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]


def test_json_has_no_infinity(tmp_path):
    write_json(tmp_path / "a.json", {"psnr": math.inf, "nan": [math.nan, 1.5], 0.75: tmp_path})
    assert json.loads((tmp_path / "a.json").read_text()) == {"psnr": None, "nan": [None, 1.5], "0.75": str(tmp_path)}


def test_epochs_that_run_again_leave_the_log_once(tmp_path):
    run = RunFolder(str(tmp_path), is_main=True)
    run.start({}, 0, 0)
    for epoch in range(3):
        run.epoch({"epoch": epoch, "loss": 1.0})
    run.close()
    resumed = RunFolder(str(tmp_path), is_main=True)
    resumed.start({}, 2, 20)  # the checkpoint was written before the third line
    resumed.epoch({"epoch": 2, "loss": 2.0})
    resumed.close()
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert [(line["epoch"], line["loss"]) for line in lines] == [(0, 1.0), (1, 1.0), (2, 2.0)]


def test_tensorboard_holds_the_scalars_and_pictures(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder(str(tmp_path), is_main=True)
    run.start({}, 0, 0)
    run.scalars({"train/loss": 0.5}, 7)
    run.picture("reconstruction", Image.new("RGB", (8, 6), "red"), 7)
    run.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(7, 0.5)]
    picture = events.Images("reconstruction")[0]
    assert (picture.width, picture.height) == (8, 6)
    assert Image.open(tmp_path / "reconstruction.png").getpixel((0, 0)) == (255, 0, 0)


def test_other_processes_write_nothing(tmp_path, capsys):
    run = RunFolder(str(tmp_path / "run"), is_main=False)
    run.start({}, 0, 0)
    run.say("hello")
    run.epoch({"epoch": 0})
    run.results({})
    assert not (tmp_path / "run").exists() and capsys.readouterr().out == ""


def test_a_user_error_is_one_line_and_status_two(capsys):
    @cli
    def main():
        raise UserError("no such\n  thing: make it")

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err == "error: no such thing: make it\n"

    @cli
    def broken():
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError):
        broken()


def test_an_output_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another"):
        RunFolder(str(tmp_path / "file" / "run"), is_main=True)
