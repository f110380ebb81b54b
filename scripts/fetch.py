"""Bring weights and data sets to this machine before a long run needs them; what is here already is not fetched again.

python scripts/fetch.py --weights official:mae_visualize_vit_base --data hf:OWNER/NAME
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.sources import open_source
from util.run.args import Parser
from util.run.errors import UserError, cli
from util.training.hub import load_weights


@cli
def main(argv: list[str] | None = None) -> None:
    parser = Parser("Fetch weights and data sets")
    parser.add_argument("--weights", nargs="+", default=[], metavar="W", help="as --init of the training scripts")
    parser.add_argument("--data", nargs="+", default=[], metavar="DIR", help="as --data_path of the training scripts")
    args = parser.parse_args(argv)
    if not args.weights and not args.data:
        raise UserError("nothing to fetch: give --weights, --data, or both")
    for spec in args.weights:
        weights = load_weights(spec, official_names=False)
        print(f"{weights.source}: {sum(value.numel() for value in weights.state.values()):,} numbers")
    for path in args.data:
        source = open_source(path, "train")
        print(f"{source.name}: {len(source):,} pictures to train on")


if __name__ == "__main__":
    main()
