"""The benchmark of embedding and probing compares like with like and writes the agreed file.

Run: python -m pytest tests/test_bench_eval.py
"""

import json
import statistics
from pathlib import Path

import helpers
import pytest
import torch

from models_vit import build_vit
from util.data.augment import EvalCrop, to_unit
from util.transfer import features

TINY = "--model vit_nano_patch8 --input_size 16 --images 12 --batch_size 4 --num_workers 0 --rounds 2 --device cpu"


@pytest.fixture(scope="module")
def bench(import_script):
    return import_script("scripts/bench_eval.py")


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    return helpers.make_identities(tmp_path_factory.mktemp("people"))


@pytest.fixture
def prepared(bench, people, tmp_path):
    """prepared(flag, ...): a Bench on the tiny identities."""

    def make(*flags):
        args = bench.get_args(["--out", "x.json", *TINY.split(), "--data_path", str(people), *map(str, flags)])
        return bench.Bench(args, tmp_path / "scratch")

    return make


def run(bench, out: Path, *flags) -> dict:
    bench.main(["--out", str(out), *TINY.split(), *map(str, flags)])
    return json.loads(out.read_text())


def test_result_file_on_pictures_of_its_own(bench, tmp_path, capsys):
    out = tmp_path / "new" / "bench.json"
    result = run(bench, out, "--what", "extraction", "lora", "precision", "--threads", 1)
    found = result["extraction"]
    (name, block) = next(iter(found["paths"].items()))
    assert name == "toonfaces" and block["images"] == 12 and len(block["seconds_of_each_round"]) == 2
    assert block["images_per_s"] == pytest.approx(12 / statistics.median(block["seconds_of_each_round"]))
    ceiling = found["ceiling"]
    assert ceiling["images_per_s"] == pytest.approx(12 / statistics.median(ceiling["seconds_of_each_round"]))
    assert found["ratio"] == pytest.approx(block["images_per_s"] / ceiling["images_per_s"])
    lora = result["lora"]
    assert lora["ratio"] == pytest.approx(lora["merged"]["images_per_s"] / lora["unmerged"]["images_per_s"])
    assert 0 < lora["difference"] < bench.LORA_TOLERANCE
    assert "fp32 is the precision for cpu" in result["precision"]["skipped"]
    assert result["targets"] == {"extraction": 0.8, "probe": 20.0} and result["batch_size"] == 4
    assert result["provenance"]["data_fingerprint"] and result["provenance"]["versions"]["torch"]
    text = capsys.readouterr().out
    assert "(target 0.8)" in text and "skipped: fp32 is the precision" in text and f"written to {out}" in text


def test_every_data_path_has_its_figures(bench, people, make_images, tmp_path):
    plain = make_images(tmp_path / "plain", 10)
    result = run(bench, tmp_path / "bench.json", "--what", "extraction", "--data_path", people, plain)
    paths = result["extraction"]["paths"]
    assert list(paths) == [str(people), str(plain)]
    assert [block["images"] for block in paths.values()] == [12, 9]  # a tenth of a plain folder is held out
    assert result["extraction"]["ratio"] == min(block["ratio"] for block in paths.values())


def test_the_encoder_is_run_once_for_each_view_or_once_for_each_epoch(bench, people, prepared, monkeypatch):
    passes, cached = [], features.cached_features

    def counted(here, folder, model, weights, source, transform, view=0, name="images"):
        passes.append((here.run.path.name, name, view))
        return cached(here, folder, model, weights, source, transform, view, name)

    monkeypatch.setattr(bench.main_linprobe, "cached_features", counted)
    found = bench.probe(prepared("--epochs", 4, "--views", 2, "--rerun_epochs", 3))
    train = [(run, view) for run, name, view in passes if name == "train images"]
    assert train == [("cached", 0), ("cached", 1), ("rerun", 0), ("rerun", 1), ("rerun", 2)]
    assert found["epochs"] == 4 and "really run in each of 3 epochs" in found["what"]
    assert found["ratio"] == pytest.approx(found["rerun_seconds"] / found["cached_seconds"])


def test_an_epoch_that_is_multiplied_is_one_pass_and_what_heads_cost(bench, prepared, monkeypatch):
    """50 epochs of 10 s, of which 2 passes of 4 s are cached: heads cost (500 - 8) / 50 s, a rerun epoch 4 s more."""
    results = {"epochs": 50, "encoder_pass_seconds": 4.0, "seconds_per_epoch": 10.0}
    monkeypatch.setattr(bench, "run_probe", lambda *_: results)
    found = bench.probe(prepared("--views", 2))
    assert found["cached_seconds"] == 500 and found["rerun_seconds"] == pytest.approx(50 * (4 + 492 / 50))
    assert "one pass of the encoder measured, times 50 epochs" in found["what"]


def test_the_forward_pass_is_that_of_the_first_pictures(prepared):
    subject = prepared()
    source, crop = subject.source(subject.first), EvalCrop((16, 16))
    pictures = torch.stack([crop(source.load(row), source.record(row)) for row in range(4)])
    torch.manual_seed(0)
    model = build_vit("vit_nano_patch8", img_size=16).eval()
    with torch.inference_mode():
        expected = model.embed(to_unit(pictures))
    assert torch.allclose(subject.forward(subject.model), expected, atol=1e-6)
    assert subject.forward(subject.model, "bf16").dtype in (torch.bfloat16, torch.float32)
    assert not torch.equal(subject.forward(subject.model, "bf16").float(), expected)


def test_turns_are_taken_after_a_round_to_warm_up(prepared):
    subject, calls = prepared("--rounds", 3), []
    times = subject.take_turns({name: lambda name=name: calls.append(name) for name in "ab"})
    assert "".join(calls) == "abbaabba" and {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


def test_adapters_that_change_when_they_are_merged_are_noticed(bench, prepared, monkeypatch):
    def spoil(model):
        bench_merge(model)
        model.blocks[0].mlp.fc1.weight.mul_(1.1)

    bench_merge = bench.merge_lora
    monkeypatch.setattr(bench, "merge_lora", spoil)
    with pytest.raises(AssertionError, match="merged adapters do not embed"):
        bench.lora(prepared())


def test_a_precision_that_is_asked_for_is_measured(bench, prepared):
    found = bench.precision(prepared("--precision", "bf16"))
    assert found["ratio"] == pytest.approx(found["bf16"]["images_per_s"] / found["fp32"]["images_per_s"])


def test_compiling_has_its_warm_up_and_its_break_even(bench, prepared, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda embed, **_: embed)
    found = bench.compilation(prepared())
    saved = 1 / found["off"]["images_per_s"] - 1 / found["on"]["images_per_s"]
    assert found["pays_after_images"] == (round(found["warmup_seconds"] / saved) if saved > 0 else None)
    assert any("warm-up" in line for line in bench.lines("compile", found))

    def broken(embed, **_):
        def fail(images):
            raise RuntimeError("no compiler\nmore")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    assert bench.compilation(prepared()) == {"skipped": "torch.compile fails here: no compiler"}


def test_an_input_size_that_does_not_divide_is_one_line(bench, tmp_path, capsys):
    flags = ["--out", str(tmp_path / "bench.json"), "--model", "vit_nano_patch16", "--input_size", "30"]
    assert helpers.fails(bench.main, capsys, flags).startswith("error: an input of 30 x 30 px")
