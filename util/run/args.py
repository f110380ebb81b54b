"""Flags that several scripts share, as argument groups. Each script passes its own defaults,
so that its recipe is visible in it. Names are those of the official MAE code where they exist there."""

import argparse
import math

from util.run.errors import UserError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, "", False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints defaults in --help and reports a bad value in one line."""

    def __init__(self, description: str):
        super().__init__(description=description, formatter_class=_Formatter)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists every flag with its unit and range)")


def number(kind: type, low: float, high: float = float("inf"), *, open_high: bool = False):
    """An argparse type: an int or float from low to high (high itself left out if open_high)."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'an integer' if kind is int else 'a number'}") from None
        if not low <= value <= high or value == math.inf or (open_high and value == high):
            raise argparse.ArgumentTypeError(f"{text} is out of range: {_range(low, high, open_high)}")
        return value

    return parse


def _range(low: float, high: float, open_high: bool) -> str:
    if high == float("inf"):
        return f"it must be at least {low:g}"
    return f"it must be from {low:g} to {'below ' if open_high else ''}{high:g}"


count = number(int, 1)
count0 = number(int, 0)
fraction = number(float, 0.0, 1.0)
ratio = number(float, 0.0, 1.0, open_high=True)
share = number(float, 1e-12, 1.0)
rate = number(float, 0.0)
positive = number(float, 1e-12)


# flags that say where and how a run takes place, and not what it learns
BOOKKEEPING = frozenset({
    "output_dir", "log_dir", "resume", "max_steps", "device", "num_workers", "log_every", "save_steps", "max_bad",
    "eval_images", "eval_every", "compile", "grad_checkpoint", "augment_on", "fsdp",
})  # fmt: skip

AUTO = "auto"


def count_or_auto(text: str) -> int | str:
    """An argparse type: an integer from 1, or AUTO."""
    return text if text == AUTO else count(text)


def image_size(text: str) -> int | list[int]:
    """An argparse type: "224" is a square, "192x256" is height x width, px."""
    parts = [count(part) for part in text.lower().split("x")]
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a side in px nor HEIGHTxWIDTH")
    return parts[0] if len(parts) == 1 else parts


def height_width(size: int | list[int]) -> tuple[int, int]:
    """(height, width) in px of an --input_size."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def add_data_args(
    parser: argparse.ArgumentParser,
    *,
    input_size: int = 224,
    batch_size: int = 64,
    streams: bool = True,
    auto_batch: bool = False,
) -> None:
    """Where the pictures come from and how they are read. streams: whether the script can read a stream.

    auto_batch: whether it can find the largest batch itself (util.training.batch_size).
    """
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data_path",
        required=True,
        metavar="DIR",
        help="prepared folder, class folders, folder of images, packed file, or hf:OWNER/NAME[:SPLIT]",
    )
    group.add_argument(
        "--labels",
        choices=("auto", "none", "folders", "metadata"),
        default="auto",
        help="what a nested folder of images means: its folders are labels or not, or metadata.parquet says",
    )
    group.add_argument(
        "--val_fraction",
        type=fraction,
        default=0.1,
        help="share of the samples held out where the data has no split of its own, fraction in 0..1",
    )
    group.add_argument(
        "--face_padding",
        type=rate,
        default=None,
        metavar="X",
        help="show only the face box, enlarged by X of its side on each side (0.5 doubles it); default: whole pictures",
    )
    if streams:
        group.add_argument(
            "--streaming", action="store_true", help="read a Hugging Face data set shard by shard, without storing it"
        )
        group.add_argument("--epoch_images", type=count, default=None, help="images that count as an epoch of a stream")
    group.add_argument("--input_size", type=image_size, default=input_size, help="px, a side or HEIGHTxWIDTH")
    group.add_argument(
        "--batch_size",
        type=count_or_auto if auto_batch else count,
        default=batch_size,
        help="images per process and step" + "; auto: the most that fit into memory" * auto_batch,
    )
    if auto_batch:
        group.add_argument(
            "--memory", type=positive, default=None, metavar="GIB", help="that auto may take; default: what is free"
        )
    group.add_argument(
        "--num_workers", type=count0, default=2, help="processes that decode images; 0 = in the main one"
    )
    group.add_argument(
        "--max_bad",
        type=fraction,
        default=0.01,
        help="share of unreadable images above which the run stops, fraction in 0..1",
    )


def add_optim_args(
    parser: argparse.ArgumentParser,
    *,
    epochs: int,
    warmup_epochs: float,
    weight_decay: float | None,
    blr: float | None = None,
    lr: float | None = None,
    min_lr: float = 0.0,
) -> None:
    """The optimizer and its schedule. blr or lr: the script's own rate, relative to the batch or absolute."""
    group = parser.add_argument_group("optimization")
    group.add_argument("--epochs", type=count, default=epochs, help="passes over the training set")
    group.add_argument("--max_steps", type=count, default=None, help="end this process after N optimizer steps")
    group.add_argument("--accum_iter", type=count, default=1, help="batches whose gradients are added up per step")
    instead = "; given, it takes the place of --{}"
    group.add_argument(
        "--lr", type=positive, default=lr, help="learning rate, absolute" + instead.format("blr") * (lr is None)
    )
    group.add_argument(
        "--blr",
        type=positive,
        default=blr,
        help="learning rate per 256 images of the effective batch" + instead.format("lr") * (blr is None),
    )
    group.add_argument("--min_lr", type=rate, default=min_lr, help="learning rate that the cosine ends at, absolute")
    group.add_argument("--warmup_epochs", type=rate, default=warmup_epochs, help="epochs of linear warm-up")
    group.add_argument(
        "--weight_decay", type=rate, default=weight_decay, help="decay of matrices; biases and norms have none"
    )
    group.add_argument("--clip_grad", type=positive, default=None, help="largest gradient norm; default: no clipping")


def add_init_arg(group) -> None:
    """Where a model's start weights come from."""
    group.add_argument(
        "--init",
        default=None,
        metavar="W",
        help="start weights: file, hf:OWNER/REPO, timm:NAME, official:NAME; none: random",
    )


def add_crop_arg(group, default: float) -> None:
    """How small a random crop may be."""
    group.add_argument(
        "--min_crop", type=fraction, default=default, help="least area of a random crop, fraction in 0..1"
    )


def add_augment_arg(group) -> None:
    """Where the random crops of training are made."""
    group.add_argument(
        "--augment_on",
        choices=("auto", "workers", "device"),
        default="auto",
        help="where training crops are made; auto: on a CUDA device where the data are packed, else in the workers",
    )


def add_unfreeze_args(group, first: str) -> None:
    """Progressive unfreezing. first: what learns from the start, for --help."""
    group.add_argument(
        "--unfreeze_every",
        type=count0,
        default=0,
        help=f"epochs per stage of progressive unfreezing, {first} first; 0: train all",
    )
    group.add_argument("--unfreeze_blocks", type=count, default=2, help="encoder blocks that each stage adds")


def add_device_args(group) -> None:
    """Where and how numbers are computed."""
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the forward pass"
    )
    group.add_argument("--seed", type=count0, default=0, help="every random number follows from it")


def add_compile_arg(group) -> None:
    """Whether the network is compiled."""
    group.add_argument("--compile", choices=("auto", "on", "off"), default="auto", help="torch.compile the model")


def add_shard_arg(group) -> None:
    """Whether several processes share a model out, each holding a part of it."""
    group.add_argument(
        "--fsdp",
        action="store_true",
        help="share weights, gradients and optimizer states out over the processes, for a model larger than one card's "
        "memory; without torch.compile",
    )


def add_runtime_args(parser: argparse.ArgumentParser) -> None:
    """Device, output, logging and resuming."""
    group = parser.add_argument_group("run")
    group.add_argument("--output_dir", required=True, metavar="RUN", help="folder for checkpoints, logs and results")
    group.add_argument(
        "--log_dir", default=None, metavar="DIR", help="folder for TensorBoard; default: the output folder"
    )
    group.add_argument(
        "--resume",
        default="",
        metavar="auto|FILE",
        help="auto: go on from checkpoint-last.pth of the output folder, if any",
    )
    add_device_args(group)
    add_compile_arg(group)
    group.add_argument(
        "--grad_checkpoint",
        action="store_true",
        help="recompute transformer blocks in the backward pass: much less memory for about a third more time",
    )
    group.add_argument("--eval_every", type=count, default=1, help="epochs between evaluations on held-out images")
    group.add_argument("--log_every", type=count, default=20, help="steps between readings of the loss")
    group.add_argument("--save_steps", type=count, default=None, help="steps between checkpoints inside an epoch")
