"""Which mask ratio? Models trained at several ratios, each tested at several ratios, beside floors that need no model.

    python -m visualize.mask_sweep --ckpt runs/mask_sweep/epochs/*/checkpoint-last.pth --data_path DIR --out OUT

Checkpoints say themselves what they were trained with: runs of one ratio under other seeds are averaged. Writes
OUT/mask_sweep.md (tables), metrics.json, grid.png (rows: pictures; a block for each test ratio; columns: trainings),
errors.png (where the errors are), curves.png (while training) and regions.png (face, eyes, figure, background: needs
semantic maps). --probes adds what the features are worth. One checkpoint is enough for the test ratios.
"""

import time
from collections.abc import Iterable

import torch

from models_mae import MaskedAutoencoder
from models_mae_weights import load_mae
from util.benchmark.regions import MAPS
from util.data.maps import Maps, find_maps
from util.data.sources import Source, open_source, origins
from util.run.args import Parser, height_width, ratio
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.files import write_atomically, write_text
from util.run.log import progress, provenance, write_json
from visualize.measure import measure_pictures
from visualize.pictures import (
    Pictures,
    add_picture_args,
    check_ratios,
    draw_masks,
    make_folder,
    open_floors,
    spread,
)
from visualize.sweep.numbers import GROUP_COLUMNS, Sweep
from visualize.sweep.plots import curves_figure, regions_figure
from visualize.sweep.probes import by_training, read_probes
from visualize.sweep.report import report
from visualize.sweep.sheets import Shown, error_figure, grid_figure
from visualize.sweep.trained import Trained, by_recipe, learning_curve, open_trained

USUAL_RATIO = 0.75  # the test ratio of the tables and figures that show one


def get_args(argv: list[str] | None = None):
    parser = Parser("Models trained at several mask ratios, each tested at several ratios")
    parser.add_argument("--ckpt", nargs="+", required=True, metavar="W", help="checkpoints with a decoder, any number")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for the tables and figures")
    parser.add_argument(
        "--mask_ratios", type=ratio, nargs="+", default=[0.25, 0.5, 0.75, 0.9], help="tested, fractions, 0 to below 1"
    )
    parser.add_argument("--maps", metavar="DIR", help="folder of semantic maps; default: DATA/maps, if there is one")
    parser.add_argument(
        "--groups",
        nargs="+",
        default=None,
        metavar="COLUMN",
        help=f"PSNR for each value of these columns: {', '.join(GROUP_COLUMNS)}; default: identity, where it is known",
    )
    parser.add_argument("--probes", metavar="GLOB", help="folder or pattern of the results of main_linprobe.py")
    add_picture_args(parser, figure_images=3)
    args = parser.parse_args(argv)
    args.mask_ratios = sorted(set(args.mask_ratios))
    if not args.mask_ratios[-1]:
        raise UserError("--mask_ratios 0 removes nothing, so there is nothing to compare: add one above 0")
    return args


def load_all(runs: Iterable[Trained], args, device: torch.device):
    """Each checkpoint's model in turn. UserError where they do not cut pictures into the same patches."""
    first = None
    for run in runs:
        model = load_mae(run.ckpt, args.input_size and height_width(args.input_size), device)
        shape = (model.patch_size, *(side * model.patch_size for side in model.grid))
        first = first or (run.ckpt, shape)
        if shape != first[1]:
            texts = ["{1} x {2} px in patches of {0} px".format(*one) for one in (shape, first[1])]
            raise UserError(
                f"{run.ckpt} sees {texts[0]}, {first[0]} {texts[1]}: masks differ; give --input_size, or compare apart"
            )
        yield run, model


def draw(model: MaskedAutoencoder, label: str, shown: Shown, index: torch.Tensor, args) -> None:
    """Add a model's reconstructions of the pictures of the figures to `shown`. index: (K,) their numbers."""
    images = shown.originals.to(model.pixel_mean.device)
    for mask_ratio in args.mask_ratios:
        out = model.reconstruct(images, draw_masks(model, images, index, args.seed, mask_ratio))
        shown.masks[mask_ratio] = out["mask"].cpu()
        shown.pasted[label, mask_ratio] = out["pasted"].cpu()
    if model.norm_pix_loss:
        shown.oracle.add(label)


def measure(args, trainings: dict[str, list[Trained]], source: Source, maps: Maps | None, device: torch.device):
    """Every checkpoint on every picture: (the sweep, the pictures of the figures, missing floors, patches L)."""
    runs = [run for own in trainings.values() for run in own]
    first_of = {own[0].ckpt: label for label, own in trainings.items()}
    sweep, floors = Sweep(args.mask_ratios, trainings, {}, [], args.seed, origins(source)), {}
    for run, model in load_all(progress(runs, desc="checkpoints"), args, device):
        size = tuple(side * model.patch_size for side in model.grid)
        if run is runs[0]:
            check_ratios(args.mask_ratios, model.grid[0] * model.grid[1])
            floors, missing = open_floors(args, size, device)
            sweep.floors = list(floors)
        indices = spread(len(source), args.images)
        pictures = Pictures(source, indices, size, args.batch_size, "measuring", maps=maps)
        sweep.measured[run.ckpt] = measure_pictures(model, pictures, args.mask_ratios, floors, args.seed)
        if run is runs[0]:
            floors = {}  # they are the same for all
            places = spread(len(sweep.index), args.figure_images)
            batch = next(iter(Pictures(source, sweep.index[places].tolist(), size, len(places), "drawing")))
            shown = Shown(batch.images, places, {}, {}, set())
        if run.ckpt in first_of:
            draw(model, first_of[run.ckpt], shown, batch.index, args)
    return sweep, shown, missing, model.grid[0] * model.grid[1]


def group_tables(sweep: Sweep, source: Source, columns: list[str] | None) -> dict:
    """PSNR by the values of each column asked for, or by identity where it is known."""
    if columns:
        return {column: sweep.groups(source, column) for column in dict.fromkeys(columns)}
    try:
        return {"identity": sweep.groups(source, "identity")}
    except UserError as error:
        return {"identity": {"skipped": str(error)}}


def region_tables(sweep: Sweep, missing: dict[str, str]) -> dict:
    """The regions' part of metrics.json."""
    if not sweep.regions:
        return {"skipped": next(iter(missing.values()))}
    note = {"missing": "; ".join(missing.values())} if missing else {}
    return {"rows": _text_keys(sweep.region_table()), **note}


def _text_keys(table: dict) -> dict:
    """Mask ratios as JSON has them, "0.75"."""
    return {
        f"{key:g}" if isinstance(key, float) else key: _text_keys(value) if isinstance(value, dict) else value
        for key, value in table.items()
    }


@cli
def main(argv: list[str] | None = None) -> None:
    started = time.perf_counter()
    args = get_args(argv)
    device = pick_device(args.device)
    trainings = by_recipe(open_trained(args.ckpt))
    probes = {"skipped": "no probes were given (--probes)"}
    if args.probes:
        probes = by_training(read_probes(args.probes), trainings)
    source = open_source(args.data_path, args.split, labels=args.labels, val_fraction=args.val_fraction)
    out = make_folder(args.out)
    maps, missing_maps = find_maps(source, MAPS, args.maps)

    sweep, shown, missing_floors, patches = measure(args, trainings, source, maps, device)
    table = _text_keys(sweep.table())
    metrics = {
        "images": len(sweep.index),
        "trainings": {
            label: [{"ckpt": run.ckpt, "mask_ratio": run.mask_ratio, "seed": run.args.get("seed")} for run in runs]
            for label, runs in trainings.items()
        },
        "ratios": {label: table[label] for label in trainings},
        "floors": {name: table[name] for name in sweep.floors},
        "missing_floors": missing_floors,
        "differences": sweep.differences(),
        "regions": region_tables(sweep, missing_maps),
        "groups": _text_keys(group_tables(sweep, source, args.groups)),
        "curves": {
            label: [{"seed": run.args.get("seed"), "epochs": learning_curve(run, patches)} for run in runs]
            for label, runs in trainings.items()
        },
        "probes": probes,
        "provenance": provenance(vars(args), device, source.fingerprint),
    }
    shown_ratio = USUAL_RATIO if USUAL_RATIO in args.mask_ratios else args.mask_ratios[-1]
    for name, picture in {
        "grid": grid_figure(sweep, shown),
        "errors": error_figure(sweep, shown, shown_ratio),
    }.items():
        write_atomically(out / f"{name}.png", lambda temporary, picture=picture: picture.save(temporary, format="PNG"))
    if not curves_figure(metrics["curves"], out / "curves.png"):
        print("no curves.png: no checkpoint has a log.txt beside it")
    if "rows" in metrics["regions"]:
        regions_figure(metrics["regions"]["rows"], list(trainings), f"{shown_ratio:g}", out / "regions.png")
    else:
        print(f"no regions.png: {metrics['regions']['skipped']}")
    metrics["seconds"] = round(time.perf_counter() - started, 1)
    write_json(out / "metrics.json", metrics)
    write_text(out / "mask_sweep.md", report(sweep, metrics, source.name, shown_ratio))
    print(f"{metrics['images']} images, {len(args.ckpt)} checkpoints; tables: {out / 'mask_sweep.md'}")


if __name__ == "__main__":
    main()
