"""The embeddings of a data set as a map: similar pictures lie close together.

    python -m visualize.embedding_map --ckpt RUN/checkpoint-best.pth --data_path DIR --out embedding_map.png

By t-SNE (van der Maaten and Hinton 2008), or with --method umap by UMAP (arXiv 1802.03426), where that is installed.
A few identities have a colour and a sign of their own, all others are grey. Distances far apart mean nothing on such a
map, so the .json beside says how far it keeps neighbourhoods.
"""

import importlib.util
from collections import Counter
from collections.abc import Sequence

import numpy as np

from util.benchmark.figure_style import COLOURS, INK, MARKERS, finish, new_figure, percent, short
from util.data.face_crop import open_pictures
from util.data.sources import spread
from util.representation.nearest import nearest
from util.run.args import Parser, count0, number
from util.run.device import pick_device
from util.run.errors import UserError, cli
from visualize.views import (
    DPI,
    add_encoder_args,
    add_picture_args,
    check_out,
    embed,
    identities,
    open_encoder,
    thumbnail,
    write_numbers,
)

MOST_COLOURS = len(COLOURS) - 1  # the last is too close to the grey of the others
_GREY = "#b5b5b5"
_NEIGHBOURS = 5  # of the trustworthiness
_HEIGHT = 6.6  # inches


def lay_out(embeddings: np.ndarray, method: str, seed: int, perplexity: float) -> np.ndarray:
    """(N, D) rows of length 1 -> places (N, 2) on the map, the same for the same seed.

    perplexity: of t-SNE; UMAP's number of neighbours, rounded. UserError where UMAP is missing or pictures are too few.
    """
    if perplexity >= len(embeddings):
        raise UserError(f"--perplexity {perplexity:g} needs more than {len(embeddings)} pictures: lower it")
    if method == "umap":
        if not importlib.util.find_spec("umap"):
            raise UserError("--method umap: umap-learn is not installed: pip install umap-learn, or take tsne")
        from umap import UMAP  # slow to import

        made = UMAP(n_neighbors=max(2, round(perplexity)), metric="cosine", random_state=seed)
    else:
        from sklearn.manifold import TSNE  # slow to import

        # rows have length 1: Euclidean distances rank as cosines do
        made = TSNE(perplexity=perplexity, init="pca", learning_rate="auto", random_state=seed)
    return np.asarray(made.fit_transform(embeddings), dtype=np.float64)


def pick_identities(names: Sequence[str | None], wanted: Sequence[str] | int) -> list[str]:
    """Who gets a colour: those named, or the `wanted` most frequent ones, in alphabetical order among equals.

    UserError for a name that is on no picture, and for more than there are colours.
    """
    counts = Counter(name for name in names if name is not None)
    if isinstance(wanted, int):
        wanted = sorted(counts, key=lambda name: (-counts[name], name))[:wanted]
    if len(wanted) > MOST_COLOURS:
        raise UserError(f"--identities: {len(wanted)} are more than can be told apart: name at most {MOST_COLOURS}")
    for name in wanted:
        if name not in counts:
            raise UserError(f"--identities {name}: none of these pictures shows it: name one of {_some(counts)}")
    return list(dict.fromkeys(wanted))


def _some(names) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (" ..." if len(listed) > 5 else "")


def choose_apart(places: np.ndarray, order: Sequence[int], size: float, most: int) -> list[int]:
    """Which of the places (N, 2) get a square picture of side `size`, in the same unit, so that no two overlap.

    Taken greedily in `order`, at most `most`.
    """
    chosen: list[int] = []
    for i in order:
        if len(chosen) == most:
            break
        if all(np.abs(places[i] - places[j]).max() >= size for j in chosen):
            chosen.append(i)
    return chosen


def fidelity(embeddings: np.ndarray, places: np.ndarray, names: Sequence[str | None]) -> dict:
    """How far a map keeps what the embeddings say.

    "trustworthiness" (0..1; Venna and Kaski 2001) of 5 neighbours, None of too few pictures. "nearest_same_identity":
    the share of pictures whose nearest neighbour is of their identity, among the embeddings and on the map.
    """
    from sklearn.manifold import trustworthiness  # slow to import

    enough = len(places) > 2 * _NEIGHBOURS
    trust = float(trustworthiness(embeddings, places, n_neighbors=_NEIGHBOURS)) if enough else None
    known = [i for i, name in enumerate(names) if name is not None]
    report = {"trustworthiness": trust, "nearest_same_identity": None}
    if len(known) > 1:
        who = np.array([names[i] for i in known])
        own = np.arange(len(known))
        first = nearest(embeddings[known], embeddings[known], 1, (own, own))[0][:, 0]
        distances = np.square(places[known][:, None] - places[known][None]).sum(axis=2)
        np.fill_diagonal(distances, np.inf)
        report["nearest_same_identity"] = {
            "embeddings": float((who[first] == who).mean()),
            "map": float((who[distances.argmin(axis=1)] == who).mean()),
        }
    return report


def on_paper(places: np.ndarray, width: float, height: float) -> np.ndarray:
    """Places (N, 2) in the unit of the map -> inches on axes of a size, as `frame` sets their limits."""
    low, high = places.min(axis=0), places.max(axis=0)
    return (places - low) / np.where(high > low, high - low, 1) * [width, height]


def draw(
    places: np.ndarray, names: Sequence, coloured: Sequence[str], pictures: dict[int, object], side: float, axis: str
):
    """The map, and the axes that hold its legend. pictures: point -> thumbnail. side: of a thumbnail, inches."""
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage  # slow to import

    figure, axes = new_figure(height=_HEIGHT, dpi=DPI)
    axes.grid(False)
    axes.set(xticks=[], yticks=[], xlabel=f"{axis} 1 (no unit)", ylabel=f"{axis} 2 (no unit)")
    who = np.array([name if name in coloured else "" for name in names], dtype=object)
    others = who == ""
    if others.any():
        label = f"others ({others.sum():,})" if coloured else f"pictures ({others.sum():,})"
        axes.scatter(*places[others].T, s=9, color=_GREY, linewidths=0, label=label)
    style_of = {name: (COLOURS[i], MARKERS[i]) for i, name in enumerate(coloured)}
    for name, (colour, marker) in style_of.items():
        own = who == name
        style = {"s": 34, "color": colour, "marker": marker, "edgecolors": "white", "linewidths": 0.6, "zorder": 3}
        axes.scatter(*places[own].T, label=f"{short(name, 22)} ({own.sum():,})", **style)
    for i, picture in pictures.items():
        image = np.asarray(picture)
        zoom = side * 72 / max(image.shape[:2])
        colour, marker = style_of.get(names[i], (_GREY, None))
        frame = {"edgecolor": colour, "linewidth": 1.8 if marker else 0.8, "facecolor": "white"}
        box = OffsetImage(image, zoom=zoom, interpolation="antialiased")
        axes.add_artist(AnnotationBbox(box, places[i], pad=0.08, bboxprops=frame, zorder=4))
        if marker:
            offset = AnnotationBbox(_sign(colour, marker), places[i], xybox=(-36 * side, 36 * side),
                                    boxcoords="offset points", frameon=False, pad=0, zorder=5)  # fmt: skip
            axes.add_artist(offset)
    margin = 0.06 * np.ptp(places, axis=0)
    low, high = places.min(axis=0) - margin, places.max(axis=0) + margin
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]))
    axes.spines[["top", "right"]].set_visible(True)
    axes.spines[:].set_color(INK)
    return figure, axes


def _sign(colour: str, marker: str):
    """The sign of an identity, at the corner of its pictures: colour is not all that tells them apart."""
    from matplotlib.lines import Line2D  # slow to import
    from matplotlib.offsetbox import DrawingArea

    area = DrawingArea(0, 0)
    area.add_artist(Line2D([0], [0], marker=marker, markersize=7, color=colour, markeredgecolor="white"))
    return area


def get_args(argv: list[str] | None = None):
    parser = Parser("The embeddings of pictures as a map, with thumbnails")
    add_encoder_args(parser)
    add_picture_args(parser, images=600, images_help="pictures on the map, evenly spread over the split")
    group = parser.add_argument_group("map")
    group.add_argument("--method", choices=("tsne", "umap"), default="tsne", help="umap needs umap-learn")
    group.add_argument(
        "--perplexity", type=number(float, 1.0), default=30.0, help="neighbours that count, roughly; below the pictures"
    )
    group.add_argument(
        "--identities", nargs="+", default=None, metavar="NAME",
        help=f"who gets a colour, at most {MOST_COLOURS}; default: the most frequent of these pictures",
    )  # fmt: skip
    group.add_argument("--thumbnails", type=count0, default=40, help="pictures at their points, at most, none overlaps")
    group.add_argument("--thumbnail_size", type=number(float, 0.2, 1.5), default=0.46, help="their side, inches")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out, device = check_out(args.out), pick_device(args.device)
    encoder = open_encoder(args.ckpt, args, device)
    source = open_pictures(args, args.split)
    embeddings, numbers = embed(encoder, source, spread(len(source), args.images), args, "embedding")
    names = identities(source, numbers)
    coloured = pick_identities(names, args.identities or MOST_COLOURS)
    places = lay_out(embeddings, args.method, args.seed, args.perplexity)

    # those with a colour first, then an even spread over the rest
    first = [i for i, name in enumerate(names) if name in coloured]
    rest = [i for i in range(len(names)) if i not in set(first)]
    order = [*first[:: max(1, len(first) // 24)], *(rest[i] for i in spread(len(rest), 400)), *first]
    room = args.thumbnail_size * 1.25  # with its frame and its sign
    shown = choose_apart(on_paper(places, 6.0, 4.7), list(dict.fromkeys(order)), room, args.thumbnails)
    pictures = {i: thumbnail(source, int(numbers[i]), encoder) for i in shown}

    measured = fidelity(embeddings, places, names)
    axis = {"tsne": "t-SNE", "umap": "UMAP"}[args.method]
    title = f"{len(places):,} pictures of {args.split} by {short(encoder.label, 60)}"
    if same := measured["nearest_same_identity"]:
        title += f": the nearest neighbour is of the same identity for {percent(same['embeddings'])}"
        title += f" of them, on this map for {percent(same['map'])}"
    figure, axes = draw(places, names, coloured, pictures, args.thumbnail_size, axis)
    finish(figure, title, out, legend_of=axes)
    samples = source.column("sample_id")
    points = [
        {"sample_id": samples[row], "identity": name, "x": round(float(x), 4), "y": round(float(y), 4)}
        for row, name, (x, y) in zip(numbers.tolist(), names, places, strict=True)
    ]
    report = {"method": args.method, "images": len(points), **measured, "points": points}
    print(f"{len(points)} pictures: {out}; numbers: {write_numbers(out, report, args, device, source)}")


if __name__ == "__main__":
    main()
