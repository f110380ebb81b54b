"""Backbones by name and start weights, for the transfer scripts; and their checkpoints back into models.

What a transfer run trains is what its checkpoint holds: everything after full fine-tuning, adapters and head after
LoRA, the head alone after a linear probe. The rest is made again from the flags in the checkpoint, and checked.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models_baseline import BASELINE_NAMES, WITH_MEAN, build_baseline, has_statistics, is_baseline
from models_vit import VIT_MODELS, Backbone, build_vit
from util.run.args import height_width
from util.run.errors import UserError
from util.training.checkpoint import MISFITS, read_checkpoint
from util.training.hub import load_weights
from util.training.pretrained import fingerprint_of, load_pretrained
from util.training.stored_flags import checked_flags
from util.transfer.heads import build_head
from util.transfer.lora import LoRAConfig, add_lora, load_lora, merge_lora

MODEL_NAMES = (
    f"{', '.join((*VIT_MODELS, *BASELINE_NAMES))}, or timm:NAME; {WITH_MEAN} behind a transformer of timm: embed by "
    "the class token and the mean of the patch tokens"
)


def start_backbone(args: dict, say: Callable[[str], None] | None = None, *, weights: bool = True) -> Backbone:
    """The backbone that flags describe, with its start weights: those of --init, else random ones from --seed.

    args: "model", "init", "input_size" (px), "global_pool", "seed" and optionally "drop_path". say: told where the
    weights come from. weights: False leaves random ones, for a model whose weights lie in a checkpoint.
    The result's `origin` is the fingerprint of the weights as they came, or "random": a re-sampled position
    embedding and random numbers differ in their last bits from one kind of processor to another.
    """
    torch.manual_seed(args["seed"])
    size, name, drop_path = height_width(args["input_size"]), args["model"], args.get("drop_path") or 0.0
    if is_baseline(name):
        if not args["global_pool"]:
            raise UserError(f"{name} pools in its own way: leave out --cls_token")
        model = build_baseline(name, size, drop_path)
    else:
        model = build_vit(name, img_size=size, global_pool=args["global_pool"], drop_path=drop_path)
    model.check_size(size)
    source = model.origin = "random"
    if weights and args["init"]:
        found = load_weights(args["init"], official_names=not is_baseline(name))
        source, model.origin = found.source, fingerprint_of(found.state)
        if found.kind == "timm" and not has_statistics(args["init"].removeprefix("timm:"), model):
            raise UserError(f"{args['init']} was trained on other pixel statistics: give it as --model too")
        if is_baseline(name):
            model.load(found)
        elif missing := load_pretrained(model, found, optional=("norm.", "fc_norm.")):
            source += f"; it has no {', '.join(sorted({name.split('.')[0] for name in missing}))}: fresh"
    if weights and say:
        say(f"weights: {source}" + ("" if args["init"] else " (no --init)"))
    return model


@dataclass(frozen=True)
class Transferred:
    """A model that a transfer script has trained, ready to embed and to classify.

    classes: the identities its head knows, in the order of its scores. args: the flags it was trained with.
    lora: its adapters' shape, None without adapters.
    """

    model: Backbone
    classes: tuple[str, ...]
    args: dict
    lora: LoRAConfig | None


def load_transferred(path: str | Path, device: torch.device | str = "cpu") -> Transferred:
    """Read a checkpoint of main_linprobe.py, main_lora.py or main_finetune.py.

    Adapters are left beside the weights they adapt (util.transfer.lora.merge_lora puts them in). UserError for another
    kind of checkpoint, and where the start weights are no longer what the run began with.
    """
    checkpoint = read_checkpoint(Path(path))
    if not _is_transferred(checkpoint):
        raise UserError(f"{path} is no checkpoint of a transfer run: give checkpoint-best.pth of one")
    return _transferred(checkpoint, path, device)


def _transferred(checkpoint: dict, path: str | Path, device: torch.device | str) -> Transferred:
    args, state, classes = checked_flags(checkpoint["args"], str(path)), checkpoint["model"], checkpoint["classes"]
    try:
        model, config = _built(checkpoint, args, state, tuple(classes), path)
    except MISFITS as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} does not fit its own flags ({reason}): restore it, or give another") from error
    return Transferred(model.to(device).eval(), tuple(classes), args, config)


def _built(
    checkpoint: dict, args: dict, state: dict, classes: tuple, path: str | Path
) -> tuple[Backbone, LoRAConfig | None]:
    if not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no names")
    on_base = "base" in checkpoint
    model = start_backbone(args, weights=on_base)
    if on_base and model.origin != checkpoint["base"]:
        raise UserError(
            f"{path} was trained on other start weights than {args['init'] or 'the random ones made here'}: "
            "put back the file that --init named then"
        )
    config = LoRAConfig(**checkpoint["lora"]) if "lora" in checkpoint else None
    if config:
        try:
            config.validate()
        except UserError as error:  # it does not know the file
            raise ValueError(error) from error
        add_lora(model, config)
        load_lora(model, {name: value for name, value in state.items() if "lora_" in name}, str(path))
    attach_head(model, args, len(classes))
    missing, unexpected = model.load_state_dict(state, strict=False)
    unmet = [name for name in missing if not on_base or name.startswith("head.")]
    if unmet or unexpected:
        raise UserError(f"{path} does not fit its own flags: {(unmet + unexpected)[0]} is the first misfit")
    for name, value in model.head.state_dict().items():  # an encoder's would be seen in its embeddings
        if not value.isfinite().all():
            raise UserError(f"{path} has a head that holds no numbers ({name}): train it again")
    return model, config


def load_recogniser(
    ckpt: str, *, model: str | None = None, input_size: int | list[int] | None = None, global_pool: bool = True,
    device: torch.device | str = "cpu",
) -> Transferred:  # fmt: skip
    """A network to be evaluated, from any weights: what a transfer script has trained, or an encoder without a head.

    ckpt: as --ckpt. model: its name, for weights that do not say it. input_size: px; None: what it was trained at,
    else 224. Adapters are merged. An encoder without a head has no classes and its head is the identity.
    """
    path = Path(ckpt)
    if path.is_file() and path.suffix not in (".safetensors", ".bin"):
        checkpoint = read_checkpoint(path)
        if _is_transferred(checkpoint):
            trained = _transferred(checkpoint, path, device)
            if trained.lora:
                merge_lora(trained.model)
            return trained
    name = model or (ckpt if ckpt.startswith("timm:") else None)
    stored = {} if name else load_weights(ckpt, official_names=False).args
    name = name or str(stored.get("model", "")).removeprefix("mae_")
    if not name:
        raise UserError(f"{ckpt} does not say which model it is of: give --model, such as vit_base_patch16")
    args = {
        "model": name, "init": ckpt, "seed": 0, "global_pool": global_pool,
        "input_size": input_size or stored.get("input_size") or 224,
    }  # fmt: skip
    return Transferred(start_backbone(args).to(device).eval(), (), args, None)


def _is_transferred(checkpoint) -> bool:
    return isinstance(checkpoint, dict) and {"model", "classes", "args"} <= checkpoint.keys()


def load_head(model: Backbone, path: str | Path, classes: Sequence[str]) -> None:
    """Put the trained head of a transfer checkpoint in the place of a fresh one, as for probing before fine-tuning.

    (arXiv 2202.10054.) UserError for another kind of checkpoint, other classes, and another kind of head.
    """
    checkpoint = read_checkpoint(Path(path))
    if not _is_transferred(checkpoint):
        raise UserError(f"--head_init {path} is no checkpoint of a transfer run: give checkpoint-best.pth of one")
    if tuple(checkpoint["classes"]) != tuple(classes):
        raise UserError(f"--head_init {path} knows other identities than the data: train a head on these")
    state = {name: value for name, value in checkpoint["model"].items() if name.startswith("head.")}
    own = {name: value for name, value in model.state_dict().items() if name.startswith("head.")}
    if {name: value.shape for name, value in state.items()} != {name: value.shape for name, value in own.items()}:
        raise UserError(f"--head_init {path} has another kind of head, or one for another model: give its --head")
    model.load_state_dict(state, strict=False)


def attach_head(model: Backbone, args: dict, classes: int) -> nn.Module:
    """Put a fresh head for a number of classes on a backbone, as the flags describe it; returns the head."""
    torch.manual_seed(args["seed"])
    model.head = build_head(
        args["head"],
        model.embed_dim,
        classes,
        batch_norm=bool(args.get("head_norm")),
        scale=args.get("scale"),
        margin=args.get("margin"),
    )
    return model.head
