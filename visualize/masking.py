"""What each masking strategy removes: a block of pictures for each, with the map it goes by.

    python -m visualize.masking --data_path DIR --out masking.png [--ckpt RUN/checkpoint-last.pth]
    python -m visualize.masking --data_path DIR --out masking.png --strategies random face face:-1 lineart+face:2

Columns: the picture, the score of each patch (bright: rather removed), the mask, and with --ckpt what the model makes
of it. A strategy that needs semantic maps reads them from --maps, by default DATA/maps.
"""

from argparse import ArgumentTypeError
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from models_mae import MaskedAutoencoder
from models_mae_weights import load_mae
from models_vit import patch_grid
from util.data.maps import Maps, find_maps
from util.data.sheet import sheet
from util.data.sources import open_source
from util.mae.masking import Masking, random_mask
from util.mae.scores import SCORES
from util.run.args import Parser, count, height_width, rate, ratio
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.files import write_atomically
from visualize.pictures import (
    GREY,
    Batch,
    Pictures,
    add_reading_args,
    check_ratios,
    heat,
    percent_masked,
    scale_bar,
    spread,
    tile,
)

WORDS = {
    "random": "every patch alike",
    "face": "the face, the eyes above all",
    "foreground": "the figure",
    "lineart": "lines and fine detail",
    "green": "loose clusters, anywhere (green noise)",
    "block": "whole rectangles, anywhere",
    "grid": "a regular pattern",
    "box": "a box as large as the face, anywhere",
    "hard": "what the model expects to get wrong",
}
DEFAULT = (
    "random", "face", "face:-1", "foreground", "lineart", "green@1000", "block@1000", "grid@1000", "box", "hard",
)  # fmt: skip


class Shown(NamedTuple):
    """One strategy on N pictures. scores: (N, rows, columns), 0 = rather kept to 1 = rather removed. mask: (N, L)."""

    scores: torch.Tensor
    mask: torch.Tensor


def in_words(strategy: Masking) -> str:
    """Such as "rather removes the face, the eyes above all; rather keeps lines and fine detail"."""
    if strategy.is_random:
        return f"removes {WORDS['random']}"
    parts = {True: [], False: []}
    for name, weight in strategy.weights.items():
        if name != "random":
            share = f" ({abs(weight):.0%})" if len(strategy.weights) > 1 else ""
            parts[weight > 0].append(WORDS[name] + share)
    texts = {True: "rather removes ", False: "rather keeps "}
    return ";\n".join(texts[kind] + " and ".join(names) for kind, names in parts.items() if names)


def apply(strategy: Masking, batch: Batch, names: tuple[str, ...], grid, mask_ratio: float, hard=None) -> Shown:
    """The scores and masks of a batch. names: which map each channel of `batch.maps` is. hard: (N, L), if needed."""
    maps = batch.maps[:, [names.index(name) for name in strategy.maps]] if strategy.maps else None
    given = (batch.images, grid, 0, batch.index, maps, hard)
    lowest = sum(weight for weight in strategy.weights.values() if weight < 0)
    mask = random_mask(strategy.order(*given), mask_ratio)
    return Shown((strategy.scores(*given) - lowest).view(-1, *grid), mask)


def panel(title: str, batch: Batch, shown: Shown, model: MaskedAutoencoder | None, patch: int) -> Image.Image:
    """picture | score | mask | reconstruction + visible, a row for each picture."""
    grid = shown.scores.shape[1:]
    area = shown.mask.view(-1, 1, *grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    scores = [heat(scores.cpu().numpy(), 1.0) for scores in shown.scores]
    columns = [batch.images, scores, torch.where(area > 0, GREY, batch.images)]
    titles = ["picture", "score", "masked"]
    if model is not None:
        columns.append(model.reconstruct(batch.images, shown.mask)["pasted"])
        titles.append("reconstruction\n+ visible" + "\n(oracle statistics)" * model.norm_pix_loss)
    cell = min(max(112, *batch.images.shape[-2:]), 160)
    return sheet(list(zip(*columns, strict=True)), column_titles=titles, title=title, cell=cell)


def removed_share(shown: Shown, covered: torch.Tensor) -> float | None:
    """Of all that a map (N, rows, columns) covers, the share that was removed, 0..1; None where it covers nothing."""
    covered = covered.to(shown.mask.device).float().flatten(1)
    total = covered.sum().item()
    return (covered * shown.mask).sum().item() / total if total else None


def open_strategy(text: str, args) -> Masking:
    """The strategy of NAME[:WEIGHT]+...[@STRENGTH]; UserError for what is none."""
    name, at, strength = text.partition("@")
    try:
        strength = rate(strength) if at else args.mask_strength
    except ArgumentTypeError as error:
        raise UserError(f"--strategies {text}: {error}: write it like grid@1000") from None
    return Masking(name, strength=strength, random_share=0.0, seed=args.seed)


def usable(args, source, model) -> tuple[dict[str, Masking], Maps | None, dict[str, str]]:
    """The strategies that can be shown by what they are called, their maps, and why others cannot.

    Maps that are missing are an error where --strategies asks for them; `hard` needs a model that has learned it.
    """
    found, skipped = {}, {}
    for name in dict.fromkeys(args.strategies or DEFAULT):
        strategy = open_strategy(name, args)
        if strategy.hard and (model is None or model.decoder_hardness is None):
            skipped[name] = "no prediction of errors: give --ckpt of a model trained with --masking hard"
        else:
            found[name] = strategy
    maps, missing = find_maps(source, {name: None for strategy in found.values() for name in strategy.maps}, args.maps)
    for name in [name for name, strategy in found.items() if missing.keys() & set(strategy.maps)]:
        skipped[name] = next(missing[map_name] for map_name in found.pop(name).maps if map_name in missing)
        if args.strategies:
            raise UserError(f"--strategies {name}: {skipped[name]}")
    if not found:
        name, reason = next(iter(skipped.items()))
        raise UserError(f"--strategies: none can be shown; {name}: {reason}")
    return found, maps, skipped


def get_args(argv: list[str] | None = None):
    parser = Parser("What each masking strategy removes, as a figure")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="pictures, as main_pretrain.py takes them")
    parser.add_argument("--out", required=True, metavar="FILE", help="the figure, a .png file")
    parser.add_argument("--ckpt", metavar="W", help="weights with a decoder, for the reconstructions")
    parser.add_argument("--maps", metavar="DIR", help="folder of semantic maps; default: DATA/maps")
    parser.add_argument(
        "--strategies",
        nargs="+",
        metavar="NAME[:WEIGHT]+...[@STRENGTH]",
        help=f"as --masking of main_pretrain.py: {', '.join(SCORES)}; default: all that can be had, and those that do "
        "not look at the picture at strength 1000",
    )
    parser.add_argument("--mask_ratio", type=ratio, default=0.75, help="removed patches, fraction, 0 to below 1")
    parser.add_argument(
        "--mask_strength", type=rate, default=4.0, help="as of main_pretrain.py, where no @ says another"
    )
    parser.add_argument("--images", type=count, default=4, help="pictures in each block, evenly spread")
    parser.add_argument("--columns", type=count, default=3, help="blocks side by side")
    parser.add_argument("--patch_size", type=count, default=16, help="side of a patch without --ckpt, px")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="part of the data to show")
    add_reading_args(parser)
    args = parser.parse_args(argv)
    if Path(args.out).suffix.lower() != ".png":
        raise UserError(f"--out {args.out}: give a file that ends in .png")
    return args


def see(args, device: torch.device) -> tuple[MaskedAutoencoder | None, int, tuple[int, int]]:
    """The model, if there is one, the side of a patch, px, and the grid of patches."""
    size = args.input_size and height_width(args.input_size)
    if args.ckpt:
        model = load_mae(args.ckpt, size, device)
        return model, model.patch_size, model.grid
    return None, args.patch_size, patch_grid(*(size or (224, 224)), args.patch_size)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    device = pick_device(args.device)
    model, patch, grid = see(args, device)
    check_ratios([args.mask_ratio], grid[0] * grid[1])
    source = open_source(args.data_path, args.split, labels=args.labels, val_fraction=args.val_fraction)
    strategies, maps, skipped = usable(args, source, model)
    for name, reason in skipped.items():
        print(f"not shown: {name}: {reason}")

    size, chosen = (grid[0] * patch, grid[1] * patch), spread(len(source), args.images)
    pictures = Pictures(source, chosen, size, args.images, "drawing", maps=maps, grid=grid)
    batch = next(iter(pictures), None)
    if batch is None:
        raise UserError(f"no picture of {source.name} can be read: check the files")
    batch = Batch(*(None if part is None else part.to(device) for part in batch))
    names = maps.names if maps else ()
    panels = []
    for name, strategy in strategies.items():
        hard = model.hardness(batch.images) if strategy.hard else None
        shown = apply(strategy, batch, names, grid, args.mask_ratio, hard)
        title = f"{name}: {in_words(strategy)}"
        if "face" in names and (share := removed_share(shown, batch.maps[:, names.index("face")])) is not None:
            title += f"\n{100 * share:.0f} % of these faces are removed"
        panels.append(panel(title, batch, shown, model, patch))
    bar = scale_bar(
        1.0,
        f"score: at 1 the odds to be removed are e^{args.mask_strength:g} times those at 0 (with @X: e^X)",
        digits=1,
    )
    head = sheet([[]], title=f"Masking strategies, {percent_masked(args.mask_ratio)}", font_size=18, cell=1)
    figure = tile([head, tile(panels, columns=args.columns), bar], columns=1, gap=12)
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda temporary: figure.save(temporary, format="PNG"))
    print(f"{len(panels)} strategies on {len(batch.images)} pictures: {out}")


if __name__ == "__main__":
    main()
