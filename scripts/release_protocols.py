"""A benchmark as versioned files: the splits, pair lists and few-shot episodes that eval_recognition.py uses.

python scripts/release_protocols.py --data_path DIR --version 1.0.0 --output_dir FOLDER
python scripts/release_protocols.py --check FOLDER                    # are these the released files?
python scripts/release_protocols.py --check FOLDER --data_path DIR    # and does this folder hold that data?

The flags of the protocols are those of eval_recognition.py, and so are their defaults: an evaluation with the same
flags on the same data compares the same pairs and draws the same episodes. docs/protocols.md says how others submit
results.
"""

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from eval_recognition import add_protocol_args, colours
from util.benchmark import protocols
from util.benchmark.embedded import Bench, Split
from util.benchmark.few_shot import episodes
from util.benchmark.pairs import KINDS
from util.benchmark.release import (
    SPLIT_COLUMNS,
    Release,
    check_release,
    episode_columns,
    first_difference,
    read_release,
    write_release,
)
from util.data.manifest import read_manifest
from util.data.trials import ICARTOONFACE, read_protocol
from util.run import args as flags
from util.run.errors import UserError, cli
from util.training.session import Session, session
from util.transfer.subject import Pictures, Subject

SETTINGS = ("seed", "negatives", "positives", "ways", "shots", "episodes", "labels", "val_fraction")


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Write the protocols of a benchmark as versioned files")
    flags.add_data_args(parser, input_size=None, batch_size=64, streams=False)
    add_protocol_args(parser)
    group = parser.add_argument_group("release")
    group.add_argument("--output_dir", required=True, metavar="FOLDER", help="the release, a new folder")
    group.add_argument("--version", required=True, metavar="X.Y.Z", help="of the release")
    group.add_argument(
        "--feature_cache", default=None, metavar="DIR", help="for colours; default: features/ beside FOLDER"
    )
    flags.add_device_args(group)
    parser.set_defaults(log_dir=None, resume="", model="colours", compile="off")
    return parser.parse_args(argv)


def get_check_args(argv: list[str]):
    parser = flags.Parser("Check a release")
    parser.add_argument("--check", required=True, metavar="FOLDER", help="a release")
    parser.add_argument("--data_path", default=None, metavar="DIR", help="prepared folder that should hold its data")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if "--check" in argv:
        check(get_check_args(argv))
        return
    args = get_args(argv)
    folder = Path(args.output_dir)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--output_dir {folder} is not empty: a release is not changed; choose another folder")
    with session(args) as here:
        release = make_release(args, here)
        write_release(folder, release)
    print(f"release {release.version}: {folder} ({check_release(folder)} files, checksums in SHA256SUMS)")


def check(args) -> None:
    """Say that a release is whole, and that a prepared folder holds its data; UserError otherwise."""
    count = check_release(args.check)
    release = read_release(args.check)
    print(f"release {release.version}: {count} files are as released")
    if args.data_path:
        rows = read_manifest(args.data_path).table.select(["sample_id", "split", "identity"]).to_pylist()
        difference = first_difference(release, rows)
        if difference:
            raise UserError(f"{args.data_path} is not the data of this release: {difference}")
        print(f"{args.data_path} holds its {len(rows)} samples")


class Everybody(Subject):
    """Embeds every sample, in one direction: which samples are compared does not depend on any model."""

    name, weights = "nobody's model", ""

    def raw(self, role, source):
        """(N, 2) ones."""
        return np.ones((len(source), 2), dtype=np.float32), {}


def make_release(args, here: Session) -> Release:
    """The lists that an evaluation with these flags would make."""
    cache = Path(args.feature_cache) if args.feature_cache else Path(args.output_dir).parent / "features"
    subject = Everybody(here, Pictures(args), cache)
    bench = Bench(subject.split, seed=args.seed, replicates=args.replicates)
    pairs = pair_lists(args, bench, subject)
    drawn = episode_lists(args, bench)
    if not pairs and not drawn:
        raise UserError(f"{args.data_path} supports neither pairs nor episodes: it needs labelled splits")
    return Release(args.version, {name: getattr(args, name) for name in SETTINGS}, all_rows(bench), pairs, drawn)


def all_rows(bench: Bench) -> list[dict]:
    """Every sample of the splits that have a role in a protocol."""
    roles = ("train", "val", "test", "open_val", "open_test", "novel")
    splits = [split for split in map(bench.split, roles) if split is not None]
    return [
        dict(zip(SPLIT_COLUMNS, (sample, split.name, identity, source), strict=True))
        for split in splits
        for sample, identity, source in zip(
            *(split.facts[key] for key in ("sample_id", "identity", "source")), strict=True
        )
    ]


def pair_lists(args, bench: Bench, subject: Subject) -> dict[str, dict[str, list]]:
    """The pairs of verification and those its threshold is chosen on; official trials of the data."""
    options = {"negatives": args.negatives, "positives_per_identity": args.positives}

    def looks(split: Split) -> np.ndarray:
        return colours(subject, split)

    found, tested = {}, bench.first("open_test", "test", "val")
    if tested is not None:
        found["verification"] = pair_columns(bench, tested, looks, options)
        tuned = bench.first(*(role for role in ("open_val", "val") if role != tested.name))
        if tuned is not None:
            found["verification_tuning"] = pair_columns(bench, tuned, looks, options)
    trials = read_protocol(args.data_path, ICARTOONFACE)
    return found | ({ICARTOONFACE: trials} if trials else {})


def pair_columns(bench: Bench, split: Split, looks, options: dict) -> dict[str, list]:
    """The pairs of a split as columns of util.data.trials.TRIALS."""
    pairs, _ = protocols.pairs_of(bench, split, signatures=looks, **options)
    names = split.facts["sample_id"]
    return {
        "id_a": names[pairs.a].tolist(),
        "id_b": names[pairs.b].tolist(),
        "label": pairs.same.astype(np.int64).tolist(),
        "kind": [KINDS[kind] for kind in pairs.kind.tolist()],
    }


def episode_lists(args, bench: Bench) -> dict[str, dict[str, list]]:
    """The few-shot episodes of every setting that the data support."""
    try:
        pools = protocols.few_shot_pools(bench)
    except protocols.Skipped:
        return {}
    found = {}
    for ways, shots in itertools.product(args.ways, args.shots):
        options = {"ways": ways, "shots": shots, "count": args.episodes, "seed": bench.seed}
        for split in pools:
            try:
                drawn = episodes(split.codes(), sources=split.sources, **options)
            except UserError:  # too few characters or pictures: the next choice may have more
                continue
            names = np.unique(split.identity.astype(str)).tolist()
            columns = episode_columns(drawn, split.facts["sample_id"].astype(str), names)
            found[f"{ways}way_{shots}shot"] = columns
            break
    return found


if __name__ == "__main__":
    main()
