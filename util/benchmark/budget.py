"""Matched budgets: how long each stage of a method may train, so that methods are compared at equal expense.

    epochs=N         every supervised stage has N epochs; pre-training is as in the recipe
    images=N         every method is shown N images in all, its own pre-training included (a share of them)
    gpu_minutes=X    every method has X minutes on the device, its own pre-training included, by measured pace
    memory=GiB       every stage that trains a network has the batch that so much memory of a CUDA card holds
    convergence[=P]  every supervised stage goes on until P epochs bring no better validation top-1, for at most 4
                     times the epochs of the recipe

Weights that were made elsewhere (ImageNet, DINO, the official MAE) bring their own expense, which no budget counts.
"""

import argparse
import math
from dataclasses import dataclass

from util.benchmark.methods import Method, Pretraining, Stage
from util.run.errors import UserError

KINDS = ("recipe", "epochs", "images", "gpu_minutes", "memory", "convergence")
PATIENCE = 10  # epochs
LONGEST = 4  # times the epochs of the recipe, until convergence
REMEDY = "raise the budget, or leave the method out"


@dataclass(frozen=True)
class Budget:
    """amount: epochs, images, minutes, GiB or epochs of patience; None for the recipe itself."""

    kind: str = "recipe"
    amount: float | None = None

    def describe(self, share: float) -> str:
        """One sentence for the reader of a leaderboard. share: of pre-training, where a method has some, 0..1."""
        return _SENTENCES[self.kind].format(n=self.amount, share=share)


_INCLUDED = "pre-training on this data included ({share:.0%} of it, where a method has some)"
_SENTENCES = {
    "recipe": "each method's own recipe; expense is not matched.",
    "epochs": "{n:g} epochs for every supervised stage; pre-training as in the recipe.",
    "images": "{n:,.0f} images for every method, " + _INCLUDED + ", in whole epochs.",
    "gpu_minutes": "{n:g} minutes on the device for every method, " + _INCLUDED + ", in whole epochs.",
    "memory": "the batch that {n:g} GiB of a card hold, for every stage that trains a network.",
    "convergence": "every supervised stage until {n:g} epochs bring no better validation top-1.",
}


def parse_budget(text: str) -> Budget:
    """An argparse type: "recipe" or KIND=AMOUNT, such as epochs=20 or convergence=10."""
    kind, _, amount = text.partition("=")
    if kind not in KINDS or ((kind == "recipe") != (not amount) and kind != "convergence"):
        forms = "recipe, epochs=N, images=N, gpu_minutes=X, memory=GiB or convergence[=PATIENCE]"
        raise argparse.ArgumentTypeError(f"{text!r} is none of {forms}")
    if kind == "recipe":
        return Budget()
    whole = kind not in ("gpu_minutes", "memory")
    try:
        value = float(amount or PATIENCE)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{amount!r} of --budget {kind} is not a number") from None
    if not 0 < value < math.inf or (whole and value != int(value)):
        raise argparse.ArgumentTypeError(f"--budget {text}: give {'a whole number' if whole else 'a number'} above 0")
    return Budget(kind, value)


@dataclass(frozen=True)
class Pace:
    """What a stage costs. per_epoch: images or seconds of an epoch; fixed: what it spends once, before the first."""

    per_epoch: float
    fixed: float = 0.0

    def epochs(self, amount: float) -> int:
        """Whole epochs that an amount pays for."""
        # a quotient such as 0.3 / 0.1 must not lose an epoch to rounding
        return max(0, math.floor((amount - self.fixed) / self.per_epoch + 1e-9))

    def cost(self, epochs: int) -> float:
        return self.fixed + epochs * self.per_epoch


def images_pace(images: int, batch_size: int) -> Pace:
    """Of a training set, on one device: what is left over after the last whole batch is not shown."""
    batch = max(1, min(batch_size, images))
    return Pace(images // batch * batch)


def at_epochs(stage: Stage, epochs: int) -> Stage:
    """The stage with other epochs; warm-ups keep their share of them."""
    scale = epochs / stage.number("epochs")
    warmups = {"warmup_epochs": stage.number("warmup_epochs") * scale}
    if "margin_warmup" in stage.flags:
        warmups["margin_warmup"] = min(round(stage.number("margin_warmup") * scale), epochs - 1)
    return stage.but(epochs=epochs, **warmups)


def divide(amount: float, share: float, pretraining: Pace | None, transfer: Pace) -> tuple[int, int]:
    """Epochs of pre-training (0 without one) and of transfer that an amount pays for together.

    Pre-training takes whole epochs out of its share, 0..1; what is left of that is for transfer. UserError where it
    does not suffice for an epoch of each.
    """
    before = 0
    if pretraining is not None:
        before = pretraining.epochs(amount * share)
        if not before:
            raise UserError(
                f"the budget is {amount:g} and an epoch of pre-training takes {pretraining.cost(1):g} of its share "
                f"of {share:.0%}: {REMEDY}"
            )
        amount -= pretraining.cost(before)
    after = transfer.epochs(amount)
    if not after:
        raise UserError(f"what is left of the budget is {amount:g} and one epoch takes {transfer.cost(1):g}: {REMEDY}")
    return before, after


def with_epochs(method: Method, before: int, after: int) -> Method:
    """The method with other epochs of its own pre-training and of transfer; runs of one length are shared."""
    pretraining = method.pretraining
    if pretraining is not None:
        pretraining = Pretraining(pretraining.name, at_epochs(pretraining.stage, before), pretraining.weights)
    return _changed(method, pretraining, at_epochs(method.transfer, after))


def apply_simple(budget: Budget, method: Method) -> Method:
    """The method under a budget for which nothing has to be measured: recipe, epochs, memory or convergence."""
    pretraining, transfer = method.pretraining, method.transfer
    if budget.kind == "epochs":
        transfer = at_epochs(transfer, int(budget.amount))
    elif budget.kind == "convergence":
        longest = at_epochs(transfer, LONGEST * int(transfer.number("epochs")))
        # the warm-up is that of the recipe: nobody knows how long the run will be
        kept = {name: transfer.flags[name] for name in ("warmup_epochs", "margin_warmup") if name in transfer.flags}
        transfer = longest.but(patience=int(budget.amount), **kept)
    elif budget.kind == "memory":
        transfer = in_memory(transfer, budget.amount)
        if pretraining is not None:
            stage = in_memory(pretraining.stage, budget.amount)
            pretraining = Pretraining(pretraining.name, stage, pretraining.weights)
    return _changed(method, pretraining, transfer)


def in_memory(stage: Stage, gib: float) -> Stage:
    """The stage with the largest batch that fits; its learning rate grows with the batch (arXiv 1706.02677).

    A probe keeps its batch, which is not what fills the memory, and so does SimCLR, whose loss depends on it.
    """
    if stage.script in ("main_linprobe.py", "main_simclr.py"):
        return stage
    rate = {"lr": None, "blr": stage.number("lr") * 256 / stage.number("batch_size")} if "lr" in stage.flags else {}
    return stage.but(batch_size="auto", memory=gib, **rate)


def _changed(method: Method, pretraining: Pretraining | None, transfer: Stage) -> Method:
    return Method(method.name, method.label, method.family, transfer, method.weights, pretraining, method.tuned)
