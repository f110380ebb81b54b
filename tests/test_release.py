"""A benchmark as files: the lists are those of an evaluation, checksums, submissions of scores, the leaderboard page.

Run: python -m pytest tests/test_release.py
"""

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import helpers
import numpy as np
import pyarrow.parquet as pq
import pytest

import eval_recognition
from tests.conftest import ROOT
from util.benchmark.leaderboard_page import interval_of
from util.benchmark.release import check_release, digest, first_difference, read_release
from util.run.errors import UserError

STRANGERS, TUNED, NEW = ("sora", "tsuki", "yuki"), ("hana", "ren", "kai"), ("aoi", "haru", "nao", "rin", "shin")
LISTS = ["--episodes", "20", "--negatives", "150", "--ways", "5", "--device", "cpu", "--num_workers", "0"]
FAST = [*LISTS, "--replicates", "20"]


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("people")
    helpers.make_identities(folder)
    for names, role in ((STRANGERS, "open_test"), (TUNED, "open_val"), (NEW, "novel")):
        helpers.make_identities(folder, names, **{role: 8})
    return folder


@pytest.fixture(scope="module")
def make(import_script):
    return import_script("scripts/release_protocols.py").main


@pytest.fixture(scope="module")
def released(people, make, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "v1"
    make(["--data_path", str(people), "--version", "1.0.0", "--output_dir", str(folder), *FAST])
    return folder


@pytest.fixture(scope="module")
def embeddings(released, tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    """Of a model that is better than chance: the identity's direction, and noise."""
    rng, directions, rows = np.random.default_rng(5), {}, {}
    for row in read_release(released).splits:
        direction = directions.setdefault(row["identity"], rng.normal(size=12))
        rows[row["sample_id"]] = (direction + 1.6 * rng.normal(size=12)).astype(np.float32)
    path = tmp_path_factory.mktemp("embeddings") / "theirs.npz"
    np.savez(path, embeddings=np.stack(list(rows.values())), sample_id=np.array(list(rows)))
    return path, {name: row / np.linalg.norm(row) for name, row in rows.items()}


@pytest.fixture(scope="module")
def evaluated(people, embeddings, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("evaluations") / "theirs"
    protocols = ["--protocols", "closed_set", "verification", "open_set", "few_shot"]
    argv = ["--embeddings", str(embeddings[0]), "--data_path", str(people), "--output_dir", str(out), *FAST, *protocols]
    eval_recognition.main(argv)
    return out, helpers.results_of(out)


# --- lists


def test_the_pairs_are_those_of_an_evaluation(released, evaluated):
    own = pq.read_table(released / "pairs/verification.parquet").to_pydict()
    assert own == pq.read_table(evaluated[0] / "protocols/verification.parquet").to_pydict()
    assert set(own["kind"]) == {"positive", "random", "hard"}
    tuning = pq.read_table(released / "pairs/verification_tuning.parquet").to_pydict()
    strangers = read_release(released).identities("open_val")
    assert set(tuning["id_a"]) | set(tuning["id_b"]) <= set(strangers)


@pytest.mark.parametrize("setting", ["5way_1shot", "5way_5shot"])
def test_the_episodes_are_those_of_an_evaluation(released, evaluated, embeddings, setting):
    """Accuracy of prototypes, by hand, on the listed samples."""
    rows = pq.read_table(released / f"episodes/{setting}.parquet").to_pylist()
    base = np.mean([embeddings[1][name] for name in read_release(released).identities("train")], axis=0)
    right = []
    for episode in range(20):
        vectors = {"support": {}, "query": {}}
        for row in rows:
            if row["episode"] == episode:
                vector = embeddings[1][row["sample_id"]] - base
                own = vectors[row["role"]].setdefault(row["class"], [])
                own.append(vector / np.linalg.norm(vector))
        prototypes = {name: np.mean(own, axis=0) for name, own in vectors["support"].items()}
        assert len(prototypes) == 5 and all(len(own) == int(setting[5]) for own in vectors["support"].values())
        for name, queries in vectors["query"].items():
            for query in queries:
                nearest = min(prototypes, key=lambda other: np.linalg.norm(query - prototypes[other]))
                right.append(nearest == name)
    assert np.mean(right) == pytest.approx(evaluated[1]["few_shot"][setting]["mean"])


def test_the_splits_are_those_of_the_data(released, people):
    release = read_release(released)
    assert release.version == "1.0.0" and release.classes == sorted(helpers.IDENTITIES)
    counts = json.loads((released / "protocol.json").read_text())["counts"]
    assert counts["splits"]["train"] == {"samples": 48, "labelled": 48, "identities": 4}
    assert counts["episodes"] == {"5way_1shot": 20, "5way_5shot": 20}
    on_disk = {path.relative_to(people).as_posix() for path in people.rglob("*.png")}
    assert {row["sample_id"] for row in release.splits} == on_disk
    assert all(row["sample_id"].split("/")[:2] == [row["split"], row["identity"]] for row in release.splits)


def test_a_release_is_the_same_when_it_is_made_again(released, people, make, tmp_path):
    make(["--data_path", str(people), "--version", "1.0.0", "--output_dir", str(tmp_path / "again"), *FAST])
    assert (tmp_path / "again/SHA256SUMS").read_bytes() == (released / "SHA256SUMS").read_bytes()


# --- checksums


def test_checksums_are_those_of_coreutils(released, make, capsys):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum on this machine")
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=released, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count(": OK") == check_release(released) == 7
    make(["--check", str(released)])
    assert "release 1.0.0: 7 files are as released" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "splits.csv").write_text("x"), "is not the released file"),
        (lambda folder: (folder / "pairs/verification.parquet").unlink(), "lacks pairs/verification.parquet"),
        (lambda folder: (folder / "more.txt").write_text("x"), "is not part of the release"),
        (lambda folder: (folder / "SHA256SUMS").unlink(), "is no release"),
        (lambda folder: (folder / "SHA256SUMS").write_text("nonsense\n"), "is no release"),
    ],
)
def test_a_file_that_is_not_as_released_is_named(released, make, tmp_path, capsys, spoil, message):
    folder = shutil.copytree(released, tmp_path / "copy")
    spoil(folder)
    assert message in helpers.fails(make, capsys, ["--check", str(folder)])


def test_only_files_that_have_a_checksum_are_read(released, tmp_path):
    """What a killed process left, or anybody put there under such a name, is none of the lists."""
    folder = shutil.copytree(released, tmp_path / "copy")
    for name in ("pairs/.evil.parquet.0123abcd.tmp", "episodes/.lock"):
        shutil.copy(folder / "pairs/verification.parquet", folder / name)
    assert read_release(folder) == read_release(released)


@pytest.mark.parametrize("who", ["ann", "yuki", "", "sora\0"])
def test_splits_that_contradict_the_pairs_are_refused(who, released, tmp_path):
    """Its checksums are made anew: whoever can change a list can do that too."""
    folder = shutil.copytree(released, tmp_path / "copy")
    sample = read_release(folder).pairs["verification"]["id_a"][0]
    rows = (folder / "splits.csv").read_text().splitlines()
    (number,) = [number for number, row in enumerate(rows) if row.startswith(f"{sample},")]
    name, split, old, source = rows[number].split(",")
    assert old != who
    (folder / "splits.csv").write_text(
        "\n".join([*rows[:number], f"{name},{split},{who},{source}", *rows[number + 1 :]])
    )
    names = [line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
    (folder / "SHA256SUMS").write_text("".join(f"{digest(folder / name)}  {name}\n" for name in names))
    with pytest.raises(UserError, match=r"calls a pair one identity that splits\.csv calls two|or nobody's"):
        read_release(folder)


def test_other_data_are_told_from_the_released(released):
    release = read_release(released)
    rows = [dict(row) for row in release.splits]
    assert first_difference(release, rows) is None
    assert "is missing" in first_difference(release, rows[1:])
    assert "is not in the release" in first_difference(release, [*rows, {**rows[0], "sample_id": "new"}])
    assert "'rei' of val, in the release" in first_difference(
        release, [{**rows[0], "split": "val", "identity": "rei"}, *rows[1:]]
    )


def test_what_cannot_be_released_is_one_line(people, make, released, tmp_path, capsys):
    argv = ["--data_path", str(people), *FAST]
    assert "is not of the form" in helpers.fails(
        make, capsys, [*argv, "--version", "one", "--output_dir", str(tmp_path / "a")]
    )
    assert "is not empty" in helpers.fails(make, capsys, [*argv, "--version", "1.0.0", "--output_dir", str(released)])


# --- submissions


@pytest.fixture(scope="module")
def scores(released, embeddings) -> dict[str, np.ndarray]:
    """What a model without embeddings would send in: cosines to class centres, cosines of pairs."""
    release, vectors = read_release(released), embeddings[1]
    train = release.identities("train")
    classes = release.classes[::-1]  # in an order of one's own
    centres = np.stack([np.mean([vectors[s] for s, who in train.items() if who == name], axis=0) for name in classes])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    asked = [name for split in ("test", "open_test", "val", "open_val") for name in release.identities(split)]
    arrays = {
        "sample_id": np.array(asked),
        "class_scores": np.stack([vectors[name] for name in asked]) @ centres.T,
        "classes": np.array(classes),
    }
    for name, listed in (("pair_scores", "verification"), ("tuning_pair_scores", "verification_tuning")):
        pairs = zip(release.pairs[listed]["id_a"], release.pairs[listed]["id_b"], strict=True)
        arrays[name] = np.array([vectors[a] @ vectors[b] for a, b in pairs], dtype=np.float64)
    return arrays


@pytest.fixture(scope="module")
def submit(import_script):
    return import_script("scripts/score_submission.py").main


def send(submit, released, arrays, folder: Path) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "scores.npz", **arrays)
    argv = ["--release", released, "--scores", folder / "scores.npz", "--output_dir", folder / "out"]
    submit([*map(str, argv), "--replicates", "20"])
    return helpers.results_of(folder / "out")


def test_scores_give_the_report_that_embeddings_give(submit, released, scores, evaluated, tmp_path):
    found, expected = send(submit, released, scores, tmp_path), evaluated[1]
    for key in ("top1", "top5", "macro_f1", "balanced_accuracy", "top1_ci95", "macro_f1_ci95", "probes"):
        assert found["closed_set"][key] == pytest.approx(expected["closed_set"]["by"]["centroid"][key]), key
    for key in ("auc", "eer", "auc_ci95", "positives", "negatives", "identities", "on"):
        assert found["verification"][key] == pytest.approx(expected["verification"][key], abs=1e-6), key
    assert found["verification"]["hard"]["auc"] == pytest.approx(expected["verification"]["hard"]["auc"], abs=1e-6)
    tried = expected["verification"]["threshold"]
    assert found["verification"]["threshold"]["accuracy"] == pytest.approx(tried["accuracy"], abs=1e-6)
    for key in ("auroc", "oscr", "auroc_ci95", "known", "unknown"):
        assert found["open_set"][key] == pytest.approx(expected["open_set"][key], abs=1e-6), key
    assert found["open_set"]["threshold"]["value"] == pytest.approx(
        expected["open_set"]["threshold"]["value"], abs=1e-5
    )
    assert "embeddings" in found["few_shot"]["skipped"] and found["release"]["version"] == "1.0.0"
    report = (tmp_path / "out/report.md").read_text()
    assert "release 1.0.0" in report and "Skipped: needs embeddings" in report


def test_a_part_of_the_scores_is_enough_for_a_part_of_the_report(submit, released, scores, tmp_path):
    pairs_only = send(submit, released, {"pair_scores": scores["pair_scores"]}, tmp_path / "pairs")
    assert "auc" in pairs_only["verification"] and "skipped" in pairs_only["closed_set"]
    assert "threshold" not in pairs_only["verification"]
    test_only = {name: scores[name] for name in ("sample_id", "class_scores", "classes")}
    count = len(read_release(released).identities("test"))
    test_only |= {name: test_only[name][:count] for name in ("sample_id", "class_scores")}
    found = send(submit, released, test_only, tmp_path / "classes")
    assert found["closed_set"]["probes"] == count
    assert "open_test" in found["open_set"]["skipped"] and "skipped" in found["verification"]


def wrong(scores, **changes) -> dict:
    changed = {**scores, **changes}
    return {name: value for name, value in changed.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda s: {"classes": None}, "lacks classes"),
        (lambda s: {"sample_id": None, "class_scores": None, "classes": None, "pair_scores": None}, "neither"),
        (lambda s: {"pair_scores": s["pair_scores"][1:]}, "pair_scores is float64"),
        (lambda s: {"pair_scores": np.full_like(s["pair_scores"], np.nan)}, "not finite"),
        (lambda s: {"classes": np.array(["x", *s["classes"][1:]])}, "are not the 4 characters"),
        (lambda s: {"sample_id": np.array([*s["sample_id"][:-1], s["sample_id"][0]])}, "stands there twice"),
        (lambda s: {"sample_id": np.array(["nobody", *s["sample_id"][1:]])}, "is no sample of release 1.0.0"),
        (lambda s: {"sample_id": s["sample_id"][1:], "class_scores": s["class_scores"][1:]}, "has no class_scores of"),
        (lambda s: {"class_scores": s["class_scores"].astype(int)}, "class_scores is int64"),
        (lambda s: {"logits": s["class_scores"]}, "which means nothing"),
    ],
)
def test_a_submission_that_does_not_fit_is_one_line(submit, released, scores, tmp_path, capsys, changes, message):
    np.savez(tmp_path / "s.npz", **wrong(scores, **changes(scores)))
    argv = ["--release", str(released), "--scores", str(tmp_path / "s.npz"), "--output_dir", str(tmp_path / "out")]
    assert message in helpers.fails(submit, capsys, argv)


# --- the leaderboard page


class Cells(HTMLParser):
    """The cells of all tables, row by row, and what is emphasised."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.strong, self._in = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self._in.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        while self._in and self._in.pop() != tag:
            pass

    def handle_data(self, data):
        if "td" in self._in or "th" in self._in:
            self.rows[-1][-1] += data
        if "strong" in self._in:
            self.strong.append(data)


@pytest.fixture(scope="module")
def page(import_script):
    return import_script("scripts/leaderboard_page.py").main


def test_the_page_holds_every_figure_with_its_interval(page, submit, released, scores, evaluated, tmp_path):
    shutil.copytree(evaluated[0], tmp_path / "all/theirs")
    about = {"name": "A <b>model</b> | x", "url": "https://example.org", "note": "trained on & off"}
    (tmp_path / "all/theirs/submission.json").write_text(json.dumps(about))
    send(submit, released, scores, tmp_path / "all/scores")
    (tmp_path / "all/training").mkdir()
    (tmp_path / "all/training/results.json").write_text('{"val": {"top1": 1.0}, "finished": true}')
    page([str(tmp_path / "all"), "--out", str(tmp_path / "page"), "--release", str(released)])
    cells = Cells((tmp_path / "page/leaderboard.html").read_text())
    assert len(cells.rows) == 3 and {len(row) for row in cells.rows} == {len(cells.rows[0])}
    (row,) = [row for row in cells.rows if "A <b>model</b> | x" in row[0]]
    assert "trained on & off" in row[0]
    results, column = evaluated[1], {text: place for place, text in enumerate(cells.rows[0])}
    top1, low, high = (100 * x for x in (results["closed_set"]["top1"], *results["closed_set"]["top1_ci95"]))
    assert row[column["Top-1, %"]] == f"{top1:.1f} ({low:.1f} to {high:.1f})"
    shot = results["few_shot"]["5way_1shot"]
    expected = [100 * (shot["mean"] + sign * shot["ci95"]) for sign in (-1, 1)]
    assert row[column["5-way 1-shot, %"]] == f"{100 * shot['mean']:.1f} ({expected[0]:.1f} to {expected[1]:.1f})"
    other = next(row for row in cells.rows[1:] if "scores.npz" in row[0])
    assert other[column["5-way 1-shot, %"]] == "-"
    text = (tmp_path / "page/leaderboard.md").read_text()
    assert text.count("## Release 1.0.0") == 1 and r"[A <b>model</b> \| x](https://example.org)" in text
    assert f"{top1:.1f} ({low:.1f} to {high:.1f})" in text


def test_other_lists_make_another_table(page, people, embeddings, evaluated, released, tmp_path, capsys):
    shutil.copytree(evaluated[0], tmp_path / "all/a")
    results = helpers.results_of(tmp_path / "all/a")
    for name, change in (("b", {}), ("c", {"seed": 7})):
        shutil.copytree(tmp_path / "all/a", tmp_path / f"all/{name}")
        changed = {**results, "args": results["args"] | change}
        (tmp_path / f"all/{name}/results.json").write_text(json.dumps(changed))
    page([str(tmp_path / "all"), "--out", str(tmp_path / "page"), "--release", str(released)])
    assert "3 models in 2 tables" in capsys.readouterr().out
    text = (tmp_path / "page/leaderboard.md").read_text()
    assert text.index("## Release 1.0.0") < text.index("seed 7")
    # equal models: the paired difference is 0, so both are best
    assert text.split("## Release 1.0.0")[1].split("## ")[0].count("**") >= 4


def test_runs_of_one_name_are_one_row(page, evaluated, tmp_path):
    for seed, top1 in enumerate((0.5, 0.7)):
        folder = shutil.copytree(evaluated[0], tmp_path / f"all/{seed}")
        results = helpers.results_of(folder)
        results["closed_set"]["top1"] = top1
        (folder / "results.json").write_text(json.dumps(results))
        (folder / "submission.json").write_text('{"name": "ours"}')
    page([str(tmp_path / "all"), "--out", str(tmp_path / "page")])
    (line,) = [
        line for line in (tmp_path / "page/leaderboard.md").read_text().splitlines() if line.startswith("| ours")
    ]
    assert "60.0 ± 14.1" in line and line.endswith("| 2 |")


def test_without_a_name_seeds_of_a_folder_are_one_row_and_folders_are_two(page, evaluated, tmp_path):
    for place in ("linear/seed=0", "linear/seed=1", "lora/rank=8/seed=0", "lora/rank=16/seed=0"):
        shutil.copytree(evaluated[0], tmp_path / "all" / place)
    page([str(tmp_path / "all"), "--out", str(tmp_path / "page")])
    lines = (tmp_path / "page/leaderboard.md").read_text().splitlines()
    runs = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in lines if line.endswith(("1 |", "2 |"))}
    model = evaluated[1]["subject"]["name"]
    assert runs == {
        f"{model} ({name})": n for name, n in (("linear", "2"), ("lora/rank=8", "1"), ("lora/rank=16", "1"))
    }
    page([str(tmp_path / "all/linear/seed=0"), "--out", str(tmp_path / "one")])
    assert f"| {model} (seed=0) |" in (tmp_path / "one/leaderboard.md").read_text()


def test_where_an_interval_stands():
    results = {"a": {"b": 0.5, "b_ci95": [0.4, 0.6]}, "t": {"at": {"0.01": 0.2}, "at_ci95": {"0.01": [0.1, 0.3]}}}
    results["f"] = {"mean": 0.5, "ci95": 0.1}
    assert interval_of(results, "a.b") == (0.4, 0.6)
    assert interval_of({"x": {"at": {"1": 2.0}, "at_ci95": {"1": [1, 3]}}}, "x.at.1") == (1.0, 3.0)
    assert interval_of(results, "f.mean") == pytest.approx((0.4, 0.6))
    assert interval_of(results, "a.c") is None


def test_what_is_no_result_is_one_line(page, evaluated, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = ["--out", str(tmp_path / "page")]
    assert "no results.json of an evaluation" in helpers.fails(page, capsys, [str(tmp_path / "empty"), *out])
    folder = shutil.copytree(evaluated[0], tmp_path / "all/a")
    for text, message in (
        ('{"nam": "x"}', "'nam' is not one of"),
        ('{"name": 3}', "'name' is not one of"),
        ('{"url": "javascript:alert(1)"}', "is no web address"),
        ("[", "cannot be read"),
    ):
        (folder / "submission.json").write_text(text)
        assert message in helpers.fails(page, capsys, [str(tmp_path / "all"), *out])
    (folder / "results.json").write_text("{")
    assert "cannot be read" in helpers.fails(page, capsys, [str(tmp_path / "all"), *out])


RELEASES = sorted((ROOT / "releases").iterdir())


@pytest.mark.parametrize("folder", RELEASES, ids=lambda path: path.name)
def test_the_releases_of_this_repository_are_whole(folder):
    """Each pair list tells the truth of its splits; support and query of an episode share no picture."""
    check_release(folder)
    release = read_release(folder)
    assert folder.name.endswith(release.version)
    who = {row["sample_id"]: row["identity"] for row in release.splits}
    on = {row["sample_id"]: row["split"] for row in release.splits}
    for name, split in {"verification": "open_test", "verification_tuning": "open_val"}.items():
        listed = release.pairs[name]
        assert {on[sample] for side in ("id_a", "id_b") for sample in listed[side]} == {split}
        same = [who[a] == who[b] for a, b in zip(listed["id_a"], listed["id_b"], strict=True)]
        assert [bool(label) for label in listed["label"]] == same
        assert len(set(zip(listed["id_a"], listed["id_b"], strict=True))) == len(same)
    for drawn in release.episodes.values():
        assert [who[sample] for sample in drawn["sample_id"]] == drawn["class"]
        assert len(set(zip(drawn["episode"], drawn["sample_id"], strict=True))) == len(drawn["class"])


def test_a_newer_format_is_not_guessed_at(released, tmp_path):
    folder = shutil.copytree(released, tmp_path / "copy")
    facts = json.loads((folder / "protocol.json").read_text())
    (folder / "protocol.json").write_text(json.dumps({**facts, "format": 2}))
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    fresh = f"{digest(folder / 'protocol.json')}  protocol.json"
    (folder / "SHA256SUMS").write_text(
        "\n".join(fresh if line.endswith("protocol.json") else line for line in lines) + "\n"
    )
    with pytest.raises(UserError, match="format 2"):
        read_release(folder)
