"""The benchmark runner on scripts that only pretend: what is started, what a stop or a failure leaves, and what for.

Run: python -m pytest tests/test_benchmark_runner.py
"""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import main_linprobe
from tests.conftest import ROOT
from tests.helpers import make_identities
from util.benchmark.availability import named_weights, unavailable
from util.benchmark.chains import Bench
from util.benchmark.methods import PRESETS, WEIGHTS, Method, Stage
from util.benchmark.progress_table import ProgressTable
from util.run.errors import UserError
from util.run.grid_run import Run

# Any script of a chain in small: it notes that it was started, takes its time, and leaves what the real one would.
FAKE = """
import argparse, json, sys, time
from pathlib import Path

p = argparse.ArgumentParser()
for name in ("output_dir", "init", "ckpt", "model", "resume", "max_steps", "head"):
    p.add_argument(f"--{name}")
p.add_argument("--seed", type=int)
p.add_argument("--epochs", type=int, default=1)
p.add_argument("--batch_size", type=int, default=1)
args, _ = p.parse_known_args()
run, script = Path(args.output_dir), Path(sys.argv[0]).stem
with open(run / "starts.txt", "a") as file:
    file.write("start\\n")
settings = json.loads(Path("settings.json").read_text())
if args.head and args.head == settings.get("fails"):
    sys.exit("error: this head is unlucky")
needed = args.ckpt or args.init
if needed and not needed.startswith(("timm:", "official:")):
    assert Path(needed).is_file(), needed
time.sleep(settings.get("pause", 0))
steps = int(args.max_steps or 6 * args.epochs)
results = {
    "finished": not args.max_steps, "trainable_params": 10, "total_params": 100, "steps": steps, "epochs": args.epochs,
    "train_images": 48, "images_seen": steps * 8, "train_seconds": steps * 0.5, "images_per_s": 16.0, "device": "toy",
}
if script == "eval_recognition":
    seed = int(args.ckpt.split("seed=")[1].split("/")[0])
    results = {"closed_set": {"top1": 0.5 + seed / 10}, "open_set": {"auroc": 0.6 + seed / 100}}
    results |= {"finished": True, "device": "toy"}
    rows = [f"s{i},c{i % 3},{int(i < 5 + seed)},c0" for i in range(10)]
    (run / "predictions.csv").write_text("\\n".join(["sample_id,identity,correct,answer1", *rows]))
else:
    for name in ("last", "best"):
        (run / f"checkpoint-{name}.pth").write_text("weights")
(run / "results.json").write_text(json.dumps(results))
"""
SCRIPTS = ("main_pretrain", "main_simclr", "main_linprobe", "main_lora", "main_finetune", "eval_recognition")
MAE = ("mae_scratch_linear", "mae_scratch_lora_r8")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A folder with scripts that pretend, to work in."""
    for name in SCRIPTS:
        (tmp_path / f"{name}.py").write_text(FAKE)
    (tmp_path / "settings.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("util.run.grid.POLL_S", 0.01)
    return tmp_path


@pytest.fixture
def benchmark(import_script, monkeypatch):
    script = import_script("scripts/benchmark.py")
    monkeypatch.setattr(script, "unavailable", lambda specs: {})
    return script


def call(script, *argv) -> int:
    """The exit status of the benchmark, run in this process."""
    with pytest.raises(SystemExit) as end:
        script.main([*map(str, argv)])
    return end.value.code


def flags(*methods: str, preset="tiny", seeds=(0, 1), more=()) -> list:
    words = ["--data_path", "data", "--out", "out", "--preset", preset, "--methods", *methods, "--seeds", *seeds]
    return [*words, "--jobs", 2, *more]


def starts(out: Path = Path("out")) -> dict[str, int]:
    return {str(file.parent.relative_to(out)): len(file.read_text().split()) for file in out.rglob("starts.txt")}


def test_a_benchmark_leaves_a_leaderboard_and_starts_nothing_twice(place, benchmark, capsys):
    assert call(benchmark, *flags(*MAE, "random_linear", seeds=(0, 1, 2))) == 0
    once = starts()
    assert set(once.values()) == {1} and len(once) == 3 * (1 + 3 + 3), "pre-training is shared, once per seed"
    assert sum(name.startswith("pretrain/mae_scratch/") for name in once) == 3
    text = Path("out/leaderboard.md").read_text()
    assert text.count("60.0 ± 10.0") == 3, "mean and deviation of 50, 60 and 70 % in each row"
    assert "| MAE from scratch + LoRA r = 8 | MAE on this data alone | **60.0 ± 10.0** |" in text
    assert "Budget: each method's own recipe" in text and "- Device: toy" in text
    assert {path.name for path in Path("out").glob("leaderboard.*")} == {
        f"leaderboard.{x}" for x in ("md", "csv", "tex")
    }
    assert Path("out/accuracy_against_time.png").is_file()
    assert "9 of 9 (methods x seeds) are done, 0 runs failed" in capsys.readouterr().out
    assert call(benchmark, *flags(*MAE, "random_linear", seeds=(0, 1, 2))) == 0
    assert starts() == once
    assert call(benchmark, *flags(*MAE, "random_linear", "random_finetune", seeds=(0, 1, 2))) == 0
    added = {name for name in starts() if name not in once}
    assert added == {f"{stage}/random_finetune/seed={s}" for stage in ("transfer", "eval") for s in range(3)}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_benchmark_that_was_killed_goes_on_and_repeats_nothing(place, benchmark, signum):
    (place / "settings.json").write_text('{"pause": 0.4}')
    command = [sys.executable, str(ROOT / "scripts/benchmark.py"), *map(str, flags(*MAE, seeds=(0, 1)))]
    process = subprocess.Popen(command, cwd=place, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    end = time.monotonic() + 300
    while not list(Path("out").glob("transfer/*/*/starts.txt")) and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signum)
    process.wait(timeout=300)
    done = {name for name in starts() if (Path("out") / name / "results.json").is_file()}
    assert done and len(done) < 10, "it was stopped in the middle"
    (place / "settings.json").write_text("{}")
    while any(Run("", (), {}, Path("out") / name).is_running() for name in starts()) and time.monotonic() < end:
        time.sleep(0.05)  # what a killed runner has started goes on to its end
    done = {name for name in starts() if (Path("out") / name / "results.json").is_file()}
    before = starts()
    assert call(benchmark, *flags(*MAE, seeds=(0, 1))) == 0
    after = starts()
    assert len(after) == 2 + 4 + 4 and all(after[name] == before[name] for name in done)


def test_a_failure_is_reported_and_does_not_stop_the_others(place, benchmark, capsys):
    (place / "settings.json").write_text('{"fails": "cosface"}')
    names = ("resnet10t_cosface_scratch", "resnet10t_arcface_scratch")
    assert call(benchmark, *flags(*names)) == 1
    assert "failed: transfer resnet10t_cosface_scratch seed=0: error: this head is unlucky" in capsys.readouterr().err
    text = Path("out/leaderboard.md").read_text()
    assert "- ResNet-10-T CosFace, scratch: failed: seed 0: error: this head is unlucky; seed 1:" in text
    assert (
        "eval/resnet10t_cosface_scratch/seed=0" not in starts() and "eval/resnet10t_arcface_scratch/seed=1" in starts()
    )
    (place / "settings.json").write_text("{}")
    assert call(benchmark, *flags(*names)) == 0
    assert starts()["transfer/resnet10t_cosface_scratch/seed=0"] == 2
    assert starts()["transfer/resnet10t_arcface_scratch/seed=0"] == 1


def test_weights_that_cannot_be_had_leave_a_method_out_by_name(place, benchmark, monkeypatch, capsys):
    asked = []

    def refuse(specs):
        asked.append(dict(specs))
        return {"dino": "timm:x cannot be downloaded (no connection)"}

    monkeypatch.setattr(benchmark, "unavailable", refuse)
    (place / "own.pth").write_text("weights")
    names = ("dino_linear", "dino_mlp", "mae_linear", "mae_adapted_linear", "random_linear")
    assert call(benchmark, *flags(*names, preset="full", seeds=[0], more=["--weights", "mae=own.pth"])) == 0
    assert asked == [{"dino": WEIGHTS["dino"], "mae": "own.pth"}], "once, and only for what is needed"
    assert not any("dino" in name for name in starts())
    text = Path("out/leaderboard.md").read_text()
    assert text.count("unavailable: timm:x cannot be downloaded (no connection)") == 2
    assert "unavailable: dino_mlp: timm:x cannot be downloaded" in capsys.readouterr().err
    for name in ("transfer/mae_linear", "pretrain/mae_adapted"):
        command = json.loads(Path(f"out/{name}/seed=0/command.json").read_text())["command"]
        assert command[command.index("--init") + 1] == "own.pth"
    assert (
        call(benchmark, *flags(*names, preset="full", seeds=[0], more=["--weights", "mae=own.pth", "--report_only"]))
        == 0
    )
    assert len(asked) == 1 and "cannot be downloaded" in Path("out/leaderboard.md").read_text()


def test_equal_images_are_counted_on_the_data(place, benchmark):
    make_identities(place / "data")  # 48 to train: an epoch shows 32, or 48 in a probe's one batch
    names = ("mae_scratch_linear", "mae_scratch_finetune", "random_finetune")
    more = ["--budget", "images=480", "--pretrain_share", "0.5"]
    assert call(benchmark, *flags(*names, seeds=[0], more=more)) == 0

    def epochs(run: str) -> int:
        command = json.loads(Path(f"out/{run}/seed=0/command.json").read_text())["command"]
        return int(command[command.index("--epochs") + 1])

    assert epochs("pretrain/mae_scratch") == 7  # 240 // 32
    assert epochs("transfer/mae_scratch_linear") == (480 - 7 * 32) // 48
    assert epochs("transfer/mae_scratch_finetune") == (480 - 7 * 32) // 32
    assert epochs("transfer/random_finetune") == 480 // 32
    assert "Budget: 480 images for every method" in Path("out/leaderboard.md").read_text()
    with pytest.raises(SystemExit):  # another budget is another run
        benchmark.main([*map(str, flags(*names, seeds=[0]))])


def test_equal_minutes_are_measured_first_and_recorded(place, benchmark, capsys):
    names = ("mae_scratch_finetune", "random_finetune")
    assert call(benchmark, *flags(*names, seeds=[0], more=["--budget", "gpu_minutes=1"])) == 0
    # the scripts pretend 0.5 s a step of 8 images: 6 steps, 3 s, for an epoch of 48
    measured = json.loads(Path("out/calibration.json").read_text())
    assert measured["transfer/random_finetune"] == {"seconds_per_epoch": 3.0, "fixed_seconds": 0.0}
    for run, epochs in (
        ("pretrain/mae_scratch", 10),
        ("transfer/mae_scratch_finetune", 10),
        ("transfer/random_finetune", 20),
    ):
        command = json.loads(Path(f"out/{run}/seed=0/command.json").read_text())["command"]
        assert command[command.index("--epochs") + 1] == str(epochs)
    assert starts()["calibration/transfer/random_finetune"] == 1
    assert call(benchmark, *flags(*names, seeds=[0], more=["--budget", "gpu_minutes=1"])) == 0
    assert set(starts().values()) == {1}, "measured once"
    assert "0 runs failed" in capsys.readouterr().out


def test_a_budget_too_small_for_a_method_leaves_it_out(place, benchmark):
    make_identities(place / "data")
    more = ["--budget", "images=50"]
    assert call(benchmark, *flags("mae_scratch_linear", "random_finetune", seeds=[0], more=more)) == 0
    text = Path("out/leaderboard.md").read_text()
    assert "unavailable: the budget is 50 and an epoch of pre-training takes 32 of its share of 50%" in text
    assert not any("mae" in name for name in starts()) and "eval/random_finetune/seed=0" in starts()


def test_tuned_settings_take_the_place_of_the_recipe(place, benchmark):
    Path("tuned.json").write_text('{"random_linear": {"lr": 0.02, "from": "runs/sweep, validation top-1"}}')
    assert call(benchmark, *flags("random_linear", seeds=[0], more=["--tuned", "tuned.json"])) == 0
    command = json.loads(Path("out/transfer/random_linear/seed=0/command.json").read_text())["command"]
    assert command[command.index("--lr") + 1] == "0.02"
    assert "Settings: runs/sweep, validation top-1." in Path("out/leaderboard.md").read_text()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--methods", "nothing"], "--methods nothing is not in the preset tiny"),
        (["--reference", "nothing"], "--reference nothing is not in the preset"),
        (["--budget", "speed=3"], "'speed=3' is none of recipe, epochs=N"),
        (["--weights", "mae"], "--weights mae is not of the form KEY=PATH"),
        (["--weights", "mae=gone.pth"], "there is no gone.pth"),
        (["--tuned", "gone.json"], "--tuned gone.json cannot be read"),
    ],
)
def test_a_bad_call_is_one_line_and_starts_nothing(place, benchmark, capsys, argv, message):
    assert call(benchmark, "--data_path", "data", "--out", "out", "--preset", "tiny", *argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not starts()


def test_equal_memory_needs_a_card(place, benchmark, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert call(benchmark, *flags("random_linear", more=["--budget", "memory=8"])) == 2
    assert "--budget memory needs a CUDA card" in capsys.readouterr().err


def test_a_dry_run_prints_every_command_and_writes_nothing(place, benchmark, capsys):
    benchmark.main([*map(str, flags("all", more=["--dry_run", "--", "--num_workers", "0"]))])
    lines = capsys.readouterr().out.splitlines()
    methods = len(PRESETS["tiny"].methods)
    assert len(lines) == 2 * 2 * (2 * methods + 2) and not Path("out").exists()
    assert all("--num_workers 0 --output_dir" in line for line in lines[1::2])


# --- weights, and the table on a terminal ---------------------------------------------------------------------------


def test_weights_are_tried_before_anything_is_trained(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "good.pth")
    (tmp_path / "bad.pth").write_bytes(b"no checkpoint")
    found = unavailable({"good": str(tmp_path / "good.pth"), "bad": str(tmp_path / "bad.pth")})
    assert found.keys() == {"bad"} and "bad.pth" in found["bad"] and "\n" not in found["bad"]


def test_weights_of_the_user(tmp_path):
    (tmp_path / "a=b.pth").touch()
    texts = [f"mae={tmp_path}/a=b.pth", "dino=timm:x"]
    assert named_weights(texts, WEIGHTS) == {"mae": f"{tmp_path}/a=b.pth", "dino": "timm:x"}
    with pytest.raises(UserError, match="with a KEY of mae, dino"):
        named_weights(["moe=timm:x"], WEIGHTS)


def test_the_progress_table_says_where_each_method_is(place, benchmark):
    Path("out").mkdir()
    plan = benchmark.make_plan(benchmark.get_args([*map(str, flags(*MAE, "random_linear"))]))
    assert call(benchmark, *flags("random_linear")) == 0
    stream = io.StringIO()
    table = ProgressTable(plan.chains, ["dino_linear"], stream)
    lines = table.lines([], 20)
    assert lines[0].split() == ["method", "seed", "0", "seed", "1"]
    assert [line.split() for line in lines[1:4]] == [
        [MAE[0], "-", "-"],
        [MAE[1], "-", "-"],
        ["random_linear", "done", "done"],
    ]
    assert lines[4] == "2 of 6 done, 1 methods unavailable"
    assert [line.split()[0] for line in table.lines([], 4)[1:3]] == list(MAE), "finished ones give way"
    table.watch([])
    table.say("start something")
    table.close()
    assert re.search(r"\n\x1b\[5A\r\x1b\[Jstart something\n$", stream.getvalue())


def test_a_real_probe_tells_its_pace_in_a_few_steps(tmp_path):
    flags = {"model": "vit_nano_patch8", "input_size": "16", "batch_size": "8", "epochs": "50", "device": "cpu"}
    method = Method("probe", "a probe", "floor", Stage("main_linprobe.py", {**flags, "num_workers": "0"}))
    bench = Bench(tmp_path / "out", str(make_identities(tmp_path / "data")), method.transfer, {})
    (run,) = bench.calibrations([method], seed=0).values()
    with pytest.raises(UserError, match="its pace could not be measured"):
        run.pace()
    main_linprobe.main(list(run.argv()[2:]))
    results, pace = json.loads((run.folder / "results.json").read_text()), run.pace()
    assert run.state() == "done" and results["finished"] is False and results["steps"] == 20
    assert pace.per_epoch == pytest.approx(results["train_seconds"] / 20 * (48 // 8))
    views = 2 * results["encoder_pass_seconds"]
    assert 0.2 * views < pace.fixed < 20 * views, "the encoder's passes over two views, and nothing else"
