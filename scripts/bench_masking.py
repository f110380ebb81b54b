"""What a masking strategy costs: the time of a whole pre-training step, and of choosing the patches alone.

python scripts/bench_masking.py --out bench.json --model mae_vit_base_patch16 --input_size 224 --batch_size 8

Every strategy trains on the same pictures with the same weights, and they take turns, so that whatever else the machine
does falls on all of them. A step differs from one turn to the next by more than a strategy costs, so two figures are
given, both against random masking: the ratio of the median steps, and what choosing takes more, as a share of a step.
"""

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from models_mae import MAE_MODELS, MaskedAutoencoder, build_mae
from util.data.augment import TrainCrop, WithMaps, standardize
from util.mae.masking import Masking
from util.mae.scores import SCORES
from util.run import args as flags
from util.run.device import autocast, pick_device, pick_precision, synchronize
from util.run.errors import UserError, cli
from util.run.log import progress, provenance, write_json
from util.run.seed import rng_for, uniform_for
from util.training.optim import decay_groups, make_optimizer

MIXTURE = "face+foreground+lineart"


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Cost of masking strategies")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    parser.add_argument("--model", choices=MAE_MODELS, default="mae_vit_base_patch16", metavar="NAME", help="model")
    parser.add_argument("--input_size", type=flags.count, default=224, help="px")
    parser.add_argument("--batch_size", type=flags.count, default=8, help="images per step")
    parser.add_argument("--mask_ratio", type=flags.ratio, default=0.75, help="removed patches, fraction in 0..1")
    parser.add_argument("--strategies", nargs="+", default=[*SCORES, MIXTURE], help="as of main_pretrain.py --masking")
    parser.add_argument("--turns", type=flags.count, default=7, help="timed steps of each; one more warms up")
    flags.add_device_args(parser)
    args = parser.parse_args(argv)
    if "random" not in args.strategies:
        raise UserError("--strategies lacks random, which the others are compared with: add it")
    return args


class Trainer:
    """A model in training, and the time that its masks take."""

    def __init__(self, args, hard: bool, device: torch.device):
        torch.manual_seed(args.seed)
        self.args, self.device = args, device
        self.precision = pick_precision(args.precision, device)
        self.model: MaskedAutoencoder = build_mae(args.model, args.input_size, hard=hard).to(device)
        self.optimizer = make_optimizer(decay_groups(self.model.named_parameters(), 0.05), 1e-4, device)

    def step(self, masking: Masking, images: torch.Tensor, maps: torch.Tensor, turn: int) -> tuple[float, float]:
        """Seconds of a whole step, and of the choice of patches in it. images: (N, 3, H, W) in [0, 1]."""
        index, model = torch.arange(len(images), device=self.device), self.model
        images, grid = images.clone(), model.grid
        synchronize(self.device)
        started = time.perf_counter()
        with autocast(self.device, self.precision):
            hard = model.hardness(images) if masking.hard else None
            noise = masking.order(images, grid, turn, index, maps[:, : len(masking.maps)], hard)
            synchronize(self.device)
            chosen = time.perf_counter()
            loss = model(standardize(images), self.args.mask_ratio, noise, 1.0)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        return time.perf_counter() - started, chosen - started


def measure(args, device: torch.device) -> dict[str, dict]:
    """{strategy: {"step_ms", "masking_ms", "step_ratio", "extra_percent"}}."""
    strategies = {name: Masking(name, epochs=args.turns + 1, seed=args.seed) for name in args.strategies}
    trainers = {hard: Trainer(args, hard, device) for hard in {one.hard for one in strategies.values()}}
    grid = trainers[False].model.grid
    index = torch.arange(args.batch_size)
    images = uniform_for(args.seed, 0, index, 3 * args.input_size**2).view(-1, 3, args.input_size, args.input_size)
    maps = (uniform_for(args.seed, 1, index, 3 * grid[0] * grid[1]).view(-1, 3, *grid) * 255).byte()
    images, maps = images.to(device), maps.to(device)
    times = {name: [] for name in strategies}
    for turn in progress(range(args.turns + 1), desc="turns"):
        for name, masking in strategies.items():
            times[name].append(trainers[masking.hard].step(masking, images, maps, turn))
    medians = {name: [statistics.median(part) for part in zip(*seen[1:], strict=True)] for name, seen in times.items()}
    step, choice = medians["random"]
    return {
        name: {
            "step_ms": 1e3 * own[0],
            "masking_ms": 1e3 * own[1],
            "step_ratio": own[0] / step,
            "extra_percent": 100 * (own[1] - choice) / step,
        }
        for name, own in medians.items()
    }


def map_microseconds(grid: tuple[int, int], seed: int) -> float:
    """What cutting three semantic maps to a crop takes in a worker, microseconds for each picture."""
    picture = np.zeros((256, 256, 3), np.uint8)
    record = {"maps": rng_for(seed).integers(0, 256, (3, 32, 32), dtype=np.uint8)}
    crop = TrainCrop((16, 16))
    seconds = []
    for transform in (crop, WithMaps(crop, grid)) * 3:
        started = time.perf_counter()
        for i in range(500):
            transform(picture, record, rng_for(seed, i))
        seconds.append((time.perf_counter() - started) / 500)
    return 1e6 * (min(seconds[1::2]) - min(seconds[::2]))


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    device = pick_device(args.device)
    result = {"strategies": measure(args, device)}
    patches = args.input_size // MAE_MODELS[args.model].keywords["patch_size"]
    result["maps_us_per_image"] = map_microseconds((patches, patches), args.seed)
    for name, figure in result["strategies"].items():
        print(
            f"{name:28} step {figure['step_ms']:8.1f} ms, {figure['step_ratio']:.3f} of random; choosing "
            f"{figure['masking_ms']:6.2f} ms, {figure['extra_percent']:+.2f} % of a step"
        )
    print(f"three semantic maps of a crop: {result['maps_us_per_image']:.0f} us an image in the worker")
    write_json(args.out, result | provenance({**vars(args), "out": str(args.out)}, device))


if __name__ == "__main__":
    main()
