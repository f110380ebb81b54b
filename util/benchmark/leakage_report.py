"""What the leakage guard says: counts, the pairs themselves, lines to read and a picture of examples."""

import json
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image

from util.benchmark import leakage
from util.benchmark.leakage import KINDS, IdentityLeak, Links, Pictures
from util.data.sheet import sheet


class Findings:
    """The links between pictures, and which of them are leaks.

    links, unsure: of `leakage.find_links`. forbidden: (S, S) bool of the sides of `pictures`. identities: of
    `leakage.identity_leaks`. component: (N,) int64, that each row belongs to.
    """

    def __init__(
        self, pictures: Pictures, links: Links, unsure: Links, forbidden: np.ndarray, identities: Sequence[IdentityLeak]
    ):
        self.pictures, self.links, self.identities, self.forbidden = pictures, links, identities, forbidden
        self.component = leakage.components(len(pictures), links.a, links.b)
        self.side, self.sides = pictures.sides()
        self.leaks = leakage.leaks(links, self.side, forbidden)
        self.unsure = leakage.leaks(unsure, self.side, forbidden)
        self.straddling = leakage.straddling(self.component, self.side, forbidden)

    def report(self) -> dict:
        """What leaks.json holds."""
        hashes, sizes = self.pictures.hashes, Counter(self.side.tolist())
        return {
            "clean": not len(self.straddling) and not self.identities,
            "pictures": len(self.pictures),
            "sides": [
                {"pool": pool, "split": split, "pictures": sizes[i]} for i, (pool, split) in enumerate(self.sides)
            ],
            "not_comparable": {"unreadable": len(hashes.bad), "blank": int(hashes.blank.sum())},
            "bad": [{"path": path, "reason": reason} for _, path, reason in hashes.bad],
            "links": {kind: int((self.links.kind == i).sum()) for i, kind in enumerate(KINDS)},
            "components": len(np.unique(self.component)),
            "straddling_components": len(self.straddling),
            "leaks": leakage.count_leaks(self.leaks, self.side, self.sides),
            "unconfirmed_pairs": len(self.unsure.a),
            "cosine": self.cosines(),
            "identities": [self.identity(leak) for leak in self.identities],
            "pairs": [self.pair(self.leaks, i) for i in range(len(self.leaks.a))],
            "straddling": self.members(),
        }

    def pair(self, links: Links, i: int) -> dict:
        """One link."""
        row = {"kind": KINDS[links.kind[i]]}
        for key, number in (("a", links.a[i]), ("b", links.b[i])):
            pictures = self.pictures
            row[key] = {
                "sample_id": pictures.sample_id[number],
                "pool": pictures.pool[number],
                "split": pictures.split[number],
                "identity": pictures.identity[number],
            }
        row["distance"] = int(links.distance[i]) if links.distance[i] >= 0 else None
        row["cosine"] = round(float(links.cosine[i]), 4) if np.isfinite(links.cosine[i]) else None
        return row

    def members(self) -> list[list[str]]:
        """The pictures of each straddling component."""
        rows_of: dict[int, list[int]] = {own: [] for own in self.straddling.tolist()}
        for row in np.flatnonzero(np.isin(self.component, self.straddling)).tolist():
            rows_of[int(self.component[row])].append(row)
        names, sample_id = [":".join(side) for side in self.sides], self.pictures.sample_id
        return [[f"{names[self.side[row]]} {sample_id[row]}" for row in rows] for rows in rows_of.values()]

    @staticmethod
    def identity(leak: leakage.IdentityLeak) -> dict:
        """An identity that should be new."""
        new = leak.unknown
        seen = [
            {"pool": own.pool, "split": own.split, "identity": own.identity, "pictures": own.pictures, "reason": why}
            for own, why in leak.seen
        ]
        return {
            "pool": new.pool, "split": new.split, "identity": new.identity, "pictures": new.pictures, "seen": seen
        }  # fmt: skip

    def cosines(self) -> dict | None:
        """Quantiles that thresholds can be chosen by: of random pairs, and of pairs that are surely one picture."""
        if self.pictures.embeddings is None:
            return None
        alike = (self.links.kind != KINDS.index("identical")) & (self.links.distance >= 0) & (self.links.distance <= 2)
        twins = self.links.cosine[alike]
        ordinary = leakage.random_cosines(leakage.centred(self.pictures.embeddings))
        levels = {"near_duplicates": (twins, (0.01, 0.05, 0.5)), "random_pairs": (ordinary, (0.5, 0.999, 0.9999))}
        found = {"missing": int(np.isnan(self.pictures.embeddings[:, 0]).sum())}
        for name, (values, at) in levels.items():
            values = values[np.isfinite(values)]
            found[name] = {str(q): round(float(np.quantile(values, q)), 4) for q in at} if len(values) else None
        return found


def lines_of(report: dict) -> list[str]:
    """The report as text, a line for each pair of sides and for each identity."""
    odd = report["not_comparable"]
    links = ", ".join(f"{kind} {number}" for kind, number in report["links"].items() if number) or "none"
    lines = [
        f"{report['pictures']} pictures, {odd['unreadable']} cannot be read, {odd['blank']} are blank (not hashed)",
        f"links: {links}; {report['components']} components",
    ]
    if report["cosine"]:
        lines.append(f"cosines, centred: {json.dumps(report['cosine'])}")
    if report["unconfirmed_pairs"]:
        lines.append(f"not counted: {report['unconfirmed_pairs']} pairs up to --far bits apart, unconfirmed")
    for row in report["leaks"]:
        names = " - ".join(f"{own['pool']}:{own['split']} ({own['pictures']} pictures)" for own in row["sides"])
        lines.append(f"LEAK {row['kind']}: {row['pairs']} pairs, {names}")
    for row in report["identities"]:
        seen = [f"{own['identity']!r} of {own['pool']}:{own['split']} ({own['reason']})" for own in row["seen"]]
        lines.append(f"LEAK identity: {row['identity']!r} of {row['pool']}:{row['split']} may be {', '.join(seen)}")
    verdict = f"{report['straddling_components']} components straddle"
    verdict += f", {len(report['identities'])} identities are not new"
    lines.append("clean" if report["clean"] else verdict)
    return lines


def draw_examples(found: Findings, load: Callable[[int], Image.Image | None], most: int) -> Image.Image | None:
    """Pairs side by side: leaks of each kind, nearest to furthest, then the nearest pairs that are not counted.

    load: row -> its picture, None if it cannot be read. Returns None where there is no pair to show.
    """
    chosen = [(found.leaks, i) for i in spread(found.leaks, most)]
    nearest = np.argsort(found.unsure.distance, kind="stable")[: most - len(chosen)]
    chosen += [(found.unsure, i) for i in nearest]
    titles, rows = [], []
    for links, i in chosen:
        pair = found.pair(links, i)
        numbers = [] if pair["distance"] is None else [f"{pair['distance']} bits"]
        if pair["cosine"] is not None:
            numbers.append(f"cosine {pair['cosine']:.3f}")
        names = [f"{own['pool']}:{own['split']}  {own['sample_id'][-44:]}" for own in (pair["a"], pair["b"])]
        kind = pair["kind"] if links is found.leaks else "not counted"
        titles.append("\n".join([", ".join([kind, *numbers]), *names]))
        rows.append([load(int(links.a[i])), load(int(links.b[i]))])
    if not rows:
        return None
    return sheet(rows, row_titles=titles, title=f"{len(found.leaks.a)} leaking pairs, {len(rows)} pairs shown")


def spread(leaks: Links, most: int) -> list[int]:
    """Numbers of at most `most` leaks: as many of each kind, from the nearest to the furthest."""
    kinds = np.unique(leaks.kind)
    shown: list[int] = []
    for place, kind in enumerate(kinds):
        own = np.flatnonzero(leaks.kind == kind)
        own = own[np.argsort(leaks.distance[own], kind="stable")]
        share = min(len(own), (most - len(shown)) // (len(kinds) - place))
        shown += own[np.unique(np.linspace(0, len(own) - 1, share).round().astype(int))].tolist() if share else []
    return shown
