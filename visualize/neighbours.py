"""Who looks alike to an encoder: pictures and their nearest neighbours, right and wrong ones told apart.

    python -m visualize.neighbours --ckpt RUN/checkpoint-best.pth --data_path DIR --out neighbours.png

Queries come from --queries, neighbours from --gallery, by the cosine of their embeddings; a query is no neighbour of
its own. The .json beside says how often a neighbour is right over all queries that were measured.
"""

import numpy as np

from util.benchmark.figure_style import COLOURS, INK, families, finish, percent, plain, short
from util.data.face_crop import open_pictures
from util.data.roles import ROLES
from util.data.sources import Source, spread
from util.representation.nearest import nearest
from util.run.args import Parser, count
from util.run.device import pick_device
from util.run.errors import UserError, cli
from visualize.views import (
    add_encoder_args,
    add_picture_args,
    check_out,
    column_titles,
    embed,
    identities,
    open_encoder,
    picture_table,
    row_labels,
    show,
    thumbnail,
    write_numbers,
)

RIGHT, WRONG = COLOURS[0], COLOURS[1]


def rates(right: np.ndarray) -> dict[str, float]:
    """Of (N, k) bool, whether each neighbour is right: the share of first ones, of all, and of queries with any."""
    return {
        "first_right": float(right[:, 0].mean()),
        "neighbours_right": float(right.mean()),
        "any_right": float(right.any(axis=1).mean()),
    }


def choose(right: np.ndarray, wanted: int, kind: str) -> list[int]:
    """Which queries to show, evenly spread: of "all" (N, k), or only those whose first neighbour is right or wrong."""
    pool = {"all": np.arange(len(right)), "right": np.flatnonzero(right[:, 0]), "wrong": np.flatnonzero(~right[:, 0])}
    return [int(pool[kind][i]) for i in spread(len(pool[kind]), wanted)]


def draw(queries: list, found: list[list[tuple]], names: list[str], title: str, aspect: float):
    """A row for each query. found: (picture, identity, cosine, right) of its neighbours."""
    columns = len(found[0])
    figure, axes = picture_table(
        len(queries), columns + 1, title, head=0.28, foot=0.3, label=0.9, below=0.34, gap=0.11, aspect=aspect
    )
    column_titles(axes, ["query", *(f"neighbour {i + 1}" for i in range(columns))])
    row_labels(axes, names)
    for row, query, own in zip(axes, queries, found, strict=True):
        show(row[0], query, interpolation="antialiased")
        for cell, (picture, name, cosine, right) in zip(row[1:], own, strict=True):
            show(cell, picture, interpolation="antialiased")
            _frame(cell, right)
            mark = "\N{CHECK MARK}" if right else "\N{BALLOT X}"
            text = f"{mark} {cosine:.3f}\n{short(name, 13)}"
            style = {"fontsize": 7.5, "color": RIGHT if right else WRONG, "fontfamily": families()}
            cell.text(
                0.5, -0.06, plain(text), ha="center", va="top", transform=cell.transAxes, linespacing=1.2, **style
            )
    width, height = figure.get_size_inches()
    parts = ("\N{CHECK MARK} solid: the query's identity", "\N{BALLOT X} dashed: another", "number: cosine, -1 to 1")
    key = "      ".join(parts)
    figure.text(0.1 / width, 0.12 / height, key, fontsize=8, color=INK, va="bottom")
    return figure


def _frame(cell, right: bool) -> None:
    cell.spines[:].set_visible(True)
    cell.spines[:].set(color=RIGHT if right else WRONG, linewidth=2.6, linestyle="-" if right else (0, (2.2, 1.4)))


def labelled(source: Source, wanted: int, role: str) -> list[int]:
    """Numbers of `wanted` samples of known identity, evenly spread; UserError where there are none."""
    known = [i for i, name in enumerate(source.column("identity")) if name is not None]
    if not known:
        raise UserError(f"{source.name} has no labels for {role!r}: give class folders, or metadata with identities")
    return [known[i] for i in spread(len(known), wanted)]


def get_args(argv: list[str] | None = None):
    parser = Parser("Pictures and their nearest neighbours by an encoder, as a figure")
    add_encoder_args(parser)
    add_picture_args(parser, images=5, images_help="queries in the figure", split=None)
    group = parser.add_argument_group("neighbours")
    group.add_argument("--queries", choices=tuple(ROLES), default="test", help="part of the data that queries are from")
    group.add_argument("--gallery", choices=tuple(ROLES), default="train", help="part that neighbours are from")
    group.add_argument("--neighbours", type=count, default=6, help="nearest neighbours of each query")
    group.add_argument("--measure", type=count, default=500, help="queries that the rates are of, evenly spread")
    group.add_argument("--gallery_images", type=count, default=5000, help="pictures of the gallery, evenly spread")
    group.add_argument(
        "--show", choices=("all", "right", "wrong"), default="all",
        help="queries to show: evenly spread over all, or those whose first neighbour is right, or wrong",
    )  # fmt: skip
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    out, device = check_out(args.out), pick_device(args.device)
    encoder = open_encoder(args.ckpt, args, device)
    ours, theirs = open_pictures(args, args.queries), open_pictures(args, args.gallery)
    asked, rows = labelled(ours, args.measure, args.queries), labelled(theirs, args.gallery_images, args.gallery)
    queries, asked = embed(encoder, ours, asked, args, "queries")
    gallery, rows = embed(encoder, theirs, rows, args, "gallery")
    samples = [np.array(source.column("sample_id")) for source in (ours, theirs)]
    try:
        found, cosines = nearest(queries, gallery, args.neighbours, (samples[0][asked], samples[1][rows]))
    except ValueError as error:
        raise UserError(f"--neighbours {args.neighbours}: {error} ({args.gallery}): ask for fewer") from None
    who, whose = (np.array(identities(s, n), dtype=object) for s, n in ((ours, asked), (theirs, rows)))
    right = whose[found] == who[:, None]
    shown = choose(right, args.images, args.show)
    if not shown:
        raise UserError(f"--show {args.show}: no query is {args.show} at the first neighbour: give another")

    measured = rates(right)
    title = f"Nearest neighbours in {args.gallery} ({len(rows):,} pictures): the first is right for "
    title += f"{percent(measured['first_right'])} of {len(asked):,} queries of {args.queries}"
    title += f"; shown: queries where it is {args.show}" * (args.show != "all")
    title += f". {short(encoder.label, 60)}"
    cells = [
        [
            (thumbnail(theirs, int(rows[m]), encoder), whose[m], float(cosines[n, i]), bool(right[n, i]))
            for i, m in enumerate(found[n])
        ]
        for n in shown
    ]
    pictures = [thumbnail(ours, int(asked[n]), encoder) for n in shown]
    names = [short(who[n], 13) for n in shown]
    finish(draw(pictures, cells, names, title, encoder.size[0] / encoder.size[1]), title, out)

    lists = [
        {
            "query": samples[0][asked[n]],
            "identity": who[n],
            "neighbours": [
                {"sample_id": samples[1][rows[m]], "identity": whose[m], "cosine": round(float(cosines[n, i]), 5)}
                for i, m in enumerate(found[n])
            ],
        }
        for n in shown
    ]
    numbers = {"queries": len(asked), "gallery": len(rows), "k": args.neighbours, **measured, "shown": lists}
    print(f"{len(shown)} queries: {out}; numbers: {write_numbers(out, numbers, args, device, ours)}")


if __name__ == "__main__":
    main()
