"""Is one way of pre-training worse than another? Paired: the same pictures, masks, folds and episodes for both.

python scripts/compare_pretraining.py --a runs/exact-*/checkpoint-last.pth --b runs/cross-*/checkpoint-last.pth \
    --pictures data/real_pool --labelled data/moeimouto --out compare.json

The i-th checkpoint of --b stands against the i-th of --a (same seed, say). The measures are those of
scripts/score_pretraining.py: PSNR of held-out pictures with the visible patches pasted, dB, and with semantic maps that
of each region; a linear probe and few-shot recognition, in points of accuracy. The differences b - a are averaged over
the checkpoints. Of a single pair the 95 % interval is a bootstrap over pictures (PSNR) or characters (probe, few-shot);
of several it tells how the difference would vary with other runs as well (util/benchmark/paired.py).
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.score_pretraining import add_scoring_args, check_scoring_args, open_data, score
from util.benchmark.paired import compare
from util.benchmark.scores import heading
from util.run import args as flags
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.log import progress, provenance, write_json


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Paired comparison of two ways of pre-training")
    parser.add_argument("--a", nargs="+", required=True, metavar="CKPT", help="checkpoints of one way")
    parser.add_argument("--b", nargs="+", required=True, metavar="CKPT", help="as many of the other, in the same order")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    add_scoring_args(parser)
    args = parser.parse_args(argv)
    if len(args.a) != len(args.b):
        raise UserError(f"--a names {len(args.a)} checkpoints and --b {len(args.b)}: give as many of each")
    check_scoring_args(args)
    return args


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    started, device = time.perf_counter(), pick_device(args.device)
    data, result = open_data(args), {}
    ways = [[score(ckpt, data, args, device) for ckpt in progress(way, desc="scores")] for way in (args.a, args.b)]
    scores, skipped = ways[0][0]
    for name, measured in scores.items():
        a, b = ([found[name].values for found, _ in way] for way in ways)
        try:
            result[name] = figure = compare(a, b, measured.groups, heading(name).scale)
        except ValueError as error:  # such as eyes that no picture shows
            skipped[name] = str(error)
            continue
        low, high = figure["difference_ci95"] or (float("nan"),) * 2
        difference = f"b - a {figure['difference']:+.2f} [{low:+.2f}, {high:+.2f}]"
        print(f"{name}: a {figure['a']:.2f}, b {figure['b']:.2f}, {difference} {heading(name).unit}")
    for name, reason in skipped.items():
        print(f"not measured: {name}: {reason}")
    result |= {"skipped": skipped, **provenance({**vars(args), "out": str(args.out)}, device)}
    result["wall_seconds"] = time.perf_counter() - started
    write_json(args.out, result)


if __name__ == "__main__":
    main()
