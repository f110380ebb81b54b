"""What a user of the transfer scripts can get wrong is one line that names the thing, and exit status 2."""

from functools import partial

import pytest
import torch

import main_finetune
import main_linprobe
import main_lora
from models_mae import build_mae
from models_transfer import load_transferred
from tests import helpers
from tests.helpers import IDENTITIES, make_identities, results_of, transfer_flags
from util.training.checkpoint import read_checkpoint, save_checkpoint

MAINS = {"linprobe": main_linprobe.main, "lora": main_lora.main, "finetune": main_finetune.main}
fails = {script: partial(helpers.fails, main) for script, main in MAINS.items()}


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp("people"), train=4, val=2)


@pytest.mark.parametrize("script", MAINS)
def test_data_that_do_not_fit(people, make_images, tmp_path, capsys, script):
    def refusal(data, *more):
        return fails[script](capsys, transfer_flags(data, tmp_path / "run", *more))

    assert "--nb_classes 5" in refusal(people, "--nb_classes", 5)
    assert "nowhere" in refusal(tmp_path / "nowhere")
    flat = make_images(tmp_path / "flat", 30)
    assert "no labels" in refusal(flat) and "flat" in refusal(flat)
    stranger = make_identities(tmp_path / "stranger", train=3, val=1)
    make_identities(stranger, ("shinji",), val=1)
    assert "'shinji' is in val" in refusal(stranger)
    alone = make_identities(tmp_path / "alone", IDENTITIES[:1], train=3, val=1)
    assert "'asuka'" in refusal(alone)
    assert not (tmp_path / "run" / "checkpoint-last.pth").exists()


@pytest.mark.parametrize("script", MAINS)
def test_weights_and_models_that_do_not_fit(people, tmp_path, capsys, script):
    def refusal(*more):
        return fails[script](capsys, transfer_flags(people, tmp_path / "run", *more))

    save_checkpoint(tmp_path / "headless.pth", {"model": {"head.weight": torch.zeros(4, 128)}})
    assert "headless.pth" in refusal("--init", tmp_path / "headless.pth")
    whole = build_mae("mae_vit_nano_patch8", 16).state_dict()
    save_checkpoint(tmp_path / "decoder.pth", {"model": {k: v for k, v in whole.items() if k.startswith("decoder")}})
    assert "no encoder" in refusal("--init", tmp_path / "decoder.pth")
    save_checkpoint(tmp_path / "tiny.pth", {"model": build_mae("mae_vit_tiny_patch8", 16).state_dict()})
    assert "another model" in refusal("--init", tmp_path / "tiny.pth")
    del whole["blocks.3.attn.qkv.weight"]
    save_checkpoint(tmp_path / "holes.pth", {"model": whole})
    assert "blocks.3.attn.qkv.weight" in refusal("--init", tmp_path / "holes.pth")
    assert "none.pth" in refusal("--init", tmp_path / "none.pth")
    assert "unknown model 'vit_enormous_patch16'" in refusal("--model", "vit_enormous_patch16")
    assert "timm:no_such_net" in refusal("--model", "timm:no_such_net")
    assert "multiple of 8" in refusal("--input_size", 20)


def test_adapters_that_cannot_be(people, tmp_path, capsys):
    def refusal(*more):
        return fails["lora"](capsys, transfer_flags(people, tmp_path / "run", *more))

    assert "rank of 0" in refusal("--rank", 0)
    assert "rank of 100000" in refusal("--rank", 100000) and "at most 128" in refusal("--rank", 100000)
    assert "'embedding'" in refusal("--lora_targets", "q", "embedding")
    assert "--lora_dropout" in refusal("--lora_dropout", 1)
    assert "transformer" in refusal("--model", "timm:resnet10t", "--input_size", 32)
    assert "--mixup" in refusal("--mixup", 0.8)  # not offered here


def test_recipes_that_cannot_be(people, tmp_path, capsys):
    def refusal(script, *more):
        return fails[script](capsys, transfer_flags(people, tmp_path / "run", *more))

    assert "--mixup" in refusal("finetune", "--head", "arcface", "--mixup", 0.8)
    assert "--cutmix" in refusal("finetune", "--head", "curricularface", "--cutmix", 1)
    timm = ["--model", "timm:resnet10t", "--input_size", 32]
    assert "--layer_decay" in refusal("finetune", *timm, "--layer_decay", 0.75)
    assert "--unfreeze_every" in refusal("finetune", *timm, "--unfreeze_every", 1)
    assert "margin" in refusal("finetune", "--head", "linear", "--margin", 0.3)
    assert "out of range" in refusal("finetune", "--head", "cosface", "--margin", 1.5)
    assert "--label_fraction" in refusal("finetune", "--label_fraction", 0)
    assert "9 factors" in refusal("linprobe", "--lr_grid", *range(1, 10))
    assert "--lr_grid" in refusal("linprobe", "--lr_grid", 0)
    assert "--clip_grad" in refusal("linprobe", "--clip_grad", 1)
    assert "arcface" in refusal("linprobe", "--head", "arcface")
    assert "--margin_warmup" in refusal("finetune", "--margin_warmup", 2)
    assert "--unfreeze_every" in refusal("finetune", "--patience", 1, "--unfreeze_every", 1)
    assert "--cls_token" in refusal("finetune", *timm, "--cls_token")
    assert "--head_norm" in refusal("linprobe", "--head_norm", "--batch_size", 1)


@pytest.mark.parametrize("script, more", [("finetune", []), ("lora", ["--rank", 2]), ("linprobe", [])])
def test_a_run_goes_on_only_as_what_it_was(people, tmp_path, capsys, script, more):
    argv = partial(transfer_flags, people, tmp_path / "run", *more)
    MAINS[script](argv("--max_steps", 3))
    before = (tmp_path / "run" / "checkpoint-last.pth").read_bytes()
    others = make_identities(tmp_path / "others", ("kaworu", *IDENTITIES[1:]), train=4, val=2)
    resume = ["--resume", tmp_path / "run" / "checkpoint-last.pth"]
    assert "other classes" in fails[script](capsys, transfer_flags(others, tmp_path / "run", *more, *resume))
    assert "--resume auto" in fails[script](capsys, argv())  # a second run does not write over a first
    assert "images per step" in fails[script](capsys, argv("--resume", "auto", "--batch_size", 4))
    assert "another model" in fails[script](capsys, argv("--resume", "auto", "--head", "mlp"))
    # these two have the run's images per step and classes, and not its weights
    if script == "lora":
        assert "other lora" in fails[script](capsys, argv("--resume", "auto", "--rank", 3))
    if script == "linprobe":
        assert "another model" in fails[script](capsys, argv("--resume", "auto", "--lr_grid", 1))
    assert (tmp_path / "run" / "checkpoint-last.pth").read_bytes() == before
    assert not results_of(tmp_path / "run")["finished"]


def test_a_diverging_run_keeps_the_last_good_checkpoint(people, tmp_path, capsys):
    argv = partial(transfer_flags, people, tmp_path)
    MAINS["finetune"](argv("--max_steps", 1))
    good = (tmp_path / "checkpoint-last.pth").read_bytes()
    assert "is not finite at step" in fails["finetune"](capsys, argv("--resume", "auto", "--lr", 1e30))
    assert (tmp_path / "checkpoint-last.pth").read_bytes() == good
    assert read_checkpoint(tmp_path / "checkpoint-last.pth")["progress"]["global_step"] == 1


def test_a_device_without_room_is_not_told_as_a_damaged_checkpoint(people, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    MAINS["finetune"](transfer_flags(people, tmp_path, "--max_steps", 1))
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.nn.Module, "to", full)
        load_transferred(tmp_path / "checkpoint-last.pth")
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", full)
    with pytest.raises(torch.OutOfMemoryError):
        MAINS["finetune"](transfer_flags(people, tmp_path, "--resume", "auto"))
