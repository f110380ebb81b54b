"""eval_recognition.py as a user runs it: on a checkpoint, on embeddings, on data that lack something.

Run: python -m pytest tests/test_eval_recognition.py
"""

import json
from pathlib import Path

import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

import eval_recognition
import main_finetune
from models_vit import VisionTransformer
from util.data.manifest import read_manifest, write_manifest

STRANGERS, TUNED, NEW = ("sora", "tsuki", "yuki"), ("hana", "ren", "kai"), ("aoi", "haru", "nao", "rin", "shin")
FAST = {"replicates": 20, "episodes": 20, "negatives": 500, "ways": 5, "device": "cpu", "num_workers": 0}
FAST = [word for flag, value in FAST.items() for word in (f"--{flag}", str(value))]
FILES = ("results.json", "report.md", "predictions.csv", "per_class.csv", "protocols/verification.parquet")


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    """Class folders with characters to train on, to tune thresholds on, to test on, and new ones."""
    folder = tmp_path_factory.mktemp("people")
    helpers.make_identities(folder)
    for names, role in ((STRANGERS, "open_test"), (TUNED, "open_val"), (NEW, "novel")):
        helpers.make_identities(folder, names, **{role: 6})
    return folder


@pytest.fixture(scope="module")
def trained(people, tmp_path_factory) -> Path:
    """A fully fine-tuned run of 12 steps."""
    run = tmp_path_factory.mktemp("runs") / "run"
    main_finetune.main(helpers.transfer_flags(people, run))
    return run


def evaluate(out: Path, *flags) -> dict:
    eval_recognition.main([*map(str, flags), "--output_dir", str(out), *FAST])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def report(people, trained, tmp_path_factory) -> tuple[Path, dict]:
    """Everything about the run."""
    out = tmp_path_factory.mktemp("report") / "out"
    flags = ("--ckpt", trained / "checkpoint-best.pth", "--data_path", people, "--save_embeddings")
    return out, evaluate(out, *flags, "--resolutions", 16, 24, 20)


def test_every_protocol_has_its_block_and_every_list_is_there(report):
    out, results = report
    assert "skipped" in results["icartoonface"]
    for name in eval_recognition.PROTOCOLS:
        assert name == "icartoonface" or "skipped" not in results[name], name
    assert all((out / name).is_file() for name in FILES)
    text = (out / "report.md").read_text()
    for line in text.splitlines():
        if line.startswith("!["):
            with Image.open(out / line.split("(")[1].rstrip(")")) as picture:
                assert min(picture.size) > 100
    assert text.count("![") >= 10 and results["finished"] is True
    assert {"git_commit", "seed", "device", "versions", "data_fingerprint", "wall_seconds"} <= results.keys()
    assert results["data"]["train"] == {"samples": 48, "identities": 4, "unlabelled": 0}


def test_the_head_says_what_the_training_run_said(report, trained):
    expected = helpers.results_of(trained)["test"]
    closed = report[1]["closed_set"]
    assert closed["method"] == "head"
    for name in ("top1", "top5", "macro_f1"):
        assert closed[name] == pytest.approx(expected[name])


def test_the_figures_are_those_of_the_lists(report):
    out, results = report
    lines = (out / "predictions.csv").read_text().splitlines()[1:]
    assert len(lines) == 16
    assert results["closed_set"]["top1"] == np.mean([line.split(",")[2] == "1" for line in lines])
    wrong = (out / "errors.csv").read_text().splitlines()[1:]
    assert {line.split(",")[0] for line in wrong} == {line.split(",")[0] for line in lines if line.split(",")[2] == "0"}
    assert len(wrong) == results["errors"]["errors"] > 0
    pairs = pq.read_table(out / "protocols" / "verification.parquet").to_pydict()
    scores, kind = np.load(out / "verification_scores.npy"), np.array(pairs["kind"])
    chosen, same = kind != "hard", np.array(pairs["label"])
    assert results["verification"]["auc"] == pytest.approx(roc_auc_score(same[chosen], scores[chosen]), abs=1e-6)
    with np.load(out / "embeddings.npz") as file:
        embeddings = dict(zip(file["sample_id"].tolist(), file["embeddings"], strict=True))
    a, b = (np.array([embeddings[name] for name in pairs[key]]) for key in ("id_a", "id_b"))
    cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    np.testing.assert_allclose(scores, cosine, atol=1e-5)


def test_sizes_that_the_patches_do_not_divide_are_refused_one_by_one(report):
    found = report[1]["resolution"]
    assert "multiple of 8" in found["20"]["skipped"] and found["24"]["gmacs"] > found["16"]["gmacs"] > 0
    assert found["16"]["top1"] == report[1]["closed_set"]["top1"]
    assert found["source_crops"]["short_side_px"]["p50"] == 24


def test_stress_has_the_synthetic_ones_and_says_what_the_metadata_lack(report):
    stress = report[1]["stress"]
    assert "hue_90" in stress["colour_shift"]["synthetic"] and "eyes" in stress["occlusion"]["synthetic"]
    assert "no style" in stress["style"]["strata"]["skipped"]
    grey = stress["colour_shift"]["synthetic"]["grey"]  # a character of these is a hue
    assert grey["drop"] == pytest.approx(stress["clean"]["top1"] - grey["top1"]) and grey["drop"] > 0


def without_times(results: dict) -> dict:
    """What must not depend on the machine or the way the embeddings came."""
    names = ("closed_set", "verification", "open_set", "few_shot", "long_tail", "stress", "errors")
    return {name: {k: v for k, v in results[name].items() if k != "seconds"} for name in names if name in results}


def test_without_figures_the_numbers_are_the_same(report, people, tmp_path):
    flags = ("--embeddings", report[0] / "embeddings.npz", "--data_path", people, "--protocols", "closed_set")
    drawn, bare = evaluate(tmp_path / "drawn", *flags), evaluate(tmp_path / "bare", *flags, "--no_figures")
    assert without_times(bare)["closed_set"] == without_times(drawn)["closed_set"]
    assert list((tmp_path / "drawn").rglob("*.png")) and not list((tmp_path / "bare").rglob("*.png"))
    assert "![" not in (tmp_path / "bare" / "report.md").read_text()


def test_a_second_evaluation_embeds_nothing(report, people, trained, monkeypatch):
    out, results = report
    counts, embed = [], VisionTransformer.embed
    monkeypatch.setattr(
        VisionTransformer, "embed", lambda self, images: counts.append(len(images)) or embed(self, images)
    )
    protocols = ("closed_set", "verification", "open_set", "few_shot", "long_tail", "stress")
    flags = ("--ckpt", trained / "checkpoint-best.pth", "--data_path", people, "--protocols", *protocols)
    again = evaluate(out.with_name("again"), *flags)
    assert not counts and without_times(again) == without_times(results)


def test_embeddings_of_any_model_get_the_same_report(report, people, tmp_path):
    out, results = report
    flags = ("--embeddings", out / "embeddings.npz", "--data_path", people, "--all_pairs")
    again = evaluate(tmp_path / "out", *flags)
    for method in ("centroid", "knn"):
        assert again["closed_set"]["by"][method] == results["closed_set"]["by"][method]
    assert again["closed_set"]["method"] == "centroid"
    assert again["verification"]["auc"] == pytest.approx(results["verification"]["auc"])
    assert again["open_set"]["auroc"] == pytest.approx(results["open_set"]["auroc"])
    assert again["few_shot"]["5way_1shot"]["mean"] == pytest.approx(results["few_shot"]["5way_1shot"]["mean"])
    # there are so few pairs that the list holds all: every pair, streamed, is the same
    every = again["verification"]["all_pairs"]
    pairs = pq.read_table(tmp_path / "out" / "protocols" / "verification.parquet").to_pydict()
    scores, same = np.load(tmp_path / "out" / "verification_scores.npy"), np.array(pairs["label"])
    assert (every["positives"], every["negatives"]) == (same.sum(), len(same) - same.sum()) == (45, 108)
    assert every["auc"] == pytest.approx(roc_auc_score(same, scores), abs=every["auc_error_bound"] + 1e-6)
    assert "skipped" in again["resolution"] and "skipped" in again["stress"]["colour_shift"]["synthetic"]


def damaged(report, tmp_path, change) -> Path:
    """A copy of the embeddings with something wrong."""
    with np.load(report[0] / "embeddings.npz") as file:
        arrays = {name: file[name].copy() for name in file.files}
    arrays = change(arrays) or arrays
    np.savez(tmp_path / "damaged.npz", **arrays)
    return tmp_path / "damaged.npz"


def spoil(arrays: dict) -> None:
    rows = np.flatnonzero([name.startswith("test/") for name in arrays["sample_id"]])
    arrays["embeddings"][rows[0]] = np.nan
    arrays["embeddings"][rows[1]] = 0


def test_embeddings_that_are_no_numbers_are_left_out_counted_and_listed(report, people, tmp_path, capsys):
    path = damaged(report, tmp_path, spoil)
    flags = ("--embeddings", path, "--data_path", people, "--protocols", "closed_set", "--max_bad", 0.2)
    results = evaluate(tmp_path / "out", *flags)
    assert results["closed_set"]["probes"] == 14 and results["data"]["left_out"] == {"test": 2}
    listed = json.loads((tmp_path / "out" / "left_out.json").read_text())["test"]
    assert len(listed) == 2 and "not finite" in listed[0]["reason"]
    assert "left out of test" in capsys.readouterr().out


def test_too_many_of_them_are_an_error(report, people, tmp_path, capsys):
    path = damaged(report, tmp_path, spoil)
    argv = ["--embeddings", path, "--data_path", people, "--output_dir", tmp_path / "out", *FAST]
    error = helpers.fails(eval_recognition.main, capsys, list(map(str, argv)))
    assert "2 of 16 samples of test" in error and "--max_bad" in error


def test_samples_that_the_file_lacks_are_counted(report, people, tmp_path):
    path = damaged(report, tmp_path, lambda arrays: {name: value[1:] for name, value in arrays.items()})
    flags = ("--embeddings", path, "--data_path", people, "--protocols", "closed_set", "--max_bad", 0.1)
    assert evaluate(tmp_path / "out", *flags)["data"]["left_out"] == {"train": 1}


def refuse(capsys, data, embeddings, tmp_path, *flags) -> str:
    argv = ["--embeddings", embeddings, "--data_path", data, "--output_dir", tmp_path / "out", *FAST, *flags]
    return helpers.fails(eval_recognition.main, capsys, list(map(str, argv)))


@pytest.fixture
def prepared(tmp_path) -> tuple[Path, Path, list[dict]]:
    """A prepared folder, embeddings for it, and its rows."""
    rng, rows = np.random.default_rng(0), []
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for split, names in (("train", "ab"), ("test", "ab"), ("open_test", "cd")):
        for i in range(8):
            row = {"sample_id": f"{split}{i}", "file_name": "a.png", "split": split, "identity": names[i % 2]}
            rows.append(row)
    write_manifest(tmp_path, rows)
    ids = [row["sample_id"] for row in rows]
    np.savez(tmp_path / "e.npz", embeddings=rng.normal(size=(len(rows), 8)), sample_id=ids)
    return tmp_path, tmp_path / "e.npz", rows


def test_a_single_identity_and_no_labels_at_all(prepared, tmp_path, capsys):
    folder, embeddings, rows = prepared
    only = {"--protocols": "closed_set"}
    write_manifest(folder, [{**row, "identity": "a"} for row in rows])
    assert "1 identity only" in refuse(capsys, folder, embeddings, tmp_path, *only, only["--protocols"])
    write_manifest(folder, [{**row, "identity": None} for row in rows])
    assert "no labelled train" in refuse(capsys, folder, embeddings, tmp_path)


def test_a_split_without_rows_skips_what_needs_it(prepared, tmp_path):
    folder, embeddings, rows = prepared
    write_manifest(folder, [row for row in rows if row["split"] != "open_test"])
    results = evaluate(tmp_path / "out", "--embeddings", embeddings, "--data_path", folder)
    assert "open_test" in results["open_set"]["skipped"] and "top1" in results["closed_set"]
    assert results["verification"]["on"] == "test"


def test_a_metadata_file_with_a_missing_column_is_named(prepared, tmp_path, capsys):
    folder, embeddings, _ = prepared
    table = pq.read_table(folder / "metadata.parquet")
    pq.write_table(table.drop_columns(["split"]), folder / "metadata.parquet")
    assert "no column 'split'" in refuse(capsys, folder, embeddings, tmp_path)


def test_a_path_that_leaves_the_folder_is_refused(prepared, tmp_path, capsys):
    folder, embeddings, _ = prepared
    table = pq.read_table(folder / "metadata.parquet")
    names = ["../a.png", *table.column("file_name").to_pylist()[1:]]
    pq.write_table(table.set_column(1, "file_name", [names]), folder / "metadata.parquet")
    assert "leads outside" in refuse(capsys, folder, embeddings, tmp_path)
    assert read_manifest  # the reader that refuses is the one every script uses


def test_a_training_run_is_not_written_over(trained, people, capsys):
    argv = ["--ckpt", trained / "checkpoint-best.pth", "--data_path", people, "--output_dir", trained]
    assert "holds a training run" in helpers.fails(eval_recognition.main, capsys, list(map(str, argv)))


def test_a_stress_that_is_not_known_is_named(prepared, tmp_path, capsys):
    folder, embeddings, _ = prepared
    assert "--stresses rain" in refuse(capsys, folder, embeddings, tmp_path, "--stresses", "rain")


def test_the_official_trials_of_a_prepared_folder_are_used(prepared, tmp_path):
    from util.data.trials import write_protocol

    folder, embeddings, rows = prepared
    strangers = [row["sample_id"] for row in rows if row["split"] == "open_test"]
    lists = {"id_a": [*strangers[:2], strangers[7]], "id_b": [*strangers[2:4], None]}
    write_protocol(folder, "icartoonface", lists | {"label": [1, 1, 0], "kind": ["trial", "trial", "distractor"]})
    results = evaluate(
        tmp_path / "out", "--embeddings", embeddings, "--data_path", folder, "--protocols", "icartoonface"
    )
    with np.load(embeddings) as file:
        vectors = dict(zip(file["sample_id"].tolist(), file["embeddings"], strict=True))
    unit = {name: vector / np.linalg.norm(vector) for name, vector in vectors.items()}
    right = [
        unit[a] @ unit[b] > unit[a] @ unit[strangers[7]] for a, b in zip(strangers[:2], strangers[2:4], strict=True)
    ]
    assert results["icartoonface"]["rank1"] == np.mean(right) and results["icartoonface"]["distractors"] == 1


def test_two_processes_give_the_figures_of_one(report, people, trained, run_script, tmp_path):
    _, results = report
    flags = ("--ckpt", trained / "checkpoint-best.pth", "--data_path", people, "--output_dir", tmp_path / "out")
    run_script("eval_recognition.py", *flags, *FAST, "--protocols", "closed_set", "verification", processes=2)
    again = json.loads((tmp_path / "out" / "results.json").read_text())
    assert again["closed_set"]["top1"] == results["closed_set"]["top1"]
    assert again["verification"]["auc"] == pytest.approx(results["verification"]["auc"], abs=1e-6)


def test_a_flip_test_adds_the_mirrored_picture(report, people, trained, tmp_path):
    flags = ("--ckpt", trained / "checkpoint-best.pth", "--data_path", people, "--protocols", "closed_set")
    evaluate(tmp_path / "out", *flags, "--flip_test", "--save_embeddings")

    def load(path: Path) -> dict:
        with np.load(path) as file:
            return dict(zip(file["sample_id"].tolist(), file["embeddings"], strict=True))

    plain, flipped = load(report[0] / "embeddings.npz"), load(tmp_path / "out" / "embeddings.npz")
    mirrored = tmp_path / "mirrored"
    for path in people.glob("t*/*/*.png"):
        target = mirrored / path.relative_to(people)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(path) as image:
            image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target)
    more = ("--val_fraction", 0, "--save_embeddings")  # no training picture is to be held out
    evaluate(tmp_path / "m", *flags[:2], "--data_path", mirrored, *flags[4:], *more)
    other = load(tmp_path / "m" / "embeddings.npz")
    for name in list(flipped)[:10]:
        np.testing.assert_allclose(flipped[name], (plain[name] + other[name]) / 2, atol=1e-4)
