"""The transfer scripts when something interrupts them: exact resuming, early stops, signals, several processes."""

import os
import signal
import subprocess
import sys

import pytest

import main_finetune
import main_linprobe
import main_lora
from tests.conftest import ROOT
from tests.helpers import assert_same, make_identities, outcome, results_of, transfer_flags
from util.training.checkpoint import read_checkpoint

MAINS = {"linprobe": main_linprobe.main, "lora": main_lora.main, "finetune": main_finetune.main}
MIXED = "--drop_path 0.1 --mixup 0.8 --cutmix 1 --smoothing 0.1 --reprob 0.25 --color_jitter 0.2"
# what must go on exactly: script, and flags with random numbers, stages, warm-ups and buffers of their own
RECIPES = {
    "probe": ("linprobe", "--views 2 --lr_grid 0.3 3 --head mlp --head_norm"),
    "lora": ("lora", "--rank 2 --lora_dropout 0.1"),
    "lora with a margin": ("lora", "--rank 2 --head curricularface --margin_warmup 1"),
    "mixed": ("finetune", MIXED),
    "in stages": ("finetune", "--unfreeze_every 1 --unfreeze_blocks 2"),
    "curricular": ("finetune", "--head curricularface --margin_warmup 1 --label_fraction 0.75 --accum_iter 2"),
}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp("people"))


def whole_outcome(run):
    """The outcome of a finished run, its best checkpoint and its figures included."""
    results = results_of(run)
    figures = {key: results[key] for key in ("val", "test", "best_epoch", "epochs", "steps", "finished")}
    best = read_checkpoint(run / "checkpoint-best.pth")
    return [*outcome(run), best["model"], best["epoch"], best["classes"], figures]


@pytest.fixture(scope="module")
def whole(people, tmp_path_factory):
    """whole(recipe): the outcome of such a run that nothing interrupted."""
    outcomes = {}

    def of(recipe):
        if recipe not in outcomes:
            script, more = RECIPES[recipe]
            run = tmp_path_factory.mktemp("whole") / "run"
            MAINS[script](transfer_flags(people, run, *more.split()))
            outcomes[recipe] = whole_outcome(run)
        return outcomes[recipe]

    return of


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_resume_from_the_middle_of_an_epoch_is_exact(people, whole, tmp_path, recipe, workers):
    script, more = RECIPES[recipe]
    steps = whole(recipe)[2]["global_step"]
    run = tmp_path / "run"
    argv = transfer_flags(people, run, *more.split(), "--num_workers", workers, "--resume", "auto")
    for part in range(2):  # in the middle of both epochs
        MAINS[script]([*argv, "--max_steps", str(steps // 4 + part)])
        progress = read_checkpoint(run / "checkpoint-last.pth")["progress"]
        assert progress["epoch"] == part and 0 < progress["step"] < steps // 2
        assert not results_of(run)["finished"] and "test" not in results_of(run)
    MAINS[script](argv)
    assert_same(whole_outcome(run), whole(recipe))


def test_the_recipes_are_what_their_names_say(whole):
    """Else exact resuming would be shown of something simpler."""
    assert whole("curricular")[0]["head.t"] != 0 and whole("lora with a margin")[0]["head.t"] != 0
    # the last stage trains the upper two of six blocks, so the optimizer has no state of the others
    weights, optimizer, *_ = whole("in stages")
    assert sum(len(group["params"]) for group in optimizer["param_groups"]) == len(weights)
    assert len(optimizer["state"]) == sum(
        name.startswith(("head.", "fc_norm.", "blocks.4.", "blocks.5.")) for name in weights
    )
    assert whole("mixed")[3][0]["train_loss"] != whole("in stages")[3][0]["train_loss"]
    assert len(whole("probe")[1]["param_groups"]) == 4  # weights and biases of two heads
    assert whole("curricular")[2]["step_images"] == 16


@pytest.mark.parametrize(
    "script, more",
    [("finetune", MIXED), ("lora", "--lora_dropout 0.1"), ("linprobe", "")],
    ids=["finetune", "lora", "linprobe"],
)
def test_a_run_that_improves_no_more_ends_early(people, tmp_path, capsys, script, more):
    # such a rate moves no prediction, so no epoch is better than the first
    argv = [*more.split(), "--epochs", 6, "--patience", 2, "--lr", 1e-12]
    argv += [] if script == "linprobe" else ["--head_lr", 1e-12]
    run = tmp_path / "run"
    MAINS[script](transfer_flags(people, run, *argv))
    results = results_of(run)
    assert results["finished"] and results["epochs"] == 3 and results["best_epoch"] == 1
    assert results["val"]["top1"] == outcome(run)[3][0]["val_top1"] and results["test"]
    assert read_checkpoint(run / "checkpoint-best.pth")["epoch"] == 0

    left = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    MAINS[script](transfer_flags(people, run, *argv, "--resume", "auto"))
    assert "is finished: 3 epochs are done" in capsys.readouterr().out
    assert left == {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.rglob("*") if path.is_file()}

    parts = tmp_path / "parts"
    for steps in (3, 6, 6, 6):  # stopped in the middle of each epoch that there is
        MAINS[script](transfer_flags(people, parts, *argv, "--resume", "auto", "--max_steps", steps))
    assert_same(whole_outcome(parts), whole_outcome(run))


def test_patience_counts_from_the_best_epoch(people, tmp_path):
    argv = ["--epochs", 12, "--patience", 3, "--head_lr", 2e-3]
    MAINS["finetune"](transfer_flags(people, tmp_path, *argv))
    results, figures = results_of(tmp_path), [line["val_top1"] for line in outcome(tmp_path)[3]]
    best = figures.index(max(figures)) + 1  # the first of equals
    assert results["best_epoch"] == best and results["val"]["top1"] == max(figures) > figures[0]
    assert results["epochs"] == len(figures) == min(12, best + 3)


@pytest.mark.parametrize("script", ["finetune", "linprobe"])
def test_a_run_that_goes_on_elsewhere_takes_its_best_along(people, tmp_path, capsys, script):
    still = ["--lr", 1e-12] + (["--head_lr", 1e-12] if script == "finetune" else [])
    MAINS[script](transfer_flags(people, tmp_path / "old", *still, "--max_steps", 7))
    last = tmp_path / "old" / "checkpoint-last.pth"
    MAINS[script](transfer_flags(people, tmp_path / "new", *still, "--resume", last))
    assert results_of(tmp_path / "new")["finished"] and results_of(tmp_path / "new")["best_epoch"] == 1
    (tmp_path / "old" / "checkpoint-best.pth").unlink()
    MAINS[script](transfer_flags(people, tmp_path / "newer", *still, "--resume", last))
    assert "looked for anew" in capsys.readouterr().out
    assert results_of(tmp_path / "newer")["best_epoch"] == 2


def test_batches_are_no_larger_than_the_data(people, tmp_path, capsys):
    MAINS["lora"](transfer_flags(people, tmp_path / "lora", "--batch_size", 512))
    MAINS["linprobe"](transfer_flags(people, tmp_path / "probe", "--batch_size", 512, "--accum_iter", 2))
    assert "training images" in capsys.readouterr().out
    for run in ("lora", "probe"):
        results = results_of(tmp_path / run)
        assert results["finished"] and results["train_images"] == 48 and results["steps"] == results["epochs"]


def test_patience_waits_for_an_evaluation(people, tmp_path):
    argv = ["--epochs", 6, "--patience", 1, "--eval_every", 3, "--lr", 1e-12, "--head_lr", 1e-12]
    MAINS["finetune"](transfer_flags(people, tmp_path, *argv))
    assert results_of(tmp_path)["epochs"] == 6 and results_of(tmp_path)["best_epoch"] == 3


def test_a_run_goes_on_with_other_rates(people, tmp_path, capsys):
    MAINS["finetune"](transfer_flags(people, tmp_path, "--max_steps", 2))
    equal = ["--weight_decay", 0, "--lr", 1e-3, "--head_lr", 1e-3, "--resume", "auto"]
    MAINS["finetune"](transfer_flags(people, tmp_path, *equal))
    said = capsys.readouterr().out
    assert "--weight_decay was" in said and "weights: random" in said.split("resuming")[0]
    assert "weights:" not in said.split("stopped")[-1].split("resuming")[-1]
    assert results_of(tmp_path)["finished"]


def test_a_run_stopped_by_a_signal_goes_on_exactly(people, tmp_path):
    run = tmp_path / "run"
    argv = transfer_flags(people, run, *MIXED.split(), "--epochs", 2000, "--resume", "auto")
    process = subprocess.Popen(
        [sys.executable, "main_finetune.py", *argv],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stdout:  # it is training once the first epoch is reported
        if line.startswith("epoch 0 "):
            break
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in rest and "--resume auto" in rest
    steps = read_checkpoint(run / "checkpoint-last.pth")["progress"]["global_step"]
    assert steps >= 6
    MAINS["finetune"]([*argv, "--max_steps", "4"])
    undisturbed = tmp_path / "undisturbed"
    more = [*MIXED.split(), "--epochs", 2000, "--max_steps", steps + 4]
    MAINS["finetune"](transfer_flags(people, undisturbed, *more))
    assert_same(outcome(run), outcome(undisturbed))


@pytest.mark.parametrize(
    "script, more", [("finetune", MIXED), ("linprobe", "--lr_grid 1 3")], ids=["finetune", "linprobe"]
)
def test_two_processes_share_a_run(people, run_script, tmp_path, script, more):
    argv = transfer_flags(people, tmp_path / "two", *more.split(), "--batch_size", 4)
    run_script(f"main_{script}.py", *argv, processes=2)
    results, (weights, _, progress, lines) = results_of(tmp_path / "two"), outcome(tmp_path / "two")
    assert results["finished"] and results["images_seen"] == 2 * 48 and progress["step_images"] == 8
    assert 0 <= results["val"]["top1"] <= 1 and 0 <= results["test"]["top1"] <= 1
    if script == "linprobe":  # nothing is drawn per process here, so one process computes the same
        MAINS[script](transfer_flags(people, tmp_path / "one", *more.split()))
        alone, _, _, lines_alone = outcome(tmp_path / "one")
        for name, value in alone.items():
            assert (weights[name] - value).abs().max() < 1e-5
        assert [line["val_top1"] for line in lines] == [line["val_top1"] for line in lines_alone]
