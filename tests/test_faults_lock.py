"""Two runs in one folder: the second is refused in one line, whatever becomes of the first.

Run: python -m pytest tests/test_faults_lock.py
"""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import identify
import main_pretrain
from tests.conftest import ROOT
from tests.helpers import assert_same, fails, outcome
from tests.left_run import FACES, flags, images, left, whole  # noqa: F401
from util.data.pack_journal import Journal
from util.run import files
from util.run.errors import UserError
from util.run.files import only_writer, write_text
from util.run.grid_run import Job, Run
from util.toonfaces.dataset import write_faces

HOLD = """
import os, sys, time
from pathlib import Path
from util.run.files import only_writer
with only_writer(Path(sys.argv[1])):
    child = os.fork()  # as a data worker, which outlives a parent that is killed
    if child:
        print(child, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(left):
    """A process that works in the folder, and the number of its worker."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, left], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    worker = int(process.stdout.readline())
    yield process
    process.kill()
    process.wait()
    os.kill(worker, signal.SIGKILL)


def test_the_second_run_in_a_folder_is_refused_until_the_first_has_ended(images, whole, left, holder, capsys):
    before = {path: path.read_bytes() for path in left.iterdir() if path.is_file()}
    error = fails(main_pretrain.main, capsys, flags(images, left, "--resume", "auto"))
    assert f"is in use by process {holder.pid} on " in error
    assert before == {path: path.read_bytes() for path in left.iterdir() if path.is_file()}
    holder.kill()  # its worker lives on
    holder.wait()
    main_pretrain.main(flags(images, left, "--resume", "auto"))
    assert_same(outcome(left), outcome(whole / "whole"))
    assert not (left / ".lock").exists()


def test_a_lock_whose_file_was_taken_away_is_not_trusted(tmp_path, monkeypatch):
    """Between opening and locking, the one who held it may end and remove the file."""
    lockf, opened = files.fcntl.lockf, []

    def late(file, how):
        if not opened:
            (tmp_path / ".lock").unlink()
        opened.append(os.fstat(file.fileno()).st_ino)
        lockf(file, how)

    monkeypatch.setattr(files.fcntl, "lockf", late)
    with only_writer(tmp_path):
        assert len(opened) == 2 and (tmp_path / ".lock").stat().st_ino == opened[1]


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks available")

    for take in ("lockf", "flock"):
        monkeypatch.setattr(files.fcntl, take, refuse)
    with only_writer(tmp_path):
        assert "has no locks" in capsys.readouterr().err
    with Journal(tmp_path / "p", {"samples": 1, "chunk": 64}, 1, False):
        assert "has no locks" in capsys.readouterr().err
    run = Run("a", ("true",), {}, tmp_path / "a")
    Job(run, 0, None).wait()
    assert "has no locks" in capsys.readouterr().err and not run.is_running()
    killed = tmp_path / ".x.json.0a1b2c3d.tmp"  # or somebody's: who can tell
    killed.touch()
    files._swept.discard(tmp_path)
    write_text(tmp_path / "y.json", "{}")
    assert killed.exists() and (tmp_path / "y.json").read_text() == "{}"


def test_a_refusal_names_the_holder_and_what_to_do_if_that_is_gone_for_good(busy, monkeypatch):
    monkeypatch.setattr(files, "LOCK_PATIENCE_S", 0.0)
    with pytest.raises(UserError, match=rf"or, if its machine has failed, remove {busy}/.lock$"), only_writer(busy):
        pass
    (busy / "sleep.py").write_text("import time; time.sleep(60)")
    run = Run("a", (str(busy / "sleep.py"),), {}, busy / "a")
    job = Job(run, 0, None)
    try:
        assert re.search(rf"in use by process {job.process.pid} on .*, remove {run.output}$", Job(run, 0, None).note)
    finally:
        job.send(signal.SIGKILL)
        job.wait()


def test_a_folder_that_is_let_go_soon_is_waited_for(left, holder):
    threading.Timer(0.5, holder.kill).start()
    with only_writer(left):
        assert holder.wait() == -signal.SIGKILL


def test_a_packing_that_ends_while_another_waits_is_not_done_again(tmp_path, monkeypatch):
    plan = {"samples": 1, "chunk": 64}
    monkeypatch.setattr("util.data.pack_journal.lock", lambda file: Path(file.name).unlink() is None)
    with pytest.raises(UserError, match="has just ended: give the same command again"):
        Journal(tmp_path / "p", plan, 1, False).__enter__()


def test_a_full_disk_at_the_lock_is_called_so(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "open", full, raising=False)
    with pytest.raises(UserError, match="no space left on device: make room"), only_writer(tmp_path / "made"):
        pass


def test_a_folder_that_cannot_be_made_is_called_so(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"--out .*/file/x cannot be made"), only_writer(tmp_path / "file/x", "--out"):
        pass


@pytest.fixture
def busy(tmp_path):
    """A folder that a process works in."""
    (tmp_path / "busy").mkdir()
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "busy"], cwd=ROOT, stdout=subprocess.PIPE)
    worker = int(process.stdout.readline())
    yield tmp_path / "busy"
    for pid in (process.pid, worker):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_other_writers_refuse_a_folder_in_use_too(busy, images, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--out .* is in use by process"):
        write_faces(busy, FACES, 0)
    argv = [str(images), "--ckpt", "none.pth", "--finder", "whole", "--output_dir", str(busy)]
    assert "is in use by process" in fails(identify.main, capsys, argv)
