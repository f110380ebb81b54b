"""How many epochs at other mask ratios cost what some epochs at one of them do.

python scripts/matched_epochs.py --model mae_vit_base_patch16 --mask_ratios 0.25 0.5 0.75 0.9 --epochs 100

prints 0.25/53,0.5/70,0.75/100,0.9/136: an axis "mask_ratio/epochs" of the grid runner (scripts/mask_sweep.sh). A lower
ratio leaves more patches to the encoder, so at equal epochs it was given more computation. Cost is the operations of
all matrix products of a training step, counted by formula.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models_mae import MAE_MODELS
from models_vit import patch_grid
from util.benchmark.cost import Shape, pretraining
from util.mae.masking import visible_count
from util.run import args as flags
from util.run.errors import cli


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Epochs of equal cost at several mask ratios")
    parser.add_argument("--model", choices=MAE_MODELS, default="mae_vit_base_patch16", metavar="NAME", help="model")
    parser.add_argument("--input_size", type=flags.image_size, default=224, help="px, a side or HEIGHTxWIDTH")
    parser.add_argument("--mask_ratios", nargs="+", type=flags.ratio, default=[0.25, 0.5, 0.75, 0.9], help="0..1")
    parser.add_argument("--reference", type=flags.ratio, default=0.75, help="the ratio whose epochs are given, 0..1")
    parser.add_argument("--epochs", type=flags.count, required=True, help="at the reference ratio")
    return parser.parse_args(argv)


def matched_epochs(args) -> dict[float, int]:
    """Epochs of each mask ratio, at least 1, to the nearest whole one."""
    shape = Shape.of(MAE_MODELS[args.model].keywords)
    rows, columns = patch_grid(*flags.height_width(args.input_size), shape.patch)

    def cost(ratio: float) -> int:
        return pretraining(shape, rows * columns, visible_count(rows * columns, ratio))

    budget = args.epochs * cost(args.reference)
    return {ratio: max(1, round(budget / cost(ratio))) for ratio in args.mask_ratios}


@cli
def main(argv: list[str] | None = None) -> None:
    print(",".join(f"{ratio:g}/{epochs}" for ratio, epochs in matched_epochs(get_args(argv)).items()))


if __name__ == "__main__":
    main()
