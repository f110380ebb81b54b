"""Names for faces, from a gallery: who it is, or that it is nobody there."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from util.transfer.gallery import Gallery

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Name:
    """Whom a face is taken for. name: of the gallery, or UNKNOWN. nearest: the character most like it, "" in an empty
    gallery. similarity: cosine of the face with that character, -1..1; 0 in an empty gallery."""

    name: str
    nearest: str
    similarity: float


def name_faces(gallery: Gallery, embeddings: np.ndarray, threshold: float | None) -> list[Name]:
    """A name for each face: the character whose centre is most like it, if their cosine is at least `threshold`.

    embeddings: (N, D). threshold None: all are unknown.
    """
    if not gallery.people or not len(embeddings):
        return [Name(UNKNOWN, "", 0.0)] * len(embeddings)
    return [
        Name(
            best.name if threshold is not None and best.similarity >= threshold else UNKNOWN, best.name, best.similarity
        )
        for (best,) in gallery.identify(embeddings, k=1)
    ]


def share_names(names: Sequence[Name], clusters: np.ndarray, share: float = 0.5) -> list[Name]:
    """The same, but where at least `share` (0..1) of a cluster is named, and most of that alike, all of it is.

    It finds more faces of a character, and gives more of them a wrong name (RESULTS.md).
    """
    shared = list(names)
    for number in np.unique(clusters):
        rows = np.flatnonzero(clusters == number).tolist()
        given = Counter(names[row].name for row in rows if names[row].name != UNKNOWN)
        if given.total() < max(1, share * len(rows)):
            continue
        name, votes = given.most_common(1)[0]
        if 2 * votes > given.total():
            for row in rows:
                shared[row] = replace(names[row], name=name)
    return shared


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
