"""Names for clusters of faces, from a gallery: who it is, or that it is nobody there."""

from dataclasses import dataclass

import numpy as np

from util.transfer.gallery import Gallery, unit

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Name:
    """Whom a face is taken for. name: of the gallery, or UNKNOWN. nearest: the character most like it, "" in an empty
    gallery. similarity: cosine of the face with that character, -1..1; 0 in an empty gallery."""

    name: str
    nearest: str
    similarity: float


def name_clusters(
    gallery: Gallery, embeddings: np.ndarray, clusters: np.ndarray, threshold: float | None
) -> list[Name]:
    """A name for each face; all faces of a cluster have the same.

    embeddings: (N, D). clusters: (N,) numbers. A cluster is the character whose centre has the highest mean cosine
    with its faces, if that is at least `threshold`. The mean over a cluster varies less than the cosine of one face,
    and has the same expectation, so that one threshold serves clusters of every size. threshold None: all are unknown.
    """
    if not gallery.people or not len(embeddings):
        return [Name(UNKNOWN, "", 0.0)] * len(embeddings)
    faces = unit(np.asarray(embeddings, dtype=np.float32))
    groups = [np.flatnonzero(clusters == number) for number in np.unique(clusters)]
    means = np.stack([faces[rows].mean(axis=0) for rows in groups])
    lengths = np.linalg.norm(means, axis=1)
    names: list[Name] = [Name(UNKNOWN, "", 0.0)] * len(faces)
    for rows, length, (match,) in zip(groups, lengths, gallery.identify(means, k=1), strict=True):
        # the cosine with the mean's direction, times the mean's length, is the mean of the faces' cosines
        known = threshold is not None and match.similarity * length >= threshold
        own = faces[rows] @ unit(gallery.people[match.name].mean(axis=0))
        for row, similarity in zip(rows.tolist(), own.tolist(), strict=True):
            names[row] = Name(match.name if known else UNKNOWN, match.name, similarity)
    return names


def stranger_threshold(gallery: Gallery, far: float) -> float | None:
    """The similarity that only a share `far` (0..1) of strangers reaches, as far as the gallery itself can tell.

    Each picture is a stranger to all characters but its own, so its best cosine with another character is that of a
    stranger. Where the network was trained on the gallery's characters, they are further apart than real strangers
    are, and the threshold is too low. None for fewer than two characters.
    """
    if len(gallery.people) < 2:
        return None
    own = [name for name, rows in gallery.people.items() for _ in rows]
    nearest = gallery.identify(np.concatenate(list(gallery.people.values())), k=2)
    others = (max(m.similarity for m in two if m.name != name) for name, two in zip(own, nearest, strict=True))
    scores = sorted(others, reverse=True)
    allowed = int(far * len(scores))
    return float(np.nextafter(scores[allowed], np.inf)) if allowed < len(scores) else -1.0
