"""Optimizer, learning-rate schedule, and which parameters are trainable when."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn


def decay_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict]:
    """Two parameter groups: matrices and tokens decay, biases and norms (1-D) do not.

    Frozen position embeddings are left out; parameters that are only frozen for now belong in.
    """
    groups = {True: [], False: []}
    for name, parameter in named:
        if not name.endswith("pos_embed"):
            groups[parameter.ndim > 1].append(parameter)
    return [
        {"params": groups[True], "weight_decay": weight_decay},
        {"params": groups[False], "weight_decay": 0.0},
    ]


def transfer_groups(
    model: nn.Module, weight_decay: float, *, head_scale: float = 1.0, layer_decay: float = 1.0
) -> list[dict]:
    """Parameter groups of a backbone with a `head`: the trainable ones, each with a factor "lr_scale" of the rate.

    head_scale: factor of the head. layer_decay: factor from a layer to the one below (arXiv 2106.08254, section 3.1):
    1 above the blocks, layer_decay for the last block, ..., layer_decay ** (depth + 1) for the embedding; it needs a
    model with `blocks`. Biases, norms, tokens and position embeddings do not decay.
    """
    depth, prefix = len(getattr(model, "blocks", ())), blocks_prefix(model)
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim > 1 and not name.endswith(_TOKENS)
        layer = depth + 1 if layer_decay == 1 else _layer_of(name.removeprefix(prefix), depth)
        part = "head" if name.startswith("head.") else layer
        # by what they are, not by their rates: a run that is resumed with other rates has the same groups
        group = groups.setdefault((part, decays), {"params": []})
        group["params"].append(parameter)
        group["lr_scale"] = head_scale if part == "head" else layer_decay ** (depth + 1 - layer)
        group["weight_decay"] = weight_decay if decays else 0.0
    return list(groups.values())


_TOKENS = ("pos_embed", "cls_token", "reg_token")


def blocks_prefix(model: nn.Module) -> str:
    """What stands before "blocks" in a model's names: nothing, or "net." where a network is wrapped as a backbone."""
    blocks = getattr(model, "blocks", None)
    found = (name for name, module in model.named_modules() if blocks is not None and module is blocks)
    return next(found, "blocks").removesuffix("blocks")


def _layer_of(name: str, depth: int) -> int:
    """0 for the embedding, 1 ... depth for the blocks, depth + 1 for what comes after them."""
    if name.startswith("blocks."):
        return int(name.split(".")[1]) + 1
    return 0 if name.startswith(("patch_embed", "norm_pre", *_TOKENS)) else depth + 1


def make_optimizer(
    groups: list[dict], lr: float, device: torch.device, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) in its fused form: one kernel, about four times the speed on a CPU too."""
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=device.type in ("cpu", "cuda", "mps"))


class LARS(torch.optim.Optimizer):
    """Momentum with a rate of its own for each weight tensor (LARS, arXiv 1708.03888), as SimCLR has it.

    The rate of a tensor is lr x trust x |w| / |g|, where g is the gradient plus weight_decay x w; lr where either norm
    is 0. Biases and norms (1-D) learn at lr; that they do not decay is up to the groups (`decay_groups`,
    `transfer_groups`). The momentum adds up steps that are scaled already.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.9, trust: float = 1e-3):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable | None = None) -> torch.Tensor | None:
        """One update. Where `found_inf` (a scalar on the device; set from outside) is 1, it changes nothing."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, group)
        return loss

    def _update(self, weight: torch.Tensor, group: dict) -> None:
        gradient = weight.grad.add(weight, alpha=group["weight_decay"])
        if weight.ndim > 1:
            size, steepness = weight.norm(), gradient.norm()
            ratio = group["trust"] * size / steepness
            gradient.mul_(torch.where((size > 0) & (steepness > 0), ratio, 1.0))
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight)
        buffer = state["momentum_buffer"]
        moved = group["momentum"] * buffer + group["lr"] * gradient
        changed = weight - moved
        held = getattr(self, "found_inf", None)
        if held is not None:  # on the device: the host does not wait for the answer
            moved, changed = torch.where(held > 0, buffer, moved), torch.where(held > 0, weight, changed)
        buffer.copy_(moved)
        weight.copy_(changed)


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then half a cosine down to min_lr. Steps are optimizer steps."""

    lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def at(self, step: int) -> float:
        """The learning rate of step 0, 1, ...; the first step already learns."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    def apply(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Set the rate of every group (times its "lr_scale", if it has one) and return it."""
        lr = self.at(step)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr


def unfreeze_in_stages(model: nn.Module, every: int, top_k: int, always: tuple[str, ...]) -> Callable[[int], list[str]]:
    """Progressive unfreezing of an encoder with `blocks`: first only what starts with `always`
    (a head, a decoder), then `top_k` more blocks from the top every `every` epochs, at last the embedding.

    Returns stage(epoch) -> names of the trainable parameters, which it also sets; it depends on the
    epoch alone, so a resumed run stands where it stood.
    """
    depth, prefix = len(model.blocks), blocks_prefix(model)
    frozen_for_good = {name for name, p in model.named_parameters() if not p.requires_grad}

    def stage(epoch: int) -> list[str]:
        open_blocks = min(depth, top_k * (epoch // every))
        prefixes = list(always)
        if open_blocks:
            prefixes += ["norm."] + [f"blocks.{i}." for i in range(depth - open_blocks, depth)]
        if open_blocks == depth:
            prefixes.append("")
        trainable = []
        for name, parameter in model.named_parameters():
            is_open = name.removeprefix(prefix).startswith(tuple(prefixes))
            parameter.requires_grad = is_open and name not in frozen_for_good
            if parameter.requires_grad:
                trainable.append(name)
            else:
                parameter.grad = None
        return trainable

    return stage
