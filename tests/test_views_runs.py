"""visualize/curves and visualize/adaptation: runs read as they are, and what changed between two encoders.

Run: python -m pytest tests/test_views_runs.py
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

import main_lora
from models_mae import build_mae
from models_transfer import load_recogniser
from models_vit import build_vit
from tests.helpers import fails, make_identities, transfer_flags
from util.data.augment import EvalCrop, to_unit
from util.data.sources import open_source
from util.representation.cka import linear_cka
from visualize import adaptation, curves, views

NAME, SIZE, DEPTH = "vit_nano_patch8", 32, 6


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_identities(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start weights: a masked autoencoder's checkpoint."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("start") / "checkpoint-last.pth"
    args = {"model": f"mae_{NAME}", "input_size": SIZE}
    torch.save({"model": build_mae(f"mae_{NAME}", SIZE).state_dict(), "args": args, "epoch": 4}, path)
    return path


@pytest.fixture(scope="module")
def lora(start, data, tmp_path_factory):
    """A run of main_lora.py from there, one epoch long."""
    run = tmp_path_factory.mktemp("lora") / "run"
    flags = ["--init", start, "--input_size", SIZE, "--epochs", 1, "--lr", 0.05, "--lora_targets", "q", "v"]
    main_lora.main(transfer_flags(data, run, *flags))
    return run


def write_log(folder, *lines):
    folder.mkdir(parents=True)
    (folder / "log.txt").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


def line(epoch, loss, **more):
    return {"epoch": epoch, "global_step": 10 * epoch, "train_loss": loss, **more}


# --- curves -------------------------------------------------------------------------------------------------------


@pytest.fixture
def runs(tmp_path):
    first = write_log(
        tmp_path / "seed=0", line(0, 3.0), line(1, 2.5, val_loss=2.0), line(2, 2.0, val_loss=1.5), '{"epo'
    )
    second = write_log(tmp_path / "b", line(0, 4.0, val_loss=3.0), line(1, None, val_loss=1.0))
    return first, second


def test_runs_are_read_as_they_are(runs):
    first = curves.read_run(str(runs[0]))
    assert first.name == f"{runs[0].parent.name}/seed=0" and first.points("train_loss") == ([1, 2, 3], [3.0, 2.5, 2.0])
    assert first.points("val_loss") == ([2, 3], [2.0, 1.5]) and first.points("nothing") == ([], [])
    named = curves.read_run(f"mine={runs[1] / 'log.txt'}")
    assert named.name == "mine" and named.points("train_loss") == ([1], [4.0])


def test_curves_are_the_numbers_of_the_logs(runs):
    read = [curves.read_run(str(run)) for run in runs]
    assert curves.pick_metric(read, None) == "val_loss" and curves.pick_metric(read, "global_step") == "global_step"
    groups = curves.tell_apart(read)
    _, panels = curves.draw(groups, ("train_loss", "val_loss"), log_loss=False)
    drawn = [[drawn.get_xydata().tolist() for drawn in panel.get_lines()] for panel in panels]
    assert drawn[0] == [[[1, 3.0], [2, 2.5], [3, 2.0]], [[1, 4.0]]]
    assert drawn[1] == [[[2, 2.0], [3, 1.5]], [[1, 3.0], [2, 1.0]]]
    styles = {(one.get_color(), one.get_marker()) for one in panels[0].get_lines()}
    assert len(styles) == 2
    title = curves.describe(groups, "val_loss")
    assert title.startswith("2 trainings") and "/b ends with the lowest loss, 1" in title


def test_runs_of_one_name_are_drawn_alike_and_the_best_accuracy_wins(tmp_path):
    logs = {name: line(0, 1.0, val_top1=top1) for name, top1 in (("a0", 0.2), ("a1", 0.4), ("b0", 0.35))}
    read = [curves.read_run(f"{name[0]}={write_log(tmp_path / name, log)}") for name, log in logs.items()]
    groups = curves.tell_apart(read)
    assert {name: len(own) for name, own in groups.items()} == {"a": 2, "b": 1}
    assert "b ends with the highest top-1 accuracy, 35.0 %" in curves.describe(groups, "val_top1")
    _, panels = curves.draw(groups, ("train_loss",), log_loss=True)
    assert [one.get_color() for one in panels[0].get_lines()].count(panels[0].get_lines()[0].get_color()) == 2
    assert panels[0].get_yscale() == "log"


def test_curves_command(runs, tmp_path, capsys):
    out = tmp_path / "c.png"
    curves.main([str(run) for run in runs] + ["--out", str(out)])
    assert Image.open(out).info["dpi"][0] >= 150
    written = json.loads(out.with_suffix(".json").read_text())["runs"]
    assert written[0]["val_loss"] == [[2, 2.0], [3, 1.5]] and written[0]["epochs"] == 3
    empty = write_log(tmp_path / "empty")
    flags = ["--out", str(out)]
    assert "has no log.txt" in fails(curves.main, capsys, [str(tmp_path), *flags])
    assert "has no epoch yet" in fails(curves.main, capsys, [str(empty), *flags])
    assert "no run has it; they have" in fails(curves.main, capsys, [str(runs[0]), *flags, "--metric", "val_top9"])


# --- adaptation ---------------------------------------------------------------------------------------------------


def adapt(data, out, *flags) -> dict:
    adaptation.main([str(word) for word in ("--data_path", data, "--out", out, "--device", "cpu", *flags)])
    assert Image.open(out).info["dpi"][0] >= 150
    return json.loads(out.with_suffix(".json").read_text())


def test_nothing_changed_is_said_to_be_nothing(start, data, tmp_path):
    found = adapt(data, tmp_path / "same.png", "--before", start, "--after", start)
    assert found["cka"]["after"] == pytest.approx([1.0] * (DEPTH + 1)) and found["stages"] == ["after"]
    assert found["cka_debiased"] == pytest.approx([1.0] * (DEPTH + 1))
    assert all(values == [0.0] * DEPTH for values in found["weight_change"].values())
    probes = found["probes"]
    assert probes["accuracy"]["before"] == probes["accuracy"]["after"] and probes["classes"] == 4
    assert probes["gain"]["mean"] == [0.0] * (DEPTH + 1) and probes["gain"]["ci95"][0] == [0.0, 0.0]
    assert probes["chosen_on"] == "val" and probes["test_images"] == 16


def test_what_lora_changed_from_where_it_started(start, lora, data, tmp_path):
    found = adapt(data, tmp_path / "lora.png", "--after", lora, "--no_probes")
    assert found["before"] == str(start) and found["probes"] == {"skipped": "--no_probes"}
    # by the networks themselves, mean of the patches after each block
    models = [load_recogniser(str(path)).model for path in (start, lora / "checkpoint-best.pth")]
    source, crop = open_source(data, "test"), EvalCrop((SIZE, SIZE))
    images = to_unit(torch.stack([crop(source.load(i), source.record(i)) for i in range(len(source))]))
    ours, theirs = ([], [])
    for model, layers in zip(models, (ours, theirs), strict=True):
        for block in model.blocks:
            block.register_forward_hook(lambda _, i, out, layers=layers: layers.append(out[:, 1:].mean(dim=1)))
        with torch.inference_mode():
            model.embed(images)
    expected = [linear_cka(a.numpy(), b.numpy()) for a, b in zip(ours, theirs, strict=True)]
    np.testing.assert_allclose(found["cka"]["after"][1:], expected, atol=1e-4)
    assert found["cka"]["after"][0] == pytest.approx(1) and min(expected) < 0.9999
    np.testing.assert_allclose(np.diag(found["cka_matrix"]), found["cka"]["after"], atol=1e-6)
    # q and v were adapted, nothing else
    changes = found["weight_change"]
    assert min(changes["attn.qkv"]) > 0 and changes["mlp.fc1"] == [0.0] * DEPTH == changes["attn.proj"]
    qkv = [model.blocks[2].attn.qkv.weight.detach().double() for model in models]
    assert changes["attn.qkv"][2] == pytest.approx(
        (torch.linalg.norm(qkv[1] - qkv[0]) / torch.linalg.norm(qkv[0])).item()
    )


def test_stages_of_an_adaptation_are_drawn_over_its_epochs(start, data, tmp_path):
    folder = tmp_path / "stages"
    folder.mkdir()
    state, args = torch.load(start)["model"], {"model": f"mae_{NAME}", "input_size": SIZE, "init": str(start)}
    for epoch in (9, 1, 2):
        moved = {name: value + 0.01 * epoch * torch.randn_like(value) for name, value in state.items()}
        torch.save({"model": moved, "args": args, "epoch": epoch - 1}, folder / f"checkpoint-{epoch}.pth")
    found = adapt(data, tmp_path / "stages.png", "--after", folder, "--train_images", "24", "--images", "8")
    assert found["stages"] == ["1 epoch", "2 epochs", "9 epochs"] and found["before"] == str(start)
    assert list(found["probes"]["accuracy"]) == ["before", *found["stages"]]
    last = [found["cka"][stage][-1] for stage in found["stages"]]
    assert last[0] > last[2] and found["images"] == 8


def test_stages_are_numbered_where_epochs_do_not_rise(start, tmp_path):
    assert adaptation.name_stages([str(start)]) == (["after"], [])
    assert adaptation.name_stages([str(start)] * 2) == (["stage 1", "stage 2"], [0, 1, 2])
    assert views.stages_in(str(start.parent)) == [str(start.parent)]


def test_val_is_not_chosen_on_where_it_is_the_test(tmp_path):
    folder = make_identities(tmp_path / "data", train=10)
    args = adaptation.get_args(["--after", "x", "--data_path", str(folder), "--out", "x.png", "--val_fraction", "0.4"])
    parts = adaptation.open_parts(args)
    assert parts["val"] is None and set(parts["test"].names) <= set(parts["train"].names)


def test_weights_of_other_shapes_are_not_compared():
    small, large = build_vit(NAME, img_size=SIZE), build_vit(NAME, img_size=SIZE)
    with torch.no_grad():
        for block in large.blocks:
            block.mlp.fc1.weight.copy_(1.5 * small.blocks[0].mlp.fc1.weight)
    assert adaptation.weight_change(small, large)["mlp.fc1"][0] == pytest.approx(0.5)
    wider = build_vit("vit_nano_patch8", img_size=SIZE, mlp_ratio=2.0)
    assert adaptation.weight_change(small, wider) == {}


def test_refusals_are_one_line(start, data, tmp_path, capsys):
    def refused(*flags, data=data):
        argv = ("--data_path", data, "--out", tmp_path / "x.png", "--device", "cpu", *flags)
        return fails(adaptation.main, capsys, [str(word) for word in argv])

    assert "does not say what it started from" in refused("--after", start)
    deeper = tmp_path / "deeper.pth"
    tiny = {"model": "mae_vit_tiny_patch8", "input_size": SIZE}
    torch.save({"model": build_mae(tiny["model"], SIZE).state_dict(), "args": tiny}, deeper)
    assert "have different depths" in refused("--after", start, "--before", deeper)
    assert "too few to compare" in refused("--after", start, "--before", start, "--images", "3")
