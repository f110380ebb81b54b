"""scripts/export.py: what a transfer run has trained, as others read it.

Run: python -m pytest tests/test_export.py
"""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import main_linprobe
import main_lora
from models_transfer import load_transferred
from models_vit import build_vit

SIZE = 16
RECIPE = f"--model vit_nano_patch8 --input_size {SIZE} --batch_size 4 --epochs 1 --lr 0.05 --num_workers 0 --device cpu"


@pytest.fixture(scope="module")
def data(make_images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    for role in ("train", "val"):
        for name in ("asuka", "rei"):
            make_images(folder / role / name, 4)
    return folder


@pytest.fixture(scope="module")
def lora(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("lora")
    argv = f"--data_path {data} --output_dir {run} --warmup_epochs 0 --rank 2 --lora_targets q v proj fc1 {RECIPE}"
    main_lora.main(argv.split())
    return run / "checkpoint-best.pth"


def plain_with(weights, classes: int):
    model = build_vit("vit_nano_patch8", img_size=SIZE)
    model.head = torch.nn.Linear(model.embed_dim, classes)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def test_a_plain_network_gives_the_adapted_ones_outputs(import_script, lora, tmp_path):
    out = tmp_path / "new" / "weights.safetensors"
    import_script("scripts/export.py").main(["--ckpt", str(lora), "--out", str(out)])
    images = torch.rand(3, 3, SIZE, SIZE)
    trained = load_transferred(lora).model
    assert (trained.blocks[0].attn.qkv.lora_B != 0).any()
    model = plain_with(load_file(out), 2)
    torch.testing.assert_close(model(images), trained(images), rtol=0, atol=1e-5)
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["classes"]) == ["asuka", "rei"]


def test_peft_reads_the_adapters(import_script, lora, tmp_path):
    peft = pytest.importorskip("peft")
    import_script("scripts/export.py").main(["--ckpt", str(lora), "--peft", str(tmp_path / "adapter")])
    trained = load_transferred(lora)
    torch.manual_seed(trained.args["seed"])
    base = build_vit("vit_nano_patch8", img_size=SIZE)  # the random start weights of that run
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    images = torch.rand(3, 3, SIZE, SIZE)
    expected = trained.model.embed(images)
    torch.testing.assert_close(adapted.base_model.model.embed(images), expected, rtol=0, atol=1e-5)


def test_what_cannot_be_exported_is_one_line(import_script, data, lora, tmp_path, capsys):
    main_linprobe.main(f"--data_path {data} --output_dir {tmp_path / 'probe'} {RECIPE}".split())
    export = import_script("scripts/export.py").main
    probe = tmp_path / "probe" / "checkpoint-best.pth"
    for argv, reason in (
        (["--ckpt", str(probe), "--peft", str(tmp_path / "adapter")], "no LoRA adapters"),
        (["--ckpt", str(lora)], "nothing to write"),
        (["--ckpt", str(tmp_path / "none.pth"), "--out", str(tmp_path / "w.safetensors")], "does not exist"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            export(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and reason in error and error.count("\n") == 1
