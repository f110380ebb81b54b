"""What the patches of several pictures have in common: principal components of their tokens, as colours.

    python -m visualize.patch_pca --ckpt RUN/checkpoint-last.pth --data_path DIR --out patch_pca.png
    python -m visualize.patch_pca --ckpt RUN/checkpoint-last.pth --data_path DIR --out patch_pca.png --foreground

The components are fitted to the patches of all pictures together, so one colour means the same everywhere. The first is
shown as lightness, the second from blue to yellow, the third from green to red, and each by itself. --foreground:
the first component tells figure from background (as in DINOv2, arXiv 2304.07193), and the colours are of the figure.
"""

from dataclasses import dataclass

import numpy as np

from util.benchmark.figure_style import INK, finish, percent, short
from util.data.face_crop import open_pictures
from util.data.maps import Maps, find_maps
from util.data.sources import Source, spread
from util.representation.layers import blocks_of, grid_of, prefix_tokens, tokens_by_layer
from util.representation.patch_pca import as_colours, fit_components, foreground_by, to_unit_range, without_position
from util.run.args import Parser, count, number
from util.run.device import pick_device
from util.run.errors import UserError, cli
from visualize.pictures import Pictures
from visualize.views import (
    Encoder,
    add_encoder_args,
    add_picture_args,
    check_out,
    column_titles,
    enlarged,
    open_encoder,
    picture_table,
    show,
    write_numbers,
)

MEANING = ("dark to light", "blue to yellow", "green to red")
BACKGROUND = 1.0  # white
_MAP = "foreground"


@dataclass(frozen=True)
class Painted:
    """Of N pictures. values: (N, rows, columns, 3) in [0, 1], NaN outside the figure. share: (3,) of the variance.

    figure: (N, rows, columns) bool, None where the whole picture is painted.
    """

    values: np.ndarray
    share: np.ndarray
    figure: np.ndarray | None


def read_tokens(encoder: Encoder, source: Source, indices: list[int], layer: int, batch_size: int, maps: Maps | None):
    """Pictures, their patch tokens (N, L, D), their numbers, and the covered share of each patch (N, L) where maps are.

    layer: number of the block, from 1.
    """
    size, patch = encoder.size, encoder.model.patch_size
    cells = {"maps": maps, "grid": (size[0] // patch, size[1] // patch)} if maps else {}
    images, tokens, numbers, covered = [], [], [], []
    for batch in Pictures(source, indices, size, batch_size, "reading", **cells):
        found = tokens_by_layer(encoder.model, batch.images.to(encoder.device))[layer]
        images.extend(batch.images)
        tokens.append(found[:, prefix_tokens(encoder.model) :].cpu().numpy())
        numbers += batch.index.tolist()
        if maps:
            covered.append(batch.maps[:, 0].flatten(1).numpy() / 255)
    if not images:
        raise UserError(f"no picture of {source.name} can be read: check the files")
    return images, np.concatenate(tokens), numbers, np.concatenate(covered) if maps else None


def paint(tokens: np.ndarray, grid: tuple[int, int], foreground: bool) -> Painted:
    """The first three components of tokens (N, L, D), fitted to all patches; of the figure alone with `foreground`."""
    flat = tokens.reshape(-1, tokens.shape[-1])
    chosen = np.ones(len(flat), dtype=bool)
    if foreground:
        first = fit_components(flat, 1).of(tokens)[..., 0]
        chosen = foreground_by(first, grid).reshape(-1)
    components = fit_components(flat[chosen])
    values = np.full((len(flat), 3), np.nan)
    values[chosen] = to_unit_range(components.of(flat[chosen]))
    shape = (len(tokens), *grid)
    return Painted(values.reshape(*shape, 3), components.share, chosen.reshape(shape) if foreground else None)


def draw(pictures: list, painted: Painted, title: str, aspect: float):
    """picture | colours | (figure) | component 1 | 2 | 3."""
    names = [
        f"component {i + 1}: {percent(share)}\n{meaning}"
        for i, (share, meaning) in enumerate(zip(painted.share, MEANING, strict=True))
    ]
    masks = [] if painted.figure is None else ["figure, by the\nfirst component"]
    titles = ["picture", "components\nas colours", *masks, *names]
    figure, axes = picture_table(len(pictures), len(titles), title, head=0.42, foot=0.3, aspect=aspect)
    column_titles(axes, titles, 8)
    width, height = figure.get_size_inches()
    key = "percentages: of the variance of the tokens; each map from the least (dark) to the most (bright), no unit"
    figure.text(0.1 / width, 0.1 / height, key, fontsize=8, color=INK, va="bottom")
    colours = np.nan_to_num(as_colours(np.nan_to_num(painted.values, nan=0.5)))
    colours[np.isnan(painted.values[..., 0])] = BACKGROUND
    for n, (row, picture) in enumerate(zip(axes, pictures, strict=True)):
        show(row[0], picture, interpolation="antialiased")
        show(row[1], colours[n])
        if masks:
            show(row[2], painted.figure[n], cmap="gray", vmin=-0.25, vmax=1)
        for i, cell in enumerate(row[-3:]):
            show(cell, painted.values[n, ..., i], cmap="viridis", vmin=0, vmax=1)
    return figure


def agreement(figure: np.ndarray, covered: np.ndarray) -> float:
    """Intersection over union, 0..1, of the patches found (N, rows, columns) and those a map covers by half or more."""
    found, true = figure.reshape(-1), covered.reshape(-1) >= 0.5
    return float((found & true).sum() / max(1, (found | true).sum()))


def get_args(argv: list[str] | None = None):
    parser = Parser("Principal components of the patch tokens of several pictures, as colours")
    add_encoder_args(parser)
    add_picture_args(parser, images=5, images_help="pictures in the figure, evenly spread over the split")
    parser.add_argument("--fit_images", type=count, default=64, help="pictures that the components are fitted to")
    parser.add_argument("--foreground", action="store_true", help="paint the figure only, found by the first component")
    parser.add_argument(
        "--remove_position", action="store_true",
        help="take out what the tokens of all pictures share at a place: else components may be places in the picture",
    )  # fmt: skip
    parser.add_argument("--layer", type=number(int, 1), default=None, help="block that is read; default: the last")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out, device = check_out(args.out), pick_device(args.device)
    encoder = open_encoder(args.ckpt, args, device)
    depth = len(blocks_of(encoder.model))
    layer = args.layer or depth
    if layer > depth:
        raise UserError(f"--layer {layer}: {args.ckpt} has {depth} blocks, choose one of 1 to {depth}")
    source = open_pictures(args, args.split)
    # maps are of whole pictures
    maps = find_maps(source, {_MAP: None}, None)[0] if args.foreground and not args.face_padding else None

    chosen = spread(len(source), max(args.fit_images, args.images))
    images, tokens, numbers, covered = read_tokens(encoder, source, chosen, layer, args.batch_size, maps)
    if args.remove_position:
        tokens = without_position(tokens)
    if tokens.shape[-1] < 3 or tokens.shape[0] * tokens.shape[1] < 4:
        raise UserError("three components need tokens of three dimensions or more, and four patches")
    painted = paint(tokens, grid_of(encoder.model, images[0]), args.foreground)

    shown = spread(len(images), args.images)
    part = Painted(painted.values[shown], painted.share, None if painted.figure is None else painted.figure[shown])
    what = "figure's patches" if args.foreground else "patches"
    title = f"Principal components of the {what} of {len(images)} pictures after block {layer} of {depth}"
    title += " (what they share at a place taken out)" * args.remove_position
    figure = draw(
        [enlarged(images[i]) for i in shown], part, f"{title}: {short(encoder.label, 60)}",
        encoder.size[0] / encoder.size[1],
    )  # fmt: skip
    finish(figure, f"{title}: {short(encoder.label, 60)}", out)
    samples = source.column("sample_id")
    measured = {"images": [samples[numbers[i]] for i in shown], "fitted_to": len(images), "layer": layer}
    measured["variance"] = [round(float(share), 4) for share in painted.share]
    if painted.figure is not None:
        measured["figure_share"] = round(float(painted.figure.mean()), 4)
        measured["figure_iou"] = None if covered is None else round(agreement(painted.figure, covered), 4)
    print(f"{len(shown)} pictures: {out}; numbers: {write_numbers(out, measured, args, device, source)}")


if __name__ == "__main__":
    main()
