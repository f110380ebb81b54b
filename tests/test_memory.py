"""Memory of a training step: recomputed blocks, and what a batch needs. Run: python -m pytest tests/test_memory.py"""

import pytest
import torch
from torch import nn

from models_mae import build_mae
from models_vit import build_vit
from util.run.errors import UserError
from util.training import memory
from util.training.memory import LiveBytes, checkpoint_blocks, measure_step
from util.transfer.lora import LoRAConfig, add_lora


def mae(**options) -> nn.Module:
    torch.manual_seed(0)
    return build_mae("mae_vit_nano_patch8", 32, **options)


def mae_loss(model: nn.Module) -> torch.Tensor:
    return model(torch.randn(4, 3, 32, 32), 0.75, torch.rand(4, 16), 1.0)


def dropping_vit() -> nn.Module:
    torch.manual_seed(0)
    return build_vit("vit_nano_patch8", img_size=32, drop_path=0.5)


def lora_vit() -> nn.Module:
    model = dropping_vit()
    add_lora(model, LoRAConfig(rank=2, dropout=0.3))
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    return model


def vit_loss(model: nn.Module) -> torch.Tensor:
    return model(torch.rand(4, 3, 32, 32)).square().mean()


CASES = {
    "mae": (mae, mae_loss),
    "cross": (lambda: mae(decoder="cross"), mae_loss),
    "drop path": (dropping_vit, vit_loss),
    "lora": (lora_vit, vit_loss),
}


def trained(model: nn.Module, loss_of) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Loss, gradients, and the bytes that the forward pass keeps for the backward pass, parameters left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    model.train()
    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model)
    torch.manual_seed(2)  # the second computation must not depend on where the generator stands
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, sum(kept.values())


@pytest.mark.parametrize("case", CASES)
def test_recomputed_blocks_give_the_same_gradients_from_less_memory(case):
    build, loss_of = CASES[case]
    plain, saving = build(), build()
    assert checkpoint_blocks(saving) == 6 + len(getattr(saving, "decoder_blocks", ()))
    assert list(saving.state_dict()) == list(plain.state_dict())
    loss, gradients, kept = trained(plain, loss_of)
    again, same, kept_less = trained(saving, loss_of)
    assert torch.equal(again, loss)
    assert same.keys() == gradients.keys() and gradients
    assert all(torch.equal(same[name], gradients[name]) for name in gradients)
    assert kept_less < kept / 3


def test_asking_twice_changes_nothing_and_no_blocks_is_an_error():
    model = mae()
    checkpoint_blocks(model)
    before = [block.forward for block in model.blocks]
    checkpoint_blocks(model)
    assert [block.forward for block in model.blocks] == before
    with pytest.raises(UserError, match="--grad_checkpoint"):
        checkpoint_blocks(nn.Linear(2, 2))


def test_without_gradients_a_block_is_computed_as_ever(monkeypatch):
    model = mae()
    checkpoint_blocks(model)
    monkeypatch.setattr(memory, "checkpoint", None)
    with torch.no_grad():
        assert mae_loss(model).isfinite()


def test_the_generator_of_mps_is_put_back_for_the_second_computation(monkeypatch):
    generator = {"state": 5}
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: generator["state"])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: generator.update(state=state))
    first, second = memory._same_mps_numbers()
    with first:
        generator["state"] = 6  # the forward pass draws
    generator["state"] = 9
    with second:
        assert generator["state"] == 5
    assert generator["state"] == 9


def test_live_bytes_follow_tensors_from_birth_to_death():
    outside = torch.zeros(1000)
    with LiveBytes() as live:
        first = torch.ones(256)  # 1024 bytes
        assert live.timeline[-1] == 1024
        view = first.view(16, 16)[2:].t()
        outside.add_(1)
        outside[:10].copy_(first[:10])
        assert live.timeline[-1] == 1024  # views and writes in place are no new memory
        second = first + 1
        del first, view
        third = second.double()
        assert live.timeline[-1] == 1024 + 2048
        del second, third
        torch.zeros(1)
        assert max(live.timeline) <= 1024 + 2048 + 1024 and live.timeline[-1] == 4


def test_a_large_batch_is_foreseen_from_two_small_ones():
    model = mae()

    def step(size: int) -> None:
        model(torch.randn(size, 3, 32, 32), 0.75, torch.rand(size, 16), 1.0).backward()
        model.zero_grad(set_to_none=True)

    foreseen = measure_step(step)
    for size in (1, 16, 50):
        with LiveBytes() as live:
            step(size)
        assert foreseen.peak(size) == pytest.approx(max(live.timeline), rel=0.01)
    for budget in (10 << 20, 100 << 20):
        largest = foreseen.largest(budget)
        assert foreseen.peak(largest) <= budget < foreseen.peak(largest + 1)
    assert foreseen.largest(1000) == 0  # the gradients alone are more


def test_a_step_of_other_operations_for_another_size_is_foreseen_by_its_peaks():
    def step(size: int) -> None:
        parts = [torch.zeros(1000, dtype=torch.uint8) for _ in range(size)]
        assert len(parts) == size

    foreseen = measure_step(step)
    assert foreseen.peak(10) == 10_000 and foreseen.largest(7_500) == 7
