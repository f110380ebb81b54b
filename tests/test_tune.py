"""Tuning on scripts that only pretend: what is tried, what is chosen, what the benchmark makes of it.

Run: python -m pytest tests/test_tune.py
"""

import json
from pathlib import Path

import pytest

from tests.test_benchmark_runner import SCRIPTS
from util.benchmark.methods import PRESETS, Stage, with_settings
from util.run.grid_run import Run

# Validation top-1 has one best point: encoder rate 2e-3, crop 0.8, and 5/1 before other schedules; a probe on a
# pre-training is best where that had twice its rate.
FAKE = """
import argparse, json, math, sys
from pathlib import Path

p = argparse.ArgumentParser()
p.add_argument("--output_dir")
p.add_argument("--init")
p.add_argument("--lr", type=float, default=1.0)
p.add_argument("--min_crop", type=float, default=0.5)
p.add_argument("--epochs", type=int)
args, _ = p.parse_known_args()
run, script = Path(args.output_dir), Path(sys.argv[0]).stem
with open(run / "starts.txt", "a") as file:
    file.write("start\\n")
if Path("fail").exists():
    sys.exit("error: out of luck")
(run / "checkpoint-last.pth").write_text(str(args.lr))
quality = -abs(math.log(args.lr / 2e-3)) / 10 - abs(args.min_crop - 0.8) / 10 + 0.01 * (args.epochs == 5)
if script == "main_linprobe":
    quality = float(Path(args.init).read_text())
results = {"finished": True, "val": {"top1": 0.5 + quality}}
if script in ("main_pretrain", "main_simclr"):
    results = {"finished": True}
(run / "results.json").write_text(json.dumps(results))
"""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    for name in SCRIPTS:
        (tmp_path / f"{name}.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("util.run.grid.POLL_S", 0.01)
    return tmp_path


def tune(script, *more) -> int | None:
    words = ["--data_path", "data", "--out", "out", "--preset", "tiny", "--jobs", "4", *more]
    try:
        script.main(words)
    except SystemExit as end:
        return end.code
    return None


def starts() -> dict[str, int]:
    return {str(file.parent): len(file.read_text().split()) for file in Path("out").rglob("starts.txt")}


def test_each_axis_starts_from_the_best_so_far(place, import_script):
    script = import_script("scripts/tune.py")
    more = ("--methods", "random_finetune", "--rates", "0.5", "2", "4", "--crops", "0.8", "0.2", "--schedules", "5/1")
    assert tune(script, *more) is None  # recipe: lr 1e-3, head_lr 4e-3, min_crop 0.5, 4 epochs
    tuned = json.loads(Path("out/tuned.json").read_text())["random_finetune"]
    assert {k: tuned[k] for k in ("lr", "head_lr", "min_crop", "epochs")} == {
        "lr": "0.002", "head_lr": "0.008", "min_crop": "0.8", "epochs": "5",
    }  # fmt: skip
    assert "validation top-1 on data, 7 settings tried" in tuned["from"]
    once = starts()
    assert len(once) == 4 + 2 + 1 and set(once.values()) == {1}, "the sum of the axes, the best of each tried once"
    assert not list(Path("out").glob("eval")), "test pictures play no part"
    rows = [line for line in Path("out/tuning.md").read_text().splitlines() if "random_finetune" in line]
    assert len(rows) == 7 and sum("**" in row for row in rows) == 1
    assert next(row for row in rows if "**" in row).endswith("| 51.0 |")
    assert tune(script, *more) is None and starts() == once


def test_pretraining_is_judged_by_the_probe_on_it_and_stays_for_the_transfers(place, import_script):
    script = import_script("scripts/tune.py")
    names = ("mae_scratch_linear", "mae_scratch_lora_r8")
    assert tune(script, "--methods", *names, "--rates", "0.25", "2", "--crops") is None
    tuned = json.loads(Path("out/tuned.json").read_text())
    largest = 2 * PRESETS["tiny"].methods["mae_scratch_linear"].pretraining.stage.number("lr")
    assert float(tuned["mae_scratch"]["lr"]) == largest, "this probe likes large ones"
    assert set(tuned) == {"mae_scratch", "mae_scratch_lora_r8"}, "a probe has a grid of rates of its own"
    trial = next(Path("out/transfer/mae_scratch_lora_r8").rglob("command.json"))
    command = json.loads(trial.read_text())["command"]
    start = Path(command[command.index("--init") + 1])
    assert float(start.read_text()) == largest, "LoRA starts from the pre-training that was chosen"
    assert sum("pretrain" in folder for folder in starts()) == 3, "which is not done again"


def test_what_was_tuned_is_what_the_benchmark_runs(place, import_script):
    assert (
        tune(import_script("scripts/tune.py"), "--methods", "simclr_linear", "--rates", "2", "--crops", "0.8") is None
    )
    benchmark = import_script("scripts/benchmark.py")
    tuned = benchmark.read_tuned(Path("out/tuned.json"))
    [method] = with_settings([PRESETS["tiny"].methods["simclr_linear"]], tuned)
    recipe = PRESETS["tiny"].methods["simclr_linear"].pretraining.stage
    assert method.pretraining.stage == recipe.but(blr=tuned["simclr"]["blr"], min_crop=tuned["simclr"]["min_crop"])
    assert "scripts/tune.py" in method.tuned


def test_a_search_of_which_nothing_works_is_one_line(place, import_script, capsys):
    (place / "fail").touch()
    assert tune(import_script("scripts/tune.py"), "--methods", "random_finetune", "--crops") == 2
    error = capsys.readouterr().err
    assert error == "error: no setting of random_finetune could be tried: error: out of luck\n"


def test_a_trial_that_failed_is_never_chosen(import_script):
    script = import_script("scripts/tune.py")

    class Ended(Run):
        def results(self) -> dict:
            return {"finished": True, "val": {"top1": self.settings["top1"]}} if self.settings else {}

    def trial(top1):
        run = Ended("x", (), {} if top1 is None else {"top1": top1}, Path("nowhere"))
        chain = script.Chain(None, 0, None, run, run)
        return script.Trial(top1, {}, [chain, chain])

    assert script.best([trial(None), trial(0.3), trial(0.5), trial(0.5 - 1e-9)]) == 0.5
    assert script.best([trial(0.3), trial(0.3)]) == 0.3


@pytest.mark.parametrize("text", ["20", "x/1", "5/5", "0/0"])
def test_a_schedule_has_a_warm_up_shorter_than_itself(place, import_script, capsys, text):
    assert tune(import_script("scripts/tune.py"), "--schedules", text) == 2
    assert "--schedules" in capsys.readouterr().err


def test_settings_find_their_stage():
    method = PRESETS["tiny"].methods["mae_scratch_lora_r8"]
    [found] = with_settings([method], {"mae_scratch": {"lr": 1.5}, "mae_scratch_lora_r8": {"rank": 4, "from": "me"}})
    assert found.pretraining.stage.number("lr") == 1.5 and found.transfer.number("rank") == 4 and found.tuned == "me"
    assert found.transfer.number("lr") == method.transfer.number("lr")
    [same] = with_settings([method], {})
    assert same == method and isinstance(same.transfer, Stage)
