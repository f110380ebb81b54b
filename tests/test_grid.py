"""The grid runner: what is started, what is not started again, what a stop or a failure leaves, and the tables."""

import csv
import itertools
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models_mae import build_mae
from util.run import grid, grid_report
from util.run.errors import UserError
from util.run.grid_run import Job, Run, error_line

ROOT = Path(__file__).resolve().parents[1]

# A training script in small: an epoch is a line in epochs.txt; it saves after each, stops on a signal, and resumes.
FAKE = """
import argparse, json, os, signal, sys, time
from pathlib import Path

p = argparse.ArgumentParser()
p.add_argument("--output_dir", type=Path)
p.add_argument("--resume")
p.add_argument("--seed", type=int, default=0)
p.add_argument("--rank", type=int, default=1)
p.add_argument("--epochs", type=int, default=1)
p.add_argument("--pause", type=float, default=0)
p.add_argument("--fail_file", type=Path)     # seed 1 fails while this file exists
p.add_argument("--fail_starts", type=int, default=0)
p.add_argument("--status", type=int, default=2)
p.add_argument("--meet", type=Path)          # wait there for a second run
p.add_argument("--alone", type=Path)         # fail if a second run is there
p.add_argument("--unfinished", action="store_true")
args = p.parse_args()
assert args.resume == "auto"
run = args.output_dir
stop = []
for signum in (signal.SIGTERM, signal.SIGINT):
    signal.signal(signum, lambda signum, frame: stop.append(signum))

def note(name, text):
    with open(run / name, "a") as file:
        file.write(text + "\\n")
    return len((run / name).read_text().splitlines())

print("loading")
starts = note("starts.txt", os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
if starts <= args.fail_starts or (args.fail_file and args.fail_file.exists() and args.seed == 1):
    print("error: seed 1 is unlucky", file=sys.stderr)
    print("a farewell from a library")
    sys.exit(args.status)
if args.meet:
    (args.meet / run.name).touch()
    end = time.monotonic() + 15
    while len(list(args.meet.iterdir())) < 2:
        if time.monotonic() > end:
            sys.exit("nobody came")
        time.sleep(0.01)
if args.alone:
    os.close(os.open(args.alone, os.O_CREAT | os.O_EXCL))
state = run / "state.json"
done = json.loads(state.read_text()) if state.exists() else 0
while done < args.epochs:
    note("epochs.txt", str(done))
    time.sleep(args.pause)
    done += 1
    state.write_text(json.dumps(done))
    if stop:
        print("stopped and saved")
        sys.exit(128 + stop[0])
top1 = args.rank / 100 + args.seed / 1000
(run / "results.json").write_text(json.dumps({
    "finished": not args.unfinished, "trainable_params": 1000 * args.rank, "total_params": 10**6, "epochs": done,
    "peak_memory_bytes": 3 * 2**20, "seconds_per_epoch": 1.5, "images_per_s": 100.0, "seed": args.seed,
    "val": {"top1": top1, "top5": None}, "args": {"rank": args.rank},
}))
if args.alone:
    args.alone.unlink()
"""


@pytest.fixture
def fake(tmp_path) -> str:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return str(path)


def call(*argv) -> int:
    """The exit status of the grid, run in this process."""
    with pytest.raises(SystemExit) as end:
        grid.main([str(word) for word in argv])
    return end.value.code


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def starts(out: Path) -> dict[str, int]:
    return {str(path.parent.relative_to(out)): len(lines(path)) for path in sorted(out.rglob("starts.txt"))}


def test_every_command_gets_every_combination_of_its_own_flags(tmp_path):
    axes = [grid.parse_vary(text) for text in ("lora:rank=4,8", "epochs/warmup_epochs=20/2,50/5", "seed=0,1")]
    commands = dict([grid.parse_command("probe: main_linprobe.py --lr 1"), grid.parse_command("lora: main_lora.py")])
    runs = grid.expand(tmp_path, commands, axes, ("--data_path", "my data"))
    assert len(runs) == 4 + 8 and len({run.folder for run in runs}) == 12
    assert runs[0].folder == tmp_path / "probe" / "epochs=20,warmup_epochs=2,seed=0"
    assert runs[0].command == (
        *("main_linprobe.py", "--lr", "1", "--data_path", "my data"),
        *("--epochs", "20", "--warmup_epochs", "2", "--seed", "0"),
    )
    assert runs[-1].label == "lora rank=8 epochs=50 warmup_epochs=5 seed=1"
    assert runs[-1].argv() == [
        *(sys.executable, *runs[-1].command),
        *("--output_dir", str(tmp_path / "lora" / "rank=8,epochs=50,warmup_epochs=5,seed=1"), "--resume", "auto"),
    ]


def test_a_value_that_is_no_file_name_is_made_one(tmp_path):
    (run,) = grid.expand(tmp_path, {"a": ("torchrun", "x.py")}, [grid.parse_vary("init=hf:OWNER/MAE@main")])
    assert run.folder.name == "init=hf-OWNER-MAE-main" and run.settings == {"init": "hf:OWNER/MAE@main"}
    assert run.argv()[:4] == ["torchrun", "x.py", "--init", "hf:OWNER/MAE@main"]  # not under this Python
    (single,) = grid.expand(tmp_path, {"a": ("x.py",)}, [])
    assert single.folder == tmp_path / "a"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--vary", "rank"], "is not of the form"),
        (["--vary", "rank="], "is not of the form"),
        (["--vary", "rank=4,,8"], "is no value of rank"),
        (["--vary", "epochs/warmup_epochs=20/2,50"], "is no value of epochs/warmup_epochs"),
        (["--vary", "lroa:rank=4"], "no command of that name"),
        (["--vary", "rank=4,8", "rank=16"], "twice"),
        (["--vary", "rank=4,4"], "several runs the folder"),
        (["--vary", "init=a/b,a:b"], "several runs the folder"),
        (["--vary", "epochs=1,2"], "both varied and in the command"),
        (["--", "--rank=4"], "both varied and in the command"),
        (["--", "--output_dir", "x"], "the grid itself gives --output_dir"),
        (["--command", "lora: fake.py"], "same name"),
        (["--command", "fake.py --lr 1"], "is not of the form"),
        (["--command", "b: fake.py 'x"], "mend the quotes"),
        (["--command", "b: no_such_script.py"], "no script no_such_script.py"),
        (["--figure", "rank"], "is not of the form X:Y"),
        (["--jobs", "0"], "must be at least 1"),
    ],
)
def test_a_bad_call_is_one_line_and_starts_nothing(fake, tmp_path, capsys, argv, message):
    cut = argv.index("--") if "--" in argv else len(argv)
    axes = [] if any(word.startswith("rank=") for word in argv) else ["--vary", "rank=4"]
    command = ["--out", tmp_path / "out", "--command", f"lora: {fake} --epochs 1", *axes]
    assert call(*command, *argv[:cut], *argv[cut:]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert starts(tmp_path) == {}


def test_finished_runs_are_not_started_again(fake, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["--out", out, "--command", f"lora: {fake} --alone {tmp_path / 'busy'}", "--vary", "rank=4,8"]
    assert call(*command, "seed=0") == 0
    assert starts(out) == {"lora/rank=4,seed=0": 1, "lora/rank=8,seed=0": 1}
    assert call(*command, "seed=0,1") == 0
    assert starts(out) == {f"lora/rank={rank},seed={seed}": 1 for rank in (4, 8) for seed in (0, 1)}
    record = json.loads((out / "lora" / "rank=8,seed=1" / "command.json").read_text())
    assert record["command"][-4:] == ["--rank", "8", "--seed", "1"] and record["command"][0] == fake
    assert lines(out / "lora" / "rank=8,seed=1" / "output.txt") == ["loading"]
    assert "4 of 4 runs are done, 0 failed" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"lora", "results.csv", "results.md"}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_grid_goes_on_where_it_was(fake, tmp_path, signum):
    out, meeting = tmp_path / "out", tmp_path / "meeting"
    meeting.mkdir()  # both begin their first epoch together
    command = ["--out", out, "--command", f"slow: {fake} --epochs 2 --pause 1 --meet {meeting}", "--jobs", 2]
    command += ["--command", f"fast: {fake} --epochs 5 --pause 0.2 --meet {meeting}", "--vary", "fast:seed=0,1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "util.run.grid", *map(str, command)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        # where the tests run in the background, SIGINT is ignored, and the grid would respect that
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),
    )  # fmt: skip
    slow, fast, third = out / "slow", out / "fast" / "seed=0", out / "fast" / "seed=1"
    end = time.monotonic() + 30
    while not ((slow / "epochs.txt").exists() and (fast / "state.json").exists()) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signum)
    output = process.communicate(timeout=30)[0]
    assert process.returncode == 128 + signum, output
    assert "stopped and saved" in output and "the same command goes on" in output
    assert lines(slow / "output.txt")[-1] == lines(fast / "output.txt")[-1] == "stopped and saved"
    assert starts(out) == {"fast/seed=0": 1, "slow": 1}  # no third one was begun while the slow one saved
    table = (out / "results.md").read_text()
    assert "| 1 waiting |" in table and "| 2 waiting |" in table and "failed" not in table
    assert call(*command) == 0
    assert starts(out) == {"fast/seed=0": 2, "fast/seed=1": 1, "slow": 2}
    for run, epochs in ((slow, 2), (fast, 5), (third, 5)):
        assert lines(run / "epochs.txt") == [str(epoch) for epoch in range(epochs)]  # each epoch once


def test_a_failed_run_is_reported_and_tried_again_by_the_next_call(fake, tmp_path, capsys):
    out, fault = tmp_path / "out", tmp_path / "fault"
    command = ["--out", out, "--command", f"a: {fake} --fail_file {fault}", "--vary", "seed=0,1,2"]
    fault.touch()
    assert call(*command, "--retry", "2") == 1
    assert "failed: a seed=1: error: seed 1 is unlucky (see " in capsys.readouterr().err
    assert starts(out) == {"a/seed=0": 1, "a/seed=1": 1, "a/seed=2": 1}  # a user's error is not retried
    assert "2 done, 1 failed" in (out / "results.md").read_text()
    assert "* a seed=1: error: seed 1 is unlucky" in (out / "results.md").read_text()
    states = [row["state"] for row in csv.DictReader((out / "results.csv").read_text().splitlines())]
    assert states == ["done", "failed", "done"]
    fault.unlink()
    assert call(*command) == 0
    assert starts(out) == {"a/seed=0": 1, "a/seed=1": 2, "a/seed=2": 1}
    assert "failed" not in (out / "results.md").read_text()


@pytest.mark.parametrize(("retry", "status", "started"), [(1, 1, 2), (2, 0, 3), (5, 0, 3)])
def test_a_fault_is_retried_as_often_as_allowed(fake, tmp_path, retry, status, started):
    out = tmp_path / "out"
    assert call("--out", out, "--command", f"a: {fake} --fail_starts 2 --status 1", "--retry", retry) == status
    assert starts(out) == {"a": started}


def test_a_run_that_ends_unfinished_is_no_success(fake, tmp_path, capsys):
    assert call("--out", tmp_path / "out", "--command", f"a: {fake} --unfinished") == 1
    assert "does not say that it is finished" in capsys.readouterr().err
    row = next(csv.DictReader((tmp_path / "out" / "results.csv").read_text().splitlines()))
    assert row["state"] == "failed" and "val.top1" not in row


def test_a_program_that_is_not_there_is_a_failed_run(tmp_path, capsys):
    assert call("--out", tmp_path / "out", "--command", "a: no-such-program", "--vary", "seed=0,1") == 1
    assert "0 of 2 runs are done, 2 failed" in (said := capsys.readouterr()).out
    assert "cannot be started: No such file or directory: no-such-program" in said.err


def test_the_line_that_says_why():
    trace = ["Traceback (most recent call last):", "torch.OutOfMemoryError: CUDA out of memory", "leaked semaphores"]
    assert error_line(trace, 1) == trace[1]
    assert error_line(["epoch 1", "gone"], 1) == "gone" and "exit status 3" in error_line([], 3)
    assert error_line(["epoch 1"], -signal.SIGKILL).startswith("ended by SIGKILL")


def test_a_folder_of_another_command_is_refused(fake, tmp_path, capsys):
    out = tmp_path / "out"
    assert call("--out", out, "--command", f"a: {fake} --epochs 1", "--vary", "seed=0") == 0
    capsys.readouterr()
    assert call("--out", out, "--command", f"a: {fake} --epochs 2", "--vary", "seed=1,0") == 2
    error = capsys.readouterr().err
    assert "there: --epochs 1; wanted: --epochs 2" in error and str(out / "a" / "seed=0") in error
    assert error.count("\n") == 1 and starts(out) == {"a/seed=0": 1}  # seed 1 was not begun either


def test_a_folder_that_no_grid_made_is_refused(fake, tmp_path, capsys):
    (tmp_path / "out" / "a").mkdir(parents=True)
    (tmp_path / "out" / "a" / "results.json").write_text('{"finished": true}')
    assert call("--out", tmp_path / "out", "--command", f"a: {fake}") == 2
    assert "no grid made" in capsys.readouterr().err


def test_a_run_that_outlived_its_grid_is_not_started_beside_itself(fake, tmp_path, capsys):
    run = Run("a", (fake, "--epochs", "1", "--pause", "60"), {}, tmp_path / "out" / "a")
    job = Job(run, 0, None)  # its grid has no more part in it from here on
    try:
        assert run.is_running()
        assert call("--out", tmp_path / "out", "--command", f"a: {fake} --epochs 1 --pause 60") == 2
        assert "is in use" in capsys.readouterr().err
    finally:
        job.send(signal.SIGKILL)
        job.wait()
    assert not run.is_running()


def test_a_lock_that_is_gone_soon_is_waited_for(fake, tmp_path):
    run = Run("a", (fake,), {}, tmp_path / "a")
    run.folder.mkdir()
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); "
         "print(flush=True); time.sleep(0.3)", run.output], stdout=subprocess.PIPE,
    )  # fmt: skip
    holder.stdout.readline()
    assert run.is_running()
    job = Job(run, 0, None)
    holder.communicate(timeout=10)
    job.wait()
    job.finish(stopped=0)
    assert job.state == "done"


@pytest.mark.parametrize(
    ("beside", "given", "expected"), [(1, None, "none"), (2, None, "4"), (20, None, "1"), (2, "7", "7")]
)
def test_runs_at_the_same_time_share_the_cores(tmp_path, monkeypatch, beside, given, expected):
    script = tmp_path / "threads.py"
    script.write_text("import os\nprint('threads', os.environ.get('OMP_NUM_THREADS', 'none'))")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    job = Job(Run("a", (str(script),), {}, tmp_path / "a"), 0, None, beside)
    job.wait()
    assert f"threads {expected}" in job.run.output.read_text().splitlines()


def test_jobs_run_side_by_side_on_their_own_cards(fake, tmp_path):
    out, meeting = tmp_path / "out", tmp_path / "meeting"
    meeting.mkdir()
    command = f"a: {fake} --meet {meeting}"  # a run that is alone fails
    assert call("--out", out, "--command", command, "--vary", "seed=0,1,2", "--devices", "3,5") == 0
    cards = [lines(path)[0] for path in sorted(out.rglob("starts.txt"))]
    assert cards[:2] == ["3", "5"] and cards[2] in ("3", "5")


def test_a_dry_run_prints_the_commands_and_writes_nothing(fake, tmp_path, capsys):
    out = tmp_path / "out"
    grid.main(["--out", str(out), "--command", f"a: {fake}", "--vary", "seed=0,1", "--dry_run", "--", "--data", "b c"])
    printed = capsys.readouterr().out.splitlines()
    assert printed[::2] == ["# a seed=0: waiting", "# a seed=1: waiting"] and not out.exists()
    folder = str(out / "a" / "seed=1")
    assert shlex.split(printed[3]) == [
        *(sys.executable, fake, "--data", "b c", "--seed", "1", "--output_dir", folder, "--resume", "auto")
    ]


def test_help_explains_every_flag():
    done = subprocess.run([sys.executable, "-m", "util.run.grid", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and all(f"--{flag}" in done.stdout for flag in ("out", "vary", "devices", "dry_run"))


def test_the_runner_stays_small_beside_its_runs():
    code = "import sys, util.run.grid; print('torch' in sys.modules or 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# hand-made results: what the tables and curves say of them


def make(out: Path, name: str, settings: dict, results: dict | None, error: str | None = None) -> Run:
    run = Run(name, ("x.py", *(f"--{key}={value}" for key, value in settings.items())), settings,
              out / name / grid.folder_name(settings))  # fmt: skip
    if results is not None or error:
        run.folder.mkdir(parents=True)
        run.write_record(error)
    if results is not None:
        (run.folder / "results.json").write_text(json.dumps({"finished": True, **results}))
    return run


VAL = {("4", 0): 0.5, ("4", 1): 0.53, ("4", 2): 0.58, ("8", 0): 0.61, ("8", 1): 0.6}


@pytest.fixture
def rows(tmp_path) -> list[grid_report.Row]:
    """Rank 4 has three seeds, one of them without test figures; rank 8 one failed seed; rank 16 never ran."""
    runs = []
    for (rank, seed), top1 in VAL.items():
        results = {
            "trainable_params": 1_500_000 * int(rank), "peak_memory_bytes": 512 * 2**20, "epochs": 7 + seed,
            "seconds_per_epoch": 12.5 + seed, "val": {"top1": top1, "top5": None}, "note": "text", "best": True,
            "args": {"lr": 0.1}, "seed": seed, "test": {"top1": 0.0, "macro_f1": top1 / 2} if seed else {},
        }  # fmt: skip
        runs.append(make(tmp_path, "lora", {"rank": rank, "epochs": "9", "seed": str(seed)}, results))
    runs.append(make(tmp_path, "lora", {"rank": "8", "epochs": "9", "seed": "2"}, None, "error: a | b"))
    runs.append(make(tmp_path, "lora", {"rank": "16", "epochs": "9", "seed": "0"}, None))
    runs.append(make(tmp_path, "probe", {"seed": "0"}, {"val": {"top1": 0.25}, "trainable_params": 10}))
    return grid_report.collect(runs)


def test_the_table_holds_mean_and_sample_deviation(rows):
    body = [[cell.strip() for cell in line.split("|")[1:-1]] for line in grid_report.table(rows).splitlines()[:6]]
    header, _, rank4, rank8, rank16, probe = body
    assert header == [
        *("method", "rank", "epochs", "val top-1", "test top-1", "test macro-F1", "trainable parameters"),
        *("peak memory, MiB", "seconds per epoch", "images/s", "runs"),
    ]
    vals = [VAL["4", seed] for seed in range(3)]
    assert rank4[:4] == ["lora", "4", "9", f"{np.mean(vals):.4f} ± {np.std(vals, ddof=1):.4f}"]
    assert rank4[4] == "0.0000 ± 0.0000 (n=2)"  # a true zero, of the two seeds that have the figure
    assert rank4[5] == f"0.2775 ± {statistics.stdev([0.265, 0.29]):.4f} (n=2)"
    assert rank4[6:] == ["6,000,000", "512 ± 0", "13.5 ± 1", "-", "3 done"]
    assert rank8[3] == f"0.6050 ± {np.std([0.61, 0.6], ddof=1):.4f}" and rank8[-1] == "2 done, 1 failed"
    assert rank8[4] == "0.0000 (n=1)"  # a single value has no deviation
    assert rank16 == ["lora", "16", "9", *"-------", "1 waiting"]
    assert probe == ["probe", "-", "-", "0.2500", "-", "-", "10", "-", "-", "-", "1 done"]
    assert "* lora rank=8 epochs=9 seed=2: error: a | b\n" in grid_report.table(rows)


def test_other_columns_can_be_asked_for(rows):
    header, _, rank4, *_ = grid_report.table(rows, ["val.top1", "val.psnr_db", "epochs"]).splitlines()
    assert header == "| method | rank | epochs | val top-1 | val.psnr_db | epochs | runs |"
    assert rank4.endswith("| - | 8 ± 1 | 3 done |")


def test_the_csv_holds_every_figure_of_every_run(rows):
    table = list(csv.DictReader(grid_report.csv_table(rows).splitlines()))
    assert len(table) == 8 and len({len(row) for row in table}) == 1
    assert float(table[1]["val.top1"]) == 0.53 and float(table[1]["test.macro_f1"]) == 0.265
    assert table[0]["test.top1"] == "-" and table[0]["epochs"] == "9" and table[0]["results.epochs"] == "7"
    assert [row["state"] for row in table[5:]] == ["failed", "waiting", "done"]
    assert table[5]["error"] == "error: a | b" and table[5]["val.top1"] == "-" and table[7]["rank"] == "-"
    assert not {"args.lr", "note", "best", "val.top5"} & set(table[0])


def test_damaged_results_count_as_not_done(tmp_path):
    run = make(tmp_path, "a", {}, {"val": {"top1": 1.0}})
    assert run.state() == "done"
    for text in ('{"finished": tr', "[]", '{"finished": false}'):
        (run.folder / "results.json").write_text(text)
        assert run.state() == "unfinished" and grid_report.collect([run])[0].figures == {}


def test_curves_against_a_flag_and_against_a_figure(rows):
    lines = grid_report.curves(rows, "rank", "val.top1")
    assert list(lines) == ["lora"]  # the probe has no rank; --epochs is the same for all
    assert [point.x for point in lines["lora"]] == ["4", "8"]
    assert lines["lora"][0].y == pytest.approx(np.mean([0.5, 0.53, 0.58]))
    assert lines["lora"][0].std == pytest.approx(np.std([0.5, 0.53, 0.58], ddof=1))
    lines = grid_report.curves(rows, "trainable_params", "val.top1")
    assert {name: [(point.x, point.note) for point in points] for name, points in lines.items()} == {
        "lora": [(6e6, "rank 4, epochs 9"), (12e6, "rank 8, epochs 9")],
        "probe": [(10, "")],
    }


def test_a_line_for_each_of_the_other_flags_but_not_for_those_that_x_settles(tmp_path):
    runs = [
        make(tmp_path, "a", {"lr": lr, "epochs": epochs, "warmup": warmup}, {"val": {"top1": 0.5}})
        for lr in ("0.1", "1")
        for epochs, warmup in (("20", "2"), ("50", "5"))
    ]
    lines = grid_report.curves(grid_report.collect(runs), "epochs", "val.top1")
    assert {name: len(points) for name, points in lines.items()} == {"lr=0.1": 2, "lr=1": 2}
    lines = grid_report.curves(grid_report.collect(runs), "lr", "val.top1")
    assert list(lines) == ["epochs=20", "epochs=50"]


@pytest.mark.parametrize(("x", "lines"), [("rank", 1), ("trainable_params", 2), ("masking", 1)])
def test_the_figure_is_a_picture_of_every_line(tmp_path, rows, x, lines):
    if x == "masking":  # a flag that is no number
        runs = [make(tmp_path, "mae", {"masking": kind}, {"val": {"top1": 0.5}}) for kind in ("random", "face")]
        rows = grid_report.collect(runs)
    path = tmp_path / "results.png"
    assert grid_report.draw(path, rows, x, "val.top1")
    with Image.open(path) as image:
        assert image.format == "PNG" and min(image.size) > 400
        plot = np.asarray(image.convert("RGB"))[: round(0.8 * image.height)]  # above the legend
    colours = [(31, 119, 180), (255, 127, 14)]
    drawn = [int((np.abs(plot.astype(int) - colour).sum(axis=2) < 30).sum()) for colour in colours]
    assert [count > 50 for count in drawn] == [True, lines == 2]


def test_no_figure_without_points(tmp_path, rows, fake, capsys):
    assert not grid_report.draw(tmp_path / "results.png", rows, "rank", "val.psnr_db")
    command = ["--out", tmp_path / "out", "--command", f"a: {fake}", "--vary", "rank=1,20", "seed=0,1"]
    assert call(*command, "--figure", "rank:test.top1") == 0
    assert "no figure" in capsys.readouterr().out and not (tmp_path / "out" / "results.png").exists()
    assert call(*command, "--figure", "rank:val.top1") == 0
    assert (tmp_path / "out" / "results.png").stat().st_size > 5000


# the shell scripts


@pytest.fixture
def ask_script(tmp_path):
    """ask_script(name, *arguments, **environment): what the script would have `python -m util.run.grid` do."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(
        f'#!/bin/sh\ncase "$1" in scripts/*) exec "{sys.executable}" "$@";; esac\n'
        f'case "$2" in util.run.grid) shift 2; exec "{sys.executable}" -c '
        f'\'import json, sys; json.dump(sys.argv[1:], open("{tmp_path}/asked.json", "w"))\' "$@";; esac\n'
    )
    stub.chmod(0o755)

    def ask(name: str, *arguments, **environment) -> list[Run] | str:
        clean = {key: value for key, value in os.environ.items() if key not in ("MODEL", "SEEDS", "GRID")}
        path = f"{stub.parent}{os.pathsep}{clean['PATH']}"
        done = subprocess.run(
            ["bash", ROOT / "scripts" / f"{name}.sh", *map(str, arguments)], capture_output=True, text=True, timeout=30,
            env={**clean, "PATH": path, "ANIMASK_USE_ACTIVE_ENV": "1", **environment},
        )  # fmt: skip
        if done.returncode:
            assert done.returncode == 2
            return done.stderr
        args = grid.get_args(json.loads((tmp_path / "asked.json").read_text()))
        return grid.plan(args), args

    return ask


def test_lora_ranks_varies_the_rank(ask_script, tmp_path):
    runs, args = ask_script("lora_ranks", tmp_path, "my weights.pth")
    assert [run.label for run in runs] == [f"lora rank={r} seed={s}" for r in (4, 8, 16, 32) for s in (0, 1, 2)]
    common = ("--data_path", str(tmp_path), "--init", "my weights.pth", "--model", "vit_base_patch16")
    assert runs[0].command == ("main_lora.py", *common, "--rank", "4", "--seed", "0")
    assert args.out == Path("runs/lora_ranks") and args.figure == "trainable_params:test.top1" and not args.dry_run


def test_data_efficiency_gives_all_three_methods_all_fractions(ask_script, tmp_path):
    runs, args = ask_script("data_efficiency", tmp_path, "w.pth", "runs/x", "--", "--epochs", "5", SEEDS="7", MODEL="m")
    assert [run.command[0] for run in runs[::5]] == ["main_linprobe.py", "main_lora.py", "main_finetune.py"]
    assert [run.settings["label_fraction"] for run in runs[:5]] == ["0.01", "0.05", "0.1", "0.25", "1"]
    assert len(runs) == 15 and all(run.settings["seed"] == "7" for run in runs)
    assert runs[0].command[5:9] == ("--model", "m", "--epochs", "5") and args.out == Path("runs/x")
    assert args.figure == "label_fraction:test.top1"


def test_sweep_covers_rate_augmentation_and_schedule(ask_script, tmp_path):
    runs, args = ask_script("sweep", tmp_path, "w.pth", "--", "--batch_size", "8", GRID="--dry_run --jobs 2")
    assert len(runs) == 3 * 2 * 2 * 2 * 3
    values = {flag: {run.settings[flag] for run in runs} for flag in runs[0].settings}
    assert values["epochs"] == {"20", "50"} and values["color_jitter"] == {"0", "0.4"} and len(values["lr"]) == 3
    schedules = {(run.settings["epochs"], run.settings["warmup_epochs"]) for run in runs}
    assert schedules == {("20", "2"), ("50", "5")}
    assert "--batch_size" in runs[0].command and args.dry_run and args.jobs == 2
    assert args.figure == "lr:val.top1"  # a recipe is never chosen by test images


def test_margin_study_gives_each_head_its_own_margins_and_evaluates_every_run(ask_script, tmp_path):
    data = tmp_path / "my faces"
    data.mkdir()
    runs, args = ask_script("margin_study", data, "w.pth", "--", "--epochs", "2", SEEDS="0", EVAL="--replicates 9")
    assert Counter(run.name for run in runs) == {"softmax": 1, "arcface": 3 * 2, "cosface": 2 * 2}
    assert {run.settings["margin"] for run in runs if run.name == "cosface"} == {"0.1", "0.35"}
    assert all(run.command[0] == "main_lora.py" and "--epochs" in run.command for run in runs)
    then = grid.follower(args, runs[-1])
    given = dict(itertools.pairwise(then.command))
    assert then.command[0] == "eval_recognition.py" and given["--data_path"] == str(data)
    assert given["--ckpt"] == f"{runs[-1].folder}/checkpoint-best.pth" and given["--replicates"] == "9"


def test_mask_sweep_has_equal_epochs_and_equal_computation(ask_script, import_script, tmp_path):
    runs, args = ask_script("mask_sweep", tmp_path, "--", "--batch_size", "32", SEEDS="0,1", EPOCHS="100")
    assert Counter(run.name for run in runs) == {"epochs": 4 * 2, "compute": 4 * 2}
    given = {name: {run.settings["mask_ratio"]: run.settings["epochs"] for run in runs if run.name == name}
             for name in ("epochs", "compute")}  # fmt: skip
    assert given["epochs"] == dict.fromkeys(["0.25", "0.5", "0.75", "0.9"], "100")
    assert given["compute"]["0.75"] == "100" and given["compute"]["0.25"] == "53"
    assert args.figure == "mask_ratio:val.psnr_db"
    for run in runs[:1] + runs[-1:]:
        flags = import_script("main_pretrain.py").get_args(run.argv()[2:])
        assert flags.model == "mae_vit_base_patch16" and flags.batch_size == 32 and flags.data_path == str(tmp_path)
    for arguments, message in {
        (): "DATA is needed",
        ("--lr",): "DATA is needed",
        (tmp_path / "no",): "there is no",
        (tmp_path, "o", "x"): "lone --",
    }.items():
        error = ask_script("mask_sweep", *arguments)
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_epochs_of_equal_cost(import_script):
    """Against torch's own count of a step: what the epochs of each ratio cost differs by half an epoch at most."""
    script = import_script("scripts/matched_epochs.py")
    args = script.get_args(["--model", "mae_vit_nano_patch8", "--input_size", "64", "--epochs", "200"])
    model = build_mae(args.model, 64).to("meta")
    costs = {}
    for ratio in args.mask_ratios:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(torch.empty(1, 3, 64, 64, device="meta"), ratio, torch.empty(1, 64, device="meta"), 1.0).backward()
        costs[ratio] = counter.get_total_flops()
    for ratio, epochs in script.matched_epochs(args).items():
        assert abs(epochs * costs[ratio] - 200 * costs[0.75]) <= costs[ratio] / 2


@pytest.mark.parametrize("name", ["lora_ranks", "data_efficiency", "sweep", "margin_study"])
def test_scripts_give_known_flags_and_refuse_what_they_do_not_understand(ask_script, import_script, tmp_path, name):
    for arguments, message in {
        (): "DATA and INIT are needed",
        (tmp_path,): "DATA and INIT are needed",
        (tmp_path, "--lr"): "DATA and INIT are needed",
        (tmp_path / "missing", "w.pth"): "there is no",
        (tmp_path, "w.pth", "out", "--lr", "1"): "come after a lone --",
        (tmp_path, "w.pth", "--lr", "1"): "come after a lone --",
    }.items():
        error = ask_script(name, *arguments)
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    runs, _ = ask_script(name, "hf:OWNER/NAME", "w.pth")  # not a path
    assert runs[0].command[2] == "hf:OWNER/NAME"
    for script, command in {run.command[0]: run.argv()[2:] for run in runs}.items():
        args = import_script(script).get_args(command)  # every flag is one of the script's
        assert args.data_path == "hf:OWNER/NAME" and args.init == "w.pth" and args.resume == "auto"
    with pytest.raises(UserError, match="both varied and in the command"):
        ask_script(name, tmp_path, "w.pth", "--", "--seed", "3")
    subprocess.run(["bash", "-n", ROOT / "scripts" / f"{name}.sh"], check=True)


# An evaluation in small: it reads what the run has written.
SECOND = """
import argparse, json, sys
from pathlib import Path

p = argparse.ArgumentParser()
p.add_argument("--output_dir", type=Path)
p.add_argument("--resume")
p.add_argument("--ckpt", type=Path)
p.add_argument("--fail_rank", type=int)
args = p.parse_args()
found = json.loads((args.ckpt.parent / "results.json").read_text())
with open(args.output_dir / "starts.txt", "a") as file:
    file.write("x\\n")
if found["args"]["rank"] == args.fail_rank:
    sys.exit("error: cannot evaluate this one")
(args.output_dir / "results.json").write_text(json.dumps({
    "finished": True, "open_set": {"auroc": found["val"]["top1"] * 2}
}))
"""


@pytest.fixture
def second(tmp_path) -> str:
    path = tmp_path / "second.py"
    path.write_text(SECOND)
    return f"{path} --ckpt {{run}}/checkpoint-best.pth"


def test_what_follows_a_run_is_in_its_row(fake, second, tmp_path):
    out = tmp_path / "out"
    argv = ["--out", out, "--command", f"a: {fake}", "--vary", "rank=4,8", "seed=0,1", "--then", second]
    argv += ["--columns", "val.top1", "open_set.auroc", "--figure", "rank:open_set.auroc"]
    assert call(*argv) == 0
    assert (out / "results.png").exists()
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["open_set.auroc"]) for row in rows] == [2 * float(row["val.top1"]) for row in rows]
    assert [row["rank"] for row in rows] == ["4", "4", "8", "8"] and {row["state"] for row in rows} == {"done"}
    folder = out / "then" / "a" / "rank=4,seed=0"
    assert json.loads((folder / "command.json").read_text())["command"][2] == str(
        out / "a" / "rank=4,seed=0" / "checkpoint-best.pth"
    )
    assert call(*argv) == 0  # nothing is done twice
    assert set(starts(out).values()) == {1} and len(starts(out)) == 8


def test_what_follows_a_run_may_write_metrics_where_it_is_told(fake, tmp_path):
    script, out = tmp_path / "third.py", tmp_path / "out"
    script.write_text(
        "import argparse, json\nfrom pathlib import Path\np = argparse.ArgumentParser()\n"
        "p.add_argument('--ckpt')\np.add_argument('--out', type=Path)\nargs = p.parse_args()\n"
        "with open(args.out / 'starts.txt', 'a') as file:\n    file.write('x\\n')\n"
        "metrics = {'ratios': {'0.75': {'ssim': {'mean': 0.5}}}, 'provenance': {'torch': 2.0}}\n"
        "(args.out / 'metrics.json').write_text(json.dumps(metrics))\n"
    )
    argv = ["--out", out, "--command", f"a: {fake}", "--vary", "rank=4", "seed=0,1"]
    argv += ["--then", f"{script} --ckpt {{run}}/x.pth --out {{out}}", "--columns", "ratios.0.75.ssim.mean"]
    for _ in range(2):  # the second time, nothing is left to do
        assert call(*argv) == 0
        assert set(starts(out / "then").values()) == {1} and len(starts(out / "then")) == 2
    assert "| a | 4 | 0.5 ± 0 | 2 done |" in (out / "results.md").read_text()
    with open(out / "results.csv", newline="") as file:
        assert not any("provenance" in name for name in csv.DictReader(file).fieldnames)


def test_a_failure_of_what_follows_is_the_failure_of_its_row(fake, second, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["--out", out, "--command", f"a: {fake}", "--vary", "rank=4,8", "--then", f"{second} --fail_rank 8"]
    assert call(*argv) == 1
    assert "cannot evaluate this one" in capsys.readouterr().err
    with open(out / "results.csv", newline="") as file:
        assert [row["state"] for row in csv.DictReader(file)] == ["done", "failed"]


def test_a_failed_run_is_followed_by_nothing(fake, second, tmp_path):
    (tmp_path / "flag").touch()
    out = tmp_path / "out"
    argv = ["--out", out, "--command", f"a: {fake} --fail_file {tmp_path / 'flag'}", "--vary", "seed=0,1"]
    assert call(*argv, "--then", second) == 1
    assert set(starts(out / "then")) == {"a/seed=0"}


def test_then_must_say_what_it_works_on(fake, tmp_path, capsys):
    argv = ["--out", tmp_path / "out", "--command", f"a: {fake}", "--then", "second.py --ckpt x"]
    assert call(*argv) == 2
    assert "{run}" in capsys.readouterr().err
