"""Signals and killed workers: a run saves, says so in one line, and goes on.

Run: python -m pytest tests/test_faults_signals.py
"""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import main_pretrain
from tests.conftest import ROOT
from tests.helpers import assert_same, outcome
from tests.left_run import flags, images, left, whole  # noqa: F401
from util.run.errors import cli
from util.run.log import RunFolder
from util.training import faults
from util.training.checkpoint import read_checkpoint
from util.training.faults import Signals


@contextmanager
def ignored(signum: int):
    """A signal is ignored, as from the start of this process; afterwards it must be so still."""
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        yield
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_an_interrupt_that_was_ignored_at_the_start_still_stops_a_run():
    """A shell script starts whatever it starts with & so."""
    with ignored(signal.SIGINT), Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT


def test_the_second_interrupt_ends_a_run_that_ignored_it_at_the_start(monkeypatch):
    monkeypatch.setattr(faults, "_PATIENCE_S", -1.0)
    with ignored(signal.SIGINT), pytest.raises(KeyboardInterrupt), Signals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)


IGNORANT = """
import signal
from util.training import faults
faults._PATIENCE_S = -1.0
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with faults.Signals():
    for _ in range(2):
        signal.raise_signal(signal.SIGTERM)
"""


def test_the_second_termination_does_too():
    assert subprocess.run([sys.executable, "-c", IGNORANT], cwd=ROOT).returncode == -signal.SIGTERM


def test_a_hangup_that_is_ignored_stays_so():
    """A run under nohup goes on when its terminal is closed."""
    with ignored(signal.SIGHUP), Signals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert not signals.received
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM


def test_an_interrupt_is_one_line(capsys):
    @cli
    def main():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130 and capsys.readouterr().err == "error: interrupted\n"


def test_a_killed_worker_is_told_also_where_it_broke_off_something_else(capsys):
    """PyTorch raises it in a signal handler: here in the middle of torch.save, which then fails too."""

    @cli
    def main():
        try:
            raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed. ")
        except RuntimeError:
            raise RuntimeError("unexpected pos 4096832 vs 4096720")  # noqa: B904

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "worker process was killed" in capsys.readouterr().err


class Faulty(torch.utils.data.Dataset):
    """A data set with a fault of ours."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise RuntimeError("a fault of ours")


def test_an_error_that_a_worker_has_raised_keeps_its_traceback():
    @cli
    def main():
        list(torch.utils.data.DataLoader(Faulty(), num_workers=1))

    with pytest.raises(RuntimeError, match=r"(?s)DataLoader worker process 0.*RuntimeError: a fault of ours"):
        main()


def test_a_killed_data_worker_is_one_line_and_the_run_goes_on(images, whole, tmp_path):
    argv = flags(images, tmp_path / "run", "--num_workers", 2, "--resume", "auto")
    command = [sys.executable, "main_pretrain.py", *argv, "--epochs", "2000"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    for line in process.stdout:  # the first epoch is saved once the second is reported
        if line.startswith("epoch 1 "):
            break
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(workers[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 2 and error.count("\n") == 1 and "worker process was killed" in error, error
    step = read_checkpoint(tmp_path / "run/checkpoint-last.pth")["progress"]["global_step"]
    assert step >= 2
    main_pretrain.main([*argv, "--epochs", "2000", "--max_steps", "2"])
    other = flags(images, tmp_path / "undisturbed", "--epochs", 2000, "--max_steps", step + 2)
    main_pretrain.main(other)
    assert_same(outcome(tmp_path / "run"), outcome(tmp_path / "undisturbed"))


def test_a_run_folder_says_where_its_checkpoints_lie(tmp_path):
    run = RunFolder(str(tmp_path), is_main=True)
    assert {run.last.name, run.previous.name, run.damaged.name} == {
        f"checkpoint-{name}.pth" for name in ("last", "previous", "damaged")
    }
