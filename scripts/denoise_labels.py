"""Leave wrongly labelled pictures out of a training split, step by step, and say what each step cost.

    python scripts/denoise_labels.py --data_path data/acrd --embeddings train.npz --out data/acrd_clean

The file of embeddings holds arrays `embeddings` (N, D) and `sample_id` (N,), of the train split at least. Steps, each
on what the one before left (util/data/denoise.py):

    dedup      copies and near-copies of a picture of the same identity; a picture under several identities
    centroid   far from the centre of its identity, or nearer another one
    confident  confident learning, arXiv 1911.00068: out-of-sample probabilities of a logistic regression
    subcentre  in a part of its identity that lies farther off than another identity

It writes OUT/metadata.parquet, where only rows of train are gone, OUT/denoise.json (what was removed and why, by
step and for frequent and rare identities), and OUT/protocols/clean_test.parquet: which test pictures the same rules
accept (label 1) or not (0). Report that part beside the whole test, never instead of it: it was chosen by one model.
"""

import argparse
import os
import sys
from collections import Counter
from functools import cached_property
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from util.benchmark.embedded import read_embeddings
from util.benchmark.long_tail import band_names
from util.data import denoise
from util.data.derive import check_target, write_part
from util.data.face_crop import FaceCrops
from util.data.manifest import Manifest, read_manifest
from util.data.near_split import NEAR
from util.data.phash import MAX_DISTANCE, Hashes, hash_images, near_pairs
from util.data.sources import FolderSource
from util.data.trials import write_protocol
from util.run.args import Parser, count, count0, fraction, number, positive, ratio
from util.run.errors import UserError, cli
from util.run.log import progress, write_json

WRITER = "denoise_labels"
STEPS = ("dedup", "centroid", "confident", "subcentre")
REPORT_NAME = "denoise.json"
PROTOCOL = "clean_test"
WEAK = 0.7  # agreement of embeddings and labels below which the result is doubtful
GAP = 0.2  # by how much train may exceed test before the encoder is thought to know the training labels by heart
MAX_PROBABILITIES = 1 << 31  # numbers of a table of rows x identities: 8 GB


def get_parser() -> Parser:
    parser = Parser("Leave wrongly labelled pictures out of the train split of a prepared folder.")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="prepared folder with identities")
    parser.add_argument("--out", required=True, metavar="OUT", help="prepared folder to write")
    parser.add_argument("--embeddings", metavar="FILE", help=".npz of embeddings and sample_id; all but dedup need it")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="taken in this order")
    parser.add_argument(
        "--near",
        type=number(int, 0, MAX_DISTANCE),
        default=NEAR,
        help=f"bits of 64 by which nearly equal pictures differ, 0..{MAX_DISTANCE}",
    )
    parser.add_argument(
        "--floor",
        type=count,
        default=denoise.FLOOR,
        help="rows that an identity keeps; with fewer it is not judged",
    )
    parser.add_argument(
        "--max_removed",
        type=fraction,
        default=0.3,
        help="share of an identity that the steps after dedup may remove together, fraction in 0..1",
    )
    parser.add_argument("--sds", type=positive, default=2.0, help="centroid: spreads below the median that are far")
    parser.add_argument(
        "--margin", type=number(float, 0, 2), default=0.1, help="centroid: by how much nearer, as a cosine in 0..2"
    )
    parser.add_argument("--drop", type=ratio, default=0.1, help="share of an identity that its centre ignores, 0..1")
    parser.add_argument("--folds", type=number(int, 2), default=5, help="confident: folds of the cross-validation")
    parser.add_argument("--strength", type=positive, default=0.01, help="confident: C of the logistic regression")
    parser.add_argument("--parts", type=number(int, 2), default=3, help="subcentre: parts an identity is cut into")
    parser.add_argument("--seed", type=count0, default=0, help="deals the groups to the folds")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    manifest, out = read_manifest(args.data_path), Path(args.out)
    check_target(manifest, out, WRITER)
    ladder = Ladder(manifest, args)
    for step in STEPS:
        if step in args.steps:
            ladder.climb(step)
    kept = np.ones(len(manifest), dtype=bool)
    kept[[entry["row"] for entry in ladder.removed]] = False
    test = ladder.judge_test()
    done = write_part(manifest, kept, out, WRITER)
    if test:
        write_protocol(out, PROTOCOL, test)
    report = ladder.report(test) | {
        "args": vars(args),
        "masks_left_out": done.masks,
        "protocols": done.protocols,
        "protocols_left_out": done.lost,
        "removed": ladder.removed,
    }
    write_json(out / REPORT_NAME, report)
    say(done.path, report)


class Ladder:
    """The labelled train rows, and what the steps remove of them.

    names: identities by class number. labels: (len(manifest),) int64 class numbers, -1 for rows of other splits and
    of identities that are not trained on. rows: numbers in the manifest of the train rows that are left. removed: a
    dict for each row that is gone. steps: what is said of each step.
    """

    def __init__(self, manifest: Manifest, args: argparse.Namespace):
        self.manifest, self.args = manifest, args
        self.columns = {
            name: manifest.table.column(name).to_pylist()
            for name in ("sample_id", "file_name", "identity", "split", "source")
        }
        split, identity = self.columns["split"], self.columns["identity"]
        train = [row for row in range(len(manifest)) if split[row] == "train"]
        self.rows = np.array([row for row in train if identity[row] is not None], dtype=np.int64)
        if not len(self.rows):
            raise UserError(f"{args.data_path} has no train rows with an identity: there is nothing to clean")
        self.without_identity = len(train) - len(self.rows)
        self.names = sorted({identity[row] for row in self.rows})
        numbers = {name: number for number, name in enumerate(self.names)}
        self.labels = np.array([numbers.get(name, -1) for name in identity], dtype=np.int64)
        self.start = self.rows
        hashed = np.array(split) == "test"
        hashed[self.rows] = True
        self.place = np.where(hashed, np.cumsum(hashed) - 1, -1)  # of each row in `hashes`
        self.bands = band_names(np.bincount(self.labels[self.rows]))
        self.least = None  # rows that each identity keeps, once duplicates are gone
        self.embeddings = None
        self.agreement: dict[str, float] = {}  # share of a split's rows that lie nearest to their own centre
        self.removed: list[dict] = []
        self.steps: list[dict] = []
        if set(args.steps) != {"dedup"}:
            self._embed()

    def climb(self, step: str) -> None:
        """Take one of STEPS on the rows that are left."""
        labels = self.labels[self.rows]
        flags = getattr(self, f"_{step}")(labels)
        if step != "dedup":
            if self.least is None:
                counts = np.bincount(labels, minlength=len(self.names))
                self.least = np.maximum(np.ceil((1 - self.args.max_removed) * counts).astype(int), self.args.floor)
            flags = denoise.spare(flags, labels, self.least)
        self._remove(step, flags)

    def _embed(self) -> None:
        """Read the embeddings, subtract the mean of the train rows, which frozen encoders' share, and normalise."""
        if not self.args.embeddings:
            raise UserError("--embeddings is needed for every step but dedup: give it, or --steps dedup")
        embeddings, ids = read_embeddings(self.args.embeddings)
        place = {name: number for number, name in enumerate(ids.tolist())}
        found = np.array([place.get(name, -1) for name in self.columns["sample_id"]])
        missing = self.rows[found[self.rows] < 0]
        if len(missing):
            name = self.columns["sample_id"][missing[0]]
            raise UserError(
                f"{self.args.embeddings} lacks {len(missing)} of {len(self.rows)} train rows, the first: {name!r}: "
                "embed the train split of --data_path"
            )
        self.embeddings = np.where((found >= 0)[:, None], embeddings[found], np.float32(np.nan))
        broken = ~np.isfinite(self.embeddings[self.rows]).all(axis=1)
        flags = denoise.no_flags(len(self.rows))
        flags.reason[broken] = "its embedding is not finite"
        self._remove("embedding", flags)
        self.embeddings -= self.embeddings[self.rows].mean(axis=0)
        norms = np.linalg.norm(self.embeddings, axis=1, keepdims=True)
        self.embeddings /= np.where(norms > 0, norms, 1.0)
        found = self._centroids().agreement
        if not np.isnan(found):
            self.agreement["train"] = found

    def _dedup(self, labels: np.ndarray) -> denoise.Flags:
        readable = self.hashes.readable[self.place[self.rows]]
        rows = self.rows[readable]
        digests = self.hashes.digest[self.place[rows]].tolist()
        ids = [self.columns["sample_id"][row] for row in rows]
        found = denoise.duplicate_flags(digests, labels[readable], ids, self._near(rows))
        flags = denoise.no_flags(len(labels))
        flags.reason[~readable] = "file damaged or missing"
        flags.reason[readable], flags.score[readable] = found
        return flags

    def _centroid(self, labels: np.ndarray) -> denoise.Flags:
        found = self._centroids()
        return denoise.centroid_flags(labels, found, found.own, found.other, self.args.margin)

    def _confident(self, labels: np.ndarray) -> denoise.Flags:
        args, size = self.args, len(labels) * len(self.names)
        if size > MAX_PROBABILITIES:
            raise UserError(
                f"{len(labels)} rows of {len(self.names)} identities make a table too large for the step confident: "
                "leave it out of --steps, or prepare the data with fewer identities"
            )
        ids, *known = ([self.columns[name][row] for row in self.rows] for name in ("sample_id", "source", "file_name"))
        groups = denoise.link_groups(ids, *known, pairs=self._near(self.rows))
        folds = denoise.grouped_folds(labels, groups, args.folds, args.seed)
        shares = denoise.out_of_sample_probabilities(
            self.embeddings[self.rows], labels, folds, len(self.names), args.strength
        )
        return denoise.confident_flags(shares, labels, args.floor)

    def _subcentre(self, labels: np.ndarray) -> denoise.Flags:
        return denoise.subcentre_flags(self.embeddings[self.rows], labels, self._centroids(), self.args.parts)

    def _centroids(self) -> denoise.Centroids:
        """Centres of the rows that are left."""
        args = self.args
        return denoise.fit_centroids(
            self.embeddings[self.rows], self.labels[self.rows], len(self.names),
            sds=args.sds, drop=args.drop, floor=args.floor,
        )  # fmt: skip

    @cached_property
    def hashes(self) -> Hashes:
        """Hashes of the faces of the rows that have a `place`."""
        source = FolderSource(self.args.data_path, self.manifest.keep(self.place >= 0))
        if any(box is not None for box in source.column("box")):
            source = FaceCrops(source, 0.0)
        with progress(total=len(source), desc="hashing", unit="img") as bar:
            return hash_images(source, workers=os.cpu_count() or 1, advance=bar.update)

    def _near(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pairs of places in `rows` whose faces are nearly or exactly the same."""
        found = near_pairs(self.hashes, self.args.near)
        where = np.full(len(self.hashes), -1)
        where[self.place[rows]] = np.arange(len(rows))
        one, other = where[found.a], where[found.b]
        inside = (one >= 0) & (other >= 0)
        return one[inside], other[inside]

    def _remove(self, step: str, flags: denoise.Flags) -> None:
        labels, flagged = self.labels[self.rows], flags.flagged
        for place in np.flatnonzero(flagged):
            row = int(self.rows[place])
            entry = {"row": row, "step": step, "reason": flags.reason[place], "score": float(flags.score[place])}
            self.removed.append({**{name: self.columns[name][row] for name in ("sample_id", "identity")}, **entry})
        self.steps.append(
            {
                "step": step,
                "rows": len(labels),
                "removed": int(flagged.sum()),
                "fraction": float(flagged.mean()) if len(labels) else None,
                "by": denoise.removed_by_band(labels, flagged, self.bands),
                "reasons": Counter(flags.reason[flagged].tolist()),
            }
        )
        self.rows = self.rows[~flagged]

    def judge_test(self) -> dict[str, list] | None:
        """The test rows as a protocol: label 1 for those that the rules accept, kind: why not, "clean", "not judged".

        The centres are those of the train rows that are left. None where there is no test split.
        """
        rows = np.array([row for row, split in enumerate(self.columns["split"]) if split == "test"], dtype=np.int64)
        if not len(rows):
            return None
        kinds = np.full(len(rows), "not judged", dtype=object)
        if self.embeddings is not None:
            known = (self.labels[rows] >= 0) & np.isfinite(self.embeddings[rows]).all(axis=1)
            kinds[known] = self._test_kinds(rows[known])
        if "dedup" in self.args.steps:
            digest, readable = self.hashes.digest, self.hashes.readable
            train, own = self.place[self.start], self.place[rows]
            kinds[readable[own] & np.isin(digest[own], digest[train[readable[train]]])] = "same picture in train"
        return {
            "id_a": [self.columns["sample_id"][row] for row in rows],
            "id_b": [None] * len(rows),
            "label": [int(kind in ("clean", "not judged")) for kind in kinds],
            "kind": kinds.tolist(),
        }

    def _test_kinds(self, rows: np.ndarray) -> np.ndarray:
        """What the centroid rule says of test rows of known identities."""
        found, shown, labels = self._centroids(), self.embeddings[rows], self.labels[rows]
        own = (shown * found.directions[labels]).sum(axis=1)
        other = denoise.nearest_other(shown, labels, found.directions, found.judged)
        judged = found.judged[labels]
        if judged.any():
            self.agreement["test"] = float((own > other)[judged].mean())
        flags = denoise.centroid_flags(labels, found, own, other, self.args.margin)
        return np.where(flags.flagged, flags.reason, np.where(judged, "clean", "not judged"))

    def report(self, test: dict[str, list] | None) -> dict:
        """What denoise.json says of the train and the test split."""
        labels = self.labels[self.start]
        gone = ~np.isin(self.start, self.rows)
        left = np.bincount(self.labels[self.rows], minlength=len(self.names))
        return {
            "writer": WRITER,
            "train": {
                "rows": len(labels),
                "removed": int(gone.sum()),
                "fraction": float(gone.mean()),
                "by": denoise.removed_by_band(labels, gone, self.bands),
                "identities": len(self.names),
                "identities_without_rows": [self.names[number] for number in np.flatnonzero(left == 0)],
                "without_identity": self.without_identity,
            },
            "agreement": self.agreement,
            "steps": self.steps,
            "test": test and {"rows": len(test["label"]), "accepted": sum(test["label"]), **Counter(test["kind"])},
        }


def say(path: Path, report: dict) -> None:
    """The report in a few lines."""
    agreement = report["agreement"]
    if agreement:
        found = ", ".join(f"{value:.1%} of {split}" for split, value in agreement.items())
        print(f"embeddings: {found} lie nearest to the centre of their identity")
        if agreement.get("train", 1.0) < WEAK:
            print("  that is little: what is removed is then rather what the encoder mixes up than what is mislabelled")
        if agreement.get("train", 0.0) - agreement.get("test", 1.0) > GAP:
            print("  train and test differ: an encoder that was trained on these labels has learned the wrong ones too")
    for step in [*report["steps"], {"step": "together", **report["train"]}]:
        bands = (f"{band} {part['removed']}/{part['rows']}" for band, part in step["by"].items() if part["rows"])
        print(f"{step['step']:10} {step['removed']} of {step['rows']} train rows removed ({', '.join(bands)})")
    if report["train"]["identities_without_rows"]:
        print(f"without a train row now: {', '.join(report['train']['identities_without_rows'])}")
    if report["masks_left_out"]:
        print(f"masks of {report['masks_left_out']} rows are left out: they lie in the folder that was read")
    if report["protocols_left_out"]:
        print(f"protocols left out, for they name removed rows: {', '.join(report['protocols_left_out'])}")
    if report["test"]:
        print(f"test is as it was; {report['test']['accepted']} of its {report['test']['rows']} rows are accepted")
    print(f"{path}: written, what was removed is in {REPORT_NAME}")


if __name__ == "__main__":
    main()
