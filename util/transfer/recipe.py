"""The one recipe behind main_linprobe.py, main_lora.py and main_finetune.py.

Flags, labelled data, augmentation, loss, validation, and the run itself. A script adds what is its own: which
parameters learn, and at which rate.
"""

import argparse
from collections.abc import Callable
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from util.benchmark.identification import classification_scores
from util.data.augment import EvalCrop, TrainCrop, TrainView, to_unit
from util.data.augment_batch import pictures, placed
from util.data.labels import Labelled
from util.data.loader import TrainLoader, fitting, in_order, loader_options, readable
from util.data.sources import Source
from util.run import args as flags
from util.run.device import autocast, pick_precision
from util.run.errors import UserError
from util.training.batch_size import settle_batch_size
from util.training.checkpoint import read_checkpoint
from util.training.optim import WarmupCosine, make_optimizer
from util.training.session import Session, fit
from util.training.sharded import put_back
from util.transfer.heads import HEADS, MarginHead, set_margin_progress
from util.transfer.lora import TARGETS

BETAS = (0.9, 0.999)  # of fine-tuning and probing; pre-training has 0.95


def add_transfer_args(
    parser: flags.Parser,
    *,
    model_names: str,
    batch_size: int,
    auto_batch: bool = True,
    heads=HEADS,
    color_jitter: float = 0.0,
    **optim,
) -> None:
    """The flags of every transfer script. heads: those it offers. optim: its defaults for `add_optim_args`."""
    flags.add_data_args(parser, batch_size=batch_size, streams=False, auto_batch=auto_batch)
    flags.add_optim_args(parser, **optim)
    flags.add_runtime_args(parser)
    group = parser.add_argument_group("transfer")
    group.add_argument("--model", default="vit_base_patch16", metavar="NAME", help=model_names)
    flags.add_init_arg(group)
    pooling = group.add_mutually_exclusive_group()
    pooling.add_argument(
        "--global_pool", action="store_true", default=True, help="embed by the mean of the patch tokens (the default)"
    )
    pooling.add_argument("--cls_token", action="store_false", dest="global_pool", help="embed by the class token")
    group.add_argument("--nb_classes", type=flags.count, default=None, help="identities; default: as the data has them")
    group.add_argument("--head", choices=heads, default="linear", help="what classifies the embeddings")
    group.add_argument(
        "--label_fraction",
        type=flags.number(float, 1e-6, 1.0),
        default=1.0,
        help="share of each identity's training images, at least one; fraction in 0..1",
    )
    group.add_argument(
        "--patience", type=flags.count, default=None, help="epochs without a better val top-1 to stop at"
    )
    flags.add_crop_arg(group, 0.5)
    group.add_argument(
        "--color_jitter",
        type=flags.fraction,
        default=color_jitter,
        help="change of brightness, contrast and saturation, fraction in 0..1",
    )
    group.add_argument(
        "--blur",
        type=flags.fraction,
        default=0.0,
        help="share of images that are blurred, by a deviation of 0.1 to 2 px, fraction in 0..1",
    )


def add_training_args(parser: flags.Parser, *, head_lr: float, mixes: bool) -> None:
    """The flags of the scripts that train through the network. mixes: offer mixup and its kind."""
    group = parser.add_argument_group("head and regularization")
    flags.add_augment_arg(group)
    flags.add_shard_arg(group)
    group.add_argument("--head_lr", type=flags.positive, default=head_lr, help="learning rate of the head, absolute")
    group.add_argument("--scale", type=flags.positive, default=None, help="of margin heads; default: 64")
    group.add_argument(
        "--margin", type=flags.rate, default=None, help="of margin heads, rad or cosine; default: 0.5, CosFace 0.35"
    )
    group.add_argument(
        "--margin_warmup", type=flags.count0, default=0, help="epochs in which the margin grows from 0 to its full size"
    )
    group.add_argument("--smoothing", type=flags.ratio, default=0.0, help="label smoothing, fraction in 0..1")
    if mixes:
        group.add_argument("--mixup", type=flags.rate, default=0.0, help="alpha of mixup (arXiv 1710.09412); 0: off")
        group.add_argument("--cutmix", type=flags.rate, default=0.0, help="alpha of CutMix (arXiv 1905.04899); 0: off")
        group.add_argument(
            "--reprob", type=flags.fraction, default=0.0, help="share of images with an erased box, fraction in 0..1"
        )


def add_lora_args(parser: flags.Parser) -> None:
    """The shape of LoRA adapters (`util.transfer.lora.LoRAConfig`)."""
    group = parser.add_argument_group("LoRA")
    group.add_argument("--rank", type=int, default=8, help="of each adapter, from 1 to the width of the layer")
    group.add_argument(
        "--alpha", type=flags.positive, default=None, help="updates are scaled by alpha / rank; default: 2 x rank"
    )
    group.add_argument("--lora_targets", nargs="+", default=list(TARGETS), metavar="LAYER", help=", ".join(TARGETS))
    group.add_argument(
        "--lora_dropout", type=flags.ratio, default=0.0, help="of the adapters' inputs, fraction in 0..1"
    )


def train_view(args: argparse.Namespace) -> TrainView:
    """The augmentation that the flags describe."""
    crop = TrainCrop(flags.height_width(args.input_size), scale=(args.min_crop, 1.0))
    return TrainView(crop, jitter=args.color_jitter, erase=getattr(args, "reprob", 0.0), blur=args.blur)


def classification_step(args: argparse.Namespace, head: nn.Module, classes: int) -> Callable:
    """step_fn of a backbone with a head: cross-entropy over the classes."""
    mix = _mixer(args, classes)
    view, takes_labels = train_view(args), isinstance(head, MarginHead)
    if args.margin_warmup and not takes_labels:
        raise UserError(f"--head {args.head} has no margin: leave out --margin_warmup")
    if mix and takes_labels:
        raise UserError(f"--head {args.head} needs one true class per image: leave out --mixup and --cutmix")

    def step(model: nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        images, target = pictures(batch, view), batch["label"]
        set_margin_progress(head, batch["epoch"], args.margin_warmup)
        if mix:
            images, target = mix(images, target)
        logits = model(images, target) if takes_labels else model(images)
        return {"loss": F.cross_entropy(logits.float(), target, label_smoothing=args.smoothing)}

    return step


def _mixer(args: argparse.Namespace, classes: int) -> Callable | None:
    """Mixup, CutMix, or for each batch one of them; None without. They draw from torch's generator."""
    if not (getattr(args, "mixup", 0) or getattr(args, "cutmix", 0)):
        return None
    from torchvision.transforms import v2  # slow to import

    kinds = [(v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)]
    return v2.RandomChoice([kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds if alpha])


class Validation:
    """Loss, Top-1, Top-5 and macro-F1 of a model on held-out samples, each seen once, in its smart crop.

    The processes share the samples out, and all of them return the figures of all samples.
    """

    def __init__(self, here: Session, task: Labelled, source: Source):
        self.here, self.source, self.classes = here, source, task.numbers
        self.precision = pick_precision(here.args.precision, here.device)
        self.bad: set[str] = set()  # damaged images that were left out, by path

    @torch.inference_mode()
    def __call__(self, model: nn.Module, epoch: int = 0) -> dict[str, float]:
        args, device, world = self.here.args, self.here.device, self.here.world
        crop = EvalCrop(flags.height_width(args.input_size))
        model.eval()
        parts, bad = [], []
        for batch in in_order(
            self.source, crop, batch_size=args.batch_size, num_workers=args.num_workers, device=device,
            classes=self.classes, rows=world.rows(len(self.source)),
        ):  # fmt: skip
            with autocast(device, self.precision):
                scores = model(to_unit(batch["image"].to(device)))
            bad += batch["bad"]
            facts = (scores.float(), batch["label"].to(device), readable(batch).to(device))
            parts.append([world.collect(fact).cpu() for fact in facts])
            if not world.is_main:
                parts.clear()
        self._leave_out(sorted(chain.from_iterable(world.gather_objects(bad))))

        def figures() -> dict[str, float]:
            logits, labels, good = (torch.cat(part)[: len(self.source)] for part in zip(*parts, strict=True))
            return score(logits[good], labels[good])

        return world.from_main(figures)

    def _leave_out(self, bad: list[tuple[int, str, str]]) -> None:
        for _, path, reason in bad:
            if path not in self.bad:
                self.bad.add(path)
                self.here.run.say(f"left out of the evaluation: {path}: {reason}")


def score(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Figures of scores (N, C) float32 on the CPU for class numbers (N,): "loss", "top1", "top5", "macro_f1"."""
    if not len(labels):
        raise UserError("none of the held-out images can be read: mend them, or check --data_path")
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        **classification_scores(logits.numpy(), labels.numpy()),
    }


def transfer(here: Session, task: Labelled, model: nn.Module, groups: Callable[[float], list[dict]], **parts) -> None:
    """Train a backbone with its head end to end, test the best checkpoint, and write results.json.

    groups: parameter groups for a base learning rate. parts: further fields of util.training.loop.Setup.
    """
    args, device = here.args, here.device
    model = here.placed(model)
    step = classification_step(args, model.head, len(task.classes))
    settle_batch_size(args, here, model, step, lambda: len(task.train))
    options = loader_options(args, here.world, device)
    options["batch_size"] = fitting(args.batch_size, args.accum_iter, len(task.train), here.world)
    if options["batch_size"] < args.batch_size:
        here.run.say(f"batches of {options['batch_size']}: there are only {len(task.train)} training images")
    if options["batch_size"] == 1 and any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(f"{args.model} has batch norm, which needs batches of two images or more: raise --batch_size")
    view = placed(train_view(args), args.augment_on, task.train, device)
    loader = TrainLoader(task.train, view, classes=task.numbers, **options)
    lr = base_rate(args, loader.step_images)
    parts["notes"] = {"classes": list(task.classes), **parts.get("notes", {})}
    results = fit(
        here,
        f"{args.model}, {args.head} head for {len(task.classes)} identities, lr {lr:.3g},",
        model=model,
        step_fn=step,
        loader=loader,
        optimizer=make_optimizer(groups(lr), lr, device, BETAS),
        schedule=cosine(args, lr, loader.steps),
        evaluate=Validation(here, task, task.val),
        best_of=("top1", "max"),
        patience=args.patience,
        **parts,
    )
    if results:
        if results["finished"] and task.test is not None:
            here.world.barrier()  # the main process may still be writing the checkpoint
            put_back(model, read_checkpoint(here.run.best)["model"])
            results["test"] = Validation(here, task, task.test)(model)
        report(here, task, results)


def base_rate(args: argparse.Namespace, step_images: int) -> float:
    """The absolute learning rate: --lr, or --blr x images per step / 256 where that is given."""
    return args.lr if args.blr is None else args.blr * step_images / 256


def cosine(args: argparse.Namespace, lr: float, steps: int) -> WarmupCosine:
    """The schedule that the flags describe. steps: optimizer steps per epoch."""
    return WarmupCosine(lr, min(args.min_lr, lr), round(args.warmup_epochs * steps), args.epochs * steps)


def report(here: Session, task: Labelled, results: dict) -> None:
    """Write results.json, and say the figures that count."""
    results |= {"classes": len(task.classes), "val": results.pop("best_val")}
    here.run.results(results)
    for role in ("val", "test"):
        if figures := results.get(role):
            here.run.say(f"{role}: " + "  ".join(f"{name} {value:.4g}" for name, value in figures.items()))
