"""The transfer scripts as their users run them: what they train, what they keep, and what they report."""

import json
from importlib import metadata

import numpy as np
import pytest
import timm
import torch

import main_finetune
import main_linprobe
import main_lora
from models_mae import build_mae
from models_transfer import load_recogniser, load_transferred
from models_vit import VisionTransformer
from tests import helpers
from tests.helpers import IDENTITIES, assert_same, make_identities, outcome, results_of, transfer_flags
from util.data.augment import IMAGENET_MEAN, IMAGENET_STD, EvalCrop
from util.data.sources import open_source
from util.run.errors import UserError
from util.training.checkpoint import read_checkpoint, save_checkpoint

MAINS = {"linprobe": main_linprobe.main, "lora": main_lora.main, "finetune": main_finetune.main}
TRAINED = {
    "linprobe": "--epochs 4 --views 3 --lr_grid 0.3 3 --head_norm",
    "lora": "--epochs 4 --rank 2 --head cosface --scale 8 --head_lr 5e-3",
    "finetune": "--epochs 6",
}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp("people"))


def save_encoder(path, seed):
    """A checkpoint of a pre-training run, with random weights."""
    torch.manual_seed(seed)
    save_checkpoint(path, {"model": build_mae("mae_vit_nano_patch8", 16).state_dict()})
    return path


@pytest.fixture(scope="module")
def init(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("init") / "pretrained.pth", seed=1)


@pytest.fixture(scope="module")
def trained(people, init, tmp_path_factory):
    """Script -> the folder of a finished run of it."""
    runs = {}
    for script, more in TRAINED.items():
        runs[script] = tmp_path_factory.mktemp("trained") / script
        MAINS[script](transfer_flags(people, runs[script], "--init", init, *more.split()))
    return runs


def pictures(people, role, size=16):
    """(N, 3, size, size) in [0, 1], and the names of who they show."""
    source, crop = open_source(people, role), EvalCrop((size, size))
    records = [source.record(i) for i in range(len(source))]
    images = [crop(source.load(i), record) for i, record in enumerate(records)]
    return torch.stack(images).double().div(255).float(), [record["file_name"].split("/")[1] for record in records]


@torch.inference_mode()
def top1(model, classes, images, names) -> float:
    """One picture at a time."""
    hits = [classes[model(image[None]).argmax()] == name for image, name in zip(images, names, strict=True)]
    return np.mean(hits).item()


@pytest.mark.parametrize("script", MAINS)
def test_the_best_checkpoint_has_the_figures_of_the_results(people, trained, script):
    results, lines = results_of(trained[script]), outcome(trained[script])[3]
    loaded = load_transferred(trained[script] / "checkpoint-best.pth")
    assert loaded.classes == IDENTITIES and not loaded.model.training
    for role, count in (("val", 20), ("test", 16)):
        images, names = pictures(people, role)
        assert len(names) == count
        assert top1(loaded.model, loaded.classes, images, names) == results[role]["top1"]
    figures = [line["val_top1"] for line in lines]
    best = figures.index(max(figures))  # the first of equals
    assert results["val"]["top1"] == figures[best] and results["best_epoch"] == best + 1
    assert read_checkpoint(trained[script] / "checkpoint-best.pth")["epoch"] == best
    assert results["val"]["top5"] == results["test"]["top5"] == 1  # of four identities


def test_fine_tuning_learns_who_is_who(trained):
    results = results_of(trained["finetune"])
    assert results["val"]["top1"] > 0.6 and results["test"]["top1"] > 0.6  # chance is 0.25
    assert results["val"]["macro_f1"] > 0.6


@pytest.mark.parametrize("script", MAINS)
def test_results_say_what_was_done(trained, script):
    results = results_of(trained[script])
    promised = "trainable_params total_params peak_memory_bytes seconds_per_epoch images_per_s epochs steps val test"
    traces = "git_commit command args seed device versions data_fingerprint date"
    assert {*promised.split(), *traces.split()} <= results.keys()
    for role in ("val", "test"):
        assert {"top1", "top5", "macro_f1"} <= results[role].keys()
        assert all(0 <= results[role][name] <= 1 for name in ("top1", "top5", "macro_f1"))
    epochs = {"linprobe": 4, "lora": 4, "finetune": 6}[script]
    assert results["epochs"] == epochs and results["steps"] == 6 * epochs and results["images_seen"] == 48 * epochs
    assert results["finished"] and results["seed"] == 0 and results["bad_images"] == 0
    assert results["seconds_per_epoch"] > 0 and results["images_per_s"] > 0
    assert results["data_fingerprint"] == open_source(results["args"]["data_path"], "train").fingerprint
    assert results["versions"]["torch"] == metadata.version("torch")


def test_parameters_are_counted(trained):
    encoder = sum(p.numel() for p in VisionTransformer(16, 8, 128, 6, 4).parameters())
    head = 128 * 4 + 4
    adapters = 2 * 6 * (4 * (128 + 128) + 2 * (128 + 512))  # rank x blocks x (q, k, v, proj and fc1, fc2)
    counts = {
        script: [results_of(run)[f"{kind}_params"] for kind in ("trainable", "total")]
        for script, run in trained.items()
    }
    assert counts["linprobe"] == [head, encoder + head]  # of one head, though two were tried
    assert counts["lora"] == [adapters + 128 * 4, encoder + adapters + 128 * 4]  # cosines have no bias
    assert counts["finetune"] == [encoder + head] * 2


def test_a_lora_checkpoint_holds_adapters_and_head_only(trained):
    for name in ("checkpoint-best.pth", "checkpoint-last.pth"):
        state = read_checkpoint(trained["lora"] / name)["model"]
        adapters = {key for key in state if key.endswith((".lora_A", ".lora_B"))}
        assert len(adapters) == 6 * 4 * 2 and set(state) - adapters == {"head.weight"}
    full, small = (trained[script] / "checkpoint-best.pth" for script in ("finetune", "lora"))
    assert small.stat().st_size < full.stat().st_size / 10
    assert any(state[key].abs().max() > 0 for key in adapters if key.endswith(".lora_B"))


@pytest.mark.parametrize("script", ["lora", "linprobe"])
def test_the_base_of_a_loaded_model_is_the_start_weights_bit_for_bit(trained, init, script):
    start = read_checkpoint(init)["model"]
    state = load_transferred(trained[script] / "checkpoint-best.pth").model.state_dict()
    shared = [name for name in start if name in state]
    assert len(shared) == 6 * 12 + 4  # blocks, patch embedding, class token, position embedding
    for name in shared:
        assert torch.equal(state[name], start[name]), name
    config = load_transferred(trained[script] / "checkpoint-best.pth").lora
    assert config is None if script == "linprobe" else config.rank == 2


@pytest.mark.parametrize("script", ["lora", "linprobe"])
def test_other_start_weights_are_noticed(people, tmp_path, capsys, script):
    init, run = save_encoder(tmp_path / "init.pth", seed=1), tmp_path / "run"
    argv = transfer_flags(people, run, "--init", init, *(["--rank", 2] if script == "lora" else []))
    MAINS[script]([*argv, "--max_steps", "8"])
    load_transferred(run / "checkpoint-best.pth")
    save_encoder(init, seed=2)
    assert "base" in helpers.fails(MAINS[script], capsys, [*argv, "--resume", "auto"])
    with pytest.raises(UserError, match="other start weights"):
        load_transferred(run / "checkpoint-best.pth")
    save_encoder(init, seed=1)
    MAINS[script]([*argv, "--resume", "auto"])


@pytest.mark.parametrize(
    "change", [{"model": "vit_tiny_patch8", "init": None}, {"model": "vit_tiny_patch8"}, {"seed": 1, "init": None}]
)
def test_adapters_of_another_model_are_refused(trained, tmp_path, change):
    checkpoint = read_checkpoint(trained["lora"] / "checkpoint-best.pth")
    checkpoint["args"] |= change
    save_checkpoint(tmp_path / "other.pth", checkpoint)
    with pytest.raises(UserError) as refusal:
        load_transferred(tmp_path / "other.pth")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("script", ["linprobe", "lora", "finetune"])
def test_a_run_of_a_transfer_script_is_a_recogniser_with_its_head(trained, script):
    path = trained[script] / "checkpoint-best.pth"
    expected, found = load_transferred(path), load_recogniser(str(path))
    assert found.classes == expected.classes and not any("lora_" in name for name in found.model.state_dict())
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(found.model(images), expected.model(images), rtol=1e-4, atol=1e-5)


def test_weights_of_an_encoder_are_a_recogniser_without_a_head(init, tmp_path):
    bare = load_recogniser(str(init), model="vit_nano_patch8", input_size=16)
    assert bare.classes == () and isinstance(bare.model.head, torch.nn.Identity)
    start = read_checkpoint(init)["model"]
    assert torch.equal(bare.model.blocks[0].attn.qkv.weight, start["blocks.0.attn.qkv.weight"])
    save_checkpoint(tmp_path / "says.pth", {"model": start, "args": {"model": "mae_vit_nano_patch8", "input_size": 16}})
    told = load_recogniser(str(tmp_path / "says.pth"))
    assert told.args["model"] == "vit_nano_patch8" and told.args["input_size"] == 16
    assert torch.equal(told.model.pos_embed, bare.model.pos_embed)
    with pytest.raises(UserError, match="give --model"):
        load_recogniser(str(init))


def test_a_pretraining_checkpoint_is_no_transferred_model(init):
    with pytest.raises(UserError, match="no checkpoint of a transfer run"):
        load_transferred(init)


@pytest.fixture
def encoded(monkeypatch):
    """A list that grows by the number of images whenever the encoder runs."""
    counts, embed = [], VisionTransformer.embed
    monkeypatch.setattr(
        VisionTransformer, "embed", lambda self, images: counts.append(len(images)) or embed(self, images)
    )
    return counts


def test_a_probe_runs_the_encoder_once_per_view_and_not_per_epoch(people, tmp_path, encoded):
    MAINS["linprobe"](transfer_flags(people, tmp_path / "a", "--views", 3, "--epochs", 7, "--lr_grid", 1))
    assert sum(encoded) == 3 * 48 + 20 + 16
    encoded.clear()
    MAINS["linprobe"](transfer_flags(people, tmp_path / "b", "--views", 3, "--epochs", 9, "--head", "mlp"))
    assert not encoded
    MAINS["linprobe"](transfer_flags(people, tmp_path / "c", "--views", 4))  # one more
    assert sum(encoded) == 48
    encoded.clear()
    MAINS["linprobe"](transfer_flags(people, tmp_path / "d", "--views", 1, "--feature_cache", tmp_path / "elsewhere"))
    assert sum(encoded) == 48 + 20 + 16
    results = results_of(tmp_path / "a")
    assert results["speedup_over_rerunning"] > 0 and results["encoder_pass_seconds"] > 0
    spent = results["encoder_pass_seconds"] * 3 + results["heads_seconds"]
    assert results["speedup_over_rerunning"] == pytest.approx(7 * results["encoder_pass_seconds"] / spent, rel=1)


@pytest.mark.parametrize("more", ["", "--head mlp --head_norm"])
def test_a_rate_of_the_grid_trains_as_it_does_alone(people, tmp_path, more):
    grid, cache = [0.3, 3.0, 30.0], ["--feature_cache", tmp_path / "features", *more.split()]
    MAINS["linprobe"](transfer_flags(people, tmp_path / "grid", "--lr_grid", *grid, *cache))
    together = outcome(tmp_path / "grid")[0]
    assert {name.split(".")[1] for name in together} == {"0", "1", "2"}
    alone = {}
    for number, factor in enumerate(grid):
        run = tmp_path / f"{factor}"
        MAINS["linprobe"](transfer_flags(people, run, "--lr_grid", factor, *cache))
        prefix = f"heads.{number}."
        own = {name.removeprefix(prefix): value for name, value in together.items() if name.startswith(prefix)}
        assert_same(own, {name.removeprefix("heads.0."): value for name, value in outcome(run)[0].items()})
        alone[1e-3 * factor] = run
    # the best epoch of the best rate
    lines = {lr: outcome(run)[3] for lr, run in alone.items()}
    results, best = results_of(tmp_path / "grid"), read_checkpoint(tmp_path / "grid" / "checkpoint-best.pth")
    assert results["val"]["top1"] == max(line["val_top1"] for own in lines.values() for line in own)
    line = lines[results["val"]["lr"]][best["epoch"]]
    assert {name: line[f"val_{name}"] for name in results["val"]} == results["val"]
    equals = [
        own[best["epoch"]]["val_loss"] for own in lines.values() if own[best["epoch"]]["val_top1"] == line["val_top1"]
    ]
    assert line["val_loss"] == min(equals)


def test_a_probe_keeps_the_head_of_the_best_rate(people, tmp_path):
    # the other rate moves nothing, so it is alike in every epoch
    MAINS["linprobe"](transfer_flags(people, tmp_path / "grid", "--lr_grid", 1e-9, 10, "--epochs", 3))
    MAINS["linprobe"](transfer_flags(people, tmp_path / "alone", "--lr_grid", 10, "--epochs", 3))
    grid, alone = (read_checkpoint(tmp_path / name / "checkpoint-best.pth") for name in ("grid", "alone"))
    assert results_of(tmp_path / "grid")["val"]["lr"] == pytest.approx(1e-2)
    assert set(grid["model"]) == {"head.weight", "head.bias"}
    assert_same(grid["model"], alone["model"])
    assert results_of(tmp_path / "grid")["test"] == results_of(tmp_path / "alone")["test"]


@pytest.mark.parametrize("pooling", ["--global_pool", "--cls_token"])
def test_a_fine_tuned_checkpoint_is_a_plain_vision_transformer(people, trained, tmp_path, pooling):
    """timm loads it, and gives the same scores."""
    run = trained["finetune"]
    if pooling == "--cls_token":
        run = tmp_path
        MAINS["finetune"](transfer_flags(people, run, pooling, "--epochs", 1))
    mean = pooling == "--global_pool"
    plain = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=8, embed_dim=128, depth=6, num_heads=4, num_classes=4,
        global_pool="avg" if mean else "token", fc_norm=mean,
    ).eval()  # fmt: skip
    state = read_checkpoint(run / "checkpoint-best.pth")["model"]
    assert state.keys() == plain.state_dict().keys() and {"head.weight", "head.bias"} <= state.keys()
    assert ("fc_norm.weight" in state) == mean and ("norm.weight" in state) != mean
    plain.load_state_dict(state)
    images, _ = pictures(people, "val")
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.inference_mode():
        expected = plain((images - mean) / std)
        scores = load_transferred(run / "checkpoint-best.pth").model(images)
    assert (scores - expected).abs().max() < 1e-4 and expected.std() > 0.01


def test_the_position_embedding_and_all_else_is_trained(trained, init):
    start, state = read_checkpoint(init)["model"], read_checkpoint(trained["finetune"] / "checkpoint-last.pth")["model"]
    still = [name for name in state if name in start and torch.equal(state[name], start[name])]
    assert still == []


def test_stages_train_from_the_top(people, init, tmp_path):
    argv = ["--init", init, "--unfreeze_every", 1, "--unfreeze_blocks", 2]
    MAINS["finetune"](transfer_flags(people, tmp_path, *argv))
    start, state = read_checkpoint(init)["model"], read_checkpoint(tmp_path / "checkpoint-last.pth")["model"]
    moved = {name for name in state if name in start and not torch.equal(state[name], start[name])}
    assert moved and {name.split(".")[1] for name in moved} == {"4", "5"}


@pytest.mark.parametrize("script, more", [("finetune", []), ("lora", ["--rank", 2]), ("linprobe", [])])
def test_a_share_of_the_labels(people, tmp_path, capsys, script, more):
    MAINS[script](transfer_flags(people, tmp_path, "--label_fraction", 0.5, "--epochs", 1, *more))
    assert "24 images, 3 steps of 8 images" in capsys.readouterr().out
    results = results_of(tmp_path)
    assert results["images_seen"] == 24
    assert results["data_fingerprint"] != open_source(people, "train").fingerprint


def test_a_network_of_timm_trains(people, tmp_path):
    argv = ["--model", "timm:resnet10t", "--input_size", 32, "--epochs", 1, "--batch_size", 16]
    MAINS["finetune"](transfer_flags(people, tmp_path, *argv))
    loaded, results = load_transferred(tmp_path / "checkpoint-best.pth"), results_of(tmp_path)
    images, names = pictures(people, "val", size=32)
    assert results["val"]["top1"] == top1(loaded.model, loaded.classes, images, names)
    net = timm.create_model("resnet10t", num_classes=4)
    assert results["total_params"] == sum(parameter.numel() for parameter in net.parameters())


def test_rates_of_encoder_and_head(people, tmp_path):
    """--lr and --head_lr are absolute, and a layer's rate falls from the top by --layer_decay."""
    argv = ["--lr", 1e-3, "--head_lr", 4e-3, "--layer_decay", 0.5, "--max_steps", 6, "--warmup_epochs", 1]
    MAINS["finetune"](transfer_flags(people, tmp_path, *argv))
    rates = {group["lr"] for group in outcome(tmp_path)[1]["param_groups"]}
    expected = [4e-3, *(1e-3 * 0.5**k for k in range(8))]  # above the blocks, six blocks, the embedding
    assert sorted(rates) == pytest.approx(sorted(expected))


@pytest.mark.parametrize(
    "script, changes",
    [
        (
            "finetune",
            "drop_path=0.3 mixup=0.8 cutmix=1 smoothing=0.1 reprob=1 color_jitter=0.2 min_crop=0.2 layer_decay=0.5 "
            "weight_decay=5 clip_grad=0.01 lr=2e-3 head_lr=2e-3 blr=1 seed=1 head=mlp",
        ),
        ("lora", "lora_dropout=0.3 alpha=1 lora_targets=v rank=3 smoothing=0.1 color_jitter=0.2"),
        ("linprobe", "views=1 weight_decay=5 min_crop=0.2 color_jitter=0.2 seed=1 lr=2e-3"),
    ],
    ids=["finetune", "lora", "linprobe"],
)
def test_every_flag_of_a_recipe_counts(people, tmp_path, script, changes):
    def train_loss(*change):
        run = tmp_path / "_".join(change or ("plain",))
        start = ["--lr_grid", 1, "--epochs", 2] if script == "linprobe" else ["--epochs", 1]
        MAINS[script](transfer_flags(people, run, *start, *change))
        return outcome(run)[3][-1]["train_loss"]

    losses = {change: train_loss(*f"--{change}".split("=")) for change in changes.split()}
    assert train_loss() not in losses.values()
    assert len(set(losses.values())) == len(losses), losses


def test_the_margin_grows_over_its_warm_up(people, tmp_path):
    runs = {"none": ["--margin", 0], "grown": ["--margin_warmup", 1], "full": []}
    for name, more in runs.items():
        MAINS["finetune"](transfer_flags(people, tmp_path / name, "--head", "arcface", "--scale", 8, *more))
    none, grown, full = (outcome(tmp_path / name)[3] for name in runs)
    assert grown[0] == none[0] and full[0]["train_loss"] > none[0]["train_loss"] + 1
    assert grown[1]["train_loss"] > none[1]["train_loss"] + 1


def test_data_without_a_test_split_have_no_test_figures(tmp_path):
    people = make_identities(tmp_path / "people", train=12, val=3)
    MAINS["finetune"](transfer_flags(people, tmp_path / "run", "--epochs", 1))
    assert results_of(tmp_path / "run").get("test") is None and results_of(tmp_path / "run")["finished"]


def test_the_run_folder_holds_what_was_promised(trained):
    for script, run in trained.items():
        names = {path.name for path in run.iterdir()}
        assert {"args.json", "log.txt", "checkpoint-last.pth", "checkpoint-best.pth", "results.json"} <= names
        assert any(name.startswith("events.out.tfevents") for name in names)
        assert json.loads((run / "args.json").read_text())["epochs"] == results_of(run)["epochs"], script
