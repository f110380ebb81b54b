"""Show and measure what a masked autoencoder reconstructs, beside floors that need no model.

    python -m visualize.reconstruct --ckpt RUN/checkpoint-last.pth --data_path DIR --out OUT

Writes OUT/reconstruction.png (original | masked | reconstruction | reconstruction + visible, a panel for each mask
ratio) and OUT/metrics.json, and prints the table. A picture's mask is drawn from (seed, its index): it is the same
for the model and the floors, and what a lower ratio removes, a higher one removes too.
"""

import importlib.util
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm

from models_mae import MaskedAutoencoder, load_mae
from util.benchmark.reconstruction import (
    METRICS,
    fill_inpaint,
    fill_mean_image,
    fill_visible_mean,
    measure,
    psnr,
    summarise,
)
from util.data.augment import EvalCrop, to_unit
from util.data.images import BadImage
from util.data.sheet import PAPER, sheet
from util.data.sources import LABELS, Source, open_source
from util.mae.masking import random_mask, visible_count
from util.run.args import Parser, count, count0, fraction, height_width, image_size, ratio
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.files import write_atomically
from util.run.log import provenance, write_json
from util.run.seed import uniform_for

FLOORS = {"visible_mean": "visible mean colour", "mean_image": "shifted mean image", "inpaint": "inpainting (Telea)"}
HEADINGS = ("PSNR dB", "masked dB", "SSIM", "loss", "blockiness", "delta E", "HF energy")  # of METRICS
MEAN_IMAGES = 2000  # the mean of this many training pictures no longer changes visibly
GREY = 0.5  # masked patches in the figure


class Pictures:
    """Pictures of a source as a model sees them: iterates over (images in [0, 1] (n, 3, H, W), their indices (n,)).

    Pictures that cannot be read are left out, with a line each; `bad` holds their indices.
    """

    def __init__(self, source: Source, indices: Iterable[int], size: tuple[int, int], batch_size: int, label: str):
        self.source, self.indices, self.batch_size, self.label = source, list(indices), batch_size, label
        self.crop = EvalCrop(size)
        self.bad: set[int] = set()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batch = []
        for index in tqdm(self.indices, desc=self.label, unit="img", disable=not sys.stderr.isatty(), leave=False):
            try:
                batch.append((index, self.crop(self.source.load(index), self.source.record(index))))
            except BadImage as error:
                self.bad.add(index)
                tqdm.write(f"skipped a damaged image: {error}", file=sys.stderr)
            if len(batch) == self.batch_size:
                yield self._stack(batch)
                batch = []
        if batch:
            yield self._stack(batch)

    @staticmethod
    def _stack(batch: list[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        return to_unit(torch.stack([pixels for _, pixels in batch])), torch.tensor([index for index, _ in batch])


def spread(total: int, wanted: int) -> list[int]:
    """`wanted` indices evenly spread over range(total); all of them if wanted is 0 or too many."""
    wanted = min(wanted, total) or total
    return [i * total // wanted for i in range(wanted)]


def mean_image(pictures: Pictures) -> torch.Tensor:
    """(3, H, W) mean of the pictures; UserError if none can be read."""
    total, seen = 0.0, 0
    for images, _ in pictures:
        total, seen = total + images.double().sum(dim=0), seen + len(images)
    if not seen:
        raise UserError(f"no training picture of {pictures.source.name} can be read: check the files")
    return (total / seen).float()


def open_floors(args, size: tuple[int, int], device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """The floors that can be had, {name: fill(images, mask)}, and why the others cannot, {name: reason}."""
    floors, missing = {"visible_mean": fill_visible_mean}, {}
    try:
        source = open_source(
            args.mean_data_path or args.data_path, "train", labels=args.labels, val_fraction=args.val_fraction
        )
        pictures = Pictures(source, spread(len(source), MEAN_IMAGES), size, args.batch_size, "mean image")
        floors["mean_image"] = partial(fill_mean_image, mean_image=mean_image(pictures).to(device))
    except UserError as error:
        if args.mean_data_path:
            raise
        missing["mean_image"] = f"no training pictures ({error}); give --mean_data_path"
    if importlib.util.find_spec("cv2"):
        floors["inpaint"] = fill_inpaint
    else:
        missing["inpaint"] = "cv2 is not installed: pip install opencv-python-headless"
    return floors, missing


def draw_masks(model: MaskedAutoencoder, images: torch.Tensor, index: torch.Tensor, seed: int, mask_ratio: float):
    """(n, L) masks that depend only on the seed and the index of each picture, nested over the ratios."""
    return random_mask(uniform_for(seed, 0, index.to(images.device), model.num_patches(images)), mask_ratio)


def evaluate(
    model: MaskedAutoencoder, pictures: Pictures, ratios: list[float], floors: dict[str, Callable], seed: int
) -> dict[str, dict[float, dict[str, dict]]]:
    """{"model" or floor: {ratio: {metric: {"mean", "std"}}}} over the pictures, all under the same masks."""
    device = model.pixel_mean.device
    values = defaultdict(list)
    for images, index in pictures:
        images = images.to(device)
        for mask_ratio in ratios:
            mask = draw_masks(model, images, index, seed, mask_ratio)
            out = model.reconstruct(images, mask)
            pasted = {"model": out["pasted"]} | {name: fill(images, out["mask"]) for name, fill in floors.items()}
            for method, picture in pasted.items():
                for metric, value in measure(images, picture, out["mask"], model.patch_size).items():
                    values[method, mask_ratio, metric].append(value.cpu())
            values["model", mask_ratio, "loss"].append(out["loss"].cpu())
    if not values:
        raise UserError(f"no picture of {pictures.source.name} can be read: check the files")
    none = [torch.empty(0)]
    return {
        method: {
            r: {metric: summarise(torch.cat(values.get((method, r, metric), none))) for metric in METRICS}
            for r in ratios
        }
        for method in ("model", *floors)
    }


def panel(
    model: MaskedAutoencoder, images: torch.Tensor, index: torch.Tensor, mask_ratio: float, seed: int, title: str
) -> Image.Image:
    """original | masked | reconstruction | reconstruction + visible, a row for each picture with its PSNR."""
    out = model.reconstruct(images, draw_masks(model, images, index, seed, mask_ratio))
    masked = torch.where(out["mask"] > 0, GREY, images)
    rows = list(zip(images, masked, out["pred"], out["pasted"], strict=True))
    row_titles = ["exact" if db == math.inf else f"{db:.1f} dB" for db in psnr(images, out["pasted"]).tolist()]
    oracle = "\n(oracle statistics)" if model.norm_pix_loss else ""
    columns = ["original", "masked", f"reconstruction{oracle}", f"reconstruction\n+ visible{oracle}"]
    cell = min(max(128, *images.shape[-2:]), 192)
    return sheet(rows, column_titles=columns, row_titles=row_titles, title=title, cell=cell)


def tile(panels: list[Image.Image], gap: int = 24) -> Image.Image:
    """Panels side by side, two in a line."""
    columns = min(2, len(panels))
    width, height = (max(p.size[axis] for p in panels) + gap for axis in (0, 1))
    canvas = Image.new("RGB", (columns * width - gap, -(-len(panels) // columns) * height - gap), PAPER)
    for i, picture in enumerate(panels):
        canvas.paste(picture, (i % columns * width, i // columns * height))
    return canvas


def percent(mask_ratio: float) -> str:
    """ "75 % masked"."""
    return f"{100 * mask_ratio:.3g} % masked"


def panel_title(results: dict, mask_ratio: float, images: int) -> str:
    """The mask ratio, the model's mean PSNR and that of the strongest floor."""
    means = {method: table[mask_ratio]["psnr_db"]["mean"] for method, table in results.items()}
    own = means.pop("model")
    if own is None:
        return f"{percent(mask_ratio)}\nnothing to reconstruct"
    floor, name = max((value or -math.inf, FLOORS[floor]) for floor, value in means.items())
    score = f"PSNR {own:.1f} dB over {images} images; best floor {floor:.1f} dB, {name}"
    return f"{percent(mask_ratio)}\n{score}"


def table_text(results: dict, missing: dict[str, str], ratios: list[float]) -> str:
    """Means over the pictures, the model and the floors under each mask ratio."""
    lines = []
    for mask_ratio in ratios:
        lines.append(f"{percent(mask_ratio):22}" + "".join(f"{text:>12}" for text in HEADINGS))
        for method, name in {"model": "model", **FLOORS}.items():
            if method in missing:
                lines.append(f"  {name:20}  skipped: {missing[method]}")
                continue
            means = [results[method][mask_ratio][metric]["mean"] for metric in METRICS]
            cells = ["-" if value is None else f"{value:.3f}" for value in means]
            lines.append(f"  {name:20}" + "".join(f"{text:>12}" for text in cells))
    return "\n".join(lines)


def parse_args(argv: list[str] | None):
    """The flags."""
    parser = Parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--ckpt", required=True, help="weights with a decoder: a path, hf:OWNER/REPO, official:NAME ..."
    )
    parser.add_argument("--data_path", required=True, metavar="DIR", help="pictures, as main_pretrain.py takes them")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for reconstruction.png and metrics.json")
    parser.add_argument(
        "--mask_ratios", type=ratio, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="fractions removed, 0 to below 1"
    )
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="part of the data to measure")
    parser.add_argument("--images", type=count0, default=0, help="pictures to measure, evenly spread; 0 = all")
    parser.add_argument("--figure_images", type=count, default=4, help="pictures in the figure, evenly spread")
    parser.add_argument(
        "--mean_data_path", metavar="DIR", help="where the mean training image comes from; default: --data_path"
    )
    parser.add_argument("--labels", choices=LABELS, default="auto", help="what a nested folder of images means")
    parser.add_argument("--val_fraction", type=fraction, default=0.1, help="as in training, fraction in 0..1")
    parser.add_argument("--input_size", type=image_size, help="px, a side or HEIGHTxWIDTH; default: the checkpoint's")
    parser.add_argument("--batch_size", type=count, default=32, help="images")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--seed", type=count0, default=0, help="of the masks")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    """Measure, draw, write, print."""
    started = time.perf_counter()
    args = parse_args(argv)
    ratios = list(dict.fromkeys(args.mask_ratios))
    device = pick_device(args.device)
    model = load_mae(args.ckpt, args.input_size and height_width(args.input_size), device)
    size = tuple(side * model.patch_size for side in model.grid)
    patches = model.grid[0] * model.grid[1]
    for mask_ratio in ratios:
        if not visible_count(patches, mask_ratio):
            raise UserError(f"--mask_ratios {mask_ratio:g} leaves none of the {patches} patches visible: lower it")
    source = open_source(args.data_path, args.split, labels=args.labels, val_fraction=args.val_fraction)
    out = Path(args.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): choose another") from error

    floors, missing = open_floors(args, size, device)
    pictures = Pictures(source, spread(len(source), args.images), size, args.batch_size, "measuring")
    results = evaluate(model, pictures, ratios, floors, args.seed)

    readable = [index for index in pictures.indices if index not in pictures.bad]
    shown = [readable[i] for i in spread(len(readable), args.figure_images)]
    images, index = next(iter(Pictures(source, shown, size, len(shown), "drawing")))
    images = images.to(device)
    figure = tile([panel(model, images, index, r, args.seed, panel_title(results, r, len(readable))) for r in ratios])
    write_atomically(out / "reconstruction.png", lambda temporary: figure.save(temporary, format="PNG"))

    by_ratio = {method: {f"{r:g}": metrics for r, metrics in table.items()} for method, table in results.items()}
    skipped_floors = {name: {"skipped": reason} for name, reason in missing.items()}
    metrics = {
        "images": len(readable),
        "skipped_images": len(pictures.bad),
        "norm_pix_loss": model.norm_pix_loss,
        "ratios": by_ratio["model"],
        "floors": {f"{r:g}": {name: by_ratio[name][f"{r:g}"] for name in floors} | skipped_floors for r in ratios},
        "provenance": provenance(vars(args), device, source.fingerprint),
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_json(out / "metrics.json", metrics)
    oracle = ", reconstructed with oracle statistics (norm_pix_loss)" if model.norm_pix_loss else ""
    print(
        f"{metrics['images']} images of {source.name} ({args.split}){oracle}; means, spread in {out / 'metrics.json'}"
    )
    print(table_text(results, missing, ratios))
    print(f"figure: {out / 'reconstruction.png'}")


if __name__ == "__main__":
    main()
