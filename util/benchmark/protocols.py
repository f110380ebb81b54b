"""The recognition protocols: who is in the gallery, who is asked, and what is measured of it.

Embedded splits in, blocks of results.json out. A protocol that the data cannot support raises `Skipped`. Beside its
figures a protocol hands over the arrays that its pictures and tables are made from. What is tuned (a threshold, a
centre to subtract) is tuned on train, val and open_val, never on what is tested.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from util.benchmark.all_pairs import all_pairs_report
from util.benchmark.cascade import margins_of
from util.benchmark.embedded import Bench, Split, join_splits
from util.benchmark.few_shot import few_shot_report
from util.benchmark.identification import class_centres, closed_set_report, knn_classes, nearest_classes, rank_classes
from util.benchmark.long_tail import long_tail_report, long_tail_subsample
from util.benchmark.open_set import open_set_report
from util.benchmark.pairs import KINDS, Pairs, pair_scores, sample_pairs
from util.benchmark.retrieval import icartoonface_report, retrieval_report
from util.benchmark.verification import accuracy_at, best_threshold, verification_report
from util.run.errors import UserError

MOST_SCORES = 50_000_000  # of all probes for all classes, for the precision-recall curve


class Skipped(Exception):
    """The data do not support a protocol; the message says why."""


@dataclass
class Outcome:
    """results: the block of results.json. arrays: what figures and tables are made from."""

    results: dict
    arrays: dict = field(default_factory=dict)


# --- closed set -------------------------------------------------------------------------------------------------


def known_probes(bench: Bench) -> tuple[Split, Split, dict[str, int]]:
    """(probes, gallery, excluded): the labelled test samples whose identity the gallery holds, and why others are out.

    The gallery is the train split; where there is no test split, val is asked.
    """
    return bench.once("known probes", lambda: _known_probes(bench))


def _known_probes(bench: Bench) -> tuple[Split, Split, dict[str, int]]:
    gallery, probes = bench.first("train"), bench.first("test", "val")
    if gallery is None:
        raise Skipped("no labelled train split: it is the gallery")
    if probes is None:
        raise Skipped("no labelled test or val split")
    gallery = gallery.take(gallery.labels(bench.classes) >= 0)
    if len(bench.classes) < 2:
        raise Skipped(f"{len(bench.classes)} identity only: identification needs two or more")
    present = np.isin(probes.identity.astype(str), gallery.identity.astype(str))
    if not present.any():
        raise Skipped(f"no probe of {probes.name} shows an identity of the gallery")
    return probes.take(present), gallery, {"identity_not_in_gallery": int((~present).sum())}


def known_val(bench: Bench) -> Split | None:
    """What is tuned on: the labelled val samples of the gallery's identities; None where val is what is tested."""
    probes, gallery, _ = known_probes(bench)
    val = None if probes.name == "val" else bench.first("val")
    if val is not None:
        val = val.take(np.isin(val.identity.astype(str), gallery.identity.astype(str)))
    return val if val is not None and len(val) else None


class Namer:
    """Ranks the classes for probes by one method: "head", "centroid" or "knn"."""

    def __init__(self, bench: Bench, method: str, gallery: Split):
        self.bench, self.method, self.gallery = bench, method, gallery
        self._labels = gallery.labels(bench.classes)
        if method == "centroid":
            self.centres = class_centres(gallery.embeddings, self._labels, len(bench.classes))

    def __call__(self, probes: Split) -> np.ndarray:
        """Class numbers (N, 5), best first; ties of a head's scores count against the probe's own class."""
        if self.method == "head":
            return rank_classes(self.bench.head(probes.raw), 5, probes.labels(self.bench.classes))
        if self.method == "centroid":
            return nearest_classes(probes.embeddings, self.centres, 5, skip_empty=True)[0]
        return knn_classes(probes.embeddings, self.gallery.embeddings, self._labels)

    def scores(self, probes: Split) -> np.ndarray | None:
        """(N, C) probabilities of a head or cosines to the class centres; None where there are too many to hold."""
        if self.method == "knn" or len(probes) * len(self.bench.classes) > MOST_SCORES:
            return None
        if self.method == "head":
            logits = self.bench.head(probes.raw)
            logits = np.exp(logits - logits.max(axis=1, keepdims=True))
            return logits / logits.sum(axis=1, keepdims=True)
        return probes.embeddings @ np.nan_to_num(self.centres, nan=0.0).T

    def margins(self, probes: Split) -> np.ndarray:
        """(N,) float64: how much the best class is above the second, by a head's scores or by cosines to centres."""
        if self.method == "head":
            return margins_of(self.bench.head(probes.raw))
        return margins_of(nearest_classes(probes.embeddings, self.centres, 2, skip_empty=True)[1])


def methods(bench: Bench) -> tuple[str, ...]:
    """How probes can be named, the method that the headline is of first."""
    return ("head", "centroid", "knn") if bench.head else ("centroid", "knn")


def decide(bench: Bench, method: str) -> tuple[Namer, np.ndarray]:
    """A namer on the whole gallery, and what it makes of the known probes, (N, 5): the same for every protocol."""

    def make() -> tuple[Namer, np.ndarray]:
        probes, gallery, _ = known_probes(bench)
        namer = Namer(bench, method, gallery)
        return namer, namer(probes)

    return bench.once(method, make)


def closed_set(bench: Bench) -> Outcome:
    """Who of the known identities is it? By the trained head, the nearest class centre and k-NN; retrieval mAP."""
    probes, gallery, excluded = known_probes(bench)
    labels, classes = probes.labels(bench.classes), len(bench.classes)
    options = {"replicates": bench.replicates, "seed": bench.seed}
    ranked = {method: decide(bench, method)[1] for method in methods(bench)}
    by = {method: closed_set_report(found, labels, classes, **options) for method, found in ranked.items()}
    retrieval = retrieval_report(
        probes.embeddings, labels, gallery.embeddings, gallery.labels(bench.classes), same_set=False, **options
    )
    method = methods(bench)[0]
    results = {
        "method": method,
        **by[method],
        "map": retrieval["map"],
        "map_ci95": retrieval["map_ci95"],
        "gallery": len(gallery),
        "on": probes.name,
        "excluded": excluded,
        "by": by,
        "retrieval": retrieval,
    }
    arrays = {"probes": probes, "gallery": gallery, "labels": labels, "ranked": ranked[method]}
    arrays |= {"gallery_labels": gallery.labels(bench.classes), "scores": decide(bench, method)[0].scores(probes)}
    return Outcome(results, arrays)


def icartoonface(bench: Bench, trials: dict[str, list] | None) -> Outcome:
    """The official iCartoonFace protocol: each listed probe must be nearer its mate than any distractor."""
    if trials is None:
        raise Skipped("the data hold no protocols/icartoonface.parquet: datasets/prepare_icartoonface_rec.py writes it")
    split = bench.split("open_test")
    if split is None:
        raise Skipped("no open_test split, which holds the official test images")
    places = {name: place for place, name in enumerate(split.facts["sample_id"])}
    pairs, lost, distractors, lost_distractors = [], 0, [], 0
    for a, b, kind in zip(trials["id_a"], trials["id_b"], trials["kind"], strict=True):
        if kind == "distractor":
            if a in places:
                distractors.append(places[a])
            else:
                lost_distractors += 1
        elif a in places and b in places:
            pairs.append((places[a], places[b]))
        else:
            lost += 1
    if not pairs or not distractors:
        raise Skipped(f"{len(pairs)} trials and {len(distractors)} distractors have embeddings: both are needed")
    anchors = np.unique(np.array(pairs)[:, 0])
    groups = np.full(len(split), -1, dtype=np.int64)
    groups[anchors] = split.take(anchors).codes()
    results = icartoonface_report(
        split.embeddings, np.array(pairs), np.array(distractors), groups, replicates=bench.replicates, seed=bench.seed
    )
    return Outcome({**results, "excluded": {"trials": lost, "distractors": lost_distractors}})


# --- verification -----------------------------------------------------------------------------------------------


def verification(
    bench: Bench,
    *,
    negatives: int,
    positives_per_identity: int,
    signatures: Callable[[Split], np.ndarray] | None = None,
    all_pairs: bool = False,
) -> Outcome:
    """Are these two of one character? On a seeded pair list, of identities never trained on where the data have some.

    signatures: what the pictures of a split look like without any model, (N, S), for hard negatives. Thresholds for
    use are chosen on the pairs of open_val, else of val, and tried here.
    """
    split = bench.first("open_test", "test", "val")
    if split is None:
        raise Skipped("no labelled open_test or test or val split")
    options = {"negatives": negatives, "positives_per_identity": positives_per_identity, "signatures": signatures}
    pairs, dropped = pairs_of(bench, split, **options)
    scores, codes = pair_scores(split.embeddings, pairs.a, pairs.b), split.codes()
    boot = {"replicates": bench.replicates, "seed": bench.seed}

    def report(kind: str) -> dict:
        chosen = pairs.same | (pairs.kind == KINDS.index(kind))
        return verification_report(
            scores[chosen], pairs.same[chosen], codes[pairs.a[chosen]], codes[pairs.b[chosen]], **boot
        )

    results = report("random")
    if "skipped" in results:
        raise Skipped(f"{split.name}: {results['skipped']}")
    results |= {"on": split.name, "identities": len(np.unique(codes)), "excluded": dropped}
    if (pairs.kind == KINDS.index("hard")).any():
        results["hard"] = report("hard")
    tuned = bench.first(*(role for role in ("open_val", "val") if role != split.name))
    if tuned is not None:
        results["threshold"] = _tried_threshold(bench, tuned, scores, pairs, options)
    if all_pairs:
        results["all_pairs"] = all_pairs_report(split.embeddings, codes)
    return Outcome(results, {"split": split, "pairs": pairs, "scores": scores})


def pairs_of(bench: Bench, split: Split, *, signatures, **options) -> tuple[Pairs, dict[str, int]]:
    """The pair list of a split. Two pictures from one source are no test of recognition: such pairs are left out."""
    looks = None if signatures is None else signatures(split)
    pairs = sample_pairs(split.codes(), seed=bench.seed, signatures=looks, **options)
    twins = pairs.same & (split.sources[pairs.a] == split.sources[pairs.b])
    kept = Pairs(*(column[~twins] for column in (pairs.a, pairs.b, pairs.same, pairs.kind)))
    return kept, {"positives_from_one_source": int(twins.sum())}


def _tried_threshold(bench: Bench, tuned: Split, scores: np.ndarray, pairs: Pairs, options: dict) -> dict:
    """The threshold of the highest balanced accuracy on the pairs of another split, and what it does here."""
    own, _ = pairs_of(bench, tuned, **options)
    random = own.kind != KINDS.index("hard")
    own_scores = pair_scores(tuned.embeddings, own.a[random], own.b[random])
    try:
        threshold = best_threshold(own_scores, own.same[random])
    except ValueError as error:
        return {"skipped": f"{tuned.name}: {error}"}
    tried = pairs.kind != KINDS.index("hard")
    return {
        "value": threshold,
        "chosen_on": tuned.name,
        "rule": "highest balanced accuracy",
        **accuracy_at(threshold, scores[tried], pairs.same[tried]),
    }


# --- open set ---------------------------------------------------------------------------------------------------


def open_set(bench: Bench) -> Outcome:
    """Known or not, and if known, who? Probes of gallery identities against probes of identities never trained on.

    The score of a probe is its largest cosine to a class centre; a head's largest score, largest probability and
    energy stand under "by".
    """
    probes, gallery, excluded = known_probes(bench)
    unknown = bench.first("open_test")
    if unknown is None:
        raise Skipped("no open_test split: identities that were never trained on")
    strangers = set(unknown.identity) & (set(gallery.identity) | set(bench.classes))
    if strangers:
        raise UserError(f"{min(strangers)!r} is in train and in open_test: what is open must never be trained on")
    known, unknown_val = known_val(bench), bench.first("open_val")
    val = None if known is None or unknown_val is None else (known, unknown_val)
    by, rated = {}, {}
    for name, rate in _raters(bench).items():
        known_scores, ranks = rate(probes)
        unknown_scores, _ = rate(unknown)
        tuned = None
        if val is not None:
            val_scores, val_ranks = rate(val[0])
            tuned = (val_scores, val_ranks == 1, rate(val[1])[0])
        by[name] = open_set_report(
            known_scores, ranks == 1, unknown_scores, probes.codes(), unknown.codes(), val=tuned,
            replicates=bench.replicates, seed=bench.seed,
        )  # fmt: skip
        rated[name] = {"known": known_scores, "correct": ranks == 1, "unknown": unknown_scores}
    name = next(iter(by))
    results = {**by.pop(name), "score": name, "unknown_identities": len(np.unique(unknown.codes()))}
    if val is None:
        results["threshold"] = {"skipped": "no val and open_val splits to choose it on"}
    return Outcome({**results, "excluded": excluded, "by": by}, rated[name])


def _raters(bench: Bench) -> dict[str, Callable[[Split], tuple[np.ndarray, np.ndarray]]]:
    """{name: split -> (score that a probe is known (N,), rank of its own class (N,), 0 beyond the fifth)}."""
    centres = decide(bench, "centroid")[0].centres

    def cosine(split: Split):
        ranked, scores = nearest_classes(split.embeddings, centres, 5, skip_empty=True)
        return scores[:, 0].astype(np.float64), _rank(ranked, split.labels(bench.classes))

    raters = {"cosine": cosine}
    if bench.head:
        for name, score in HEAD_SCORES.items():

            def by_head(split: Split, score=score):
                logits, labels = bench.head(split.raw).astype(np.float64), split.labels(bench.classes)
                known = labels >= 0
                ranks = np.zeros(len(split), dtype=np.int64)
                ranks[known] = _rank(rank_classes(logits[known], 5, labels[known]), labels[known])
                return score(logits), ranks

            raters[name] = by_head
    return raters


def _rank(ranked: np.ndarray, labels: np.ndarray) -> np.ndarray:
    hits = ranked == labels[:, None]
    return np.where(hits.any(axis=1), hits.argmax(axis=1) + 1, 0)


def _energy(logits: np.ndarray) -> np.ndarray:
    top = logits.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(logits - top).sum(axis=1))


# what a head's scores (N, C) say of being known: maximum softmax probability (arXiv 1610.02136), largest score, and
# free energy (arXiv 2010.03759), the last two up to a sign
HEAD_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "max_logit": lambda logits: logits.max(axis=1),
    "max_probability": lambda logits: np.exp(logits.max(axis=1) - _energy(logits)),
    "energy": _energy,
}


# --- few-shot, long tail ----------------------------------------------------------------------------------------


def few_shot(bench: Bench, *, settings: tuple[tuple[int, int], ...], count: int) -> Outcome:
    """Episodes of characters that were never trained on; the same ones for every model.

    They are those of the novel split; where it has too few of them, or too few pictures of each, for a setting, those
    of open_test join them for that setting. A block's "on" says which.
    """
    pools = few_shot_pools(bench)
    train = bench.split("train")
    base_mean = None if train is None else train.embeddings.mean(axis=0)
    options = {"count": count, "replicates": bench.replicates, "seed": bench.seed}
    results: dict = {}
    for setting in settings:
        for split in pools:
            found = few_shot_report(
                split.embeddings, split.codes(), (setting,), base_mean, sources=split.sources, **options
            )
            ((name, block),) = found.items()
            results[name] = {**block, "on": split.name}
            if "skipped" not in block:
                break
    return Outcome(results)


def few_shot_pools(bench: Bench) -> list[Split]:
    """What episodes are drawn from, the first choice first; rows sorted, that their order does not matter."""
    novel, others = bench.first("novel"), bench.first("open_test")
    if novel is None and others is None:
        raise Skipped("no novel or open_test split: identities that were never trained on")
    pools = [split for split in (novel, others if novel is None else None) if split is not None]
    if novel is not None and others is not None:
        pools.append(join_splits(novel, others))
    return [pool.take(np.argsort(pool.facts["sample_id"].astype(str))) for pool in pools]


def long_tail(bench: Bench, *, many: int, few: int, imbalance: float | None = None) -> Outcome:
    """Accuracy of frequent and of rare characters, by the number of training images of each.

    imbalance: cut the gallery to a seeded power law first, the most frequent identity having so many times the images
    of the rarest; probes are then named by the class centres of what is left, for a trained head has seen the rest.
    """
    probes, gallery, excluded = known_probes(bench)
    method = methods(bench)[0]
    if imbalance is None:
        predicted = decide(bench, method)[1][:, 0]
    else:
        rows = long_tail_subsample(gallery.labels(bench.classes), imbalance=imbalance, seed=bench.seed)
        gallery, method = gallery.take(rows), "centroid"
        predicted = Namer(bench, method, gallery)(probes)[:, 0]
    labels = probes.labels(bench.classes)
    counts = np.bincount(gallery.labels(bench.classes), minlength=len(bench.classes))
    results = long_tail_report(
        counts, predicted, labels, many=many, few=few, replicates=bench.replicates, seed=bench.seed
    )
    results |= {"method": method, "gallery": len(gallery), "imbalance": imbalance, "excluded": excluded}
    return Outcome(results, {"counts": counts, "predicted": predicted, "labels": labels})
