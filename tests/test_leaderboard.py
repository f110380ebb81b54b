"""The leaderboard of a benchmark: means, paired differences, what is bold, and the three tables, on made-up runs.

Run: python -m pytest tests/test_leaderboard.py
"""

import csv
import io
import json
import re
from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from scipy import stats

from util.benchmark.budget import Budget
from util.benchmark.chains import Bench
from util.benchmark.leaderboard import COLUMNS, Entry, Trial, compare, entry_of, make_board
from util.benchmark.leaderboard_figures import accuracy_figure, draw_figures
from util.benchmark.leaderboard_tables import About, csv_table, difference_cell, escape, latex, markdown
from util.benchmark.methods import PRESETS

TINY = PRESETS["tiny"]
TOP1 = COLUMNS[0]
AUROC = next(column for column in COLUMNS if column.key == "open_set.auroc")
EER = next(column for column in COLUMNS if column.key == "verification.eer")
SAMPLES, CLASSES = 120, 12


def entry(name: str, *, seeds=(0, 1, 2), top1=0.5, auroc=0.6, eer=0.3, spread=0.0, key=0, **more) -> Entry:
    """Made-up runs of a method: each of the pictures right with a probability of top1, figures around others."""
    trials = {}
    for seed in seeds:
        rng = np.random.default_rng([key, seed])
        right = (rng.random(SAMPLES) < top1).astype(float)
        names = [f"s{i:03d}" for i in range(SAMPLES)]
        figures = {
            "closed_set.top1": right.mean(), "open_set.auroc": auroc + spread * rng.normal(),
            "verification.eer": eer + spread * rng.normal(), "trainable_params": 1000 * (key + 1), "total_params": 5000,
            "train_seconds": 60.0 * (key + 1) + seed, "latency_ms": 2.0 + key, "classes": 40,
        } | more  # fmt: skip
        groups = {sample: f"c{i % CLASSES}" for i, sample in enumerate(names)}
        trials[seed] = Trial(figures, {"top1": dict(zip(names, right, strict=True))}, groups)
    return Entry(TINY.methods[name], trials, "done")


def about(seeds=(0, 1, 2)) -> About:
    return About("Leaderboard", Budget().describe(0.5), seeds, TINY.evaluation, {"Data": "x_y, 64 px"})


def frame(board) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(csv_table(board)), index_col="method")


# --- numbers --------------------------------------------------------------------------------------------------------


def test_means_and_deviations_are_those_of_pandas():
    entries = [entry("random_linear", spread=0.05), entry("random_finetune", spread=0.05, key=1)]
    long = pd.DataFrame(
        [(one.method.name, trial.figures["open_set.auroc"]) for one in entries for trial in one.trials.values()],
        columns=["method", "auroc"],
    )
    expected = 100 * long.groupby("method").auroc.agg(["mean", "std"])
    found = frame(make_board(entries))
    assert found["open_set.auroc mean"].to_dict() == pytest.approx(expected["mean"].to_dict())
    assert found["open_set.auroc std"].to_dict() == pytest.approx(expected["std"].to_dict())
    mean, std = expected.loc["random_linear"]
    assert f"{mean:.1f} ± {std:.1f}" in markdown(make_board(entries), about())


def test_a_figure_of_each_seed_is_compared_by_a_paired_t_test():
    a, b = entry("random_linear", spread=0.05), entry("random_finetune", spread=0.05, key=1)
    found = compare(AUROC, b, a)
    values = [100 * np.array(one.values("open_set.auroc")) for one in (a, b)]
    test = stats.ttest_rel(values[1], values[0])
    low, high = test.confidence_interval(0.95)
    assert found.mean == pytest.approx((values[1] - values[0]).mean())
    assert found.ci95 == pytest.approx([low, high]) and found.p == pytest.approx(test.pvalue) and found.over == "seeds"


def test_top1_is_compared_sample_by_sample_in_whatever_order_they_come():
    a, b = entry("random_linear", top1=0.4), entry("random_finetune", top1=0.6, key=1)
    expected = compare(TOP1, b, a)
    gain = 100 * (np.mean(b.values("closed_set.top1")) - np.mean(a.values("closed_set.top1")))
    assert expected.mean == pytest.approx(gain) and expected.samples == SAMPLES
    assert expected.over == "seeds and samples"
    trial = b.trials[1]
    shuffled = dict(sorted(trial.samples["top1"].items(), reverse=True))
    b.trials[1] = Trial(trial.figures, {"top1": shuffled}, trial.groups)
    assert compare(TOP1, b, a) == expected


def test_only_seeds_and_samples_of_both_are_compared():
    a, b = entry("random_linear", seeds=(0, 1)), entry("random_finetune", seeds=(1, 2), key=1)
    found = compare(TOP1, b, a)
    assert found.of_each_seed == pytest.approx(
        [100 * (b.trials[1].figures["closed_set.top1"] - a.trials[1].figures["closed_set.top1"])]
    )
    assert compare(TOP1, b, entry("random_linear", seeds=(5,))) is None
    without = Entry(a.method, {1: Trial({"closed_set.top1": 0.5})}, "done")
    assert compare(TOP1, b, without) is None and compare(AUROC, b, without) is None


def test_p_values_are_adjusted_for_their_number():
    entries = [entry(name, auroc=0.5 + 0.02 * i, spread=0.01, key=i) for i, name in enumerate(list(TINY.methods)[:4])]
    board = make_board(entries, reference=entries[0].method.name, columns=[AUROC])
    p = {each.method: each.found.p for each in board.to_reference["open_set.auroc"]}
    ranked = sorted(p, key=p.get)
    adjusted = np.maximum.accumulate([min(1, (3 - i) * p[name]) for i, name in enumerate(ranked)])
    found = {each.method: each.p_holm for each in board.to_reference["open_set.auroc"]}
    assert [found[name] for name in ranked] == pytest.approx(adjusted)


# --- what is bold ---------------------------------------------------------------------------------------------------


def test_a_clear_winner_is_bold_alone():
    board = make_board([entry("random_linear", top1=0.1), entry("random_finetune", top1=0.9, key=1)])
    assert board.bold["closed_set.top1"] == {"random_finetune"}
    text = markdown(board, about())
    assert re.search(r"\| random ViT \+ fine-tuning \| floor \| \*\*[89]\d\.\d ± \d\.\d\*\* \|", text)
    assert re.search(r"\| random ViT \+ linear \| floor \| \d+\.\d ± \d\.\d \|", text)


def test_methods_that_cannot_be_told_apart_are_bold_together():
    entries = [entry("random_linear", top1=0.62), entry("random_finetune", top1=0.6, key=1)]
    entries.append(entry("simclr_linear", top1=0.1, key=2))
    board = make_board(entries)
    assert board.bold["closed_set.top1"] == {"random_linear", "random_finetune"}


def test_less_is_better_where_it_is_an_error():
    entries = [entry("random_linear", eer=0.1, spread=1e-3), entry("random_finetune", eer=0.4, spread=1e-3, key=1)]
    board = make_board(entries, columns=[EER])
    assert board.bold["verification.eer"] == {"random_linear"}
    (only,) = board.to_best["verification.eer"]
    assert only.other == "random_linear" and only.found.mean == pytest.approx(30, abs=1)


def test_without_an_interval_nothing_is_bold():
    entries = [entry("random_linear", seeds=[0], auroc=0.9), entry("random_finetune", seeds=[0], key=1)]
    board = make_board(entries)
    assert board.bold["open_set.auroc"] == frozenset(), "one seed, one number: nothing tells them apart"
    assert board.bold["closed_set.top1"], "one seed has an interval over samples"
    assert not make_board([entry("random_linear")]).bold["closed_set.top1"], "one method alone has won nothing"


def test_one_lucky_run_is_not_the_best():
    lucky, full = entry("random_linear", seeds=[0], top1=0.99), entry("random_finetune", top1=0.6, key=1)
    board = make_board([lucky, full], columns=[TOP1])
    (only,) = board.to_best["closed_set.top1"]
    assert only.other == "random_finetune" and len(only.found.of_each_seed) == 1


def test_no_cost_is_ever_bold():
    board = make_board([entry("random_linear"), entry("random_finetune", key=1)])
    assert not {"trainable_params", "train_seconds", "latency_ms"} & board.bold.keys()


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed() -> list[Entry]:
    failed = Entry(TINY.methods["simclr_linear"], {}, "failed", "seed 0: the loss is not finite")
    missing = Entry(PRESETS["full"].methods["dino_linear"], {}, "unavailable", "timm:x_y cannot be downloaded (50 %)")
    return [entry("resnet10t_arcface_scratch"), failed, missing, entry("random_finetune", key=1, top1=0.9)]


def test_what_is_not_there_is_named_with_its_reason(mixed):
    board = make_board(mixed, "random_finetune")
    text = markdown(board, about())
    assert "| DINO ViT-B/16 + linear | self-distillation |" + " - |" * len(COLUMNS) + " unavailable |" in text
    assert "- DINO ViT-B/16 + linear: unavailable: timm:x_y cannot be downloaded (50 %)" in text
    assert "- SimCLR on this data + linear: failed: seed 0: the loss is not finite" in text
    found = frame(board)
    assert found.loc["dino_linear", "state"] == "unavailable" and np.isnan(
        found.loc["dino_linear", "open_set.auroc mean"]
    )
    assert found.loc["dino_linear", "open_set.auroc n"] == 0


def test_margin_and_scale_are_reported_with_the_scale_that_is_needed(mixed):
    line = next(line for line in markdown(make_board(mixed), about()).splitlines() if "**resnet10t_arcface" in line)
    assert "Margin 0.2, scale 16, epochs of margin warm-up 1; minimal scale for 40 classes: 5.7" in line
    assert "--head arcface" in line and "Settings: by validation top-1" in line


def test_the_budget_and_what_was_used_are_stated(mixed):
    text = markdown(make_board(mixed), About("T", Budget("images", 5000).describe(0.25), [0], TINY.evaluation))
    assert "Budget: 5,000 images for every method, pre-training on this data included (25% of it" in text
    used = text.split("## What each method used")[1]
    assert "| random_finetune |" in used and "| 2,000 | 5,000 |" in used
    assert "Paired differences to" in text and "One seed: no spread" in text


def test_latex_is_balanced_and_escaped(mixed):
    text = latex(make_board(mixed), about())
    body = [line for line in text.splitlines() if not line.startswith("%")]
    depth = 0
    for line in body:
        for character in re.sub(r"\\[{}]", "", line):
            depth += (character == "{") - (character == "}")
            assert depth >= 0
        assert depth == 0, line
        bare = re.sub(r"\\[&%$#_{}]|\\\\$", "", line)
        assert not re.search(r"[%#_]", bare) and bare.count("$") % 2 == 0
        assert "±" not in line
    rows = [line for line in body if line.endswith(r"\\")]
    assert len(rows) == 3 and all(len(re.findall(r"(?<!\\)&", row)) == len(COLUMNS) for row in rows)
    assert body[0] == rf"\begin{{tabular}}{{l{'r' * len(COLUMNS)}}}" and body[-1] == r"\end{tabular}"
    assert [line for line in body if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert escape("50 % of a_b & {c}^2 \\ ~ # $") == (
        r"50 \% of a\_b \& \{c\}\textasciicircum{}2 \textbackslash{} \textasciitilde{} \# \$"
    )


def test_the_csv_holds_what_the_tables_show(mixed):
    board = make_board(mixed, "random_finetune")
    rows = list(csv.DictReader(io.StringIO(csv_table(board))))
    assert [row["method"] for row in rows] == [one.method.name for one in mixed]
    (only,) = board.to_reference["closed_set.top1"]
    assert float(rows[0]["closed_set.top1 to_reference difference"]) == pytest.approx(only.found.mean)
    assert float(rows[0]["closed_set.top1 to_reference low"]) == pytest.approx(only.found.ci95[0])
    assert difference_cell(only) in markdown(board, about())
    assert (rows[0]["closed_set.top1 bold"], rows[3]["closed_set.top1 bold"]) == ("0", "1")


def test_a_difference_is_written_with_its_sign():
    a, b = entry("random_linear", auroc=0.5), entry("random_finetune", auroc=0.6, key=1)
    board = make_board([a, b], "random_linear", [AUROC])
    assert difference_cell(board.to_reference["open_set.auroc"][0]) == "+10.0 (+10.0 to +10.0)"
    assert difference_cell(board.to_best["open_set.auroc"][0]) == "-10.0 (-10.0 to -10.0)"
    assert difference_cell(None) == "-"


def test_a_seed_without_a_figure_is_counted(mixed):
    one = entry("random_linear")
    del one.trials[2].figures["open_set.auroc"]
    text = markdown(make_board([one, mixed[0]]), about())
    assert re.search(r"60\.0 \(n=2\)", text)


# --- from folders ---------------------------------------------------------------------------------------------------


def finish(run, **results) -> None:
    run.folder.mkdir(parents=True)
    run.write_record()
    (run.folder / "results.json").write_text(json.dumps({"finished": True, **results}))


def test_a_method_is_read_from_its_folders(tmp_path):
    method = TINY.methods["mae_scratch_linear"]
    bench = Bench(tmp_path, "data", TINY.evaluation, {})
    chains = bench.chains([method], [0, 1, 2])
    first, second, third = chains
    sizes = {"trainable_params": 10, "total_params": 100}
    finish(first.pretraining, images_seen=1000, train_seconds=50.0, epochs=20, peak_memory_bytes=7)
    # 300 images at 10 images/s: 30 s, of which the optimizer's are 4
    finish(first.transfer, **sizes, images_seen=300, images_per_s=10.0, train_seconds=4.0, encoder_pass_seconds=13.0,
           epochs=3, classes=2, peak_memory_bytes=9)  # fmt: skip
    closed_set = {"top1": 0.5, "top5": 0.75, "macro_f1": 0.4, "top1_ci95": [0, 1]}
    measured = {"few_shot": {"5way_1shot": {"mean": 0.3}}, "resolution": {"64": {"latency_ms_p50": 1.5}}}
    finish(first.evaluation, closed_set=closed_set, open_set={"skipped": "no open_test split"}, **measured)
    answers = "sample_id,identity,correct,answer1,answer2\na,x,1,x,y\nb,y,0,x,y\nc,y,0,x,\nd,x,1,x,y\n"
    (first.evaluation.folder / "predictions.csv").write_text(answers)
    (first.evaluation.folder / "per_class.csv").write_text("identity,images,f1\nx,2,0.8\ny,2,0.0\nz,0,\n")
    second.pretraining.folder.mkdir(parents=True)
    second.pretraining.write_record("memory ran out")

    found = entry_of(method, chains)
    assert (found.state, found.reason) == ("failed", "seed 1: memory ran out") and list(found.trials) == [0]
    trial = found.trials[0]
    assert trial.samples["top1"] == {"a": 1, "b": 0, "c": 0, "d": 1}
    assert trial.samples["top5"] == {"a": 1, "b": 1, "c": 0, "d": 1}
    assert trial.samples["macro_f1"] == {"x": 0.8, "y": 0.0, "z": 0.0} and trial.groups["b"] == "y"
    assert trial.figures["train_seconds"] == 80 and trial.figures["images_seen"] == 1300
    assert trial.figures["peak_memory_bytes"] == 9 and trial.figures["latency_ms"] == 1.5
    assert trial.figures["few_shot.5way_1shot.mean"] == 0.3 and "open_set.auroc" not in trial.figures
    assert third.state() == "pre-training waiting"
    assert entry_of(method, chains, "no weights") == Entry(method, {}, "unavailable", "no weights")
    assert entry_of(method, [first, third]).state == "partial" and entry_of(method, [third]).state == "waiting"


def test_figures_are_drawn_where_there_is_something_to_compare(mixed, tmp_path):
    files = draw_figures(make_board(mixed), tmp_path)
    names = [f"accuracy_against_{name}.png" for name in ("trainable", "time", "latency")]
    assert [file.name for file in files] == names
    for file in files:
        with Image.open(file) as picture:
            assert picture.width == 1008 and len(set(picture.convert("RGB").resize((64, 64)).getdata())) > 10
    assert draw_figures(make_board(mixed[:3]), tmp_path) == []


def test_numbers_of_methods_that_lie_together_do_not_cover_each_other(tmp_path):
    entries = [entry(name, key=i, latency_ms=5 + 0.02 * i) for i, name in enumerate(list(TINY.methods)[:9])]
    figure = accuracy_figure(make_board(entries), entries, "latency_ms", tmp_path / "figure.png")
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.axes[0].texts] == [str(i) for i in range(1, 10)]
    for a, b in combinations(boxes, 2):
        assert min(min(a.x1, b.x1) - max(a.x0, b.x0), min(a.y1, b.y1) - max(a.y0, b.y0)) < 2


@pytest.mark.parametrize("spread", [20.0, 3000.0])
def test_a_wide_axis_is_logarithmic_with_few_labels(spread, tmp_path):
    entries = [entry("random_linear", train_seconds=60.0), entry("random_finetune", key=1, train_seconds=60.0 * spread)]
    figure = accuracy_figure(make_board(entries), entries, "train_seconds", tmp_path / "figure.png")
    axis = figure.axes[0].xaxis
    low, high = axis.get_view_interval()
    labels = [tick.label1.get_text() for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    assert axis.get_scale() == "log" and 2 <= len(labels) <= 7 and not any("times" in label for label in labels)
    assert not any(tick.label1.get_text() for tick in axis.get_minor_ticks())
