"""The methods of the benchmark: what they expand to, what the scripts say to it, and how budgets change them.

Run: python -m pytest tests/test_benchmark_methods.py
"""

import argparse
import importlib
import shlex
from pathlib import Path

import numpy as np
import pytest

from models_baseline import TIMM_MODELS, is_baseline
from models_vit import VIT_MODELS
from util.benchmark import budget as budgets
from util.benchmark.budget import Budget, Pace, at_epochs, divide, images_pace, parse_budget, with_epochs
from util.benchmark.chains import Bench, calibration_keys, needs, unique
from util.benchmark.methods import FLOORS, PRESETS, WEIGHTS, Stage
from util.data.batches import StepSampler
from util.run.dist import World
from util.run.errors import UserError
from util.transfer.heads import minimal_scale

ALL = [(preset.name, name) for preset in PRESETS.values() for name in preset.methods]
OUT = Path("runs/benchmark")


def bench(preset: str) -> Bench:
    return Bench(OUT, "my data", PRESETS[preset].evaluation, WEIGHTS, ("--num_workers", "0"))


def parsed(run) -> argparse.Namespace:
    """The flags of a run as its own script understands them."""
    script, *words = run.argv()[1:]
    return importlib.import_module(script.removesuffix(".py")).get_args(words)


def stage_of(**flags) -> Stage:
    return Stage("main_finetune.py", {name: str(value) for name, value in flags.items()})


@pytest.mark.parametrize(("preset", "name"), ALL)
def test_every_method_expands_to_commands_that_the_scripts_take(preset, name):
    method = PRESETS[preset].methods[name]
    for kind in ("recipe", "epochs=3", "memory=8", "convergence=5"):
        changed = budgets.apply_simple(parse_budget(kind), method)
        chain = bench(preset).chain(changed, 7)
        flags = {run.command[0]: parsed(run) for run in chain.runs}
        transfer, evaluation = flags[method.transfer.script], flags["eval_recognition.py"]
        assert transfer.seed == 7 and evaluation.seed == 0, "all runs are asked for the same pairs"
        assert {one.data_path for one in flags.values()} == {"my data"}
        assert {one.input_size for one in flags.values()} == {PRESETS[preset].input_size}
        assert transfer.model in VIT_MODELS or is_baseline(transfer.model)
        assert evaluation.ckpt == f"{chain.transfer.folder}/checkpoint-best.pth"
        if method.pretraining:
            assert transfer.init == f"{chain.pretraining.folder}/checkpoint-last.pth"
            assert parsed(chain.pretraining).init == WEIGHTS.get(method.pretraining.weights)
        else:
            assert transfer.init == WEIGHTS.get(method.weights)


def test_a_preset_has_what_was_asked_for():
    for preset in ("full", "face112"):
        methods = PRESETS[preset].methods
        for name in ("resnet50", "efficientnet_b0", "efficientnet_b3"):
            assert methods[f"{name}_scratch"].weights is None and methods[f"{name}_imagenet"].weights == name
        for head in ("arcface", "cosface", "curricularface"):
            assert {f"{net}_{head}_scratch" for net in ("resnet50", "ir_50")} <= methods.keys()
        assert {"simclr_linear", "dino_linear", "dino_mlp", "dinov2_linear", "dinov2_mlp"} <= methods.keys()
        for way in ("linear", "lora_r8", "lora_r16", "finetune"):
            assert methods[f"mae_{way}"].weights == "mae" and methods[f"mae_{way}"].pretraining is None
            assert methods[f"mae_adapted_{way}"].pretraining.weights == "mae"
        assert {"random_linear", "random_finetune"} <= methods.keys()
    tiny = PRESETS["tiny"].methods.values()
    families = {method.family for method in tiny if method.needed_weights is None}
    assert families == {"CNN", "margin", "contrastive", "MAE on this data alone", FLOORS}, "they need no download"
    assert {method.needed_weights for method in tiny} == {None, "dino", "mae", "resnet10t", "efficientnet_lite0"}
    assert not any("official" in method.label for method in tiny if method.name.startswith("mae_scratch"))
    for preset in PRESETS.values():
        assert preset.reference in preset.methods and all(method.tuned for method in preset.methods.values())


def test_weights_are_those_that_the_networks_are_meant_to_have():
    for key, model in {"dino": "dino_vitb16", "dinov2": "dinov2_vitb14", "dinov2_large": "dinov2_vitl14"}.items():
        assert WEIGHTS[key] == f"timm:{TIMM_MODELS[model]}"
    for key in ("resnet50", "efficientnet_b0", "efficientnet_b3"):
        assert WEIGHTS[key] == f"timm:{TIMM_MODELS[key]}"


def test_margins_have_a_scale_that_suffices_and_a_warm_up():
    for preset, classes in (("full", 3263), ("face112", 3263), ("tiny", 40)):
        margins = [method.transfer for method in PRESETS[preset].methods.values() if method.family == "margin"]
        assert margins
        for stage in margins:
            assert stage.number("scale") > minimal_scale(classes) and stage.number("margin") > 0
            assert 0 < stage.number("margin_warmup") < stage.number("epochs")


def test_pre_training_is_shared_once_per_seed_and_comes_first():
    methods = list(PRESETS["tiny"].methods.values())
    chains = bench("tiny").chains(methods, [0, 1, 2])
    runs, wanted = unique(chains), needs(chains)
    folders = [str(run.folder.relative_to(OUT)) for run in runs]
    assert [f for f in folders if f.startswith("pretrain/mae")] == [f"pretrain/mae_scratch/seed={s}" for s in range(3)]
    assert len(folders) == len(set(folders)) == 3 * (2 * len(methods) + 2)
    for place, run in enumerate(runs):
        assert all(need in runs[:place] for need in wanted[run.folder])
    users = [chain for chain in chains if chain.method.name.startswith("mae_scratch") and chain.seed == 1]
    assert len(users) == 4 and len({chain.pretraining.folder for chain in users}) == 1


def test_an_unknown_method_is_named_with_those_there_are():
    with pytest.raises(UserError, match="--methods mea_linear is not in the preset tiny: resnet10t_scratch"):
        PRESETS["tiny"].choose(["mea_linear"])
    assert len(PRESETS["tiny"].choose(["random_linear", "all"])) == len(PRESETS["tiny"].methods)


def test_flags_of_a_stage():
    stage = Stage("main_linprobe.py", {"lr_grid": "1 3 10", "head_norm": "", "lr": "1e-3"})
    assert stage.words() == ("main_linprobe.py", "--lr_grid", "1", "3", "10", "--head_norm", "--lr", "1e-3")
    assert stage.but(lr=None, blr=0.25).words()[-2:] == ("--blr", "0.25") and stage.number("lr") == 1e-3


# --- budgets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("recipe", "recipe", None), ("epochs=20", "epochs", 20), ("images=5e6", "images", 5e6),
        ("gpu_minutes=1.5", "gpu_minutes", 1.5), ("memory=11.5", "memory", 11.5), ("convergence", "convergence", 10),
        ("convergence=3", "convergence", 3),
    ],
)  # fmt: skip
def test_a_budget_is_read_and_described(text, kind, amount):
    found = parse_budget(text)
    assert found == Budget(kind, amount)
    sentence = found.describe(0.5)
    assert sentence.endswith(".") and "None" not in sentence and "{" not in sentence
    assert amount is None or f"{amount:,g}".split("e")[0][:1] in sentence


@pytest.mark.parametrize("text", ["epochs", "epochs=", "epochs=0", "epochs=1.5", "images=x", "speed=3", "recipe=2", ""])
def test_a_bad_budget_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_budget(text)


def test_an_epoch_shows_what_the_loader_shows():
    for images, batch in ((1920, 32), (1000, 64), (50, 64), (64, 64), (129, 128)):
        sampler = StepSampler(images, min(batch, images), 1, 0, World())
        assert images_pace(images, batch).per_epoch == sampler.steps * sampler.step_images


def test_images_are_divided_exactly():
    # 1000 images, half for pre-training: 4 epochs of 120 are 480; 520 are left: 5 of 100
    assert divide(1000, 0.5, Pace(120), Pace(100)) == (4, 5)
    assert divide(1000, 0.5, None, Pace(100)) == (0, 10)
    assert divide(1000, 0.24, Pace(120), Pace(100)) == (2, 7), "a share that pays for exactly two epochs"
    with pytest.raises(UserError, match="an epoch of pre-training takes 120 of its share of 10%"):
        divide(1000, 0.1, Pace(120), Pace(100))
    with pytest.raises(UserError, match="what is left of the budget is 40 and one epoch takes 100"):
        divide(1000, 1.0, Pace(120), Pace(100))


@pytest.mark.parametrize("seed", range(5))
def test_no_budget_is_overdrawn_and_less_than_an_epoch_is_left(seed):
    rng = np.random.default_rng(seed)
    before, after = Pace(*rng.uniform(1, 50, 2)), Pace(*rng.uniform(1, 50, 2))
    amount = rng.uniform(300, 2000)
    first, second = divide(amount, 0.5, before, after)
    spent = before.cost(first) + after.cost(second)
    assert amount - after.per_epoch < spent <= amount and before.cost(first) <= amount / 2 < before.cost(first + 1)


def test_minutes_pay_for_what_a_probe_does_once():
    assert Pace(0.1, fixed=2.0).epochs(2.3) == 3, "0.3 / 0.1 is 2.9999999999999996 in floating point"
    assert Pace(0.1, fixed=2.0).epochs(1.0) == 0


def test_warm_ups_keep_their_share_of_the_epochs():
    stage = stage_of(epochs=50, warmup_epochs=5, margin_warmup=10, lr="1e-3")
    changed = at_epochs(stage, 10)
    assert (changed.flags["epochs"], changed.flags["warmup_epochs"], changed.flags["margin_warmup"]) == ("10", "1", "2")
    assert at_epochs(stage, 1).number("margin_warmup") == 0 and changed.flags["lr"] == "1e-3"


def test_methods_that_share_pre_training_still_do_under_a_budget():
    methods = [method for method in PRESETS["tiny"].methods.values() if method.name.startswith("mae_scratch")]
    changed = [with_epochs(method, 4, 9) for method in methods]
    assert len({chain.pretraining.command for chain in bench("tiny").chains(changed, [0])}) == 1
    assert all(method.pretraining.stage.number("epochs") == 4 for method in changed)
    assert all(method.transfer.number("epochs") == 9 for method in changed)
    assert calibration_keys(changed[0]) == ("pretrain/mae_scratch", "transfer/mae_scratch_linear")


def test_matched_epochs_leave_pre_training_alone():
    method = PRESETS["full"].methods["mae_adapted_lora_r8"]
    changed = budgets.apply_simple(Budget("epochs", 20), method)
    assert changed.pretraining == method.pretraining and changed.transfer.number("epochs") == 20


def test_convergence_is_patience_with_the_warm_up_of_the_recipe():
    changed = budgets.apply_simple(Budget("convergence", 7), PRESETS["full"].methods["resnet50_arcface_scratch"])
    assert changed.transfer.number("patience") == 7 and changed.transfer.number("epochs") == 200
    assert changed.transfer.number("warmup_epochs") == changed.transfer.number("margin_warmup") == 5


def test_a_batch_that_fits_takes_its_learning_rate_along():
    changed = budgets.in_memory(stage_of(batch_size=64, lr="1e-3"), 8)
    assert "lr" not in changed.flags and changed.flags["batch_size"] == "auto" and changed.number("memory") == 8
    assert changed.number("blr") * 64 / 256 == pytest.approx(1e-3), "at the batch of the recipe it is the recipe's rate"
    probe = PRESETS["full"].methods["dino_linear"].transfer
    assert budgets.in_memory(probe, 8) == probe


def test_extra_flags_reach_every_script():
    for run in unique(bench("tiny").chains(PRESETS["tiny"].choose(["simclr_linear"]), [0])):
        assert shlex.join(run.command).endswith("--num_workers 0")
