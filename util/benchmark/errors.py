"""Why a face was given the wrong name: tags for each error, and whether a tag is any more frequent among the errors.

    evidence = Evidence(labels, predicted, **find_neighbours(...), short_side=..., occlusion=..., ...)
    tags = tag_probes(evidence)
    table, errors = taxonomy_table(tags, evidence.wrong, labels), list_errors(evidence, tags)

The rival of a probe is the identity it was taken for; of one that was named rightly, the nearest other identity. So
every tag has a meaning for all probes, and what is as frequent among the rightly named explains nothing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from util.benchmark.bootstrap import intervals
from util.benchmark.identification import class_centres
from util.data.sheet import sheet

TAGS = ("small face", "occlusion", "style gap", "same colour scheme", "label doubt")
NO_OCCLUSION = "none"
_BLOCK = 1 << 25  # similarities held at a time: 128 MB


@dataclass(frozen=True)
class Evidence:
    """What is known of N probes. Columns may be None where nothing is known of any, and hold NaN or None for some.

    labels, predicted, rivals: (N,) int64 identity codes. score, margin: (N,) of the answer, and its lead over the next.
    own_row, rival_row: (N,) int64, the most similar gallery picture of the own identity and of the rival, -1 if none.
    own, rival: (N,) cosines with the centroids of the two. agreement: (N,) the share of the nearest gallery pictures
    that show the rival. short_side: (N,) px of the face in the stored picture. occlusion, style, own_style: (N,) str;
    own_style is that of the picture own_row. colour_own, colour_rival: (N,) cosines of the probe's colour signature
    with the mean signatures of the two.
    """

    labels: np.ndarray
    predicted: np.ndarray
    rivals: np.ndarray
    score: np.ndarray
    margin: np.ndarray
    own_row: np.ndarray
    rival_row: np.ndarray
    own: np.ndarray
    rival: np.ndarray
    agreement: np.ndarray
    short_side: np.ndarray | None = None
    occlusion: np.ndarray | None = None
    style: np.ndarray | None = None
    own_style: np.ndarray | None = None
    colour_own: np.ndarray | None = None
    colour_rival: np.ndarray | None = None

    @property
    def wrong(self) -> np.ndarray:
        """(N,) bool."""
        return self.labels != self.predicted


def find_neighbours(
    probes: np.ndarray, gallery: np.ndarray, labels: np.ndarray, gallery_labels: np.ndarray, predicted: np.ndarray,
    *, k: int = 5,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Own identity and rival of each probe in the gallery: the columns of Evidence that embeddings alone give.

    probes: (N, D), gallery: (M, D), rows L2-normalised. labels, predicted: (N,), gallery_labels: (M,) identity codes.
    k: gallery pictures that are asked for agreement. Returns "rivals", "own", "rival", "own_row", "rival_row",
    "agreement", and "score" and "margin" by centroids: cosine of the nearest, and its lead. What an identity without
    gallery picture would give is NaN, or -1 for a row. Similarities are made in blocks.
    """
    names, codes = np.unique(gallery_labels, return_inverse=True)
    centroids = class_centres(gallery, codes, len(names))
    to_centroid = probes @ centroids.T
    two = -np.sort(-to_centroid, axis=1)[:, :2] if len(names) > 1 else np.pad(to_centroid, ((0, 0), (0, 1)))
    own_code, predicted_code = _codes(labels, names), _codes(predicted, names)
    others = np.where(np.arange(len(names)) == own_code[:, None], -np.inf, to_centroid)
    nearest_other = np.where(np.isneginf(others).all(axis=1), -1, others.argmax(axis=1))
    rival_code = np.where(labels == predicted, nearest_other, predicted_code)
    found = {
        "rivals": np.where(rival_code < 0, predicted, names[rival_code]),
        "own": _chosen(to_centroid, own_code),
        "rival": _chosen(to_centroid, rival_code),
        "score": two[:, 0],
        "margin": two[:, 0] - two[:, 1],
        "own_row": np.empty(len(probes), dtype=np.int64),
        "rival_row": np.empty(len(probes), dtype=np.int64),
        "agreement": np.empty(len(probes)),
    }
    step, k = max(1, _BLOCK // len(gallery)), min(k, len(gallery))
    for first in range(0, len(probes), step):
        part = slice(first, first + step)
        similarity = probes[part] @ gallery.T
        nearest = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        found["agreement"][part] = (codes[nearest] == rival_code[part, None]).mean(axis=1)
        for name, wanted in (("own_row", own_code[part]), ("rival_row", rival_code[part])):
            theirs = np.where(codes == wanted[:, None], similarity, -np.inf)
            found[name][part] = np.where(wanted < 0, -1, theirs.argmax(axis=1))
    return found


def colour_evidence(
    signatures: np.ndarray, gallery_signatures: np.ndarray, labels: np.ndarray, rivals: np.ndarray,
    gallery_labels: np.ndarray,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Cosines (N,) of the probes' colour signatures (N, S) with the mean ones of own identity and rival: "colour_own"
    and "colour_rival" of Evidence, NaN for identities without gallery picture. labels, rivals: (N,) identity codes."""
    names, codes = np.unique(gallery_labels, return_inverse=True)
    similarity = signatures @ class_centres(gallery_signatures, codes, len(names)).T
    return {
        "colour_own": _chosen(similarity, _codes(labels, names)),
        "colour_rival": _chosen(similarity, _codes(rivals, names)),
    }


def tag_probes(
    evidence: Evidence,
    *,
    small_px: float = 64,
    colour_floor: float = 0.75,
    doubt: float = 1.0,
    doubt_agreement: float = 0.8,
) -> dict[str, np.ndarray]:
    """{tag of TAGS: (N,) float32: 1 it applies, 0 it does not, NaN not known}.

    small face: short side below `small_px`. occlusion: any but "none". style gap: the own identity's most similar
    gallery picture is in another style. same colour scheme: the rival is at least as near in colours as the own
    identity, and not below the cosine `colour_floor` (drawn faces: 0.85 is the median to the own character's mean,
    0.65 to another's). label doubt: the probe lies as clearly with the rival as others lie with their own identity
    (own - rival below -doubt times the median of that difference over the rightly named), and at least the share
    `doubt_agreement` of its nearest gallery pictures show the rival.
    """
    nothing = np.full(len(evidence.labels), np.nan, dtype=np.float32)
    tags = dict.fromkeys(TAGS, nothing)
    if evidence.short_side is not None:
        short = np.asarray(evidence.short_side, dtype=np.float64)
        tags["small face"] = _tag(short < small_px, np.isfinite(short))
    if evidence.occlusion is not None:
        tags["occlusion"] = _tag(evidence.occlusion != NO_OCCLUSION, _known(evidence.occlusion))
    if evidence.style is not None and evidence.own_style is not None:
        both = _known(evidence.style) & _known(evidence.own_style) & (evidence.own_row >= 0)
        tags["style gap"] = _tag(evidence.style != evidence.own_style, both)
    if evidence.colour_own is not None and evidence.colour_rival is not None:
        alike = (evidence.colour_rival >= evidence.colour_own) & (evidence.colour_rival >= colour_floor)
        tags["same colour scheme"] = _tag(alike, np.isfinite(evidence.colour_own) & np.isfinite(evidence.colour_rival))
    lead = evidence.own - evidence.rival
    usual = lead[~evidence.wrong & np.isfinite(lead)]
    if len(usual):
        far = lead <= -doubt * max(0.0, float(np.median(usual)))
        tags["label doubt"] = _tag(far & (evidence.agreement >= doubt_agreement), np.isfinite(lead))
    return tags


def list_errors(evidence: Evidence, tags: Mapping[str, np.ndarray]) -> list[dict]:
    """The errors, those with the largest margin first: {"row", "label", "predicted", "nearest_row", "own_row", "tags",
    "score", "margin"}.

    row: number of the probe; nearest_row, own_row: gallery pictures most like it, of the predicted and of the true
    identity, None without any. tags: those that apply.
    """
    rows = np.flatnonzero(evidence.wrong)
    rows = rows[np.lexsort((rows, -evidence.margin[rows]))]
    return [
        {
            "row": int(row),
            "label": int(evidence.labels[row]),
            "predicted": int(evidence.predicted[row]),
            "nearest_row": _row(evidence.rival_row[row]),
            "own_row": _row(evidence.own_row[row]),
            "tags": [tag for tag, applies in tags.items() if applies[row] == 1],
            "score": float(evidence.score[row]),
            "margin": float(evidence.margin[row]),
        }
        for row in rows
    ]


def taxonomy_table(tags: Mapping[str, np.ndarray], wrong: np.ndarray, groups: np.ndarray, **options) -> dict:
    """How frequent each tag is among the errors and among the rightly named, and the ratio of the two.

    tags: of `tag_probes`. wrong: (N,) bool. groups: (N,) identity codes. options: of `bootstrap.intervals`. Returns
    {"errors", "probes", "untagged": share of the errors to which no tag applies, "tags": {tag: {"errors": how many,
    "share_of_errors", "share_of_correct", "ratio", each with its NAME_ci95, "unknown": probes of which it is not
    known, which are in no share}}}. A tag explains errors only if its ratio is above 1, interval and all. It is None
    where no rightly named probe has the tag. Label doubt is no explanation, whatever its ratio: where answers come
    from centroids, it applies to errors alone by its definition; look at those. {"skipped": why} stands for a tag of
    which nothing is known among the errors, or among the others.
    """
    applied = np.array([values == 1 for values in tags.values()])
    errors = int(wrong.sum())
    return {
        "errors": errors,
        "probes": len(wrong),
        "untagged": float((~applied[:, wrong].any(axis=0)).mean()) if errors else None,
        "tags": {tag: _frequency(values, wrong, groups, options) for tag, values in tags.items()},
    }


def _frequency(values: np.ndarray, wrong: np.ndarray, groups: np.ndarray, options: dict) -> dict:
    known = ~np.isnan(values)
    for mask, what in ((known & wrong, "errors"), (known & ~wrong, "rightly named probes")):
        if not mask.any():
            return {"skipped": f"not known of any of the {what}"}
    _, codes = np.unique(groups, return_inverse=True)
    count = codes.max() + 1
    tagged, total = {}, {}
    for name, mask in (("errors", known & wrong), ("correct", known & ~wrong)):
        tagged[name] = np.bincount(codes[mask], weights=values[mask], minlength=count)
        total[name] = np.bincount(codes[mask], minlength=count)

    def statistic(weights: np.ndarray) -> dict[str, float]:
        share = {name: _divide(weights @ tagged[name], weights @ total[name]) for name in total}
        ratio = _divide(share["errors"], share["correct"])
        return {"share_of_errors": share["errors"], "share_of_correct": share["correct"], "ratio": ratio}

    row = {"errors": int(tagged["errors"].sum()), "unknown": int((~known).sum())}
    found = intervals(statistic, count, **options)
    for name, value in statistic(np.ones(count)).items():
        row[name] = None if np.isnan(value) else float(value)
        row[f"{name}_ci95"] = None if np.isnan(value) else found[name]
    return row


def error_sheet(
    errors: Sequence[dict],
    load: Callable[[int], Image.Image],
    load_gallery: Callable[[int], Image.Image],
    names: Sequence[str] | Mapping[int, str],
    *,
    limit: int = 12,
    cell: int = 128,
) -> Image.Image:
    """A contact sheet of the first `limit` errors: the probe, what it was taken for, and its own identity.

    errors: of `list_errors`. load, load_gallery: a row's picture. names: identity code -> name. cell: px.
    """
    if not errors:
        raise ValueError("no errors to show")
    rows, titles = [], []
    for error in errors[:limit]:
        others = (error["nearest_row"], error["own_row"])
        rows.append([load(error["row"]), *(None if row is None else load_gallery(row) for row in others)])
        about = f"score {error['score']:.2f}, margin {error['margin']:.2f}"
        tags = ", ".join(error["tags"]) or "no tag"
        titles.append(f"{names[error['label']]}\ntaken for {names[error['predicted']]}\n{about}\n{tags}")
    title = f"{len(rows)} of {len(errors)} errors, the clearest first"
    columns = ("probe", "taken for\n(gallery)", "own identity\n(gallery)")
    return sheet(rows, row_titles=titles, column_titles=columns, title=title, cell=cell)


def _codes(labels: np.ndarray, names: np.ndarray) -> np.ndarray:
    """Places (N,) of the labels in the sorted names, -1 for one that is not there."""
    place = np.searchsorted(names, labels).clip(0, len(names) - 1)
    return np.where(names[place] == labels, place, -1)


def _chosen(values: np.ndarray, column: np.ndarray) -> np.ndarray:
    taken = np.take_along_axis(values, column.clip(0)[:, None], axis=1)[:, 0]
    return np.where(column < 0, np.nan, taken)


def _tag(applies: np.ndarray, known: np.ndarray) -> np.ndarray:
    return np.where(known, applies, np.nan).astype(np.float32)


def _known(values: np.ndarray) -> np.ndarray:
    return np.array([value is not None for value in values], dtype=bool)


def _row(number: np.ndarray) -> int | None:
    return int(number) if number >= 0 else None


def _divide(part: float, whole: float) -> float:
    return part / whole if whole else np.nan
