"""The figure of `visualize.adaptation`: four panels, what each shows, and how stages are told apart."""

import numpy as np

from util.benchmark.figure_style import COLOURS, GREY, INK, MARKERS, new_figure, percent_axis
from visualize.views import DPI

# the matrices of a block, in the words of the figure
MATRICES = {
    "attn.qkv": "queries, keys, values",
    "attn.proj": "attention output",
    "mlp.fc1": "MLP in",
    "mlp.fc2": "MLP out",
}
_NUMBERED = 9  # layers up to which each CKA is written into its cell


def draw(
    cka: np.ndarray, diagonals: dict, changes: dict, probed: dict, bounds: dict, epochs: list, floor: float | None
):
    """Four panels. diagonals, probed, bounds: by the name of a stage, "before" among the probed ones.

    epochs: of the stages, before first, for the panel over epochs; empty for one stage: then the weights' changes.
    """
    figure, axes = new_figure(columns=2, rows=2, height=6.6, dpi=DPI)
    _draw_cka(figure, axes[0, 0], cka)
    _draw_diagonals(axes[0, 1], diagonals)
    last = axes[1, 1]
    if probed:
        _draw_probes(axes[1, 0], probed, bounds, floor)
        if epochs:
            _draw_epochs(last, epochs, probed)
    if not (probed and epochs):
        place = last if probed else axes[1, 0]
        _draw_changes(place, changes)
    if not probed:
        last.set_axis_off()
    for panel in axes.flat:
        panel.title.set_fontsize(10)
        panel.xaxis.label.set_fontsize(9)
        panel.yaxis.label.set_fontsize(9)
        panel.tick_params(labelsize=8)
    return figure


def _draw_cka(figure, axes, cka: np.ndarray) -> None:
    image = axes.imshow(cka, cmap="viridis", vmin=0, vmax=1, origin="lower")
    axes.grid(False)
    axes.set(xlabel="layer after", ylabel="layer before", title="Similarity of layers")
    if len(cka) <= _NUMBERED:
        for (i, j), value in np.ndenumerate(cka):
            colour = INK if value > 0.6 else "white"
            axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    _layer_ticks(axes.xaxis, len(cka))
    _layer_ticks(axes.yaxis, len(cka))
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("linear CKA, 0 to 1", fontsize=9)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _draw_diagonals(axes, diagonals: dict) -> None:
    for style, (name, values) in zip(_stage_styles(len(diagonals)), diagonals.items(), strict=True):
        axes.plot(range(len(values)), values, **style, label=name)
    axes.set(xlabel="layer (0: patch embedding)", ylabel="CKA with the layer before", ylim=(-0.02, 1.04),
             title="How much of each layer is left")  # fmt: skip
    _layer_ticks(axes.xaxis, len(next(iter(diagonals.values()))))
    axes.legend(frameon=False, fontsize=8, loc="lower left")


def _draw_probes(axes, probed: dict, bounds: dict, floor: float | None) -> None:
    stages = _stage_styles(len(probed) - 1)
    styles = [{"color": GREY, "linestyle": "--", "marker": "s", "markersize": 4.5, "linewidth": 1.6}, *stages]
    for style, (name, values) in zip(styles, probed.items(), strict=True):
        axes.plot(range(len(values)), values, **style, label=name)
        if name in ("before", list(probed)[-1]) and None not in bounds[name]:
            low, high = zip(*bounds[name], strict=True)
            axes.fill_between(range(len(values)), low, high, color=style["color"], alpha=0.15, linewidth=0)
    if floor is not None:
        axes.axhline(floor, color=INK, linewidth=0.9, linestyle=":")
        place = {"xy": (0.99, floor), "xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
        axes.annotate("chance", **place, fontsize=7.5, color=INK)
    axes.set(xlabel="layer (0: patch embedding)", ylabel="accuracy of a linear probe", title="Identities in each layer")
    axes.set_ylim(bottom=0)
    percent_axis(axes.yaxis)
    _layer_ticks(axes.xaxis, len(next(iter(probed.values()))))
    _legend_above(axes)


def _draw_epochs(axes, epochs: list, probed: dict) -> None:
    table = np.array(list(probed.values()))
    for i, (values, name) in enumerate(((table.max(axis=1), "best layer"), (table[:, -1], "last layer"))):
        style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "-" if i else "--", "linewidth": 1.8}
        axes.plot(epochs, values, **style, label=name)
    axes.set(xlabel="epochs of adaptation (0: before)", ylabel="accuracy of a linear probe", title="While adapting")
    axes.set_ylim(bottom=0)
    axes.set_xticks(epochs)
    percent_axis(axes.yaxis)
    _legend_above(axes)


def _draw_changes(axes, changes: dict) -> None:
    if not changes:
        axes.set_axis_off()
        return
    for i, (name, values) in enumerate(changes.items()):
        style = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": ("-", "--", "-.", ":")[i], "linewidth": 1.6}
        axes.plot(
            range(1, len(values) + 1), [np.nan if v is None else v for v in values], **style, label=MATRICES[name]
        )
    axes.set(xlabel="block", ylabel="|change| / |weights before|", title="Change of the weights")
    axes.set_ylim(bottom=0)
    percent_axis(axes.yaxis)
    _layer_ticks(axes.xaxis, len(next(iter(changes.values()))) + 1, first=1)
    _legend_above(axes)


def _legend_above(axes) -> None:
    """A legend in room of its own above the curves."""
    axes.set_ylim(top=1.32 * axes.get_ylim()[1])
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=2, columnspacing=1.0, handlelength=2.4)


def _stage_styles(count: int) -> list[dict]:
    """Of the stages of an adaptation, early ones light: one colour of one order."""
    from matplotlib import colormaps  # slow to import

    if count == 1:
        return [{"color": COLOURS[0], "marker": "o", "markersize": 4.5, "linewidth": 1.8}]
    shades = colormaps["viridis"](np.linspace(0.85, 0.0, count))
    return [
        {"color": s, "marker": MARKERS[i % len(MARKERS)], "markersize": 4.5, "linewidth": 1.6}
        for i, s in enumerate(shades)
    ]


def _layer_ticks(axis, layers: int, first: int = 0) -> None:
    axis.set_ticks(range(first, layers, max(1, round(layers / 8))))
