"""A long-tailed training set out of any prepared folder: train is thinned to a power law, the other splits stay.

    python datasets/prepare_long_tail.py --data_path data/moeimouto --out data/moeimouto_lt50 --imbalance 50

Which identity becomes frequent and which rare is drawn by the seed (util/benchmark/long_tail.py). The pictures stay
where they are.
"""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from util.benchmark.long_tail import BANDS, FEW, MANY, band_names, long_tail_subsample
from util.data.derive import check_target, write_part
from util.data.manifest import Manifest, read_manifest
from util.run.args import Parser, count0, number
from util.run.errors import UserError, cli

WRITER = "prepare_long_tail"


def get_parser() -> Parser:
    parser = Parser("Thin the train split of a prepared folder to a long tail.")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="prepared folder with identities")
    parser.add_argument("--out", required=True, metavar="OUT", help="prepared folder to write")
    parser.add_argument(
        "--imbalance",
        type=number(float, 1),
        default=50.0,
        help="train pictures of the most frequent identity over those of the rarest, at least 1",
    )
    parser.add_argument("--seed", type=count0, default=0, help="draws which identity is frequent, and its pictures")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    manifest, out = read_manifest(args.data_path), Path(args.out)
    check_target(manifest, out, WRITER)
    kept = thinned(manifest, args.imbalance, args.seed)
    facts = {"imbalance": f"{args.imbalance:g}", "seed": str(args.seed)}
    done = write_part(manifest, kept, out, WRITER, facts)
    say(manifest, kept, done.path)
    if done.masks:
        print(f"  masks of {done.masks} rows are left out: they lie in the folder that was read")
    if done.lost:
        print(f"  protocols left out, for they name removed rows: {', '.join(done.lost)}")


def thinned(manifest: Manifest, imbalance: float, seed: int) -> np.ndarray:
    """(len(manifest),) bool: which rows stay. The order of the rows in the file has no influence."""
    columns = manifest.table.select(["sample_id", "split", "identity"]).to_pydict()
    train = [
        row
        for row, (split, identity) in enumerate(zip(columns["split"], columns["identity"], strict=True))
        if split == "train" and identity is not None
    ]
    if not train:
        raise UserError(f"{manifest.folder} has no train rows with an identity: there is nothing to thin")
    train.sort(key=lambda row: columns["sample_id"][row])
    labels = np.unique([columns["identity"][row] for row in train], return_inverse=True)[1]
    kept = np.ones(len(manifest), dtype=bool)
    kept[train] = False
    kept[np.array(train)[long_tail_subsample(labels, imbalance=imbalance, seed=seed)]] = True
    return kept


def say(manifest: Manifest, kept: np.ndarray, path: Path) -> None:
    """What is in train now, and in the other splits as before."""
    columns = manifest.keep(kept).table.select(["split", "identity"]).to_pydict()
    pairs = list(zip(columns["split"], columns["identity"], strict=True))
    counts = np.array(list(Counter(name for split, name in pairs if split == "train" and name is not None).values()))
    bands = band_names(counts)
    splits = Counter(split for split, _ in pairs)
    print(f"{path}: " + ", ".join(f"{split} {count}" for split, count in sorted(splits.items())))
    print(f"  train has {len(counts)} identities of {counts.min()} to {counts.max()} pictures")
    bounds = {"head": f"more than {MANY}", "mid": f"{FEW} to {MANY}", "tail": f"fewer than {FEW}"}
    for name in BANDS:
        inside = bands == name
        print(f"  {name:5} {inside.sum()} identities, {counts[inside].sum()} pictures ({bounds[name]} each)")
    unnamed = sum(split == "train" and name is None for split, name in pairs)
    if unnamed:
        print(f"  train rows without an identity, left as they are: {unnamed}")


if __name__ == "__main__":
    main()
