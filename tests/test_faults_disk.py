"""Full disks, read-only folders, damaged checkpoints, two runs in one folder: one line, and nothing saved is lost.

Run: python -m pytest tests/test_faults_disk.py
"""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import identify
import main_pretrain
from tests.conftest import ROOT
from tests.helpers import assert_same, fails, outcome
from util.data.pack import main as pack
from util.data.pack_journal import Journal
from util.run import files
from util.run.causes import disk_trouble
from util.run.dist import World
from util.run.errors import UserError, cli
from util.run.files import is_temporary, only_writer, write_atomically, write_text
from util.run.grid_run import Job, Run
from util.run.log import RunFolder, read_json_lines
from util.run.process_tree import descendants, has_ended
from util.toonfaces.dataset import Recipe, write_faces
from util.toonfaces.split import Sizes
from util.training import faults
from util.training.checkpoint import damage, read_checkpoint, save_checkpoint
from util.training.faults import BadImages, Signals

RECIPE = "--model mae_vit_nano_patch8 --input_size 16 --batch_size 8 --epochs 2 --warmup_epochs 1 --eval_images 4"
RECIPE += " --val_fraction 0.2 --lr 1e-3 --device cpu --num_workers 0 --log_every 2"


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", 28, size=24)


def flags(data, run, *more) -> list[str]:
    return ["--data_path", str(data), "--output_dir", str(run), *RECIPE.split(), *map(str, more)]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of six steps that was left in the middle of its second epoch; and one that was let end."""
    folder = tmp_path_factory.mktemp("runs")
    main_pretrain.main(flags(images, folder / "left", "--max_steps", 4))
    main_pretrain.main(flags(images, folder / "whole"))
    return folder


@pytest.fixture
def left(whole, tmp_path):
    """A copy of the run that was left."""
    subprocess.run(["cp", "-a", whole / "left", tmp_path / "run"], check=True)
    return tmp_path / "run"


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


# --- damaged checkpoints


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


# --- two runs in one folder

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


FACES = Recipe(Sizes(4, 40, 1.0, 1, 1, 1, 1), 32, 0)


def test_other_writers_refuse_a_folder_in_use_too(busy, images, tmp_path, capsys):
    with pytest.raises(UserError, match=r"--out .* is in use by process"):
        write_faces(busy, FACES, 0)
    argv = [str(images), "--ckpt", "none.pth", "--finder", "whole", "--output_dir", str(busy)]
    assert "is in use by process" in fails(identify.main, capsys, argv)


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


# --- signals, workers


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
