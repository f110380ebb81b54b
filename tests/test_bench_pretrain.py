"""The benchmark compares like with like and writes the agreed file.

Run: python -m pytest tests/test_bench_pretrain.py
"""

import json
from pathlib import Path

import pytest
import torch

from models_mae import MaskedAutoencoder, build_mae
from scripts.contenders import EXACT, Contender, OfficialDesign, installed
from tests.conftest import SMALL_MAE

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(import_script):
    return import_script("scripts/bench_pretrain.py")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_official_design_has_our_loss_and_gradients(norm_pix_loss):
    torch.manual_seed(0)
    ours = MaskedAutoencoder(**SMALL_MAE, norm_pix_loss=norm_pix_loss)
    for parameter in ours.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    design = OfficialDesign(**SMALL_MAE, norm_pix_loss=norm_pix_loss)
    design.load_state_dict(ours.state_dict())
    images, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    loss, reference = ours(images, 0.75, noise, predict_ratio=1.0), design(images, 0.75, noise)
    torch.testing.assert_close(loss, reference, atol=1e-5, rtol=0)
    loss.backward()
    reference.backward()
    gradients = {name: parameter.grad for name, parameter in design.named_parameters()}
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad.abs().max() > 0, name
            torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=0, msg=name)


def test_the_official_design_is_what_it_says(monkeypatch):
    """Every patch goes through the convolution, and no fused attention is called."""
    design = OfficialDesign(**SMALL_MAE)
    shapes = []
    design.patch_embed.proj.register_forward_hook(lambda module, given, out: shapes.append(tuple(out.shape)))
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    design(torch.randn(2, 3, 32, 32), 0.75, torch.rand(2, 16))
    assert shapes == [(2, 48, 4, 4)]


def args_for(out: Path, *more: str) -> list[str]:
    flags = "--model mae_vit_nano_patch16 --input_size 32 --batch_size 2 --steps 2 --device cpu --precision fp32"
    return ["--out", str(out), *flags.split(), *more]


def losses_of(contenders: list[Contender], batch) -> dict[str, float]:
    with torch.no_grad():
        return {contender.name: float(contender.loss(*batch)) for contender in contenders}


def test_contenders_stay_together_while_they_learn(bench, tmp_path):
    """Same weights, same steps: after three of them the losses still agree, so all optimizers do the same."""
    args = bench.get_args(args_for(tmp_path / "bench.json"))
    weights = build_mae(args.model, args.input_size).state_dict()
    names = [name for name in EXACT if installed(name) and name != "ours_compiled"]
    contenders = [Contender(name, args, CPU, "fp32", weights) for name in names]
    batch = bench.make_batch(args, CPU)
    before = losses_of(contenders, batch)
    bench.check_same_objective(before, "fp32")
    for contender in contenders:
        for _ in range(3):
            contender.step(*batch)
    after = losses_of(contenders, batch)
    bench.check_same_objective(after, "fp32")
    assert after["ours"] < before["ours"]


def test_another_objective_is_noticed(bench, tmp_path):
    args = bench.get_args(args_for(tmp_path / "bench.json"))
    weights = build_mae(args.model, args.input_size).state_dict()
    contenders = [Contender(name, args, CPU, "fp32", weights) for name in ("ours", "official_design")]
    contenders[1].model.norm_pix_loss = True
    with pytest.raises(AssertionError, match="official_design does not compute our objective"):
        bench.check_same_objective(losses_of(contenders, bench.make_batch(args, CPU)), "fp32")


def test_the_fast_option_decodes_a_third(bench, tmp_path):
    args = bench.get_args(args_for(tmp_path / "bench.json"))
    contender, predicted = Contender("ours_fast", args, CPU, "fp32"), []
    contender.model.decoder_pred.register_forward_hook(lambda module, given, out: predicted.append(out.shape[1]))
    contender.step(*bench.make_batch(args, CPU))
    assert predicted == [1]  # 4 patches, 3 of them removed


def test_flops_are_those_of_the_products(bench, tmp_path):
    """By hand, for each product of the step: 2 x rows x columns x depth, thrice (forward and two gradients)."""
    args = bench.get_args(args_for(tmp_path / "bench.json", "--input_size", "64"))
    dim, n, length, kept = 128, 2, 16, 4
    masked = length - kept

    def block(tokens: int, last: int) -> int:
        qkv, proj, mlp = dim * (2 * tokens + last) * dim, last * dim * dim, 2 * last * dim * 4 * dim
        return 2 * n * (qkv + proj + mlp + 2 * last * tokens * dim)

    encoder = 6 * block(1 + kept, 1 + kept)
    decoder = block(1 + length, 1 + length) + block(1 + length, masked)
    embed = 2 * n * kept * 768 * dim
    ends = 2 * n * ((1 + kept) * dim * dim + masked * dim * 768)
    # the pixels need no gradient
    assert bench.step_flops(args) == 3 * (encoder + decoder + ends) + 2 * embed


def test_result_file(bench, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    bench.main(args_for(out, "--threads", "1"))
    result = json.loads(out.read_text())
    names = [name for name in ("ours", "ours_fast", "official_design", "hf", "lightly") if installed(name)]
    for name in names:
        assert result[name]["ms_per_step"] > 0 and result[name]["peak_memory_bytes"] > 0
        assert len(result[name]["ms_of_each_round"]) == 2
    official, ours = result["official_design"]["ms_per_step"], result["ours"]["ms_per_step"]
    assert result["ratio_official"] == pytest.approx(official / ours)
    assert result["ratio_official_ours_fast"] == pytest.approx(official / result["ours_fast"]["ms_per_step"])
    assert (result["ratio_hf"] is not None) == ("hf" in names)
    assert (result["ratio_lightly"] is not None) == ("lightly" in names)
    share = result["step_flops"] / (ours / 1e3) / result["matmul_flops_per_s"]
    assert result["ours"]["mfu"] == pytest.approx(share) and result["ours_fast"]["mfu"] is None
    floor = 3 * 4 * sum(p.numel() for p in build_mae("mae_vit_nano_patch16", 32).parameters())
    assert result["ours"]["peak_memory_bytes"] > floor  # at least weights and both moments of AdamW, in bytes
    assert result["provenance"]["versions"]["torch"] and result["wall_seconds"] > 0
    assert all(f"| {name} |" in capsys.readouterr().out for name in names[:1])


def test_what_is_not_installed_is_said(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "installed", lambda name: name != "lightly")
    args = bench.get_args(args_for(tmp_path / "bench.json", "--contenders", "lightly", "official_design"))
    assert bench.present(args) == ["ours", "official_design"]
    assert "lightly is left out" in capsys.readouterr().out


def test_an_input_size_that_does_not_divide_is_one_line(bench, tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(["--out", str(tmp_path / "bench.json"), "--model", "mae_vit_nano_patch16", "--input_size", "30"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: an input of 30 x 30 px")
