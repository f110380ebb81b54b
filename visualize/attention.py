"""Where a vision transformer looks: the attention of its last block, head by head, and attention rollout.

    python -m visualize.attention --ckpt RUN/checkpoint-last.pth --data_path DIR --out attention.png

A row for each picture: the picture, each head, their mean, and the rollout through all blocks (arXiv 2005.00928).
Numbers are multiples of an equal share: a patch of 3 gets three times what it would if all patches got the same. The
.json beside has the entropy and the mean distance of every head.
"""

import numpy as np
import torch

from util.benchmark.figure_style import finish, short
from util.data.face_crop import open_pictures
from util.representation.layers import attention_by_layer, blocks_of, grid_of, pooling_of, prefix_tokens
from util.representation.rollout import entropy, mean_distance, over_patches, rollout
from util.run.args import Parser
from util.run.device import pick_device
from util.run.errors import cli
from visualize.views import (
    Encoder,
    add_encoder_args,
    add_picture_args,
    check_out,
    column_titles,
    enlarged,
    identities,
    open_encoder,
    picture_table,
    row_labels,
    see,
    show,
    write_numbers,
)

WHAT = {"class": "What the class token attends to", "mean": "What the patches attend to, on average,"}


def look_at(encoder: Encoder, images: torch.Tensor, query: str) -> tuple[np.ndarray, dict]:
    """Maps (N, heads + 2, rows, columns) in multiples of an equal share: the heads, their mean, the rollout.

    Also the numbers of the heads of the last block, means over the pictures.
    """
    model = encoder.model
    prefix, grid = prefix_tokens(model), grid_of(model, images)
    parts, distances = [], []
    for image in images.split(1):  # the weights of all blocks take much memory
        attentions = attention_by_layer(model, image)
        last = attentions[-1]
        steps = (last, last.mean(dim=1, keepdim=True), rollout(attentions)[:, None])
        parts.append(torch.cat([over_patches(weights, prefix, query) for weights in steps], dim=1))
        distances.append(mean_distance(last, prefix, grid, model.patch_size))
    maps = torch.cat(parts)
    entropies = [round(value, 4) for value in entropy(maps).mean(dim=0).tolist()]
    reach = [round(value, 2) for value in torch.cat(distances).mean(dim=0).tolist()]
    heads = [{"entropy": h, "mean_distance_px": d} for h, d in zip(entropies[:-2], reach, strict=True)]
    numbers = {"heads": heads, "mean": {"entropy": entropies[-2]}, "rollout": {"entropy": entropies[-1]}}
    return maps.unflatten(-1, grid).cpu().numpy(), numbers


def ranges_of(maps: np.ndarray) -> list[tuple[float, float]]:
    """(dark, bright) of each column of maps (N, columns, ...): all but the outermost hundredths lie between."""
    flat = maps.swapaxes(0, 1).reshape(maps.shape[1], -1)
    low, high = np.percentile(flat, [1, 99], axis=1)
    return [(float(a), float(max(b, a + 1e-6))) for a, b in zip(low, high, strict=True)]


def draw(pictures: list, maps: np.ndarray, names: list[str], title: str, aspect: float):
    """The table of pictures and maps; each column has its own scale, written over it."""
    heads, ranges = maps.shape[1] - 2, ranges_of(maps)
    columns = [*(f"head {i + 1}" for i in range(heads)), "mean of heads", "rollout"]
    scales = [f"{text}\n{low:.2g} to {high:.2g} ×" for text, (low, high) in zip(columns, ranges, strict=True)]
    figure, axes = picture_table(
        len(pictures), len(scales) + 1, title, head=0.42, foot=0.62, label=0.7 * any(names), aspect=aspect
    )
    column_titles(axes, ["picture", *scales], 7.5)
    if any(names):
        row_labels(axes, names, 7.5)
    for row, picture, own in zip(axes, pictures, maps, strict=True):
        show(row[0], picture, interpolation="antialiased")
        for cell, values, (low, high) in zip(row[1:], own, ranges, strict=True):
            show(cell, values, cmap="viridis", vmin=low, vmax=high)
    _scale(figure)
    return figure


def _scale(figure) -> None:
    from matplotlib.cm import ScalarMappable  # slow to import

    width, height = figure.get_size_inches()
    axes = figure.add_axes((0.25 / width, 0.36 / height, 2.2 / width, 0.11 / height))
    bar = figure.colorbar(ScalarMappable(cmap="viridis"), cax=axes, orientation="horizontal")
    bar.set_ticks([0, 1], labels=["low", "high"])
    bar.outline.set_visible(False)
    axes.tick_params(labelsize=7.5, length=0)
    text = "attention that a patch gets, × an equal share;\nthe two numbers over a column: its low and its high"
    figure.text(2.75 / width, 0.41 / height, text, fontsize=7.5, va="center", linespacing=1.25)


def get_args(argv: list[str] | None = None):
    parser = Parser("Attention maps of the last block and attention rollout, as a figure")
    add_encoder_args(parser)
    add_picture_args(parser, images=6, images_help="pictures in the figure, evenly spread over the split")
    parser.add_argument(
        "--query", choices=("auto", "class", "mean"), default="auto",
        help="whose attention: the class token's, or the mean over the patches'; auto: what the embedding is made of",
    )  # fmt: skip
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out, device = check_out(args.out), pick_device(args.device)
    encoder = open_encoder(args.ckpt, args, device)
    depth = len(blocks_of(encoder.model))
    source = open_pictures(args, args.split)
    query = pooling_of(encoder.model) if args.query == "auto" else args.query
    images, numbers = see(encoder, source, args.images)
    maps, measured = look_at(encoder, images, query)
    names = [short(name or "", 12) for name in identities(source, numbers)]
    title = f"{WHAT[query]} in block {depth} of {depth}, and through all blocks (rollout): {short(encoder.label, 60)}"
    aspect = encoder.size[0] / encoder.size[1]
    figure = draw([enlarged(image) for image in images], maps, names, title, aspect)
    finish(figure, title, out)
    samples = source.column("sample_id")
    shown = {"images": [samples[i] for i in numbers], "query": query, "block": depth, **measured}
    beside = write_numbers(out, shown, args, device, source)
    print(f"{len(images)} pictures, {maps.shape[1] - 2} heads: {out}; numbers: {beside}")


if __name__ == "__main__":
    main()
