"""The report's figures: what is drawn is what was handed in, titles state true numbers, and no text is cut or covered.

Run: python -m pytest tests/test_benchmark_figures.py
"""

import sys
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from util.benchmark.confusion_figure import confusion_figure
from util.benchmark.figure_style import COLOURS, percent
from util.benchmark.figures import (
    dir_figure,
    few_shot_figure,
    long_tail_figure,
    oscr_figure,
    pr_figure,
    resolution_figure,
    roc_figure,
    score_histogram,
    size_histogram,
    stress_figure,
    threshold_figure,
)

NAMES = ("MAE, domain-adaptive, LoRA of rank 8, ArcFace head", "IR-50", "SimCLR $5 and $6", "a fourth model")


def curve(power: float) -> tuple[np.ndarray, np.ndarray]:
    fpr = np.concatenate([[0], np.geomspace(1e-5, 1, 60)])
    return fpr, fpr**power


CURVES = {name: curve(power) for name, power in zip(NAMES, (0.1, 0.2, 0.4, 0.7), strict=True)}
POINTS = {name: {rate: float(rate) ** p for rate in ("0.001", "0.01", "0.1")}
          for name, p in zip(NAMES, (0.1, 0.2, 0.4, 0.7), strict=True)}  # fmt: skip
SENSITIVITY = [
    {
        "offset": o,
        "threshold": 0.4 + o,
        "dir": 0.8 - o,
        "far": 0.05 - o / 4,
        "f1": 0.8,
        "slope": -1.7,
        "dir_ci95": [0, 1],
    }
    for o in (0.1, -0.1, 0.0, 0.05, -0.05)
]
STRESSES = {
    "eyes": {"drop": 0.31, "drop_ci95": [0.25, 0.38]},
    "jpeg": {"drop": 0.004, "drop_ci95": [-0.01, 0.02]},
    "occlusion: a hand in front of the face, or two": {"drop": 0.1, "drop_ci95": None},
    "blur": {"drop": -0.03, "drop_ci95": [-0.05, -0.01]},
}
SIZES = {
    str(px): {"top1": top1, "top1_ci95": ci, "latency_ms_p50": ms, "latency_ms_p95": ms * 1.2, "gmacs": ms * 2.13}
    for px, top1, ci, ms in (
        (448, 0.93, [0.91, 0.95], 40.0), (224, 0.9, None, 8.0), (336, 0.92, [0.9, 0.94], 18.0)
    )
}  # fmt: skip
FEW = {
    name: {"5way_1shot": {"mean": 0.5 + 0.1 * i, "ci95": [0.48 + 0.1 * i, 0.52 + 0.1 * i]},
           "20way_5shot": {"mean": 0.3 + 0.1 * i, "ci95": None} if i else {"skipped": "too few"}}
    for i, name in enumerate(("prototype", "logistic"))
}  # fmt: skip
RNG = np.random.default_rng(0)
SAME, DIFFERENT = RNG.normal(0.5, 0.15, 4000), RNG.normal(0, 0.15, 9000)
COUNTS = np.clip(np.geomspace(14, 7000, 300), 14, None).astype(int)
SHORT = RNG.lognormal(4.5, 0.6, 3000)


def confusions(classes: int, blocks: int) -> tuple:
    """Each class is named rightly 7 of 10 times, else taken for another of its block, twice, or for anybody, once."""
    rng, size = np.random.default_rng(1), classes // blocks
    found: dict[tuple[int, int], int] = {}
    for i in range(classes):
        first = i // size * size
        for j in (*[i] * 7, *rng.integers(first, min(first + size, classes), 2), int(rng.integers(classes))):
            found[i, int(j)] = found.get((i, int(j)), 0) + 1
    rows, cols = np.array(list(found)).T
    names = [f"character {i}" for i in range(classes)]
    named = [(f"a series of characters {b}", size) for b in range(blocks)]
    return rows, cols, np.array(list(found.values())), np.arange(classes), names, named


def draw_confusion(classes: int, blocks: int):
    *arrays, named = confusions(classes, blocks)
    return lambda path: confusion_figure(*arrays, path, named)


FIGURES = {
    "roc": lambda path: roc_figure(CURVES, POINTS, path),
    "roc of one": lambda path: roc_figure({"ours": CURVES["IR-50"]}, {}, path),
    "scores": lambda path: score_histogram(SAME, DIFFERENT, path, threshold=0.25),
    "pr": lambda path: pr_figure({"a": curve(0.2), "b": curve(0.5)}, path, {"a": 0.8, "b": 0.7}),
    "oscr": lambda path: oscr_figure(CURVES, path),
    "dir": lambda path: dir_figure(CURVES, path),
    "threshold": lambda path: threshold_figure(SENSITIVITY, path),
    "tail": lambda path: long_tail_figure(COUNTS, np.linspace(0.2, 1, 300), path),
    "a narrow tail": lambda path: long_tail_figure(np.array([19, 40, 101]), np.array([0.5, 0.7, 0.8]), path),
    "stress": lambda path: stress_figure(STRESSES, path),
    "resolution": lambda path: resolution_figure(SIZES, path),
    "few shots": lambda path: few_shot_figure(FEW, path),
    "sizes": lambda path: size_histogram(SHORT, path),
    "confusion of 3": draw_confusion(3, 1),
    "confusion of 20": draw_confusion(20, 4),
    "confusion of 60": draw_confusion(60, 5),
    "confusion of 95": draw_confusion(95, 19),
    "confusion of 900": draw_confusion(900, 90),
}


def title_of(figure) -> str:
    return figure.get_suptitle().replace("\n", " ").replace("\N{NO-BREAK SPACE}", " ")


def legend_of(figure) -> list[str]:
    return [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in figure.legends[0].get_texts()]


def texts_of(figure) -> list[Text]:
    shown = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    hidden = set()
    for axes in figure.axes:  # ticks beyond the limits exist, but are not drawn
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            pad = 1e-6 * (high - low)
            for tick in axis.get_major_ticks() + axis.get_minor_ticks():
                if not (axis.get_visible() and axes.axison and low - pad <= tick.get_loc() <= high + pad):
                    hidden |= {tick.label1, tick.label2}
                hidden |= {label for label, on in ((tick.label1, tick.label1.get_visible()),
                                                   (tick.label2, tick.label2.get_visible())) if not on}  # fmt: skip
    return [text for text in shown if text not in hidden]


@pytest.mark.parametrize("name", FIGURES)
def test_every_text_is_whole_and_none_covers_another(name, tmp_path):
    figure = FIGURES[name](tmp_path / "figure.png")
    canvas = FigureCanvasAgg(figure)
    renderer = canvas.get_renderer()
    texts = texts_of(figure)
    boxes = [text.get_window_extent(renderer) for text in texts]
    assert len(texts) > 5
    width, height = canvas.get_width_height()
    for text, box in zip(texts, boxes, strict=True):
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()
    for (one, a), (other, b) in combinations(zip(texts, boxes, strict=True), 2):
        across, down = min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)
        assert min(across, down) < 2, (one.get_text(), other.get_text())


@pytest.mark.parametrize("name", ["roc", "stress", "confusion of 95"])
def test_the_file_is_a_png_of_readable_width_and_the_same_every_time(name, tmp_path):
    first, again = tmp_path / "folder" / "a.png", tmp_path / "b.png"
    FIGURES[name](first)
    FIGURES[name](again)
    assert first.read_bytes() == again.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == ["a.png"]
    with Image.open(first) as image:
        assert image.format == "PNG" and image.width == 1008 and 300 < image.height < 1300
        assert len(np.unique(np.asarray(image.convert("L")))) > 20


def test_nothing_global_is_touched(tmp_path, monkeypatch):
    settings = [name for name in matplotlib.rcParams if name != "backend"]  # asking for that one loads pyplot
    before = {name: matplotlib.rcParams[name] for name in settings}
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it would fail now
    for name in ("roc", "resolution", "confusion of 95"):
        FIGURES[name](tmp_path / "figure.png")
    monkeypatch.undo()
    assert {name: matplotlib.rcParams[name] for name in settings} == before


def lines_of(axes) -> dict:
    return {line.get_label(): line for line in axes.lines}


def test_the_roc_shows_its_curves_and_marks(tmp_path):
    figure = roc_figure(CURVES, POINTS, tmp_path / "roc.png")
    [axes] = figure.axes
    assert axes.get_xscale() == "log" and axes.get_xlim() == (1e-4, 1)
    drawn = [line for line in axes.lines if len(line.get_xdata()) == 61]
    for line, (fpr, tpr), colour in zip(drawn, CURVES.values(), COLOURS, strict=False):
        assert np.array_equal(line.get_xdata()[1:], fpr[1:]) and np.array_equal(line.get_ydata(), tpr)
        assert line.get_drawstyle() == "steps-post" and line.get_color() == colour
    marks = [line for line in axes.lines if len(line.get_xdata()) == 3]
    for line, points in zip(marks, POINTS.values(), strict=True):
        assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(float(k), v) for k, v in points.items()]
    assert title_of(figure).startswith("With 0.1 % of false pairs accepted, MAE, domain-adaptive, LoRA")
    assert title_of(figure).endswith(f"accepts {100 * 0.001**0.1:.1f} % of the true ones")
    assert legend_of(figure)[1] == "IR-50: 25.1 % at 0.1 %, 39.8 % at 1 %, 63.1 % at 10 %"
    assert legend_of(figure)[-1] == "chance"
    chance = lines_of(axes)["chance"]
    assert np.array_equal(chance.get_xdata(), chance.get_ydata())


def test_the_title_of_an_open_set_curve_gives_the_best_value_reached(tmp_path):
    fpr = np.array([0, 0.02, 0.08, 0.3, 1])
    curves = {"a": (fpr, [0.1, 0.4, 0.5, 0.9, 0.9]), "b": (fpr, [0.2, 0.3, 0.45, 0.95, 0.97])}
    figure = oscr_figure(curves, tmp_path / "oscr.png")
    # at 0.1 the last threshold is that of 0.08: nothing between two points is reached
    assert title_of(figure) == "When 10 % of the strangers are accepted, a names 50 % of the known faces rightly"
    assert legend_of(figure) == ["a: 50 % at 10 %", "b: 45 % at 10 %"]
    figure = dir_figure(curves, tmp_path / "dir.png", at=0.01)
    assert title_of(figure) == "With 1 % of the strangers given a name, b finds and names 20 % of the known faces"


def test_the_histogram_shows_shares_and_their_overlap(tmp_path):
    same, different = np.array([0.1, 0.5, 0.9, 0.9]), np.array([0.1, 0.1, 0.3, 0.5, 0.2])
    figure = score_histogram(same, different, tmp_path / "scores.png", threshold=0.5, names=("known", "unknown"))
    outlines = [patch for patch in figure.axes[0].patches if not patch.get_fill()]
    assert [sum(patch.get_data().values) for patch in outlines] == pytest.approx([1, 1])
    assert title_of(figure) == "The scores of known and of unknown overlap by 45 %"  # 1/4 at 0.1 and 1/5 at 0.5
    assert legend_of(figure) == ["known (4)", "unknown (5)", "threshold 0.500 accepts 75 % and 20 % of them"]


def test_precision_and_recall(tmp_path):
    figure = pr_figure({"a": curve(0.2), "b": curve(0.5)}, tmp_path / "pr.png", {"a": 0.71234, "b": 0.8})
    assert title_of(figure) == "b has an average precision of 0.800, the highest"
    assert legend_of(figure) == ["a: average precision 0.712", "b: average precision 0.800"]
    assert np.array_equal(figure.axes[0].lines[1].get_ydata(), curve(0.5)[1])


def test_the_bands_of_the_long_tail_are_class_means(tmp_path):
    counts = np.array([5, 19, 20, 100, 101, 400, 0, 60])
    accuracy = np.array([0.2, 0.4, 0.5, 0.7, 0.8, 1.0, 0.1, np.nan])
    figure = long_tail_figure(counts, accuracy, tmp_path / "tail.png")
    [axes] = figure.axes
    assert [line.get_ydata()[0] for line in axes.lines] == pytest.approx([0.3, 0.6, 0.9])
    assert [line.get_xdata()[1] for line in axes.lines][:2] == [20, 100]
    assert len(axes.collections[0].get_offsets()) == 6  # without the untrained one and the one without probes
    labels = [text.get_text().replace("\N{NO-BREAK SPACE}", " ") for text in axes.texts]
    assert labels == ["tail: 30 %\n2 classes", "mid: 60 %\n2 classes", "head: 90 %\n2 classes"]
    assert title_of(figure) == "Head characters are named rightly 60.0 points more often than tail ones"
    even = long_tail_figure(np.array([5, 200]), np.array([0.9, 0.8]), tmp_path / "even.png")
    assert title_of(even) == "Rare characters are named as well: tail 90 %, head 80 %"
    narrow = long_tail_figure(np.array([19, 40, 101]), np.array([0.5, 0.7, 0.8]), tmp_path / "narrow.png")
    renderer, [axes] = FigureCanvasAgg(narrow).get_renderer(), narrow.axes
    for text, line in zip(axes.texts, axes.lines, strict=True):  # each label lies in its band
        label, band = text.get_window_extent(renderer), line.get_window_extent(renderer)
        assert band.x0 - 2 <= label.x0 and label.x1 <= band.x1 + 2
    alone = long_tail_figure(np.array([30, 40]), np.array([0.9, 0.8]), tmp_path / "alone.png")
    assert len(alone.axes[0].lines) == 1
    assert title_of(alone) == "All 2 characters are mid: 85 % named rightly, mean over characters"
    with pytest.raises(ValueError, match="no class has both"):
        long_tail_figure(np.array([0, 40]), np.array([0.9, np.nan]), tmp_path / "none.png")


def test_stresses_are_ordered_and_pale_where_they_prove_nothing(tmp_path):
    figure = stress_figure(STRESSES, tmp_path / "stress.png")
    [axes] = figure.axes
    bars = axes.patches
    assert [bar.get_width() for bar in bars] == [-0.03, 0.004, 0.1, 0.31]  # from below
    dark = [to_hex(bar.get_facecolor()) == COLOURS[0].lower() for bar in bars]
    assert dark == [True, False, False, True]
    spans = [segment[:, 0].tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert spans == [[-0.05, -0.01], [-0.01, 0.02], [0.25, 0.38]]
    assert title_of(figure) == "eyes costs most: 31.0 points of accuracy"
    assert [text.get_text() for text in axes.texts] == ["-3.0", "0.4", "10.0", "31.0"]


def test_resolutions_are_ordered_by_size(tmp_path):
    figure = resolution_figure(SIZES, tmp_path / "resolution.png")
    left, right = figure.axes
    assert left.lines[0].get_ydata().tolist() == [0.9, 0.92, 0.93]
    assert right.lines[0].get_ydata().tolist() == [8, 18, 40]
    assert right.get_xticklabels()[0].get_text() == "224\n17 GMACs"
    assert title_of(figure) == "448 px instead of 224: +3.0 points of accuracy, 5.0 times the latency"
    assert len(left.collections) == 2  # one of the three has no interval
    one = resolution_figure({"336": SIZES["336"]}, tmp_path / "one.png")
    assert title_of(one) == "336 px: 92 % named rightly, 18 ms a picture"


def test_settings_without_enough_pictures_stay_empty(tmp_path):
    figure = few_shot_figure(FEW, tmp_path / "few.png")
    [axes] = figure.axes
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([0.5, 0.6, 0.4])
    chance = [line.get_ydata()[0] for line in axes.lines]
    assert chance == [0.2, 0.05]
    assert legend_of(figure) == ["prototype", "logistic", "chance"]
    assert title_of(figure) == (
        "From 1 picture of each, logistic tells 5 new characters apart with an accuracy of 60 %"
    )
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5-way, 1-shot", "20-way, 5-shot"]


def test_rates_against_the_threshold_are_found_by_themselves(tmp_path):
    figure = threshold_figure(SENSITIVITY, tmp_path / "threshold.png")
    lines = lines_of(figure.axes[0])
    assert list(lines) == ["dir", "far", "f1", "threshold in use, 0.400"]
    assert lines["dir"].get_xdata() == pytest.approx([0.3, 0.35, 0.4, 0.45, 0.5])
    assert lines["dir"].get_ydata() == pytest.approx([0.9, 0.85, 0.8, 0.75, 0.7])
    assert title_of(figure) == "Thresholds from 0.300 to 0.500 move dir by 20.0 points"
    chosen = threshold_figure(SENSITIVITY, tmp_path / "c.png", chosen=0.33, metrics={"far": "false alarms"})
    assert list(lines_of(chosen.axes[0])) == ["false alarms", "threshold in use, 0.330"]


def test_crop_sizes_are_set_against_resolutions(tmp_path):
    figure = size_histogram(np.array([20, 100, 111, 112, 300, 5000]), tmp_path / "sizes.png", (112, 336))
    [axes] = figure.axes
    assert sum(bar.get_height() for bar in axes.patches) == 6
    labels = [text.get_text().replace("\N{NO-BREAK SPACE}", " ").strip() for text in axes.texts]
    assert labels == ["50 % below", "83.3 % below"]
    assert title_of(figure) == "83.3 % of the face crops hold less detail than 336 px can show"
    figure = size_histogram(np.array([20, 100, 112]), tmp_path / "alone.png", ())
    assert title_of(figure) == "Half of the face crops are 100 px or larger" and not figure.axes[0].texts


def test_a_small_confusion_matrix_is_drawn_as_it_is(tmp_path):
    rows, cols, counts = np.array([0, 0, 1, 2, 2]), np.array([0, 2, 1, 2, 0]), np.array([6, 2, 5, 1, 3])
    order = np.array([1, 2, 0])
    figure = confusion_figure(
        rows, cols, counts, order, ["rin", "len", "miku"], tmp_path / "c.png", [("x", 1), ("y", 2)]
    )
    [axes] = figure.axes
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(
        np.array([[1, 0, 0], [0, 0.25, 0.75], [0, 0.25, 0.75]])
    )
    assert [label.get_text() for label in axes.get_yticklabels()] == ["len (5)", "miku (4)", "rin (8)"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "100", (1, 1): "25", (2, 1): "75", (1, 2): "25", (2, 2): "75"}
    [outline] = axes.patches
    assert (outline.get_xy(), outline.get_width()) == ((0.5, 0.5), 2)
    assert title_of(figure) == "70.6 % of 17 faces are named rightly; miku is taken for rin most often, 3 of 4 times"


@pytest.mark.parametrize("classes", [61, 281, 3263])
def test_no_confusion_vanishes_from_a_large_matrix(classes, tmp_path):
    rng = np.random.default_rng(classes)
    order = rng.permutation(classes)
    # a few confusions anywhere, one of them large; the first two share a cell where there are many classes
    taken = np.r_[order[:2], order[9:16], order[2:4], order[16:]]
    rows, cols = np.r_[np.arange(classes), taken[:9]], np.r_[np.arange(classes), taken[9:18]]
    counts = np.r_[np.full(classes, 9), np.r_[np.full(8, 1), 81]]
    figure = confusion_figure(rows, cols, counts, order, [f"n{i}" for i in range(classes)], tmp_path / "c.png")
    image = figure.axes[0].images[0]
    pooled = image.get_array().filled(0)
    cells, (_, right, bottom, _) = len(pooled), image.get_extent()
    place = np.argsort(order)
    size = right / cells
    assert right == bottom and size == int(size) and classes <= right < classes + size and cells <= 280
    expected = np.zeros_like(pooled)
    for row, col, share in zip(taken[:9], taken[9:18], [*[0.1] * 8, 0.9], strict=True):
        cell = int(place[row] // size), int(place[col] // size)
        expected[cell] = max(expected[cell], share)
    assert pooled == pytest.approx(expected)  # and the diagonal is not in it
    assert title_of(figure).endswith(f"n{taken[8]} is taken for n{taken[17]} most often, 81 of 90 times")
    bars = figure.axes[1].patches
    assert sum(bar.get_width() * bar.get_height() for bar in bars) == pytest.approx(classes - 8 * 0.1 - 0.9)
    assert sum(bar.get_height() for bar in bars) == classes


def test_classes_without_probes_are_no_errors(tmp_path):
    rows = np.arange(70)
    figure = confusion_figure(rows, rows, np.ones(70), np.arange(100), ["n"] * 100, tmp_path / "c.png")
    assert title_of(figure) == "100 % of 70 faces are named rightly"
    assert [bar.get_width() for bar in figure.axes[1].patches] == [1.0] * 70


def test_names_of_any_script_and_with_dollars_do_no_harm(tmp_path, recwarn):
    names = ["初音ミク", "$a$ and $b$", "a" * 90]
    confusion_figure(np.arange(3), np.array([1, 2, 0]), np.ones(3), np.arange(3), names, tmp_path / "c.png")
    figure = roc_figure(dict.fromkeys(names, CURVES["IR-50"]), {}, tmp_path / "r.png")
    assert legend_of(figure)[1:3] == [r"\$a\$ and \$b\$", "a" * 37 + "..."]  # no formula
    assert not [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)]


def test_percentages_keep_what_matters():
    shown = [percent(value).replace("\N{NO-BREAK SPACE}", " ") for value in (0.5, 0.0123, 1, 0, 0.001, 0.0001, 0.98765)]
    assert shown == ["50 %", "1.2 %", "100 %", "0 %", "0.1 %", "0.01 %", "98.8 %"]
