"""Pictures of a detection report: precision against recall, input sizes, what was found, and sheets of the errors."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from util.benchmark.detection import AT_50, AT_75, RECALLS, Scene
from util.benchmark.detection_errors import KINDS, RIGHT, Diagnosis, is_kind
from util.benchmark.figure_style import (
    COLOURS,
    draw_intervals,
    finish,
    line_style,
    new_figure,
    percent,
    percent_axis,
)
from util.data.sheet import sheet
from util.run.files import write_atomically

TRUE, FOUND, OTHER = "#009E73", "#D55E00", "#56B4E9"
CELL, COLUMNS = 200, 6  # of the errors
_WIDE_CELL, _WIDE_COLUMNS = 300, 4  # of whole pictures
_AROUND = 2.2  # side of what is shown of a picture, in the longest side of the boxes that it is about
_LEAST = 64  # px of the picture
_LEGEND = "green: true boxes   orange: the wrong find"
_LEGENDS = {"missed": "green: true boxes, with their size", "duplicate": f"{_LEGEND}   blue: the best of that face"}


def pr_figure(curves: Mapping[str, np.ndarray], path: Path):
    """Precision against recall. curves: {name of a class: precision (10, 101), of `curves_of`}."""
    figure, axes = new_figure()
    figures = []
    for i, (name, precision) in enumerate(curves.items()):
        for place, overlap, dash in ((AT_50, 0.5, "-"), (AT_75, 0.75, "--")):
            mean = precision[place].mean()
            figures.append(f"AP{round(100 * overlap)} of {name}s {percent(mean)}")
            style = {**line_style(i), "linestyle": dash}
            axes.plot(RECALLS, precision[place], label=f"{name}, IoU {overlap:g}: AP {percent(mean)}", **style)
    axes.set(xlabel="recall: share of the true boxes found", ylabel="precision: share of the finds that are right",
             xlim=(0, 1), ylim=(0, 1.02))  # fmt: skip
    percent_axis(axes.xaxis, axes.yaxis)
    return finish(figure, ", ".join(figures[:2]), path, legend_of=axes)


def size_figure(sizes: Mapping[str, Mapping], path: Path):
    """Average precision and latency by input size. sizes: {px: {"ap", "ap_ci95", "ap50", ..., "latency_ms_p50"}}."""
    names, places = sorted(sizes, key=int), range(len(sizes))
    figure, (left, right) = new_figure(columns=2, height=3.7)
    for colour, key in zip(COLOURS, ("ap50", "ap"), strict=False):
        values = [sizes[name][key] for name in names]
        bounds = [sizes[name][f"{key}_ci95"] or (value, value) for name, value in zip(names, values, strict=True)]
        left.plot(places, values, color=colour, marker="o", label=key.upper())
        draw_intervals(left, values, bounds, places, vertical=True)
    left.set(ylabel="average precision (with 95 % interval)", ylim=(0, 1))
    left.legend(frameon=False)
    percent_axis(left.yaxis)
    latency, slow = ([sizes[name][f"latency_ms_{key}"] for name in names] for key in ("p50", "p95"))
    right.plot(places, latency, color=COLOURS[0], marker="o")
    right.fill_between(places, latency, slow, alpha=0.2, color=COLOURS[0], linewidth=0)
    right.set(ylabel="latency of a picture, ms (median to p95)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xticks(places, names)
        axes.set(xlabel="longer side of the input, px", xlim=(-0.35, len(names) - 0.65))
    change = 100 * (sizes[names[-1]]["ap"] - sizes[names[0]]["ap"])
    cost = latency[-1] / latency[0]
    title = f"{names[-1]} px instead of {names[0]}: {change:+.1f} points of AP, {cost:.1f} times the latency"
    return finish(figure, title, path)


def draw_boxes(
    picture: Image.Image, boxes: Sequence, colour: str, captions: Sequence[str] = (), width: int | None = None
) -> None:
    """Draw boxes x1 y1 x2 y2, px, into an RGB picture, each with its caption above it, or within at the upper edge.

    width: of the line, px; default: by the size of the picture.
    """
    draw = ImageDraw.Draw(picture)
    width = width or max(2, round(max(picture.size) / 300))
    font = ImageFont.load_default(max(11, 5 * width))
    for number, box in enumerate(boxes):
        x1, y1, x2, y2 = (float(value) for value in box)
        draw.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), outline=colour, width=width)
        if number < len(captions):
            left, top, right, bottom = draw.textbbox((0, 0), captions[number], font=font)
            high, wide = bottom - top + 4, right - left + 6
            x = min(max(0.0, x1), max(0.0, picture.width - wide))
            y = y1 - high if y1 >= high else max(0.0, y1)
            draw.rectangle((x, y, x + wide, y + high), fill=colour)
            draw.text((x + 3 - left, y + 2 - top), captions[number], fill="white", font=font)


def found_sheet(
    folder: Path, diagnosis: Diagnosis, scenes: Sequence[Scene], load: Callable[[int], Image.Image], most: int = 24
) -> str:
    """Pictures spread evenly over the data, so not chosen: right finds, wrong ones, and true boxes not found.

    scenes, load: as of `error_sheets`. Returns the file name.
    """
    chosen = np.unique(np.linspace(0, len(scenes) - 1, min(most, len(scenes))).round().astype(int))
    cells = [_overview(diagnosis, scenes[i], load, int(i)) for i in chosen]
    right, taken = diagnosis.kind == RIGHT, diagnosis.taken
    title = (
        f"{len(chosen)} of {len(scenes)} pictures. In all: {right.sum()} right finds (blue), {(~right).sum()} wrong "
        f"(orange), {(~taken).sum()} true boxes not found (green)"
    )
    rows = [cells[i : i + _WIDE_COLUMNS] for i in range(0, len(cells), _WIDE_COLUMNS)]
    picture = sheet(rows, title=title, cell=_WIDE_CELL)
    write_atomically(folder / "found.png", lambda part: picture.save(part, format="PNG"))
    return "found.png"


def _overview(diagnosis: Diagnosis, scene: Scene, load: Callable, number: int) -> Image.Image:
    view, scale = _scaled(load(number), _WIDE_CELL)
    unfound = diagnosis.true_number[(diagnosis.true_picture == number) & ~diagnosis.taken]
    draw_boxes(view, scene.boxes[unfound] * scale, TRUE, width=2)
    for right, colour in ((False, FOUND), (True, OTHER)):
        own = (diagnosis.picture == number) & ((diagnosis.kind == RIGHT) == right)
        captions = [f"{score:.2f}" for score in diagnosis.scores[own]]
        draw_boxes(view, scene.found[diagnosis.number[own]] * scale, colour, captions, width=2)
    return view


def _scaled(picture: Image.Image, side: int) -> tuple[Image.Image, float]:
    """A picture at a longer side of `side` px, and the factor to it: boxes are drawn afterwards, in sharp lines."""
    scale = side / max(picture.size)
    return picture.resize([max(1, round(length * scale)) for length in picture.size], Image.Resampling.BICUBIC), scale


def error_sheets(
    folder: Path, diagnosis: Diagnosis, scenes: Sequence[Scene], load: Callable[[int], Image.Image], most: int = 24
) -> dict[str, str]:
    """A contact sheet for each kind of error there is, the most confident first, of missed faces the largest.

    scenes: those that were diagnosed (`of_label`). load: the picture of a scene, by number. Returns {kind: file name}.
    """
    drawn = {}
    for kind in KINDS:
        cells, total = _cells(diagnosis, scenes, load, kind, most)
        if not cells:
            continue
        rows = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
        what = "missed: true boxes without a find, the largest first" if kind == "missed" else f"{kind}, surest first"
        title = f"{what}: {len(cells)} of {total}\n{_LEGENDS.get(kind, _LEGEND)}"
        picture = sheet(rows, title=title, cell=CELL)
        drawn[kind] = f"errors_{kind}.png"
        write_atomically(folder / drawn[kind], lambda part, picture=picture: picture.save(part, format="PNG"))
    return drawn


def _cells(diagnosis: Diagnosis, scenes, load, kind: str, most: int) -> tuple[list[Image.Image], int]:
    wrong = np.flatnonzero(is_kind(diagnosis, kind))
    finds = len(diagnosis.kind)
    if kind == "missed":
        boxes = [_true_box(diagnosis, scenes, i - finds) for i in wrong]
        wrong = wrong[np.argsort([-np.prod(box[2:] - box[:2]) for box in boxes], kind="stable")]
    return [_cell(diagnosis, scenes, load, int(i)) for i in wrong[:most]], len(wrong)


def _true_box(diagnosis: Diagnosis, scenes: Sequence[Scene], truth: int) -> np.ndarray:
    return scenes[diagnosis.true_picture[truth]].boxes[diagnosis.true_number[truth]]


def _cell(diagnosis: Diagnosis, scenes: Sequence[Scene], load: Callable, number: int) -> Image.Image:
    finds = len(diagnosis.kind)
    missed = number >= finds
    truth = number - finds if missed else int(diagnosis.truth[number])
    picture = int((diagnosis.true_picture if missed else diagnosis.picture)[truth if missed else number])
    scene, about, own = scenes[picture], [], None
    if not missed:
        own = scene.found[diagnosis.number[number]]
        about.append(own)
    if truth >= 0:
        about.append(_true_box(diagnosis, scenes, truth))
    region = _region(np.array(about), scene.size)
    view, scale = _scaled(load(picture).crop(region), CELL)

    def placed(boxes) -> np.ndarray:
        return (np.asarray(boxes).reshape(-1, 4) - [*region[:2], *region[:2]]) * scale

    if not missed and KINDS[diagnosis.kind[number]] == "duplicate":
        best = diagnosis.number[(diagnosis.truth == truth) & (diagnosis.kind == RIGHT)]
        draw_boxes(view, placed(scene.found[best]), OTHER, width=2)
    draw_boxes(view, placed(scene.boxes), TRUE, width=2)
    if own is None:
        caption = f"{'x'.join(f'{side:.0f}' for side in about[0][2:] - about[0][:2])} px"
        draw_boxes(view, placed(about[:1]), TRUE, [caption], width=2)
    else:
        overlap = int(100 * diagnosis.overlap[number]) / 100  # 0.499 is no 0.50
        caption = f"{diagnosis.scores[number]:.2f}, IoU {overlap:.2f}"
        draw_boxes(view, placed([own]), FOUND, [caption], width=2)
    return view


def _region(boxes: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """What is shown of a picture of `size`: a square around boxes (n, 4), as far as it lies in it."""
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    half = max(_LEAST, _AROUND * float((high - low).max())) / 2
    x, y = (low + high) / 2
    left, top = max(0, int(x - half)), max(0, int(y - half))
    right, bottom = min(size[0], int(np.ceil(x + half))), min(size[1], int(np.ceil(y + half)))
    return min(left, size[0] - 1), min(top, size[1] - 1), max(right, 1), max(bottom, 1)
