"""Presets of published settings, their runner, and the options that they ask of the training scripts.

Run: python -m pytest tests/test_published.py
"""

import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import main_finetune
import main_linprobe
from tests.conftest import ROOT
from tests.helpers import fails, make_identities, results_of, transfer_flags
from util.benchmark import published
from util.benchmark.published import PRESETS, Expected, Preset, Stage
from util.run.dist import World
from util.training.checkpoint import read_checkpoint
from util.transfer.features import FeatureLoader, Features

# a training in small: it says what it was told
FAKE = """
import argparse, json
from pathlib import Path

p = argparse.ArgumentParser()
p.add_argument("--output_dir", type=Path)
p.add_argument("--resume")
p.add_argument("--data_path")
p.add_argument("--init", type=Path)
p.add_argument("--top1", type=float)
args = p.parse_args()
before = json.loads((args.init / "results.json").read_text())["starts"] if args.init else 0
if args.top1 < 0:
    raise SystemExit("error: this one fails")
(args.output_dir / "results.json").write_text(json.dumps(
    {"finished": True, "starts": before + 1, "test": {"top1": args.top1}}
))
"""


@pytest.fixture
def script(import_script):
    return import_script("scripts/reproduce_published.py")


@pytest.fixture
def preset(tmp_path, monkeypatch, script):
    """Two stages, the second on what the first has left."""
    fake = tmp_path / "main_fake.py"
    fake.write_text(FAKE)
    first = Stage("first", f"{fake} --data_path {{data}} --top1 0.5")
    second = Stage("second", f"{fake} --data_path {{data}} --init {{first}} --top1 0.75")
    expected = (Expected("first", "test.top1", 0.5, "somebody"), Expected("second", "test.top1", 0.8, "somebody"))
    made = Preset("a test", "datasets/prepare_nothing.py", (first, second), expected, ("in nothing",))
    monkeypatch.setitem(PRESETS, "small", made)
    return made


def run(script, tmp_path, *more) -> int:
    (tmp_path / "my data").mkdir(exist_ok=True)
    argv = ["--preset", "small", "--data_path", tmp_path / "my data", "--out", tmp_path / "out", *more]
    with pytest.raises(SystemExit) as stop:
        script.main([*map(str, argv)])
    return stop.value.code


def test_expected_stands_beside_obtained(script, preset, tmp_path, capsys):
    assert run(script, tmp_path) == 0
    said = capsys.readouterr().out
    assert "first: test.top1: expected 50.00 %, obtained 50.00 % (+0.00 points)" in said
    assert "second: test.top1: expected 80.00 %, obtained 75.00 % (-5.00 points)" in said
    assert "differs: in nothing" in said
    assert results_of(tmp_path / "out/small/second")["starts"] == 2  # it had the first one's folder
    found = json.loads((tmp_path / "out/small/comparison.json").read_text())["figures"]
    assert [(row["expected"], row["obtained"]) for row in found] == [(0.5, 0.5), (0.8, 0.75)]
    assert found[0]["source"] == "somebody"
    before = (tmp_path / "out/small/first/results.json").stat().st_mtime_ns
    assert run(script, tmp_path) == 0  # nothing is done twice
    assert (tmp_path / "out/small/first/results.json").stat().st_mtime_ns == before


def test_a_stage_that_fails_stops_what_needs_it(script, preset, tmp_path, capsys):
    assert run(script, tmp_path, "--", "--top1", "-1") == 1
    said = capsys.readouterr()
    assert "second: test.top1: expected 80.00 %, obtained nothing" in said.out
    assert "failed: first: error: this one fails" in said.err
    assert not (tmp_path / "out/small/second").exists()


def test_a_dry_run_starts_nothing(script, preset, tmp_path, capsys):
    argv = ["--preset", "small", "--data_path", "nowhere", "--out", str(tmp_path / "out"), "--dry_run"]
    script.main(argv)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# first: waiting" and f"--init {tmp_path}/out/small/first" in lines[3]
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_one_line(script, capsys):
    assert "--preset and --data_path" in fails(script.main, capsys, [])
    assert "invalid choice" in fails(script.main, capsys, ["--preset", "none", "--data_path", "x"])
    missing = ["--preset", "dafre_beit_224", "--data_path", "nowhere"]
    assert "make it with datasets/prepare_dafre.py" in fails(script.main, capsys, missing)
    script.main(["--list"])
    said = capsys.readouterr().out
    assert all(name in said for name in PRESETS) and "94.84 %" in said and "83.24 %" in said


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_commands_of_this_project(script, import_script, name):
    made = PRESETS[name]
    assert (ROOT / made.prepare).is_file() and made.differs
    runs = script.plan(made, "my data", Path("out"))
    names = [stage.name for stage in made.stages]
    for number, one in enumerate(runs):
        args = import_script(one.command[0]).get_args(one.argv()[2:])
        assert args.data_path == "my data" and args.output_dir == f"out/{names[number]}"
        for word in one.command:
            if word.startswith("out/"):  # only on what comes before
                assert word.split("/")[1] in names[:number] and word.endswith("checkpoint-best.pth")
    assert {row.stage for row in made.expected} <= set(names)
    assert all(0 < row.value < 1 and row.source for row in made.expected)


def test_the_published_numbers_and_lengths():
    def expected(name: str) -> dict[str, float]:
        return {f"{row.stage} {row.figure}": row.value for row in PRESETS[name].expected}

    assert expected("dafre_vitl16_128") == {"full test.top1": 0.8595, "full test.top5": 0.9423}
    beit = expected("dafre_beit_224")
    assert (beit["balanced test.top1"], beit["balanced test.top5"], beit["linear val.top1"]) == (0.9484, 0.983, 0.7572)
    assert expected("icartoonface_resnet50_224") == {"test icartoonface.rank1": 0.8324}
    # the published steps of 128 images, in epochs of the published training split
    for stage, steps in zip(PRESETS["dafre_beit_224"].stages, (50_000, 50_000, 10_000), strict=True):
        words = shlex.split(stage.words)
        epochs, batch = (int(words[words.index(flag) + 1]) for flag in ("--epochs", "--batch_size"))
        assert epochs * (322_947 // batch) == pytest.approx(steps, rel=0.02)
    assert "--face_padding 0.5" in PRESETS["icartoonface_resnet50_224"].stages[0].words  # doubles the box
    assert published.PRESETS is PRESETS


# --- a head to begin with, and classes drawn equally often


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp("people"), train=8, val=4, test=4)


@pytest.fixture(scope="module")
def probe(people, tmp_path_factory):
    run = tmp_path_factory.mktemp("probes") / "run"
    main_linprobe.main(transfer_flags(people, run, "--lr_grid", 30))
    return run / "checkpoint-best.pth"


def test_fine_tuning_begins_with_the_head_of_a_probe(people, probe, tmp_path):
    still = ("--lr", 1e-12, "--head_lr", 1e-12, "--min_lr", 0, "--epochs", 1)
    main_finetune.main(transfer_flags(people, tmp_path / "run", *still, "--head_init", probe))
    head, before = (read_checkpoint(path)["model"] for path in (tmp_path / "run" / "checkpoint-best.pth", probe))
    for name in ("head.weight", "head.bias"):
        torch.testing.assert_close(head[name], before[name], rtol=0, atol=1e-6)
    assert results_of(tmp_path / "run")["val"]["top1"] == results_of(probe.parent)["val"]["top1"]
    main_finetune.main(transfer_flags(people, tmp_path / "fresh", *still))
    fresh = read_checkpoint(tmp_path / "fresh" / "checkpoint-best.pth")["model"]
    assert not torch.allclose(fresh["head.weight"], before["head.weight"], atol=1e-3)


def test_a_head_that_does_not_fit_is_one_line(people, probe, tmp_path, capsys):
    def refusal(data, *more) -> str:
        return fails(main_finetune.main, capsys, transfer_flags(data, tmp_path / "run", *more))

    assert "another kind of head" in refusal(people, "--head_init", probe, "--head", "mlp")
    torch.save({"model": {}}, tmp_path / "none.pth")
    assert "no checkpoint of a transfer run" in refusal(people, "--head_init", tmp_path / "none.pth")
    others = make_identities(tmp_path / "others", ("aoi", "haru"), train=4, val=2)
    assert "knows other identities" in refusal(others, "--head_init", probe)


def loader_of(labels: np.ndarray, balanced: bool) -> FeatureLoader:
    views = [Features(torch.arange(len(labels), dtype=torch.float32)[:, None], [], 0.0)]
    return FeatureLoader(views, labels, "data", batch_size=5, seed=0, world=World(), balanced=balanced)


def test_balanced_epochs_draw_every_class_equally_often():
    labels = np.repeat([4, 0, 9], [1, 20, 179])  # 200 rows, in no order of the classes
    loader = loader_of(np.random.default_rng(0).permutation(labels), balanced=True)
    seen, rows = [], set()
    for epoch in range(30):
        for batch in loader.enter(epoch, 0):
            seen.append(batch["label"])
            assert torch.equal(loader.labels[batch["index"]], batch["label"])
            assert torch.equal(batch["features"][:, 0].long(), batch["index"])
            rows |= set(batch["index"].tolist())
    counts = torch.cat(seen).bincount(minlength=10)[[0, 4, 9]].float()
    assert counts.sum() == 30 * 200 and rows == set(range(200))  # nothing is left out
    # 6,000 draws of a third each: a standard deviation of 36.5
    assert (counts - 2000).abs().max() < 4 * 36.5
    plain = torch.cat([batch["label"] for batch in loader_of(labels, False).enter(0, 0)]).bincount(minlength=10)
    assert plain[[0, 4, 9]].tolist() == [20, 1, 179]


def test_balanced_epochs_go_on_in_the_middle():
    loader = loader_of(np.repeat([0, 1], [3, 37]), balanced=True)
    whole = [batch["index"].tolist() for batch in loader.enter(2, 0)]
    assert [batch["index"].tolist() for batch in loader.enter(2, 5)] == whole[5:]
    assert [batch["index"].tolist() for batch in loader.enter(3, 0)] != whole


def test_a_probe_of_balanced_classes(tmp_path):
    uneven = make_identities(tmp_path / "people", ("asuka", "rei"), train=12, val=4, test=2)
    make_identities(uneven, ("misato",), train=2, val=4, test=2)
    for name, more in (("plain", ()), ("balanced", ("--balanced",))):
        main_linprobe.main(transfer_flags(uneven, tmp_path / name, "--lr_grid", 3, *more))
    plain, balanced = (read_checkpoint(tmp_path / n / "checkpoint-best.pth")["model"] for n in ("plain", "balanced"))
    assert not torch.equal(plain["head.weight"], balanced["head.weight"])
    assert results_of(tmp_path / "balanced")["finished"]
