"""The training loop and its parts: order of images, processes, accumulation, faults, schedules."""

import itertools
import math

import pytest
import torch
from torch import nn

from util.data.loader import StepSampler
from util.run.dist import World
from util.run.errors import UserError
from util.training.faults import NonFiniteGuard
from util.training.optim import WarmupCosine, decay_groups, make_optimizer, unfreeze_in_stages

WORKER = "tests/gradient_worker.py"


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"), 40)


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def load(path):
    return torch.load(path, weights_only=True)


def test_the_guard_reports_a_loss_that_is_infinite_with_a_finite_gradient():
    optimizer = make_optimizer([{"params": [nn.Parameter(torch.ones(4))]}], 0.1, torch.device("cpu"))
    guard = NonFiniteGuard(optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))
    for step, loss in enumerate([1.0, math.inf, 1.0]):
        guard.step(torch.tensor(loss), torch.tensor(1.0), step)
    assert guard.first_bad_step() == 2


def test_processes_and_accumulation_share_out_the_same_gradient(images, run_script, tmp_path):
    """Eight images a step: at once, as two batches, or on two processes. Compared in float64."""
    run_script(WORKER, images, tmp_path / "one", 8, 1)
    run_script(WORKER, images, tmp_path / "accum", 4, 2)
    run_script(WORKER, images, tmp_path / "two", 4, 1, processes=2)
    run_script(WORKER, images, tmp_path / "both", 2, 2, processes=2)
    reference = load(tmp_path / "one.0.pth")
    assert len(reference["gradients"]) == 4
    for name in ("accum.0", "two.0", "two.1", "both.0", "both.1"):
        other = load(tmp_path / f"{name}.pth")
        for mine, theirs in zip(reference["gradients"], other["gradients"], strict=True):
            assert mine.keys() == theirs.keys()
            for key in mine:
                assert torch.allclose(mine[key], theirs[key], rtol=1e-9, atol=1e-13), (name, key)


def test_a_loss_that_is_nan_on_one_process_stops_all_before_any_weight_changes(images, run_script, tmp_path):
    run_script(WORKER, images, tmp_path / "good", 4, 1, "short", processes=2)
    run_script(WORKER, images, tmp_path / "bad", 4, 1, "nan", processes=2)
    after_two_steps = load(tmp_path / "good.0.pth")["model"]
    for rank in (0, 1):
        outcome = load(tmp_path / f"bad.{rank}.pth")
        assert "is not finite at step 3" in outcome["error"]  # the third
        assert all(torch.equal(after_two_steps[name], value) for name, value in outcome["model"].items())
    assert not (tmp_path / "bad-run" / "checkpoint-last.pth").exists()


def test_a_signal_during_the_evaluation_of_one_process_stops_both(images, run_script, tmp_path):
    run_script(WORKER, images, tmp_path / "out", 4, 1, "signal", processes=2)
    outcomes = [load(tmp_path / f"out.{rank}.pth") for rank in (0, 1)]
    assert [outcome["error"] for outcome in outcomes] == ["SIGTERM", "SIGTERM"]
    assert [len(outcome["gradients"]) for outcome in outcomes] == [5, 5]  # one epoch of two


def test_the_guard_lets_no_update_through_from_the_first_bad_step_on():
    weight = nn.Parameter(torch.ones(4))
    optimizer = make_optimizer([{"params": [weight]}], 0.1, torch.device("cpu"))
    guard = NonFiniteGuard(optimizer, torch.amp.GradScaler("cpu", enabled=False), torch.device("cpu"))
    history = []
    for step, gradient in enumerate([1.0, 1.0, math.inf, 1.0]):
        weight.grad = torch.full((4,), gradient)
        guard.step(torch.tensor(0.0), weight.grad.norm(), step)
        history.append(weight.detach().clone())
    assert guard.first_bad_step() == 3  # the third
    assert not torch.equal(history[0], history[1])
    assert torch.equal(history[1], history[2]) and torch.equal(history[1], history[3])


@pytest.mark.parametrize("processes, batch, accum", [(1, 12, 1), (2, 3, 2), (3, 2, 2), (4, 3, 1)])
def test_a_step_sees_the_same_images_however_it_is_shared_out(processes, batch, accum):
    reference = StepSampler(50, 12, 1, 7, World())
    reference.enter(3, 0)
    expected = [sorted(index for _, index in step) for step in reference]
    assert len(expected) == 4 and len({i for step in expected for i in step}) == 48
    shares = []
    for rank in range(processes):
        sampler = StepSampler(50, batch, accum, 7, World(rank, rank, processes))
        sampler.enter(3, 0)
        batches = [[index for epoch, index in b] for b in sampler]
        assert len(batches) == len(sampler) == 4 * accum and all(len(b) == batch for b in batches)
        shares.append([flat(batches[s * accum : (s + 1) * accum]) for s in range(4)])
    assert [sorted(flat(share[s] for share in shares)) for s in range(4)] == expected


def test_an_epoch_is_entered_at_any_step_and_epochs_differ():
    sampler = StepSampler(50, 6, 2, 0, World())
    sampler.enter(1, 0)
    whole = list(sampler)
    sampler.enter(1, 3)
    assert list(sampler) == whole[6:]
    sampler.enter(2, 0)
    assert [[i for _, i in b] for b in sampler] != [[i for _, i in b] for b in whole]
    with pytest.raises(UserError, match="larger than the data set"):
        StepSampler(10, 6, 2, 0, World())


def test_warmup_and_cosine():
    schedule = WarmupCosine(lr=1.0, min_lr=0.1, warmup_steps=4, total_steps=12)
    assert [schedule.at(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.at(4) == 1.0 and schedule.at(8) == pytest.approx(0.55) and schedule.at(12) == pytest.approx(0.1)
    # torch's own cosine, from the end of the warm-up on
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8, eta_min=0.1)
    for step in range(4, 12):
        assert schedule.at(step) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    optimizer.param_groups[0]["lr_scale"] = 0.5
    schedule.apply(optimizer, 0)
    assert optimizer.param_groups[0]["lr"] == 0.125


def small_encoder():
    model = nn.Module()
    model.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(5))
    model.norm, model.decoder_embed, model.patch_embed = nn.LayerNorm(2), nn.Linear(2, 2), nn.Linear(2, 2)
    model.pos_embed = nn.Parameter(torch.zeros(1, 3, 2), requires_grad=False)
    return model


def test_stages_open_the_encoder_from_the_top():
    model = small_encoder()
    stage = unfreeze_in_stages(model, every=3, top_k=2, always=("decoder",))
    opened = [
        sorted({name.split(".weight")[0].split(".bias")[0] for name in stage(epoch)}) for epoch in (0, 2, 3, 6, 9)
    ]
    assert opened[0] == opened[1] == ["decoder_embed"]
    assert opened[2] == ["blocks.3", "blocks.4", "decoder_embed", "norm"]
    assert opened[3] == ["blocks.1", "blocks.2", "blocks.3", "blocks.4", "decoder_embed", "norm"]
    assert opened[4] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
        "blocks.3",
        "blocks.4",
        "decoder_embed",
        "norm",
        "patch_embed",
    ]
    assert not model.pos_embed.requires_grad


def test_biases_and_norms_do_not_decay():
    decayed, plain = decay_groups(small_encoder().named_parameters(), 0.05)
    assert decayed["weight_decay"] == 0.05 and plain["weight_decay"] == 0
    assert all(p.ndim == 2 for p in decayed["params"]) and len(decayed["params"]) == 7
    assert all(p.ndim == 1 for p in plain["params"]) and len(plain["params"]) == 9
