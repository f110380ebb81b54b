"""LARS against a NumPy reference of its update, torch's SGD where they agree, and the loop's guard.

Run: python -m pytest tests/test_lars.py
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from util.run.device import grad_scaler
from util.training.faults import NonFiniteGuard
from util.training.optim import LARS, WarmupCosine, transfer_groups

CPU = torch.device("cpu")


class Net(nn.Module):
    """Weights of 4, 2 and 1 dimensions and a head, as `transfer_groups` knows it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)


def by_numpy(weight, gradients, rates, decay, momentum=0.9, trust=1e-3):
    """The weights after all steps: the update of SimCLR's optimizer (arXiv 2002.05709), written out."""
    weight, velocity = weight.astype(np.float64), 0.0
    for gradient, lr in zip(gradients, rates, strict=True):
        if weight.ndim > 1:
            gradient = gradient + decay * weight
            lr = lr * trust * np.sqrt((weight**2).sum()) / np.sqrt((gradient**2).sum())
        velocity = momentum * velocity + lr * gradient
        weight = weight - velocity
    return weight


def test_the_update_is_that_of_the_reference():
    model = Net().double()
    start = copy.deepcopy(model)
    optimizer = LARS(transfer_groups(model, 0.1, head_scale=3.0), lr=0.0)
    schedule = WarmupCosine(lr=0.7, min_lr=0.0, warmup_steps=2, total_steps=6)
    seen = {name: [] for name, _ in model.named_parameters()}
    for step in range(6):
        schedule.apply(optimizer, step)
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            seen[name].append(parameter.grad.numpy().copy())
        optimizer.step()
    for name, parameter in model.named_parameters():
        scale = 3.0 if name.startswith("head.") else 1.0
        before = start.get_parameter(name).detach().numpy()
        expected = by_numpy(before, seen[name], [scale * schedule.at(step) for step in range(6)], decay=0.1)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-14)
        assert np.abs(expected - before).max() > 1e-4


def test_biases_and_norms_are_those_of_momentum_sgd_whatever_the_decay():
    models = [Net(), Net()]
    ours = LARS(transfer_groups(models[0], 0.5), lr=0.1)
    one_dimensional = [parameter for parameter in models[1].parameters() if parameter.ndim == 1]
    theirs = torch.optim.SGD(one_dimensional, lr=0.1, momentum=0.9)
    for step in range(4):
        for model in models:
            give_gradients(model, step)
        ours.step()
        theirs.step()
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.allclose(one, other, atol=1e-6) == (one.ndim == 1)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_the_length_of_a_matrix_gradient_does_not_count(factor):
    models = [Net().double(), Net().double()]
    for model, scale in zip(models, (1.0, factor), strict=True):
        give_gradients(model, 0)
        for parameter in model.parameters():
            parameter.grad *= scale
        LARS(transfer_groups(model, 0.0), lr=0.5).step()
    assert torch.allclose(models[0].conv.weight, models[1].conv.weight, rtol=1e-9)
    assert not torch.allclose(models[0].conv.bias, models[1].conv.bias)
    moved = (models[0].conv.weight - Net().double().conv.weight).norm() / Net().conv.weight.norm()
    assert moved.item() == pytest.approx(0.5 * 1e-3, rel=1e-5)  # the relative step is lr x trust


def test_zeros_divide_nothing():
    weights = [nn.Parameter(torch.zeros(3, 3)), nn.Parameter(torch.ones(3, 3))]
    weights[0].grad, weights[1].grad = torch.ones(3, 3), torch.zeros(3, 3)
    LARS([{"params": weights}], lr=0.25).step()
    assert torch.equal(weights[0], torch.full((3, 3), -0.25)) and torch.equal(weights[1], torch.ones(3, 3))


def test_what_has_no_gradient_stays():
    weight, frozen = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([{"params": [weight, frozen], "weight_decay": 0.1}], lr=1.0).step()
    assert torch.equal(frozen, torch.ones(2, 2)) and not torch.equal(weight, frozen)


def test_the_guard_lets_nothing_through_from_a_bad_step_on():
    model = Net()
    optimizer = LARS(transfer_groups(model, 0.1), lr=0.1)
    guard = NonFiniteGuard(optimizer, grad_scaler(CPU, "fp32"), CPU)

    def step(number: int, norm: float) -> dict:
        give_gradients(model, number)
        if not np.isfinite(norm):
            model.conv.weight.grad[0, 0, 0, 0] = torch.nan
        guard.step(torch.tensor(1.0), torch.tensor(norm), number)
        return copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])

    first, good, bad, later = step(0, 1.0), step(1, 1.0), step(2, float("nan")), step(3, 1.0)
    assert not torch.equal(first[0]["conv.weight"], good[0]["conv.weight"])
    for held in (bad, later):
        assert all(torch.equal(held[0][name], value) for name, value in good[0].items())
        for number, state in good[1].items():
            assert torch.equal(held[1][number]["momentum_buffer"], state["momentum_buffer"])
    assert guard.first_bad_step() == 3


def test_a_saved_state_goes_on_bit_for_bit():
    whole, parts = Net(), Net()
    optimizers = [LARS(transfer_groups(model, 0.1), lr=0.1) for model in (whole, parts)]
    for step in range(4):
        for model, optimizer in zip((whole, parts), optimizers, strict=True):
            give_gradients(model, step)
            optimizer.step()
        fresh = LARS(transfer_groups(parts, 0.1), lr=0.1)
        fresh.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
        optimizers[1] = fresh
    for one, other in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(one, other)
