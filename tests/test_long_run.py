"""A short long run: main_pretrain.py is started, watched, stopped, resumed and judged.

Run: python -m pytest tests/test_long_run.py
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from tests.helpers import fails, results_of

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/smaps_rollup"), reason="reads /proc, which only Linux has"
)


@pytest.fixture(scope="module")
def script(import_script):
    return import_script("scripts/long_run.py")


def made_up(script, args, leak: int = 0, handles: float = 0.0) -> list[dict]:
    """Readings of a run that leaks so many bytes, and handles, in a step."""
    return [
        {
            "segment": 0, "step": step, "cpu_seconds": 5 + 0.03 * step + 0.05 * (step % 3), "clock": 0.04 * step,
            "memory": 500 * 2**20 + leak * step + 1000 * (step % 7), "resident": 0,
            "handles": 5 + int(handles * step), "threads": 6, "children": args.num_workers, "log.txt": step // 2,
            "events": 20 * step, "bad_images.jsonl": 92, "files": 7, "folder": 0,
        }
        for step in range(250, args.steps + 1, 250)
    ]  # fmt: skip


def test_verdicts(script, tmp_path):
    args = script.get_args(["--out", str(tmp_path), "--steps", "100000"])
    fine = script.judge(made_up(script, args), args)
    assert script.passed(fine) and set(fine) == {*script.HOLDS, *script.WRITES, "cpu seconds per step"}
    assert fine["cpu seconds per step"]["first"] == pytest.approx(0.03, rel=0.02)
    leaking = script.judge(made_up(script, args, leak=1000), args)
    assert leaking["memory"]["verdict"] == "grows" and not script.passed(leaking)
    assert leaking["memory"]["gain"] == pytest.approx(1000 * 100_000, rel=0.01)
    assert script.judge(made_up(script, args, handles=0.002), args)["handles"]["verdict"] == "grows"
    said = script.table(leaking)
    assert "| memory |" in said and "| grows |" in said and "| x 1.00" in said
    script.draw(made_up(script, args), args)
    assert (tmp_path / "long_run.png").stat().st_size > 10_000


def test_disturbed_windows_do_not_count(script, tmp_path):
    """The last fifth of a run beside other work: 40 ms of processor time for 30, on a clock five times slower."""
    args = script.get_args(["--out", str(tmp_path), "--steps", "100000"])
    samples, start = made_up(script, args), 80_000
    for sample in samples:
        if (late := sample["step"] - start) > 0:
            sample["cpu_seconds"] += 0.01 * late
            sample["clock"] += 0.16 * late
    speed = script.judge(samples, args)["cpu seconds per step"]
    assert speed["verdict"] == "equal" and speed["ratio"] == pytest.approx(1, abs=0.01)
    for sample in samples:  # alone on the machine it would be slower
        sample["clock"] = 1.1 * sample["cpu_seconds"]
    assert script.judge(samples, args)["cpu seconds per step"]["verdict"] == "slower"


def test_the_data_hold_one_damaged_picture(script, tmp_path):
    import pyarrow.parquet as pq

    from util.data.images import BadImage
    from util.data.sources import open_source

    source = open_source(script.make_data(tmp_path / "a", 40, "folder"), "train")
    bad = []
    for i in range(len(source)):
        try:
            source.load(i)
        except BadImage:
            bad.append(i)
    assert len(source) == 40 and bad == [0]
    assert script.make_data(tmp_path / "b", 41, "stream") == f"hf:{tmp_path / 'b'}"
    assert sum(pq.read_metadata(path).num_rows for path in (tmp_path / "b").iterdir()) == 41


def test_too_short_is_one_line(script, capsys):
    assert "--steps 700 are not two epochs" in fails(script.main, capsys, ["--out", "x", "--steps", "700"])


def test_a_line_that_was_cut_short_is_taken_away_before_the_next_one(script, tmp_path, monkeypatch):
    """As one does who is killed while it writes."""
    args = script.get_args(["--out", str(tmp_path), "--steps", "1000"])
    path = tmp_path / "samples.jsonl"
    path.write_text('{"segment": 0, "step": 500}\n{"segment": 0, "st')
    monkeypatch.setattr(script, "command", lambda *_: [sys.executable, "-c", ""])
    monkeypatch.setattr(script, "epoch_ends", lambda child, *_: iter([1000 + child.wait()]))
    monkeypatch.setattr(script, "reading", lambda pid, run, step, segment: {"segment": segment, "step": step})
    script.watch(args, "data")
    assert script.read_samples(path) == [{"segment": 0, "step": 500}, {"segment": 1, "step": 1000}]


def test_a_second_watcher_is_refused(script, tmp_path, capsys):
    hold = "import sys; from pathlib import Path; from util.run.files import only_writer\n"
    hold += "with only_writer(Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    options = {"cwd": ROOT, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], **options) as holder:
        holder.stdout.readline()
        said = fails(script.main, capsys, ["--out", str(tmp_path), "--steps", "1000"])
        holder.stdin.close()
    assert f"--out {tmp_path} is in use by process {holder.pid} on " in said


def test_it_is_stopped_and_goes_on(script, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--out", str(out), "--steps", "48", "--epoch_steps", "2", "--readings", "24", "--log_every", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    watcher = subprocess.Popen([sys.executable, "scripts/long_run.py", *argv], cwd=ROOT, env=environment)
    samples = out / "samples.jsonl"
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and (not samples.exists() or len(samples.read_bytes().splitlines()) < 6):
        time.sleep(0.05)
    watcher.send_signal(signal.SIGTERM)
    assert watcher.wait() == 128 + signal.SIGTERM
    assert 6 <= len(script.read_samples(samples)) < 24  # the run it had started has ended too, and saved
    with pytest.raises(SystemExit) as stop:
        script.main(argv)
    assert stop.value.code == 1  # so short a run is undecided about its memory
    result = results_of(out)
    assert result["processes"] == 2 and result["verdicts"]["bad_images.jsonl"]["gain"] == 0
    assert result["cpu_seconds"] > 0 and "| memory |" in capsys.readouterr().out
    steps = [sample["step"] for sample in script.read_samples(samples)]
    assert steps == sorted(set(steps)) and steps[-1] == 46
    assert results_of(out / "run")["steps"] == 48 and results_of(out / "run")["bad_images"] == 1
    assert (out / "long_run.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", ["", "--num_workers 2 --epoch_steps 20", "--data stream --num_workers 2 --epoch_steps 20"]
)
def test_a_hundred_thousand_steps(script, tmp_path, flags):
    """About an hour of processor time each."""
    script.main(["--out", str(tmp_path), "--steps", "100000", *flags.split()])
    result = json.loads((tmp_path / "results.json").read_text())
    assert result["passed"] and result["verdicts"]["memory"]["verdict"] == "flat"
