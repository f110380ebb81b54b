"""Full disks, read-only folders, what killed processes leave: one line, and nothing saved is lost.

Run: python -m pytest tests/test_faults_disk.py
"""

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

import main_pretrain
from tests.conftest import ROOT
from tests.helpers import assert_same, fails, outcome
from tests.left_run import FACES, flags, images, left, whole  # noqa: F401
from util.data.pack import main as pack
from util.run import files
from util.run.causes import disk_trouble
from util.run.errors import UserError
from util.run.files import is_temporary, write_atomically, write_text
from util.run.grid_run import Run
from util.run.process_tree import descendants, has_ended
from util.toonfaces.dataset import write_faces

# --- a full disk


class Full:
    """Stands for a disk with room for so many bytes: any write beyond them fails, as the system says it."""

    def __init__(self, room: int):
        self.room = room

    def __call__(self, path: Path) -> None:
        with open(path, "wb") as file:
            file.write(b"x" * self.room)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "old")
    with pytest.raises(UserError, match=r"results\.json cannot be written: no space left on device: make room"):
        write_atomically(path, Full(10))
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"] and path.read_text() == "old"


def wrapped(outer: Exception, inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception:
            raise outer  # noqa: B904  (as torch does: the cause is only in the context)
    except Exception as error:
        return error


@pytest.mark.parametrize(
    "error, told",
    [
        (OSError(errno.EDQUOT, "x"), "quota"),
        (OSError(errno.EFBIG, "x"), "file too large"),
        (wrapped(RuntimeError("unexpected pos 64 vs 0"), OSError(errno.ENOSPC, "x")), "no space left"),
        (Exception("I/O error: No space left on device (os error 28)"), "no space left"),
        (OSError("4096 requested and 0 written"), "no space left"),
        (OSError(errno.ENOENT, "x"), None),
        (ValueError("28"), None),
    ],
)
def test_what_libraries_make_of_a_full_disk_is_understood(error, told):
    trouble = disk_trouble(error)
    assert trouble is None if told is None else told in trouble


LIMITED = """
import resource, sys
sys.argv = sys.argv[1:]
import main_pretrain
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main_pretrain.main()
"""


def run_limited(limit: int, *argv) -> subprocess.CompletedProcess:
    """main_pretrain.py where no file may be larger than so many bytes: the system refuses, as a full disk does."""
    command = [sys.executable, "-c", LIMITED, "main_pretrain.py", str(limit), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(images, whole, left):
    before = (left / "checkpoint-last.pth").read_bytes()
    done = run_limited(len(before) - 1000, *flags(images, left, "--resume", "auto"))
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+checkpoint-(last|best).pth cannot be written: file too large: .*\n", done.stderr)
    assert (left / "checkpoint-last.pth").read_bytes() == before
    assert not list(filter(is_temporary, left.iterdir()))
    main_pretrain.main(flags(images, left, "--resume", "auto"))  # there is room again
    assert_same(outcome(left), outcome(whole / "whole"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("file systems can be mounted by root only")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_run_on_a_disk_that_fills_up(images, small_disk, capsys):
    argv = flags(images, small_disk / "run")
    error = fails(main_pretrain.main, capsys, argv)
    assert "no space left on device" in error and "make room" in error
    assert not list((small_disk / "run").glob("*.tmp")) and not (small_disk / "run/.lock").exists()


def test_a_full_disk_of_the_logs_is_one_line_too(images, small_disk, tmp_path):
    """TensorBoard writes in a thread of its own, which would print a traceback."""
    with pytest.raises(OSError), open(small_disk / "filler", "wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass
    os.truncate(small_disk / "filler", os.path.getsize(small_disk / "filler") - 3 * 4096)  # its file can be begun
    argv = flags(images, tmp_path / "run", "--log_dir", small_disk, "--log_every", 1)
    command = [sys.executable, "main_pretrain.py", *argv]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "no space left on device" in done.stderr


def test_packing_on_a_full_disk_goes_on_when_there_is_room(images, small_disk, tmp_path, capsys):
    filler = small_disk / "filler"
    argv = ["--data_path", str(images), "--canvas", "48", "--num_workers", "0"]
    pack([*argv, "--out", str(tmp_path / "whole.pack")])
    filler.write_bytes(b"x" * 900_000)
    assert "make room" in fails(pack, capsys, [*argv, "--out", str(small_disk / "data.pack")])
    filler.unlink()
    pack([*argv, "--out", str(small_disk / "data.pack")])
    assert (small_disk / "data.pack").read_bytes() == (tmp_path / "whole.pack").read_bytes()


def test_a_read_only_folder_is_refused(images, left, capsys):
    before = sorted(path.name for path in left.iterdir())
    if os.geteuid():
        left.chmod(0o555)
    elif subprocess.run(["mount", "--bind", "-o", "ro", left, left], capture_output=True).returncode:
        pytest.skip("root may write anywhere, and may not mount here")
    try:
        assert "is not writable" in fails(main_pretrain.main, capsys, flags(images, left, "--resume", "auto"))
    finally:
        left.chmod(0o755) if os.geteuid() else subprocess.run(["umount", "-l", left], check=True)
    assert sorted(path.name for path in left.iterdir()) == before


# --- what killed processes leave


def test_temporary_files_of_killed_processes_are_removed_and_those_of_living_ones_are_not(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom util.run.files import write_atomically\n"
        "def write(path):\n    path.write_text('half')\n    print('writing', flush=True)\n    sys.stdin.read()\n"
        "write_atomically(Path(sys.argv[1]), write)\n"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / name], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for name in ("killed.txt", "living.txt")
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    writers[0].kill()
    writers[0].wait()
    assert len(list(filter(is_temporary, tmp_path.iterdir()))) == 2
    files._swept.discard(tmp_path)
    write_text(tmp_path / "another.txt", "x")
    assert [path.name[:8] for path in tmp_path.iterdir() if is_temporary(path)] == [".living."]
    writers[1].communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another.txt", "living.txt"]


@pytest.mark.parametrize("swept", ["before it is locked", "after another one has locked it"])
def test_a_file_that_a_sweep_takes_away_before_it_is_locked_is_given_another_name(tmp_path, monkeypatch, swept):
    """A sweep by another process falls between the opening and the locking of a new file."""
    real, calls = files.try_lock, []

    def late(file, **options):
        calls.append(file.name)
        if len(calls) == 1 and swept.startswith("after"):
            return files.BUSY
        if len(calls) == 1:
            os.unlink(file.name)
        return real(file, **options)

    files._swept.add(tmp_path)
    monkeypatch.setattr(files, "try_lock", late)
    write_text(tmp_path / "x.txt", "whole")
    assert (tmp_path / "x.txt").read_text() == "whole" and len(set(calls)) == 2


def test_only_names_that_we_draw_are_swept(tmp_path):
    for name in (".x.0a1b2c3d.tmp", ".x.a.tmp", ".x.0a1b2c3d4.tmp"):
        (tmp_path / name).touch()
    write_text(tmp_path / "y.txt", "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".x.0a1b2c3d4.tmp", ".x.a.tmp", "y.txt"]


def test_pictures_are_on_the_disk_before_they_count_as_done(tmp_path, monkeypatch):
    """A power cut would leave empty ones beside a note that they are there."""
    seen = []
    monkeypatch.setattr(os, "sync", lambda: seen.append([len(list(tmp_path.rglob(f"*.{kind}"))) for kind in NAMES]))
    write_faces(tmp_path, FACES, 0)
    pictures = len(list(tmp_path.glob("images/*.png"))) * 2
    assert seen[0][1] == 1 and seen[-1][0] == pictures and [parts for _, parts in seen] == [*range(1, len(seen) + 1)]


NAMES = ("png", "json")  # pictures; what is done, beside the note of the folder itself


# --- what a kill at the very beginning leaves


def test_a_folder_that_holds_what_a_killed_process_was_writing_is_not_foreign(tmp_path):
    for name in (".unfinished.json.0a1b2c3d.tmp", ".lock"):
        (tmp_path / name).touch()
    assert write_faces(tmp_path, FACES, 0) and (tmp_path / "metadata.parquet").is_file()
    (tmp_path / "metadata.parquet").unlink()
    with pytest.raises(UserError, match="no unfinished ToonFaces folder"):
        write_faces(tmp_path, FACES, 0)


def test_the_lock_of_one_that_was_killed_at_the_very_end_is_taken_away(tmp_path):
    assert write_faces(tmp_path, FACES, 0)
    (tmp_path / ".lock").touch()
    assert not write_faces(tmp_path, FACES, 0)
    assert not (tmp_path / ".lock").exists()


def interrupted(*_):
    raise KeyboardInterrupt


def test_a_data_set_that_was_killed_while_it_said_what_it_is_goes_on(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("util.toonfaces.dataset.write_text", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_faces(tmp_path / "data", FACES, 0)
    assert write_faces(tmp_path / "data", FACES, 0)


def test_a_grid_that_was_killed_before_its_first_record_goes_on(tmp_path):
    run = Run("mae", ("main_pretrain.py",), {}, tmp_path)
    for name in ("output.txt", ".command.json.0a1b2c3d.tmp"):
        (tmp_path / name).touch()
    run.check()
    run.output.write_text("somebody's")
    with pytest.raises(UserError, match="holds files that no grid made"):
        run.check()


def test_processes_that_draw_end_with_the_one_that_started_them(tmp_path):
    command = [sys.executable, "datasets/prepare_toonfaces.py", "--out", tmp_path / "data", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list((tmp_path / "data").glob("images/*.png"))) < 3:
        time.sleep(0.02)
    workers = descendants(process.pid)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while not all(map(has_ended, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and all(map(has_ended, workers))
    before = len(list((tmp_path / "data/images").iterdir()))
    for path in (tmp_path / "data/images").glob("*.png"):
        with Image.open(path) as picture:
            picture.load()
    time.sleep(0.3)
    assert len(list((tmp_path / "data/images").iterdir())) == before
