"""Show and measure what a masked autoencoder reconstructs, beside floors that need no model.

    python -m visualize.reconstruct --ckpt RUN/checkpoint-last.pth --data_path DIR --out OUT

Writes OUT/reconstruction.png (original | masked | reconstruction | reconstruction + visible, a panel for each mask
ratio) and OUT/metrics.json, and prints the table. A picture's mask is drawn from (seed, its index): it is the same
for the model and the floors, and what a lower ratio removes, a higher one removes too.
"""

import math
import time
from collections.abc import Callable

import torch
from PIL import Image

from models_mae import MaskedAutoencoder
from models_mae_weights import load_mae
from util.benchmark.reconstruction import METRICS, psnr, summarise
from util.data.sheet import sheet
from util.data.sources import open_source
from util.run.args import Parser, height_width, ratio
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.files import write_atomically
from util.run.log import provenance, write_json
from visualize.measure import MODEL, measure_pictures
from visualize.pictures import (
    FLOORS,
    GREY,
    Pictures,
    add_picture_args,
    check_ratios,
    draw_masks,
    make_folder,
    open_floors,
    percent_masked,
    spread,
    tile,
)

HEADINGS = ("PSNR dB", "masked dB", "SSIM", "loss", "blockiness", "delta E", "HF energy")  # of METRICS


def evaluate(
    model: MaskedAutoencoder, pictures: Pictures, ratios: list[float], floors: dict[str, Callable], seed: int
) -> dict[str, dict[float, dict[str, dict]]]:
    """{"model" or floor: {ratio: {metric: {"mean", "std"}}}} over the pictures, all under the same masks."""
    values = measure_pictures(model, pictures, ratios, floors, seed).values
    return {
        method: {r: {metric: summarise(values.get((method, r, metric), ())) for metric in METRICS} for r in ratios}
        for method in (MODEL, *floors)
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


def panel_title(results: dict, mask_ratio: float, images: int) -> str:
    """The mask ratio, the model's mean PSNR and that of the strongest floor."""
    means = {method: table[mask_ratio]["psnr_db"]["mean"] for method, table in results.items()}
    own = means.pop("model")
    if own is None:
        return f"{percent_masked(mask_ratio)}\nnothing to reconstruct"
    floor, name = max((value or -math.inf, FLOORS[floor]) for floor, value in means.items())
    score = f"PSNR {own:.1f} dB over {images} images; best floor {floor:.1f} dB, {name}"
    return f"{percent_masked(mask_ratio)}\n{score}"


def table_text(results: dict, missing: dict[str, str], ratios: list[float]) -> str:
    """Means over the pictures, the model and the floors under each mask ratio."""
    lines = []
    for mask_ratio in ratios:
        lines.append(f"{percent_masked(mask_ratio):22}" + "".join(f"{text:>12}" for text in HEADINGS))
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
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for reconstruction.png and metrics.json")
    parser.add_argument(
        "--mask_ratios", type=ratio, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="fractions removed, 0 to below 1"
    )
    parser.add_argument(
        "--blend", action="store_true", help="average predictions of shifted patches against block artefacts, 4 x work"
    )
    add_picture_args(parser)
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    """Measure, draw, write, print."""
    started = time.perf_counter()
    args = parse_args(argv)
    ratios = list(dict.fromkeys(args.mask_ratios))
    device = pick_device(args.device)
    model = load_mae(args.ckpt, args.input_size and height_width(args.input_size), device)
    if args.blend and model.norm_pix_loss:
        raise UserError(f"--blend averages pixels, and {args.ckpt} predicts normalised patches: leave it out")
    model.blend = args.blend
    size = tuple(side * model.patch_size for side in model.grid)
    check_ratios(ratios, model.grid[0] * model.grid[1])
    source = open_source(args.data_path, args.split, labels=args.labels, val_fraction=args.val_fraction)
    out = make_folder(args.out)

    floors, missing = open_floors(args, size, device)
    pictures = Pictures(source, spread(len(source), args.images), size, args.batch_size, "measuring")
    results = evaluate(model, pictures, ratios, floors, args.seed)

    readable = [index for index in pictures.indices if index not in pictures.bad]
    shown = [readable[i] for i in spread(len(readable), args.figure_images)]
    images, index, _ = next(iter(Pictures(source, shown, size, len(shown), "drawing")))
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
