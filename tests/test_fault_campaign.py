"""The fault campaign: kills as the seed decides, what counts as lost, and that it finds what is not safe.

Run: python -m pytest tests/test_fault_campaign.py
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.helpers import assert_same, make_identities, outcome, transfer_flags
from util.faults.forked import ask
from util.faults.jobs import JOBS, Job
from util.faults.kills import WAYS, End, Plan, draw_plan, kind_of, left_behind, orphans, run
from util.faults.outcome import differences
from util.faults.outcome import outcome as digests
from util.faults.readable import unreadable
from util.faults.report import markdown, passed
from util.run.errors import UserError
from util.run.process_tree import descendants
from util.training.checkpoint import read_checkpoint, save_checkpoint

# Counts to twenty in files, and goes on where it was. {write} is the way in which it writes them.
TOY = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from util.run.files import write_text
def carelessly(path, text):
    with open(path, "w") as file:
        for letter in text:
            file.write(letter)
            file.flush()
            time.sleep(0.005)
out = Path(sys.argv[1])
{first}
for number in range(20):
    path = out / f"{{number:02d}}.json"
    if not path.exists():
        end = time.process_time() + 0.003
        while time.process_time() < end:
            pass
        {write}(path, '{{"number": ' + str(number) + '}}')
write_text(out / "log.txt", '{{"files": ' + str(len(list(out.glob("*.json")))) + "}}")
"""


@pytest.fixture
def toy(tmp_path):
    """toy(write, first): a job of such a script. first: what it does at every start."""

    def make(write: str = "write_text", first: str = "", kills: int = 3) -> Job:
        (tmp_path / "toy.py").write_text(TOY.format(root=str(ROOT), write=write, first=first))
        return Job("toy", f"{tmp_path / 'toy.py'} {{out}}", kills=kills)

    return make


@pytest.fixture
def campaign(import_script, tmp_path, monkeypatch):
    """campaign(ways, seed=0): a Campaign in a folder of its own, patient for a second only."""
    script = import_script("scripts/fault_campaign.py")
    monkeypatch.setattr(script, "PATIENCE_S", 1.0)
    with orphans():
        yield lambda ways=WAYS, seed=0: script.Campaign(tmp_path / f"out{seed}", seed, list(ways))


def test_a_job_that_is_safe_passes_under_every_kill(toy, campaign):
    held, job = campaign(), toy()
    trials = [held.trial(job, number) for number in range(14)]
    assert all(map(passed, trials)), trials
    hit = [kill for trial in trials for kill in trial["kills"] if kill["hit"]]
    assert len(hit) >= 5 and {kill["way"] for kill in hit} == set(WAYS)
    assert not (held.out / "failed").exists()


def test_a_file_that_is_not_written_in_one_step_is_found(toy, campaign):
    # a file takes 70 ms to write, and the kill comes within 20 of its beginning
    held, job = campaign(["after"]), toy(write="carelessly")
    trials = [held.trial(job, number) for number in range(3)]
    found = [text for trial in trials for text in trial["unreadable"]]
    assert found and all(re.match(r"\d\d\.json: ", text) for text in found)
    assert any((held.out / "failed").iterdir())


ONCE = "(not (out / 'once').exists() and not (out / 'once').touch())"  # true at the first start
DETACHED = "__import__('subprocess').Popen(['sleep', '20'], start_new_session=True)"


@pytest.mark.parametrize(
    "first, words",
    [
        ("open(out / 'starts.csv', 'a').write('x')", "starts.csv differs"),
        ("(out / f'trace-{os.getpid()}').touch()", "is left over"),
        ("sys.exit(3) if (out / 'once').exists() else (out / 'once').touch()", "exit status 3"),
        ("os.fork() or (time.sleep(20), os._exit(0))", "2 processes left behind"),
        (f"{ONCE} and {DETACHED}", "1 processes left behind"),
        (f"{ONCE} or {DETACHED}", "1 processes left behind"),
    ],
    ids=["another outcome", "a temporary file", "a failed restart", "processes", "in a session of its own", "the last"],
)
def test_other_losses_are_found(toy, campaign, first, words):
    trial = campaign(["at"]).trial(toy(first=first, kills=1), 0)
    assert trial["kills"][0]["hit"] and not passed(trial) and words in markdown({"toy": [trial]}, {})


def test_kills_follow_from_the_seed(toy, campaign):
    drawn = [
        [draw_plan((seed, "toy", n), End(1, 0, 2.0, 3.0, ("a.pth", "b.npz") * 9)) for n in range(60)]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {plan.way for plan in drawn[0]} == set(WAYS)
    assert {plan.kind for plan in drawn[0] if plan.way != "moment"} == {"checkpoint", "embeddings"}
    assert all(0 <= plan.amount <= (2.0 if plan.way == "moment" else 9) for plan in drawn[0])


def test_a_kill_at_a_change_comes_before_it(toy, tmp_path):
    job, out = toy(), tmp_path / "work"
    out.mkdir()
    whole = run(job.argv({"out": str(out)}), out, tmp_path / "log.txt")
    assert whole.status == 0 and len(list(out.iterdir())) == 21
    changes = [name for name in whole.changes if kind_of(name) == "results"]
    third = next(i for i, name in enumerate(changes, 1) if name == "02.json")  # put in its place by os.replace
    shutil.rmtree(out)
    out.mkdir()
    end = run(job.argv({"out": str(out)}), out, tmp_path / "log.txt", Plan("at", third, "results"))
    assert (
        end.killed and [*map(without_number, end.changes)] == [*map(without_number, whole.changes)][: len(end.changes)]
    )
    finished = [path.name for path in out.iterdir() if not path.name.startswith(".")]
    assert sorted(finished) == ["00.json", "01.json"]


def without_number(name: str) -> str:
    """The name of a temporary file but for what is drawn for each."""
    return re.sub(r"\.[0-9a-f]{8}\.tmp$", ".tmp", name)


def test_processes_that_a_killed_one_leaves_are_found():
    """Also in a session of their own; those that end are collected, and do not count."""
    code = "import time; from subprocess import Popen\n"
    code += "both = [Popen(['sleep', str(seconds)], start_new_session=True) for seconds in (0, 60)]\n"
    code += "print(both[1].pid, flush=True); time.sleep(60)"
    with orphans():
        before = descendants(os.getpid())
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        left = int(process.stdout.readline())
        process.stdout.close()
        process.kill()
        process.wait()
        assert left_behind(before, 1) == [left]
        assert left_behind([*before, left], 0) == []
        os.kill(left, signal.SIGKILL)
        assert left_behind(before, 5) == [] and not os.path.exists(f"/proc/{left}")


def test_a_job_that_is_never_free_fails_and_holds_nobody_up(toy, campaign):
    """The runs of a grid that was killed may hang: a start is refused for a while, and then it is a failure."""
    job = replace(
        toy(first=f"{ONCE} or sys.exit(os.write(1, b'out is in use by\\n') and 2)", kills=1), own_processes=True
    )
    trial = campaign(["at"]).trial(job, 0)
    assert trial["failed"] == "exit status 2: out is in use by"


def test_a_campaign_of_other_code_or_flags_is_refused(import_script, tmp_path, monkeypatch):
    """Before anything was killed, too: undisturbed runs of other code may leave something else."""
    script = import_script("scripts/fault_campaign.py")
    monkeypatch.setattr(script, "git_commit", lambda: "a1")
    for _ in range(2):
        script.claim(tmp_path, 0, ["at"])
    with pytest.raises(UserError, match=r"seed 0, not 1, ways .* choose another --out"):
        script.claim(tmp_path, 1, ["after"])
    monkeypatch.setattr(script, "git_commit", lambda: "b2")
    with pytest.raises(UserError, match="is of commit a1, not b2: choose"):
        script.claim(tmp_path, 0, ["at"])
    (tmp_path / "campaign.json").unlink()
    (tmp_path / "undisturbed").mkdir()
    with pytest.raises(UserError, match="unknown commit"):
        script.claim(tmp_path, 0, ["at"])


BARS = """
import os, signal
from util.faults.forked import fork
from util.run.log import progress

with progress(range(1), desc="the campaign's own") as bar:  # from here on there is a lock for all forks
    next(iter(bar))

def dies_within_a_bar():
    progress(range(1), desc="x").get_lock().acquire()
    os.kill(os.getpid(), signal.SIGKILL)

def shows_a_bar():
    list(progress(range(2), desc="y"))

print([os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1]) for work in (dies_within_a_bar, shows_a_bar)])
"""


def test_a_job_that_dies_while_it_draws_a_bar_holds_nobody_up(run_script):
    assert run_script("-c", BARS).stdout.split("\n")[0] == "[-9, 0]"


def test_what_a_process_finds_out_comes_back():
    assert ask(lambda: {"pid": os.getpid() != PID}) == {"pid": True}
    with pytest.raises(RuntimeError, match="status 1"):
        ask(lambda: 1 / 0)


PID = os.getpid()


# --- what counts as the same, and as readable


def fill(folder: Path, seconds: float, number: int = 1) -> Path:
    folder.mkdir()
    save_checkpoint(folder / "a.pth", {"model": {"w": torch.arange(9) * number}, "progress": {"seconds": seconds}})
    (folder / "results.json").write_text(
        json.dumps({"top1": 0.5 * number, "train_seconds": seconds, "process": seconds})
    )
    (folder / "log.txt").write_text(json.dumps({"epoch": number, "seconds": seconds}) + "\n")
    (folder / "events.out.tfevents.1").write_text(str(seconds))
    np.savez(folder / "00000.npz", embeddings=np.arange(4.0) * number, seconds=np.array(seconds))
    np.save(folder / "face.npy", np.arange(9) * number)
    pq.write_table(pa.table({"x": [number]}), folder / "metadata.parquet")
    Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / "x.png")
    return folder


def test_outcomes_differ_by_everything_but_wall_time(tmp_path):
    one, again, other = fill(tmp_path / "a", 1.5), fill(tmp_path / "b", 2.5), fill(tmp_path / "c", 1.5, number=2)
    assert differences(digests(again), digests(one)) == []
    names = ["00000.npz", "a.pth", "face.npy", "log.txt", "metadata.parquet", "results.json", "x.png"]
    assert differences(digests(other), digests(one)) == [f"{name} differs" for name in names]
    (again / "x.png").rename(again / "y.png")
    assert differences(digests(again), digests(one)) == ["x.png is missing", "y.png is left over"]
    assert differences(digests(again, leaves=["[xy].png"]), digests(one, leaves=["[xy].png"])) == []


def test_files_that_were_cut_short_are_called_unreadable(tmp_path):
    folder = fill(tmp_path / "a", 1.5)
    assert unreadable(folder) == []
    paths = [path for path in sorted(folder.iterdir()) if "tfevents" not in path.name]
    for path in paths:
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2])
    found = [text.partition(":")[0] for text in unreadable(folder)]
    assert found == [path.name for path in paths]
    for path in paths:  # as they may be while they are written
        path.rename(path.with_name(f".{path.name}.0a1b2c3d.tmp"))
    assert unreadable(folder) == []


def test_every_job_names_folders_that_there_are():
    for job in JOBS.values():
        places = {name: f"/{name}" for name in (*JOBS, "out")}
        words = job.argv(places)
        assert words[0] == "-m" or (ROOT / words[0]).is_file()
        assert all(list(JOBS).index(name) < list(JOBS).index(job.name) for name in job.needs)
        assert any("/out" in word for word in words) and not any("{" in word for word in words)


# --- the real thing


def start_campaign(out: Path, *more) -> subprocess.Popen:
    command = [sys.executable, "scripts/fault_campaign.py", "--out", out, *map(str, more)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_a_campaign_that_is_killed_itself_goes_on(tmp_path):
    more = ["--jobs", "folder", "data", "--kills"]
    first = start_campaign(tmp_path / "out", *more, 100)
    results = tmp_path / "out/results.json"
    while not results.exists() or len(json.loads(results.read_text())["trials"]["folder"]) < 2:
        assert first.poll() is None
        time.sleep(0.05)
    first.kill()
    first.communicate()
    before = json.loads(results.read_text())["trials"]
    second = start_campaign(tmp_path / "out", *more, sum(map(len, before.values())) + 4)
    said = second.communicate()[0]
    assert second.returncode == 0, said
    after = json.loads(results.read_text())["trials"]
    assert all(after[name][: len(own)] == own for name, own in before.items())
    assert sum(map(len, after.values())) > sum(map(len, before.values()))
    assert "| folder |" in (tmp_path / "out/campaign.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("job", [job for job in JOBS if not JOBS[job].own_processes])
def test_a_few_kills_of_every_script(job, tmp_path):
    process = start_campaign(tmp_path / "out", "--jobs", job, "--kills", 3, "--seed", 7)
    said = process.communicate()[0]
    assert process.returncode == 0, said + (tmp_path / "out/campaign.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("script", ["pretrain", "simclr", "linprobe", "lora", "finetune"])
def test_every_training_saves_on_a_signal_and_says_how_to_go_on(script, signum, tmp_path):
    data, runs = make_identities(tmp_path / "data"), {name: tmp_path / name for name in ("stopped", "whole")}

    def command(name: str, *more) -> list[str]:
        argv = transfer_flags(data, runs[name], "--epochs", 3000, *more)
        if script == "pretrain":
            argv[argv.index("vit_nano_patch8")] = "mae_vit_nano_patch8"
        return [sys.executable, f"main_{script}.py", *argv]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = {"cwd": ROOT, "env": environment, "text": True}
    process = subprocess.Popen(command("stopped"), stdout=subprocess.PIPE, **options)
    for line in process.stdout:
        if line.startswith("epoch 0 "):
            break
    process.send_signal(signum)
    said = process.stdout.read()
    assert process.wait(timeout=120) == 128 + signum
    assert f"stopped by {signum.name}" in said and "go on with --resume auto" in said
    steps = read_checkpoint(runs["stopped"] / "checkpoint-last.pth")["progress"]["global_step"]
    subprocess.run(command("stopped", "--resume", "auto", "--max_steps", 5), check=True, **options)
    subprocess.run(command("whole", "--max_steps", steps + 5), check=True, **options)
    assert_same(outcome(runs["stopped"]), outcome(runs["whole"]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kills",
    [[(3, 0)], [(3, 1)], [(2, 1), (9, 0)], [(None, 0), (5, 1)], [(None, 1), (4, 1)]],
    ids=["the main process", "the other one", "both in turn", "the main one at its start too", "one twice"],
)
def test_killed_ranks_are_started_again_by_torchrun(kills, run_script, make_images, tmp_path):
    """kills: (after which epoch, or None while it starts; which rank), one after the other."""
    data = make_images(tmp_path / "images", 28, size=24)
    recipe = "--model mae_vit_nano_patch8 --input_size 16 --batch_size 4 --epochs 40 --warmup_epochs 1 --eval_images 4"
    recipe += " --val_fraction 0.2 --lr 1e-3 --device cpu --num_workers 0 --resume auto"

    def argv(name: str) -> list[str]:
        return ["main_pretrain.py", "--data_path", str(data), "--output_dir", str(tmp_path / name), *recipe.split()]

    run_script(*argv("whole"), processes=2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "--max-restarts=2"]
    process = subprocess.Popen(
        [*torchrun, *argv("restarted")], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    said = ""
    for epoch, rank in kills:
        while epoch is None and len(children.read_text().split()) < 2:
            time.sleep(0.02)
        while epoch is not None and f"epoch {epoch} " not in said:
            said += process.stdout.readline()
        os.kill(int(children.read_text().split()[rank]), signal.SIGKILL)
    said += process.stdout.read()
    assert process.wait(timeout=300) == 0
    assert "resuming" in said
    epochs = Counter(json.loads(line)["epoch"] for line in (tmp_path / "restarted/log.txt").read_text().splitlines())
    assert set(epochs.values()) == {1} and len(epochs) == 40
    assert_same(outcome(tmp_path / "restarted"), outcome(tmp_path / "whole"))
