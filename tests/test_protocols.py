"""The protocols on embedded splits: who is in the gallery, who is left out, what is tuned where.

Run: python -m pytest tests/test_protocols.py
"""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from util.benchmark import protocols
from util.benchmark.embedded import FACTS, Bench, Split, embed_split, join_splits, read_embeddings
from util.benchmark.protocols import Skipped
from util.data.trials import read_protocol, write_protocol
from util.run.errors import UserError

DIM = 16


def make_split(name: str, identities: list[str | None], noise: float = 0.3, sources=None, **facts) -> Split:
    """Samples around a direction of their identity, which is the same in every split."""
    rng = np.random.default_rng(len(name))
    rows = []
    for i, identity in enumerate(identities):
        seed = sum(map(ord, identity)) if identity else 1000 + i
        centre = np.random.default_rng(seed).normal(size=DIM)
        rows.append(centre / np.linalg.norm(centre) * 3 + rng.normal(scale=noise, size=DIM))
    columns = {key: [None] * len(identities) for key in FACTS}
    columns |= {"identity": identities, "sample_id": [f"{name}/{i:03d}" for i in range(len(identities))]}
    columns |= {"source": sources or [None] * len(identities), **facts}
    return embed_split(name, np.array(rows, dtype=np.float32), columns)[0]


KNOWN, OPEN, TUNED, NOVEL = "abcdef", "uvwx", "mnop", "qrstyz"


def make_splits(**changes) -> dict[str, Split]:
    splits = {
        "train": make_split("train", list(KNOWN) * 10),
        "val": make_split("val", list(KNOWN) * 4),
        "test": make_split("test", list(KNOWN) * 5, noise=0.9),
        "open_val": make_split("open_val", list(TUNED) * 8),
        "open_test": make_split("open_test", list(OPEN) * 8, noise=0.9),
        "novel": make_split("novel", list(NOVEL) * 9),
    }
    return {name: split for name, split in {**splits, **changes}.items() if split is not None}


def make_bench(head=None, classes=(), **changes) -> Bench:
    return Bench(make_splits(**changes).get, head=head, classes=classes, replicates=30)


def by_hand(bench: Bench, probes: Split) -> np.ndarray:
    """The nearest normalised class mean, by loops."""
    train = bench.split("train")
    centres = [train.embeddings[train.identity == name].mean(axis=0) for name in bench.classes]
    return np.array(
        [int(np.argmax([p @ c / np.linalg.norm(c) for c in centres])) for p in probes.embeddings.astype(float)]
    )


def test_closed_set_by_class_centre_is_what_loops_find():
    bench = make_bench()
    outcome = protocols.closed_set(bench)
    probes = bench.split("test")
    right = by_hand(bench, probes) == probes.labels(bench.classes)
    assert 0.5 < right.mean() < 1  # the case is neither trivial nor hopeless
    assert outcome.results["method"] == "centroid" and outcome.results["top1"] == pytest.approx(right.mean())
    assert outcome.results["by"].keys() == {"centroid", "knn"} and outcome.results["on"] == "test"


def test_a_head_is_the_headline_and_gets_embeddings_at_their_own_length():
    bench = make_bench()
    seen = []

    def head(embeddings):
        seen.append(np.linalg.norm(embeddings, axis=1))
        return embeddings @ np.eye(DIM, 6, dtype=np.float32)

    results = protocols.closed_set(make_bench(head=head, classes=tuple(KNOWN))).results
    assert results["method"] == "head" and set(results["by"]) == {"head", "centroid", "knn"}
    np.testing.assert_allclose(seen[0], bench.split("test").norms, rtol=1e-5)
    assert seen[0].min() > 1.5  # no unit vectors
    labels = bench.split("test").labels(tuple(KNOWN))
    assert results["top1"] == pytest.approx(np.mean(bench.split("test").raw[:, :6].argmax(axis=1) == labels))


def test_probes_whose_character_has_no_gallery_picture_are_left_out_and_counted():
    strangers = make_split("test", [*KNOWN, "zz", "zz", "yy"], noise=0.9)
    results = protocols.closed_set(make_bench(test=strangers)).results
    assert results["probes"] == 6 and results["excluded"] == {"identity_not_in_gallery": 3}
    # and a class of the head without gallery pictures is no answer of the class centres
    bench = make_bench(head=lambda x: x[:, :7], classes=(*KNOWN, "nobody"))
    assert protocols.closed_set(bench).results["by"]["centroid"]["classes"] == 7


def test_val_is_asked_where_there_is_no_test():
    assert protocols.closed_set(make_bench(test=None)).results["on"] == "val"
    results = protocols.open_set(make_bench(test=None)).results
    assert "skipped" in results["threshold"]  # val is what is tested: nothing is tuned on it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": None}, "no labelled train"),
        ({"test": None, "val": None}, "no labelled test or val"),
        ({"train": make_split("train", ["a"] * 9)}, "1 identity only"),
        ({"train": make_split("train", ["g", "h"] * 9)}, "no probe"),
        ({"train": make_split("train", [None] * 9)}, "no labelled train"),
    ],
)
def test_what_the_data_cannot_support_is_skipped_with_the_reason(changes, message):
    for protocol in (protocols.closed_set, protocols.open_set):
        with pytest.raises(Skipped, match=message):
            protocol(make_bench(**changes))


def test_open_set_scores_are_those_of_an_independent_reference():
    bench = make_bench()
    outcome = protocols.open_set(bench)
    train, known, unknown = (bench.split(name) for name in ("train", "test", "open_test"))
    centres = np.array([train.embeddings[train.identity == name].mean(axis=0) for name in KNOWN])
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    scores = [(split.embeddings @ centres.T).max(axis=1) for split in (known, unknown)]
    truth = np.repeat([1, 0], [len(known), len(unknown)])
    assert outcome.results["auroc"] == pytest.approx(roc_auc_score(truth, np.concatenate(scores)), abs=1e-6)
    assert outcome.results["closed_set_accuracy"] == pytest.approx(protocols.closed_set(bench).results["top1"])
    assert outcome.results["unknown_identities"] == 4 and outcome.results["score"] == "cosine"
    assert outcome.results["threshold"]["value"] > 0


def test_the_threshold_knows_nothing_of_the_test():
    chosen = [
        protocols.open_set(make_bench(open_test=make_split("open_test", list(OPEN) * 8, noise=noise)))
        for noise in (0.1, 0.9)
    ]
    assert chosen[0].results["threshold"]["value"] == chosen[1].results["threshold"]["value"]
    assert chosen[0].results["threshold"]["test"] != chosen[1].results["threshold"]["test"]


def test_a_head_adds_its_own_scores_of_being_known():
    results = protocols.open_set(make_bench(head=lambda x: x[:, :6], classes=tuple(KNOWN))).results
    assert set(results["by"]) == {"max_logit", "max_probability", "energy"}
    logits = [make_splits()[name].raw[:, :6].astype(float) for name in ("test", "open_test")]
    truth = np.repeat([1, 0], [len(part) for part in logits])
    rows = np.concatenate(logits)
    softmax = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
    expected = {
        "max_logit": rows.max(axis=1),
        "max_probability": softmax.max(axis=1),
        "energy": np.log(np.exp(rows).sum(axis=1)),
    }
    for name, scores in expected.items():
        assert results["by"][name]["auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-5), name


def test_a_character_that_was_trained_on_is_no_stranger():
    with pytest.raises(UserError, match="'a' is in train and in open_test"):
        protocols.open_set(make_bench(open_test=make_split("open_test", list("auvw") * 5)))


OPTIONS = {"negatives": 400, "positives_per_identity": 100}


def test_verification_compares_strangers_and_counts_every_pair_once():
    bench = make_bench()
    outcome = protocols.verification(bench, **OPTIONS)
    split, pairs = bench.split("open_test"), outcome.arrays["pairs"]
    assert outcome.results["on"] == "open_test" and outcome.results["positives"] == 4 * 28
    assert outcome.results["negatives"] == 32 * 31 // 2 - 4 * 28
    scores = (split.embeddings[pairs.a] * split.embeddings[pairs.b]).sum(axis=1)
    same = split.identity[pairs.a] == split.identity[pairs.b]
    assert outcome.results["auc"] == pytest.approx(roc_auc_score(same, scores), abs=1e-6)
    assert protocols.verification(make_bench(open_test=None), **OPTIONS).results["on"] == "test"


def test_pictures_from_one_source_are_no_pair():
    sources = [f"picture {i // 8}" for i in range(32)]  # rows 0..7 are u v w x u v w x, from one picture
    bench = make_bench(open_test=make_split("open_test", list(OPEN) * 8, sources=sources))
    outcome = protocols.verification(bench, **OPTIONS)
    assert outcome.results["excluded"] == {"positives_from_one_source": 16}
    assert outcome.results["positives"] == 4 * 28 - 16
    pairs, split = outcome.arrays["pairs"], bench.split("open_test")
    same = pairs.same
    assert not (split.facts["source"][pairs.a[same]] == split.facts["source"][pairs.b[same]]).any()


def test_the_verification_threshold_is_chosen_on_validation_pairs():
    outcome = protocols.verification(make_bench(), **OPTIONS)
    chosen = outcome.results["threshold"]
    assert chosen["chosen_on"] == "open_val"
    accepted = outcome.arrays["scores"] > chosen["value"]
    assert chosen["accuracy"] == pytest.approx(np.mean(accepted == outcome.arrays["pairs"].same))
    other = protocols.verification(make_bench(open_test=make_split("open_test", list(OPEN) * 8)), **OPTIONS)
    assert other.results["threshold"]["value"] == chosen["value"]
    bench = make_bench(open_val=None, val=None)
    assert "threshold" not in protocols.verification(bench, **OPTIONS).results


def test_hard_negatives_are_reported_apart():
    def looks(split: Split) -> np.ndarray:
        return np.array([[0.0 if name in "uv" else 9.0, i * 1e-3] for i, name in enumerate(split.identity)])

    outcome = protocols.verification(make_bench(), signatures=looks, negatives=200, positives_per_identity=50)
    pairs, split = outcome.arrays["pairs"], outcome.arrays["split"]
    hard = pairs.kind == 2
    assert hard.sum() == 40 and outcome.results["hard"]["negatives"] == 40 and outcome.results["negatives"] == 160
    groups = np.isin(split.identity.astype(str), ["u", "v"])
    assert (groups[pairs.a[hard]] == groups[pairs.b[hard]]).all()  # u with v, w with x


def test_few_shot_takes_novel_characters_and_others_where_they_do_not_suffice():
    results = protocols.few_shot(make_bench(), settings=((5, 1), (8, 1), (5, 8), (12, 1)), count=20).results
    assert results["5way_1shot"]["on"] == "novel" and results["5way_1shot"]["classes"] == 6
    assert results["8way_1shot"]["on"] == "novel + open_test" and results["8way_1shot"]["classes"] == 10
    assert results["5way_8shot"]["on"] == "novel" and "skipped" in results["12way_1shot"]
    # pictures from one source are one: too few for five shots, and open_test helps out
    few = make_split("novel", list(NOVEL) * 9, sources=[f"{i % 6}, {i // 24}" for i in range(54)])
    more = make_split("open_test", list("ghijk") * 9)
    results = protocols.few_shot(make_bench(novel=few, open_test=more), settings=((5, 1), (5, 5)), count=20).results
    assert results["5way_1shot"]["on"] == "novel" and results["5way_1shot"]["queries"] == 2
    assert results["5way_5shot"]["on"] == "novel + open_test" and results["5way_5shot"]["classes"] == 5
    run = {"settings": ((5, 1),), "count": 20}
    assert protocols.few_shot(make_bench(novel=None, open_test=more), **run).results["5way_1shot"]["on"] == "open_test"
    with pytest.raises(Skipped):
        protocols.few_shot(make_bench(novel=None, open_test=None), **run)


def test_few_shot_episodes_do_not_depend_on_the_order_of_the_rows():
    splits = make_splits()
    order = np.random.default_rng(0).permutation(len(splits["novel"]))
    run = {"settings": ((5, 1),), "count": 30}
    one = protocols.few_shot(make_bench(), **run).results
    assert protocols.few_shot(make_bench(novel=splits["novel"].take(order)), **run).results == one


def test_the_long_tail_can_be_cut_out_of_a_balanced_gallery():
    train = make_split("train", list(KNOWN) * 60)
    whole = protocols.long_tail(make_bench(train=train), many=50, few=10)
    assert whole.results["classes"]["head"] == 6 and whole.results["gallery"] == 360
    cut = protocols.long_tail(make_bench(train=train), many=50, few=10, imbalance=50)
    assert cut.arrays["counts"].max() == 60 and cut.arrays["counts"].min() == 1
    assert cut.results["classes"]["tail"] > 0 and cut.results["gallery"] == cut.arrays["counts"].sum()
    assert cut.results["method"] == "centroid"


def test_the_official_cartoon_protocol_is_the_written_rule():
    split = make_split("open_test", [*(list("uvwx") * 3), *[None] * 6], noise=1.2)
    ids, rows = split.facts["sample_id"], range(12)
    listed = [(a, b) for a in rows for b in rows if a != b and split.identity[a] == split.identity[b]]
    trials = {
        "id_a": [ids[a] for a, _ in listed] + [*ids[12:], "gone", "gone"],
        "id_b": [ids[b] for _, b in listed] + [None] * 6 + [None, "open_test/000"],
        "label": [1] * len(listed) + [0] * 7 + [1],
        "kind": ["trial"] * len(listed) + ["distractor"] * 7 + ["trial"],
    }
    results = protocols.icartoonface(make_bench(open_test=split), trials).results
    e = split.embeddings.astype(np.float64)
    right = [e[a] @ e[b] > max(e[a] @ e[d] for d in range(12, 18)) for a, b in listed]
    assert 0 < np.mean(right) < 1
    assert results["rank1"] == pytest.approx(np.mean(right))
    assert results["pairs"] == len(listed) and results["distractors"] == 6
    assert results["excluded"] == {"trials": 1, "distractors": 1}
    with pytest.raises(Skipped, match="icartoonface"):
        protocols.icartoonface(make_bench(), None)


def test_trials_come_back_as_they_were_written(tmp_path):
    rows = {"id_a": ["x", "y"], "id_b": ["z", None], "label": [1, None], "kind": ["trial", "distractor"]}
    path = write_protocol(tmp_path, "mine", rows)
    assert path == tmp_path / "protocols" / "mine.parquet" and read_protocol(tmp_path, "mine") == rows
    assert read_protocol(tmp_path, "other") is None
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="holds no trials"):
        read_protocol(tmp_path, "mine")


# --- embedded splits --------------------------------------------------------------------------------------------


def test_embeddings_without_a_direction_are_left_out():
    embeddings = np.ones((5, 3), dtype=np.float32)
    embeddings[1], embeddings[2, 0], embeddings[4] = 0, np.nan, np.inf
    facts = {name: list(range(5)) for name in FACTS} | {"identity": list("abcde"), "source": [None] * 5}
    split, bad = embed_split("x", embeddings, facts)
    assert bad.tolist() == [1, 2, 4] and split.rows.tolist() == [0, 3] and split.identity.tolist() == ["a", "d"]
    np.testing.assert_allclose(split.embeddings, 3**-0.5, rtol=1e-6)
    np.testing.assert_allclose(split.raw, 1, rtol=1e-6)


def test_sources_group_samples_and_unknown_ones_stand_alone():
    split = make_split("x", list("aabb"), sources=["p", None, "p", None])
    assert split.sources[0] == split.sources[2] and len(set(split.sources.tolist())) == 3


def test_joined_splits_keep_everything():
    one, two = make_split("one", list("ab"), sources=["p", None]), make_split("two", list("cd"), sources=[None, "p"])
    both = join_splits(one, two)
    assert both.identity.tolist() == list("abcd") and both.sources[0] == both.sources[3]
    assert np.array_equal(both.embeddings, np.concatenate([one.embeddings, two.embeddings]))


def save(path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_a_file_of_embeddings_that_does_not_fit_is_named(tmp_path):
    good = np.ones((2, 3), dtype=np.float64)
    cases = {
        "lacks": save(tmp_path / "a.npz", embeddings=good),
        "twice": save(tmp_path / "b.npz", embeddings=good, sample_id=["x", "x"]),
        "do not fit": save(tmp_path / "c.npz", embeddings=good, sample_id=["x"]),
        "fit: floats": save(tmp_path / "d.npz", embeddings=good.astype(int), sample_id=["x", "y"]),
        "does not exist": str(tmp_path / "e.npz"),
        "cannot be read": save(tmp_path / "f.npz", embeddings=good, sample_id=np.array(["x", None], dtype=object)),
    }
    for message, path in cases.items():
        with pytest.raises(UserError, match=message):
            read_embeddings(path)
    embeddings, ids = read_embeddings(save(tmp_path / "g.npz", embeddings=good, sample_id=["x", "y"]))
    assert embeddings.dtype == np.float32 and ids.tolist() == ["x", "y"]
