"""Scores of anybody's model on a release, and the report that they give: for models that cannot hand out embeddings.

An .npz file, written with numpy.savez, of these arrays; one of the two groups may be missing:

    sample_id (N,) str, class_scores (N, C) float, classes (C,) str
        the larger, the more likely; all labelled samples of test, and of open_test for the open set; val and open_val
        too, where a threshold for use is wanted
    pair_scores (P,) float
        the larger, the more alike; of pairs/verification.parquet, in its order
    tuning_pair_scores (Q,) float
        the same of pairs/verification_tuning.parquet, for a threshold for use
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from util.benchmark.identification import closed_set_report, rank_classes
from util.benchmark.open_set import open_set_report
from util.benchmark.pairs import KINDS
from util.benchmark.release import Release
from util.benchmark.verification import accuracy_at, best_threshold, verification_report
from util.run.errors import UserError
from util.run.untrusted import SPARE_BYTES, read_arrays

_GROUP = ("sample_id", "class_scores", "classes")
_PAIRS = {"pair_scores": "verification", "tuning_pair_scores": "verification_tuning"}
_ROWS = 1024  # that are sorted at a time
_EMBED = "needs embeddings: eval_recognition.py --embeddings"


@dataclass(frozen=True)
class Scores:
    """rows: {sample_id: scores (C,)}, in the order of the release's classes; empty without class scores.

    pairs: by name of the list.
    """

    rows: dict[str, np.ndarray]
    pairs: dict[str, np.ndarray]


def read_scores(path: str, release: Release) -> Scores:
    """A submission, checked against a release; UserError in one line for whatever does not fit."""
    # one-hot scores compress a thousandfold, and so many are what is asked for
    arrays = _arrays(path, spare=SPARE_BYTES + 8 * len(release.splits) * len(release.classes))
    unknown = sorted(set(arrays) - {*_GROUP, *_PAIRS})
    if unknown:
        raise UserError(f"--scores {path} holds {unknown[0]!r}, which means nothing: {', '.join((*_GROUP, *_PAIRS))}")
    given = [name for name in _GROUP if name in arrays]
    if given and len(given) < len(_GROUP):
        lacking = next(name for name in _GROUP if name not in arrays)
        raise UserError(f"--scores {path} lacks {lacking}: class scores are {', '.join(_GROUP)}")
    if not given and "pair_scores" not in arrays:
        raise UserError(f"--scores {path} holds neither class_scores nor pair_scores: nothing can be scored")
    pairs = {}
    for name, listed in _PAIRS.items():
        if name in arrays:
            count = len(release.pairs.get(listed, {}).get("id_a", ()))
            pairs[listed] = _floats(path, name, arrays[name], (count,))
    return Scores(_rows(path, arrays, release) if given else {}, pairs)


def _arrays(path: str, spare: int) -> dict[str, np.ndarray]:
    try:
        return read_arrays(path, spare=spare)
    except FileNotFoundError:
        raise UserError(f"--scores {path} does not exist: write it with numpy.savez") from None
    except (OSError, ValueError) as error:
        raise UserError(
            f"--scores {path} cannot be read ({error}): write it with numpy.savez, names as strings"
        ) from error


def _floats(path: str, name: str, values: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if values.dtype.kind != "f" or values.shape != shape:
        raise UserError(f"--scores {path}: {name} is {values.dtype} {values.shape}, floats {shape} are needed")
    if not np.isfinite(values).all():
        raise UserError(f"--scores {path}: {name} holds values that are not finite: give every one a number")
    return values.astype(np.float64, copy=False)


def _rows(path: str, arrays: dict[str, np.ndarray], release: Release) -> dict[str, np.ndarray]:
    for name in ("sample_id", "classes"):
        if arrays[name].ndim != 1 or arrays[name].dtype.kind not in "Uiu":
            raise UserError(f"--scores {path}: {name} is {arrays[name].dtype} {arrays[name].shape}, not strings (N,)")
    names, classes = arrays["sample_id"].astype(str).tolist(), arrays["classes"].astype(str).tolist()
    wanted = release.classes
    if sorted(classes) != wanted:
        wrong = sorted(set(classes) ^ set(wanted)) or ["one that stands twice"]
        raise UserError(f"--scores {path}: classes are not the {len(wanted)} characters of train: see {wrong[0]}")
    if len(set(names)) < len(names):
        raise UserError(f"--scores {path}: a sample_id stands there twice: keep one of each")
    scores = _floats(path, "class_scores", arrays["class_scores"], (len(names), len(classes)))
    order = np.argsort(classes)
    for first in range(0, len(scores), _ROWS):  # a sorted copy of the whole would be another half a gigabyte
        scores[first : first + _ROWS] = scores[first : first + _ROWS, order]
    known = {row["sample_id"] for row in release.splits}
    strange = next((name for name in names if name not in known), None)
    if strange is not None:
        raise UserError(f"--scores {path}: {strange!r} is no sample of release {release.version}")
    return dict(zip(names, scores, strict=True))


# --- the protocols --------------------------------------------------------------------------------------------------


def score_protocols(scores: Scores, release: Release, *, replicates: int) -> dict[str, dict]:
    """Blocks of results.json, laid out as eval_recognition.py lays them out; {"skipped": why} without the scores.

    replicates: of the bootstrap; its seed is the release's. UserError where a sample that is asked for has no scores.
    """
    boot = {"replicates": replicates, "seed": int(release.settings["seed"])}
    runs: dict[str, Callable[[], dict]] = {
        "closed_set": lambda: _closed_set(scores, release, boot),
        "verification": lambda: _verification(scores, release, boot),
        "open_set": lambda: _open_set(scores, release, boot),
        "few_shot": lambda: {"skipped": _EMBED},
        "long_tail": lambda: {"skipped": _EMBED},
    }
    return {name: run() for name, run in runs.items()}


def _split(scores: Scores, release: Release, split: str, known: bool) -> tuple[np.ndarray, np.ndarray]:
    """(scores (n, C), identities (n,)) of a split's labelled samples, all or those of the gallery's identities."""
    classes = set(release.classes)
    asked = {name: who for name, who in release.identities(split).items() if not known or who in classes}
    missing = next((name for name in asked if name not in scores.rows), None)
    if missing is not None:
        raise UserError(f"the submission has no class_scores of {missing}, of {split}: every sample is needed")
    rows = np.array([scores.rows[name] for name in asked]).reshape(len(asked), len(classes))
    return rows, np.array(list(asked.values()))


def _ranked(rows: np.ndarray, identities: np.ndarray, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    labels = np.searchsorted(classes, identities)
    return rank_classes(rows, 5, labels), labels


def _closed_set(scores: Scores, release: Release, boot: dict) -> dict:
    if not scores.rows:
        return {"skipped": "no class_scores in the submission"}
    on = "test" if release.identities("test") else "val"
    rows, identities = _split(scores, release, on, known=True)
    if not len(rows):
        return {"skipped": f"no probe of {on} shows an identity of the gallery"}
    ranked, labels = _ranked(rows, identities, release.classes)
    block = closed_set_report(ranked, labels, len(release.classes), **boot)
    total = len(release.identities(on))
    return {
        "method": "scores", **block, "map": None, "map_ci95": None, "on": on,
        "gallery": len(release.identities("train")), "excluded": {"identity_not_in_gallery": total - len(rows)},
        "by": {"head": block}, "retrieval": {},
    }  # fmt: skip


def _open_set(scores: Scores, release: Release, boot: dict) -> dict:
    if not scores.rows:
        return {"skipped": "no class_scores in the submission"}
    strangers = release.identities("open_test")
    if not strangers or not any(name in scores.rows for name in strangers):
        return {"skipped": "no class_scores of open_test" if strangers else "the release has no open_test split"}
    known, names = _split(scores, release, "test" if release.identities("test") else "val", known=True)
    unknown, others = _split(scores, release, "open_test", known=False)
    ranked, labels = _ranked(known, names, release.classes)
    report = open_set_report(
        known.max(axis=1), ranked[:, 0] == labels, unknown.max(axis=1), _codes(names), _codes(others),
        val=_tuning(scores, release), **boot,
    )  # fmt: skip
    return {**report, "score": "max_score", "unknown_identities": len(set(others.tolist())), "by": {}, "excluded": {}}


def _tuning(scores: Scores, release: Release) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """What a threshold is chosen on; None where the submission lacks a part of val or open_val, or val is the test."""
    val, strangers = release.identities("val"), release.identities("open_val")
    if not release.identities("test") or not val or not strangers:
        return None
    if not all(name in scores.rows for name in (*val, *strangers)):
        return None
    known, names = _split(scores, release, "val", known=True)
    ranked, labels = _ranked(known, names, release.classes)
    unknown, _ = _split(scores, release, "open_val", known=False)
    return known.max(axis=1), ranked[:, 0] == labels, unknown.max(axis=1)


def _codes(names: np.ndarray) -> np.ndarray:
    return np.unique(names, return_inverse=True)[1].astype(np.int64)


def _verification(scores: Scores, release: Release, boot: dict) -> dict:
    if "verification" not in scores.pairs:
        return {"skipped": "no pair_scores in the submission"}
    who = {row["sample_id"]: row["identity"] for row in release.splits}
    on = {row["sample_id"]: row["split"] for row in release.splits}
    listed, values = release.pairs["verification"], scores.pairs["verification"]
    same, kind = np.array(listed["label"], dtype=bool), np.array(listed["kind"])
    names = np.array([[who[a], who[b]] for a, b in zip(listed["id_a"], listed["id_b"], strict=True)], object)
    codes = _codes(names).reshape(names.shape)

    def report(negatives: str) -> dict:
        chosen = same | (kind == negatives)
        return verification_report(values[chosen], same[chosen], codes[chosen, 0], codes[chosen, 1], **boot)

    results = report(KINDS[1])
    if "skipped" in results:
        return results
    results |= {"on": on[listed["id_a"][0]], "identities": int(codes.max()) + 1, "excluded": {}}
    if (kind == KINDS[2]).any():
        results["hard"] = report(KINDS[2])
    if "verification_tuning" in scores.pairs:
        results["threshold"] = _tried(scores, release, values[kind != KINDS[2]], same[kind != KINDS[2]], on)
    return results


def _tried(scores: Scores, release: Release, values: np.ndarray, same: np.ndarray, on: dict[str, str]) -> dict:
    listed, own = release.pairs["verification_tuning"], scores.pairs["verification_tuning"]
    random = np.array(listed["kind"]) != KINDS[2]
    threshold = best_threshold(own[random], np.array(listed["label"], dtype=bool)[random])
    found = accuracy_at(threshold, values, same)
    return {"value": threshold, "chosen_on": on[listed["id_a"][0]], "rule": "highest balanced accuracy", **found}
