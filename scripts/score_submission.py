"""Scores of anybody's model on a released benchmark, to the report that eval_recognition.py writes.

python scripts/score_submission.py --release FOLDER --scores FILE.npz --output_dir OUT

util/benchmark/submission.py and docs/protocols.md say what the file holds. A model that can hand out embeddings is
evaluated with eval_recognition.py --embeddings: more protocols, the same report.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.benchmark.release import SUMS, digest, read_release
from util.benchmark.report import headline, write_report
from util.benchmark.submission import read_scores, score_protocols
from util.run import args as flags
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.log import provenance, write_json
from util.training.checkpoint import plain_args


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Score a submission")
    parser.add_argument("--release", required=True, metavar="FOLDER", help="of scripts/release_protocols.py")
    parser.add_argument("--scores", required=True, metavar="FILE", help=".npz with class_scores, pair_scores or both")
    parser.add_argument("--replicates", type=flags.count, default=1000, help="of the bootstrap over identities")
    parser.add_argument("--output_dir", required=True, metavar="OUT", help="folder for results.json and report.md")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    args, started = get_args(argv), time.perf_counter()
    out = Path(args.output_dir)
    if (out / "results.json").exists():
        raise UserError(f"--output_dir {out} holds results already: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    release = read_release(args.release)
    blocks = score_protocols(read_scores(args.scores, release), release, replicates=args.replicates)
    for name, block in blocks.items():
        print(headline(name, block))
    name = Path(args.scores).name
    splits = sorted({row["split"] for row in release.splits})
    counts = {split: release.identities(split) for split in splits}
    samples = {split: sum(row["split"] == split for row in release.splits) for split in splits}
    results = {
        **blocks,
        "subject": {"name": name, "weights": digest(Path(args.scores))[:16], "flip_test": False},
        "data": {
            split: {
                "samples": samples[split], "identities": len(set(found.values())),
                "unlabelled": samples[split] - len(found),
            }
            for split, found in counts.items()
        } | {"left_out": {}},
        "release": {"version": release.version, "sha256": digest(Path(args.release) / SUMS)},
        "finished": True,
        "wall_seconds": round(time.perf_counter() - started, 1),
        **provenance(plain_args(args), pick_device("cpu"), digest(Path(args.release) / SUMS)[:16]),
    }  # fmt: skip
    write_report(out / "report.md", f"{name} on release {release.version}", results, {}, {})
    write_json(out / "results.json", results)
    print(f"report: {out / 'report.md'}")


if __name__ == "__main__":
    main()
