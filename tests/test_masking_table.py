"""The tables of a masking study, from scores with known differences; and the grid that makes them.

Run: python -m pytest tests/test_masking_table.py
"""

import csv
import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image
from scipy.stats import rankdata

from tests.conftest import ROOT
from tests.helpers import fails
from util.benchmark.masking_arms import RANKED, Way, finalists, group, judge, mean_ranks, read_runs
from util.benchmark.scores import Measured, under, write_scores
from util.run import grid

PICTURES, FACES = 60, 120
GAINS = {"random": 0.0, "face": 0.5, "face:-1": -0.5, "block": 0.02}  # dB, and tenths of the accuracy
BY_RATIO = {"0.5": -0.4, "0.75": 0.0}


def scores_of(gain: float, rng: np.random.Generator, faces: bool = True) -> dict[str, Measured]:
    """What a run scores that is better than random masking by `gain` dB, or tenths, on samples common to all runs."""
    pictures, people = (
        np.array([f"{letter}{i:03d}" for i in range(n)]) for letter, n in (("p", PICTURES), ("f", FACES))
    )
    level = np.random.default_rng(1).normal(15, 2, PICTURES)
    chance = np.random.default_rng(2).random(FACES)
    noise = rng.normal(0, 0.02, PICTURES)
    psnr = level + gain + noise
    face = np.where(np.arange(PICTURES) < 20, np.nan, psnr - 1)
    characters = np.array([f"c{i % 12}" for i in range(FACES)])
    hits = (chance < 0.5 + 0.1 * gain).astype(float)
    found = {"psnr_db": Measured(psnr, pictures, pictures), "probe_top1": Measured(hits, people, characters)}
    for name in ("few_shot_5way_1shot", "few_shot_5way_5shot"):
        found[name] = Measured(0.5 + 0.1 * gain + rng.normal(0, 0.002, FACES), people, characters)
    found[under("block")] = Measured(psnr - 2, pictures, pictures)
    return found | ({"psnr_face_db": Measured(face, pictures, pictures)} if faces else {})


def add_run(out, masking: str, ratio: str, seed: int, gain: float, *, scored=True, protocol=0, faces=True, **more):
    """A run as the grid runner leaves it, and what followed it."""
    name = masking.replace(":", "_")
    settings = {"mask_ratio": ratio, "epochs": "7", "seed": str(seed)}
    folder = out / name / grid.folder_name(settings)
    folder.mkdir(parents=True)
    args = {"masking": masking, "mask_strength": 4.0, "mask_random": 0.5, "mask_schedule": "constant", "lr": 1e-3}
    args |= {"mask_ratio": float(ratio), "epochs": 7, "seed": seed, "output_dir": str(folder), **more}
    varied = [word for flag, value in settings.items() for word in (f"--{flag}", value)]
    command = ["main_pretrain.py", "--data_path", "my data", "--masking", masking, *varied]
    record = {"name": name, "settings": settings, "command": command, "error": None}
    for file, content in {"args": args, "command": record, "results": {"train_seconds": 9.0}}.items():
        (folder / f"{file}.json").write_text(json.dumps(content))
    if scored:
        then = out / "then" / folder.relative_to(out)
        then.mkdir(parents=True)
        rng = np.random.default_rng([sum(masking.encode()), seed])
        write_scores(then / "scores.npz", scores_of(gain, rng, faces), {"seed": protocol})
    return folder


def add_lora(out, run, top1: float):
    """What main_lora.py leaves when it was started from a run."""
    folder = out / f"{run.parent.name}-{run.name}"  # of a run without varied flags
    folder.mkdir(parents=True)
    (folder / "args.json").write_text(json.dumps({"init": f"{run}/checkpoint-last.pth"}))
    (folder / "results.json").write_text(json.dumps({"test": {"top1": top1}}))


@pytest.fixture(scope="module")
def table(import_script):
    return import_script("scripts/masking_table.py")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """Every way at two ratios; seed 0 of all, three seeds of random and face at 0.75, with LoRA."""
    out = tmp_path_factory.mktemp("study")
    for (masking, gain), (ratio, less) in itertools.product(GAINS.items(), BY_RATIO.items()):
        for seed in range(3 if masking in ("random", "face") and ratio == "0.75" else 1):
            run = add_run(out, masking, ratio, seed, gain + less + 0.02 * seed * (masking == "face"))
            if masking in ("random", "face") and ratio == "0.75":
                add_lora(out / "lora", run, 0.6 + 0.1 * (masking == "face") + 0.01 * seed)
    add_run(out, "block", "0.75", 9, 0.0, scored=False)
    return out


@pytest.fixture(scope="module")
def written(table, study):
    """The folder of tables of the study."""
    folder = study / "table"
    argv = ["--runs", str(study), "--lora", str(study / "lora"), "--out", str(folder), "--finalists", "2"]
    table.main([*argv, "--write", str(study / "finalists.txt")])
    return folder


@pytest.fixture(scope="module")
def arms(written):
    """{(masking, ratio): arm} of masking.json."""
    return {
        (arm["masking"], arm["mask_ratio"]): arm for arm in json.loads((written / "masking.json").read_text())["arms"]
    }


def test_known_differences_are_found(arms):
    assert len(arms) == len(GAINS) * len(BY_RATIO)
    for (masking, ratio), arm in arms.items():
        assert arm["train_seconds"] == 9.0 and arm["epochs"] == 7
        if masking == "random":
            assert arm["same_ratio"] == {}
            continue
        several = (masking, ratio) == ("face", 0.75)
        expected = GAINS[masking] + 0.02 * several  # the mean of 0, 0.02 and 0.04
        for name, scale in {"psnr_db": 1, "psnr_face_db": 1, "few_shot_5way_1shot": 10}.items():
            gain = arm["same_ratio"][name]
            assert gain["mean"] == pytest.approx(expected * scale, abs=0.01 * scale)
            assert gain["ci95"][0] < gain["mean"] < gain["ci95"][1]
            assert gain["over"] == ("seeds and samples" if several else "samples")
            assert len(gain["of_each_seed"]) == (3 if several else 1)
        assert arm["same_ratio"]["psnr_face_db"]["samples"] == 40  # where there is a face
    for masking, sign in {"face": 1, "face:-1": -1}.items():
        low, high = arms[masking, 0.5]["same_ratio"]["psnr_db"]["ci95"]
        assert low * sign > 0 and high * sign > 0


def test_the_best_random_ratio_is_the_reference_for_all(arms):
    assert arms["random", 0.75]["best"] == {}
    assert arms["random", 0.5]["best"]["psnr_db"]["mean"] == pytest.approx(-0.4, abs=0.01)
    assert arms["face", 0.5]["best"]["psnr_db"]["mean"] == pytest.approx(0.1, abs=0.01)


def test_p_values_are_corrected_where_there_are_seeds(study):
    """Of one arm there is nothing to correct; of two the smaller one doubles."""
    runs, _ = read_runs([study])
    arms = group(runs)
    judged = {(one.arm.way.masking, one.arm.ratio): one for one in judge(arms, mean_ranks(arms, ["psnr_db"]))}
    one = judged["face", 0.75]
    assert one.p_holm == {name: gain.p for name, gain in one.same_ratio.items()}
    assert judged["block", 0.75].p_holm == {}


def test_lora_is_one_figure_per_run(arms):
    gain = arms["face", 0.75]["same_ratio"]["lora_top1"]
    assert gain["mean"] == pytest.approx(10) and gain["over"] == "seeds" and gain["samples"] == 1
    assert arms["random", 0.75]["of_each_seed"]["lora_top1"] == pytest.approx([0.6, 0.61, 0.62])
    assert "lora_top1" not in arms["block", 0.75]["means"]


def test_ranks_are_scipys(study):
    arms = group(read_runs([study])[0])
    values = np.array([[arm.mean(name) for name in RANKED] for arm in arms])
    values[1] = values[0]  # a tie
    for name, column in zip(RANKED, values.T, strict=True):
        for arm, value in zip(arms, column, strict=True):
            for run in arm.runs.values():
                run.scores[name].values[:] = value
    expected = rankdata(-values, axis=0).mean(axis=1)
    assert mean_ranks(arms, RANKED) == pytest.approx(expected.tolist())


def test_finalists_are_ways_at_their_best_ratio_with_the_baseline(study):
    arms = group(read_runs([study])[0])
    ranks = mean_ranks(arms, RANKED)
    chosen = [(arm.way.masking, arm.ratio) for arm in finalists(arms, ranks, 4)]
    assert chosen[0] == ("face", 0.75) and chosen[-1] == ("face:-1", 0.75) and len(set(chosen)) == 4
    assert [(arm.way.masking, arm.ratio) for arm in finalists(arms, ranks, 1)] == [("random", 0.75)]
    assert ("random", 0.75) in [(arm.way.masking, arm.ratio) for arm in finalists(arms, ranks, 2)]


def test_finalists_are_run_again_by_the_same_command(study, written):
    """The flags name runs that are in place, so that only further seeds are trained."""
    words = (study / "finalists.txt").read_text().splitlines()
    args = grid.get_args(["--out", str(study), *words, "--vary", "seed=0,1"])
    runs = grid.plan(args)
    assert [run.label for run in runs][:2] == [f"face mask_ratio=0.75 epochs=7 seed={seed}" for seed in (0, 1)]
    assert {run.name for run in runs} == {"face", "random"} and len(runs) == 4
    for run in runs:
        known = json.loads((run.folder / "command.json").read_text())
        assert list(run.command) == known["command"]


def test_a_baseline_at_the_ratio_of_each_finalist_is_run_too(table, tmp_path):
    """A finalist at another ratio than the best of random needs random at its own, in one command with two ratios."""
    for ratio, less in BY_RATIO.items():
        add_run(tmp_path, "random", ratio, 0, less)
    add_run(tmp_path, "face", "0.5", 0, 1.0)
    argv = ["--runs", str(tmp_path), "--out", str(tmp_path / "t"), "--write", str(tmp_path / "finalists.txt")]
    table.main(argv)
    words = (tmp_path / "finalists.txt").read_text().splitlines()
    runs = grid.plan(grid.get_args(["--out", str(tmp_path), *words, "--vary", "seed=0"]))
    assert Counter((run.name, run.settings["mask_ratio"]) for run in runs) == Counter(
        [("face", "0.5"), ("random", "0.5"), ("random", "0.75")]
    )


def test_the_report_says_what_the_intervals_mean(written):
    text = (written / "masking.md").read_text()
    section = text.split("## Against random masking of the same ratio")[1].split("##")[0]
    rows = {line.split(" | ")[0].strip("| "): line for line in section.splitlines() if " | 0.5 | " in line}
    assert "▲" in rows["face"] and "▼" in rows["face:-1"] and "▼" not in rows["face"]
    assert "bootstrap over pictures" in text and "Nor is it corrected" in text
    assert "two-way clustered variance" in text and "Holm's method" in text
    assert "Trained with (rows), tested under (columns)" in text and "Not scored yet" in text
    cross = text.split("Trained with (rows)")[1]
    cells = next(line for line in cross.splitlines() if line.startswith("| face | 0.5 ")).strip(" |").split(" | ")
    assert float(cells[5]) == pytest.approx(float(cells[4]) - 2, abs=0.011)


def test_the_csv_has_a_row_per_arm_and_measure(written, arms):
    with open(written / "masking.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == sum(len(arm["means"]) for arm in arms.values())
    row = next(
        row for row in rows if (row["masking"], row["mask_ratio"], row["measure"]) == ("face", "0.75", "psnr_db")
    )
    gain = arms["face", 0.75]["same_ratio"]["psnr_db"]
    assert [float(row[f"same_ratio_{key}"]) for key in ("difference", "low", "high")] == [gain["mean"], *gain["ci95"]]
    assert row["seeds"] == "3" and row["unit"] == "dB" and float(row["same_ratio_p_holm"]) == gain["p"]


def test_the_figure_is_drawn(written):
    with Image.open(written / "masking.png") as image:
        assert image.width == 1008 and np.unique(np.asarray(image.convert("L"))).size > 20


def test_seeds_and_arms_can_be_left_out(table, study, tmp_path):
    """Without the seed that chose the finalists, only what has other seeds is left."""
    table.main(["--runs", str(study), "--out", str(tmp_path), "--seeds", "1", "2", "--min_seeds", "2"])
    arms = json.loads((tmp_path / "masking.json").read_text())["arms"]
    assert [(arm["masking"], arm["seeds"]) for arm in arms] == [("random", [1, 2]), ("face", [1, 2])]
    assert arms[1]["same_ratio"]["psnr_db"]["mean"] == pytest.approx(0.53, abs=0.01)
    assert arms[1]["same_ratio"]["psnr_db"]["p"] is not None


def test_ways_are_told_apart_by_what_differs():
    base = {"masking": "face", "mask_strength": 4.0, "mask_random": 0.5, "mask_schedule": "constant"}
    ways = [Way.of({**base, **more}) for more in ({}, {"mask_strength": 50.0}, {"mask_schedule": "easy_to_hard"})]
    assert ways[0].label() == "face" and ways[1].label(ways[:2]) == "face, strength 50"
    assert ways[2].label(ways) == "face, strength 4, easy to hard"
    assert Way.of({**base, "masking": "random"}) == Way.of({}) == Way("random")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": 2e-3}, "differ in --lr, 0.002 and 0.001"),
        ({"epochs": 8}, "had other --epochs, 8 and 7"),
        ({"protocol": 1}, "two protocols"),
        ({"seed": 0, "mask_ratio": 0.75, "masking": "random"}, "repeats"),
    ],
)
def test_what_cannot_be_compared_is_one_line(table, tmp_path, capsys, change, message):
    add_run(tmp_path, "random", "0.75", 0, 0.0)
    more = {key: value for key, value in change.items() if key not in ("masking", "seed", "mask_ratio")}
    if "masking" in change:
        folder = add_run(tmp_path, "again", "0.75", 0, 0.0)
        args = json.loads((folder / "args.json").read_text())
        (folder / "args.json").write_text(json.dumps(args | {"masking": "random"}))
    else:
        add_run(tmp_path, "face", "0.75", 0, 0.0, **more)
    assert message in fails(table.main, capsys, ["--runs", str(tmp_path), "--out", str(tmp_path / "t")])


def test_what_is_missing_is_one_line(table, study, tmp_path, capsys):
    argv = ["--out", str(tmp_path / "t"), "--runs"]
    assert "no scored run" in fails(table.main, capsys, [*argv, str(tmp_path)])
    assert "no run masks by green" in fails(table.main, capsys, [*argv, str(study), "--baseline", "green"])
    assert "holds no finished run" in fails(table.main, capsys, [*argv, str(study), "--lora", str(tmp_path)])
    assert "no arm has 4 seeds" in fails(table.main, capsys, [*argv, str(study), "--min_seeds", "4"])
    assert "--rank_by" in fails(table.main, capsys, [*argv, str(study), "--rank_by", "psnr_eyes_db"])
    add_run(tmp_path / "odd", "random", "0.75", 0, 0.0)
    (tmp_path / "odd/random/mask_ratio=0.75,epochs=7,seed=0/command.json").unlink()
    argv = [*argv, str(tmp_path / "odd"), "--write", str(tmp_path / "f")]
    assert "no " in fails(table.main, capsys, argv)


# --- scripts/masking_study.sh -----------------------------------------------------------------------------------


@pytest.fixture
def ask_study(tmp_path):
    """ask(*arguments, **environment): the script with a Python that notes each call and does only cheap ones."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(
        f'#!/bin/sh\ncase "$1" in scripts/matched_epochs.py) exec "{sys.executable}" "$@";; esac\n'
        f'case "$1 $2" in -c*|*pip) exit 0;; esac\n'
        f'exec "{sys.executable}" -c \'import json, sys; '
        f'open("{tmp_path}/calls", "a").write(json.dumps(sys.argv[1:]) + "\\n")\' "$@"\n'
    )
    stub.chmod(0o755)

    def ask(*arguments, **environment) -> list[list[str]] | str:
        names = ("MODEL", "SEEDS", "GRID", "ARMS", "RATIOS", "EPOCHS", "SCORE", "LORA", "SCREEN", "FINALISTS")
        clean = {key: value for key, value in os.environ.items() if key not in names}
        path = f"{stub.parent}{os.pathsep}{clean['PATH']}"
        done = subprocess.run(
            ["bash", ROOT / "scripts/masking_study.sh", *map(str, arguments)], capture_output=True, text=True,
            timeout=60, env={**clean, "PATH": path, "ANIMASK_USE_ACTIVE_ENV": "1", **environment},
        )  # fmt: skip
        if done.returncode:
            assert done.returncode == 2, done.stderr
            return done.stderr
        return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]

    return ask


def test_the_study_screens_every_arm_at_equal_computation(ask_study, import_script, tmp_path):
    data = tmp_path / "my faces"
    data.mkdir()
    calls = ask_study(data, data, tmp_path / "out", "--", "--batch_size", "8", GRID="--dry_run")
    (first,) = [call for call in calls if call[:2] == ["-m", "util.run.grid"]]
    args = grid.get_args(first[2:])
    runs = grid.plan(args)
    assert args.dry_run and len(runs) == 13 * 3 and {run.settings["seed"] for run in runs} == {"0"}
    epochs = {run.settings["mask_ratio"]: run.settings["epochs"] for run in runs}
    assert epochs == {"0.5": "70", "0.75": "100", "0.9": "136"}
    script = import_script("main_pretrain.py")
    parsed = [script.get_args(run.argv()[2:]) for run in runs]
    assert all(flags.data_path == str(data) and flags.batch_size == 8 for flags in parsed)
    settings = {flags.masking: (flags.mask_strength, flags.mask_random) for flags in parsed}
    assert list(settings) == [
        "random", "face", "face:-1", "foreground", "foreground:-1", "lineart", "lineart:-1",
        "face+foreground+lineart", "hard", "box", "green", "block", "grid",
    ]  # fmt: skip
    assert settings["green"] == settings["grid"] == (1000, 0) and settings["face"] == settings["box"] == (4, 0.5)
    then = grid.follower(args, runs[0])
    flags = import_script("scripts/score_pretraining.py").get_args(then.argv()[2:])
    assert flags.pictures == flags.labelled == str(data) and flags.ckpt == f"{runs[0].folder}/checkpoint-last.pth"


def test_the_study_goes_on_with_its_finalists(ask_study, import_script, tmp_path):
    """Stage 2 takes the flags that the table wrote; LoRA follows each of its runs, with the run's own seed."""
    out = tmp_path / "out"
    out.mkdir()
    words = ["--command", "face: main_pretrain.py --data_path D", "--vary", "face:mask_ratio/epochs=0.5/70,0.75/100"]
    (out / "finalists.txt").write_text("".join(f"{word}\n" for word in words))
    environment = {
        "ARMS": "random face@8/0.2/easy_to_hard",
        "RATIOS": "0.5 0.75",
        "SEEDS": "0,1,2",
        "MODEL": "mae_vit_nano_patch8",
    }
    calls = ask_study(tmp_path, tmp_path, out, INPUT_SIZE="64", LORA="--epochs 3", **environment)
    screen, choose, second, lora, final, confirmed = calls
    flags = [import_script("main_pretrain.py").get_args(run.argv()[2:]) for run in grid.plan(grid.get_args(screen[2:]))]
    assert {(f.masking, f.mask_strength, f.mask_random, f.mask_schedule) for f in flags} == {
        ("random", 4, 0.5, "constant"), ("face", 8, 0.2, "easy_to_hard"),
    }  # fmt: skip
    table = import_script("scripts/masking_table.py")
    chosen = table.get_args(choose[1:])
    assert chosen.write == out / "finalists.txt" and chosen.seeds == [0] and chosen.out == out / "screening"
    runs = grid.plan(grid.get_args(second[2:]))
    assert len(runs) == 2 * 3 and runs[0].folder == out / "face" / "mask_ratio=0.5,epochs=70,seed=0"
    tuned = grid.plan(grid.get_args(lora[2:]))
    parsed = [import_script("main_lora.py").get_args(run.argv()[2:]) for run in tuned]
    assert [flags.init for flags in parsed] == [f"{run.folder}/checkpoint-last.pth" for run in runs]
    assert [str(flags.seed) for flags in parsed] == [run.settings["seed"] for run in runs]
    assert parsed[0].model == "vit_nano_patch8" and parsed[0].epochs == 3 and parsed[0].input_size == 64
    assert table.get_args(final[1:]).min_seeds == 2 and table.get_args(final[1:]).lora == [out / "lora"]
    assert table.get_args(confirmed[1:]).seeds == [1, 2] and table.get_args(confirmed[1:]).out == out / "confirmed"


def test_the_study_refuses_what_it_does_not_understand(ask_study, tmp_path):
    for arguments, message in {
        (): "DATA and LABELLED are needed",
        (tmp_path,): "DATA and LABELLED are needed",
        (tmp_path, "--", "--lr"): "DATA and LABELLED are needed",
        (tmp_path, tmp_path / "no"): "there is no",
        (tmp_path / "no", tmp_path): "there is no",
        (tmp_path, tmp_path, "o", "x"): "lone --",
    }.items():
        error = ask_study(*arguments)
        assert error.startswith("error: ") and error.count("\n") == 1 and message in error
