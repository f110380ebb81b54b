"""The benchmark of scaling measures the manifests it says it makes, each size apart, and fits what it prints.

Run: python -m pytest tests/test_bench_scale.py
"""

import json

import numpy as np
import pytest

from tests.helpers import fails
from util.data.labels import open_labelled
from util.data.manifest import read_manifest


@pytest.fixture(scope="module")
def bench(import_script):
    return import_script("scripts/bench_scale.py")


def args_for(out, *more: str) -> list[str]:
    recipe = "--model mae_vit_nano_patch16 --input_size 32 --batch_size 8 --steps 2 --num_workers 0 --threads 1"
    return ["--out", str(out), *recipe.split(), *more]


def test_folders_are_what_the_script_says(bench, tmp_path):
    manifest = read_manifest(bench.make_folder(tmp_path / "a", 1000, seed=1))
    assert len(manifest) == 1000 and len(set(manifest.table.column("file_name").to_pylist())) == bench.PICTURES
    assert all(manifest.path(i).is_file() for i in range(bench.PICTURES))
    assert manifest.table.column("split").to_pylist().count("test") == 100
    assert manifest.table.column("box").null_count == 0
    task = open_labelled(bench.argparse.Namespace(
        data_path=str(tmp_path / "a"), labels="auto", val_fraction=0.1, face_padding=0.25, nb_classes=None,
        label_fraction=1.0, seed=0,
    ))  # fmt: skip
    assert len(task.classes) == 51 and len(task.train) + len(task.val) + len(task.test) == 1000
    again = read_manifest(bench.make_folder(tmp_path / "b", 1000, seed=1))
    assert again.table.equals(manifest.table)


def test_a_whole_run(bench, tmp_path, capsys):
    out = tmp_path / "new" / "scale.json"
    bench.main(args_for(out, "--rows", "400", "200"))
    result = json.loads(out.read_text())
    small, large = result["sizes"]
    assert (small["rows"], large["rows"]) == (200, 400)
    for size in (small, large):
        assert set(size["phases"]) == set(bench.PHASES) == set(result["exponents"])
        assert all(phase["seconds"] > 0 and phase["peak_memory_bytes"] > 0 for phase in size["phases"].values())
        assert size["peak_memory_bytes"] >= size["peak_memory_bytes_before"] > 0
        assert size["images_per_s"] == pytest.approx(2 * 8 / size["phases"]["training"]["seconds"])
    assert small["sent_to_a_spawned_worker_bytes"] < large["sent_to_a_spawned_worker_bytes"]
    ratio = large["phases"]["checkpoint"]["seconds"] / small["phases"]["checkpoint"]["seconds"]
    assert result["exponents_of_the_two_largest"]["checkpoint"] == pytest.approx(np.log2(ratio))
    assert result["provenance"]["data_fingerprint"] == large["fingerprint"] and result["wall_seconds"] > 0
    said = capsys.readouterr().out
    assert "| rows | 200 | 400 | growth | at the end |" in said and all(f"| {name} |" in said for name in bench.PHASES)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_exponents_are_slopes(bench, power):
    sizes = [
        {"rows": rows, "phases": {name: {"seconds": 1e-7 * rows**power} for name in bench.PHASES}}
        for rows in (10, 1000, 10**6)
    ]
    assert bench.exponents(sizes) == pytest.approx(dict.fromkeys(bench.PHASES, power), abs=1e-9)


def test_processes_are_compared_at_the_same_step(bench, tmp_path, monkeypatch):
    speeds = {(1, 4): 100.0, (2, 2): 90.0, (4, 1): 80.0, (8, 1): 70.0, (1, 1): 30.0, (2, 1): 54.0}
    asked = []
    monkeypatch.setattr(bench, "run_processes", lambda folder, scratch, n, threads, args: (
        asked.append((n, threads)) or speeds[n, threads]
    ))  # fmt: skip
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda process: set(range(4)), raising=False)
    args = bench.get_args(["--out", "x", "--processes", "2", "4", "8"])
    found = bench.scale_processes(tmp_path, tmp_path, args)
    assert found["cores"] == 4 and sorted(asked) == sorted(speeds)
    assert {n: one["efficiency"] for n, one in found["same_threads"].items()} == pytest.approx(
        {"1": 1, "2": 0.9, "4": 0.8, "8": 0.7}
    )
    assert {n: one["efficiency"] for n, one in found["one_thread_each"].items()} == pytest.approx(
        {"1": 1, "2": 54 / 60, "4": 80 / 120, "8": 70 / 120}
    )


def test_two_processes_train(bench, tmp_path):
    folder = bench.make_folder(tmp_path / "data", 200, seed=0)
    args = bench.get_args(args_for(tmp_path / "x.json", "--process_batch", "16"))
    assert bench.run_processes(folder, tmp_path, 2, 1, args) > 0
    results = json.loads((tmp_path / "run-2x1" / "results.json").read_text())
    assert results["steps"] == 2 and results["images_seen"] == 2 * 16


def test_too_few_rows_are_one_line(bench, capsys):
    assert "--rows 10 are too few" in fails(bench.main, capsys, ["--out", "x.json", "--rows", "10"])
