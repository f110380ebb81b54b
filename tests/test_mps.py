"""Apple's GPUs, on a machine without one: every script runs on a stand-in that refuses what MPS refuses.

Run: python -m pytest tests/test_mps.py
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval_detection
import eval_recognition
import main_detect
import main_finetune
import main_linprobe
import main_lora
import main_pretrain
import main_simclr
from models_detect import SimplePyramid
from tests.helpers import make_identities, results_of, transfer_flags
from tests.pretend_mps import MPS, OnMPS, PretendMPS, Refused, has_kernel
from tests.test_detect import flags as detect_flags
from tests.test_detect import make_squares
from util.run import device as devices
from util.run.dist import World, join
from util.run.errors import UserError
from util.training.faults import NonFiniteGuard
from util.training.optim import make_optimizer
from visualize import reconstruct

SMALL = "--model mae_vit_nano_patch8 --input_size 32 --batch_size 4 --num_workers 0 --max_steps 2 --epochs 2 "
SMALL += "--warmup_epochs 0 --lr 1e-3 --eval_images 2 --log_every 1"


@pytest.fixture
def mps(monkeypatch):
    with PretendMPS(monkeypatch):
        yield MPS


@pytest.fixture(scope="module")
def identities(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp("data") / "identities", train=4, val=2, test=2)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, make_images):
    return make_images(tmp_path_factory.mktemp("pictures"), 12, 32)


# --- the stand-in -----------------------------------------------------------------------------------------------


def test_torch_says_what_has_a_kernel_there():
    """The table is torch's own; these four are known from its documentation and its lists of failing tests."""
    assert has_kernel("sort.stable") and has_kernel("_fused_adamw_")
    assert has_kernel("add.Tensor") and not has_kernel("take")


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.double(),
        lambda x: torch.zeros(3, dtype=torch.float64, device=x.device),
        lambda x: torch.zeros(3, dtype=torch.float64).to(x.device),
        lambda x: torch.take(x, x.long()),
        lambda x: F.adaptive_avg_pool2d(x, 5),
        lambda x: F.conv_transpose2d(x.bfloat16(), torch.ones(1, 1, 2, 2, device=x.device, dtype=torch.bfloat16)),
    ],
)
def test_what_mps_cannot_do_is_refused(mps, call):
    x = torch.ones(1, 1, 8, 8, device=mps)
    assert isinstance(x, OnMPS) and x.device.type == "mps"
    with pytest.raises(Refused):
        call(x)


def test_devices_do_not_mix_and_numbers_come_back(mps):
    x = torch.arange(6.0).view(2, 3).to(mps)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2, 3)
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()
    assert (x * 2).sum().item() == 30 and np.array_equal(x.cpu().numpy(), np.arange(6.0).reshape(2, 3))


# --- questions to the device --------------------------------------------------------------------------------------


def test_auto_takes_it_in_fp32_and_compiles_nothing(mps):
    device = devices.pick_device("auto")
    assert device.type == "mps" and devices.pick_precision("auto", device) == "fp32"
    assert not devices.use_compile("auto", device, 10**9) and devices.side_stream(device) is None
    assert not devices.augments_batches(device) and devices.inference_batch(8, device) == 8
    assert devices.widest_float(device) == torch.float32 and devices.widest_float(torch.device("cpu")) == torch.float64


def test_several_processes_on_it_are_refused_in_one_line():
    with pytest.raises(UserError, match="--device cpu"):
        join(World(0, 0, 2), MPS)


@pytest.mark.parametrize("size", [(4, 4), (5, 3), (7, 6)])
def test_area_average_is_the_one_of_torch(mps, size):
    x = torch.rand(2, 1, 12, 12)
    there = devices.area_average(x.to(mps), size)
    assert there.device.type == "mps"
    assert torch.allclose(there.cpu(), F.interpolate(x, size=size, mode="area"), atol=1e-6)


def test_pyramid_upsamples_in_full_precision(mps):
    pyramid = SimplePyramid(8, 8).to(mps)
    features = torch.rand(1, 8, 4, 4).to(mps).bfloat16()
    with devices.autocast(mps, "bf16"):
        maps = pyramid(features)
    assert [one.shape[-1] for one in maps] == [8, 4, 2, 1]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_bad_gradient_changes_no_weight(mps, precision):
    """The fused AdamW of MPS does not read found_inf: without the host's own look the weights would become NaN."""
    weight = torch.nn.Parameter(torch.ones(3, device=mps))
    optimizer = make_optimizer([{"params": [weight], "weight_decay": 0.0}], 0.1, mps, (0.9, 0.95))
    scaler = devices.grad_scaler(mps, precision)
    guard = NonFiniteGuard(optimizer, scaler, mps)
    for step, size in enumerate((1.0, float("inf"), 1.0)):
        before = weight.detach().cpu()
        scaler.scale((weight * size).sum()).backward()
        scaler.unscale_(optimizer)
        guard.step(torch.zeros((), device=mps), torch.nn.utils.get_total_norm([weight.grad]), step)
        optimizer.zero_grad()
        moved = not torch.equal(before, weight.detach().cpu())
        # under a scaler the step after an overflow counts again; without one the run ends at the next look
        assert moved == (step == 0 or (step == 2 and precision == "fp16"))
    assert guard.first_bad_step() == (2 if precision == "fp32" else 0)


# --- the scripts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        "",
        "--decoder cross --predict_ratio 0.5 --norm_pix_loss --grad_checkpoint --clip_grad 1",
        "--masking hard+lineart --refine --multiscale_loss 1 --frequency_loss 1 --colour_loss 1",
        "--predict_ratio 0.5 --fill --masking green --accum_iter 2 --precision bf16",
    ],
)
def test_pretraining_gives_the_numbers_of_the_cpu(monkeypatch, pictures, tmp_path, more):
    """Masks and crops are functions of seed, epoch and sample on every device, so the losses agree."""
    flags = ["--data_path", str(pictures), *SMALL.split(), *more.split()]
    main_pretrain.main([*flags, "--device", "cpu", "--output_dir", str(tmp_path / "cpu")])
    with PretendMPS(monkeypatch):
        main_pretrain.main([*flags, "--device", "mps", "--output_dir", str(tmp_path / "mps")])
        reconstruct.main([
            "--ckpt", str(tmp_path / "mps/checkpoint-last.pth"), "--data_path", str(pictures), "--device", "mps",
            "--mask_ratios", "0.75", "--images", "2", "--out", str(tmp_path / "out"),
        ])  # fmt: skip
    cpu, there = (results_of(tmp_path / name) for name in ("cpu", "mps"))
    assert there["device"].startswith("mps")
    assert there["val"] == pytest.approx(cpu["val"], rel=1e-4)


def test_feature_loss_of_maps_that_do_not_divide(mps):
    from util.mae.remedies import feature_loss

    target, pasted = torch.rand(2, 2, 3, 12, 12).to(mps).unbind()
    area = torch.ones(2, 1, 12, 12, device=mps)
    loss = feature_loss(target, pasted, area, lambda x: [x[:, :, ::3, ::3], x[:, :, :5, :5]])
    assert 0 < float(loss) < 4


@pytest.mark.parametrize(
    "script, more",
    [
        (main_linprobe, "--epochs 2"),
        (main_lora, "--head arcface --grad_checkpoint"),
        (main_finetune, "--mixup 0.8 --cutmix 1 --reprob 0.5 --drop_path 0.1 --layer_decay 0.75 --precision bf16"),
    ],
    ids=["linprobe", "lora", "finetune"],
)
def test_transfer_and_its_evaluation(mps, identities, tmp_path, script, more):
    script.main(transfer_flags(identities, tmp_path / "run", "--device", "mps", "--max_steps", 2, *more.split()))
    assert results_of(tmp_path / "run")["device"].startswith("mps")
    if script is main_lora:
        run = ["--ckpt", str(tmp_path / "run/checkpoint-last.pth"), "--data_path", str(identities)]
        options = (
            "--device mps --num_workers 0 --replicates 5 --negatives 20 --episodes 5 --ways 2 --shots 1 --stresses grey"
        )
        eval_recognition.main([*run, "--output_dir", str(tmp_path / "out"), *options.split()])
        assert results_of(tmp_path / "out")["closed_set"]["probes"] == 8


def test_simclr(mps, identities, tmp_path):
    flags = (
        "--model vit_nano_patch8 --input_size 16 --batch_size 4 --max_steps 2 --num_workers 0 --device mps --hue 0.1"
    )
    main_simclr.main(["--data_path", str(identities), "--output_dir", str(tmp_path), *flags.split()])
    assert results_of(tmp_path)["steps"] == 2


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_detection_and_its_evaluation(mps, tmp_path, precision):
    squares = make_squares(tmp_path / "squares", 22)
    run = detect_flags(squares, tmp_path / "run", "--device", "mps", "--max_steps", 2, "--precision", precision)
    main_detect.main(run)
    assert results_of(tmp_path / "run")["device"].startswith("mps")
    if precision == "fp32":
        flags = ["--ckpt", str(tmp_path / "run/checkpoint-last.pth"), "--data_path", str(squares), "--split", "val"]
        eval_detection.main([*flags, "--output_dir", str(tmp_path / "out"), "--device", "mps", "--replicates", "5"])
        assert 0 <= results_of(tmp_path / "out")["ap50"] <= 1
