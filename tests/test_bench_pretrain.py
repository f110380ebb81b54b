"""The benchmark compares like with like and writes the agreed file.

Run: python -m pytest tests/test_bench_pretrain.py
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from models_mae import MaskedAutoencoder
from tests.conftest import SMALL_MAE


@pytest.fixture(scope="module")
def bench(import_script):
    return import_script("scripts/bench_pretrain.py")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_official_design_has_our_loss_and_gradients(bench, norm_pix_loss):
    torch.manual_seed(0)
    ours = MaskedAutoencoder(**SMALL_MAE, norm_pix_loss=norm_pix_loss)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    design = bench.OfficialDesign(**SMALL_MAE, norm_pix_loss=norm_pix_loss)
    design.load_state_dict(ours.state_dict())
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    loss, reference = ours(images, 0.75, noise)[0], design(images, 0.75, noise)
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    loss.backward()
    reference.backward()
    gradients = {name: parameter.grad for name, parameter in design.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=0, msg=name)


def test_the_official_design_is_what_it_says(bench, monkeypatch):
    """Every patch goes through the convolution, and no fused attention is called."""
    design = bench.OfficialDesign(**SMALL_MAE)
    shapes = []
    design.patch_embed.proj.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    design(torch.randn(2, 3, 32, 32), 0.75, torch.rand(2, 16))
    assert shapes == [(2, 48, 4, 4)]


def args_for(bench, out: Path, *more: str) -> list[str]:
    flags = "--model mae_vit_nano_patch16 --input_size 32 --batch_size 2 --steps 2 --device cpu --precision fp32"
    return ["--out", str(out), *flags.split(), *more]


def test_contenders_stay_together_while_they_learn(bench, tmp_path):
    """Same weights, same steps: after three of them the losses still agree, so all optimizers do the same."""
    args = bench.get_args(args_for(bench, tmp_path / "bench.json"))
    weights = bench.build_mae(args.model, args.input_size).state_dict()
    names = ["ours", "official_design"] + ["hf"] * bool(importlib.util.find_spec("transformers"))
    contenders = [bench.Contender(name, args, torch.device("cpu"), "fp32", weights) for name in names]
    batch = bench.make_batch(args, torch.device("cpu"))
    before = bench.assert_same_objective(contenders, batch)
    for contender in contenders:
        for _ in range(3):
            contender.step(*batch)
    assert bench.assert_same_objective(contenders, batch) < before


def test_another_objective_is_noticed(bench, tmp_path):
    args = bench.get_args(args_for(bench, tmp_path / "bench.json"))
    weights = bench.build_mae(args.model, args.input_size).state_dict()
    contenders = [
        bench.Contender(name, args, torch.device("cpu"), "fp32", weights) for name in ("ours", "official_design")
    ]
    contenders[1].model.norm_pix_loss = True
    with pytest.raises(AssertionError, match="official_design does not compute our objective"):
        bench.assert_same_objective(contenders, bench.make_batch(args, torch.device("cpu")))


def test_result_file(bench, tmp_path):
    out = tmp_path / "new" / "bench.json"
    bench.main(args_for(bench, out, "--threads", "1"))
    result = json.loads(out.read_text())
    names = ["ours", "official_design"] + ["hf"] * bool(importlib.util.find_spec("transformers"))
    for name in names:
        assert result[name]["ms_per_step"] > 0 and result[name]["peak_memory_bytes"] > 0
        assert len(result[name]["ms_of_each_round"]) == 2
    official, ours = result["official_design"]["ms_per_step"], result["ours"]["ms_per_step"]
    assert result["ratio_official"] == pytest.approx(official / ours)
    assert (result["ratio_hf"] is not None) == ("hf" in names)
    floor = 3 * 4 * sum(p.numel() for p in bench.build_mae("mae_vit_nano_patch16", 32).parameters())
    assert result["ours"]["peak_memory_bytes"] > floor  # at least weights and both moments of AdamW, in bytes
    assert result["provenance"]["versions"]["torch"] and result["wall_seconds"] > 0


def test_an_input_size_that_does_not_divide_is_one_line(bench, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--out", str(tmp_path / "bench.json"), "--model", "mae_vit_nano_patch16", "--input_size", "30"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: an input of 30 x 30 px")
