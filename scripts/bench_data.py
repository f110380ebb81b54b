"""Images per second of one core, from files to batches: torchvision on PIL as the official MAE code has it, and ours.

python scripts/bench_data.py --out bench.json
python scripts/bench_data.py --out bench.json --data_path DIR --jpeg_side 512

    official     PIL decodes; RandomResizedCrop, flip, ToTensor and Normalize of torchvision; float32 batches
    raw          the same files through our loader: uint8 batches, normalised on the device
    packed       canvases of python -m util.data.pack through our loader
    packed_read  the same, whole canvases with the parameters of their crops, which a GPU then makes

Without --data_path the pictures are ToonFaces of 512 px, as JPEG files in a temporary folder. All contenders make
batches of the same pictures in this process, in one thread, and take turns; the medians count. The clock is the
processor time of the process: what else the machine does, and waiting for the disk, do not count.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image

from util.data import pack
from util.data.augment import IMAGENET_MEAN, IMAGENET_STD, TrainCrop
from util.data.augment_batch import DeferredView
from util.data.batches import collate
from util.data.images import decode_image
from util.data.loader import Samples
from util.data.sources import FolderSource, open_folder, open_source
from util.run import args as flags
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.log import progress, provenance, write_json
from util.toonfaces.dataset import Recipe, write_faces
from util.toonfaces.split import Sizes

TARGETS = {"raw": 1.5, "packed": 9.0, "packed_read": 50.0}  # images per second over those of `official`
QUALITY = 92  # of the JPEG files
TOONFACES_SIDE = 512  # px

Contender = Callable[[list[int], int], torch.Tensor]  # (sample numbers, epoch) -> the images of a batch


def draw_toonfaces(folder: Path, images: int, seed: int, workers: int) -> Path:
    """At least `images` ToonFaces of TOONFACES_SIDE px, a prepared folder; returns it."""
    identities = images // 12
    sizes = Sizes(identities, images + identities, 1.0, 0, 0, 0, 0)  # a split takes whole pictures of each identity
    write_faces(folder, Recipe(sizes, TOONFACES_SIDE, seed), workers)
    return folder


def as_jpeg(data: str | Path, labels: str, folder: Path, images: int, side: int) -> Path:
    """Pictures of `data`, spread over it, their short side resized to `side` px, as JPEG files in `folder`."""
    folder.mkdir()
    manifest, _ = open_folder(str(data), labels)
    count = min(images, len(manifest))
    for number in progress(range(count), desc="JPEG files", unit="img"):
        image = decode_image(manifest.path(number * len(manifest) // count))
        factor = side / min(image.size)
        size = tuple(max(side, round(length * factor)) for length in image.size)
        resized = image.resize(size, Image.Resampling.BICUBIC)
        resized.save(folder / f"{number:05d}.jpg", quality=QUALITY)
    return folder


def official(source: FolderSource, size: int, min_crop: float) -> Contender:
    """The input pipeline of the official code, torchvision's, on PIL images."""
    from torchvision import transforms  # slow to import

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, (min_crop, 1.0), interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    paths = [source.manifest.path(i) for i in range(len(source))]

    def read(i: int) -> torch.Tensor:
        with open(paths[i], "rb") as file:
            return transform(Image.open(file).convert("RGB"))

    return lambda numbers, epoch: torch.stack([read(i) for i in numbers])


def ours(source, transform, seed: int) -> Contender:
    """What a worker of our loader does."""
    samples = Samples(source, transform, seed)
    return lambda numbers, epoch: collate([samples[epoch, i] for i in numbers])["image"]


def contenders(folder: Path, packed: Path, args: argparse.Namespace) -> dict[str, Contender]:
    """All contenders on the same pictures."""
    raw, canvases = (open_source(path, "train", val_fraction=0.0) for path in (folder, packed))
    crop = TrainCrop((args.input_size, args.input_size), scale=(args.min_crop, 1.0))
    return {
        "official": official(raw, args.input_size, args.min_crop),
        "raw": ours(raw, crop, args.seed),
        "packed": ours(canvases, crop, args.seed),
        "packed_read": ours(canvases, DeferredView(crop), args.seed),
    }


def take_turns(competing: dict[str, Contender], images: int, args: argparse.Namespace) -> dict[str, list[float]]:
    """Images per second of every round, by contender; the order changes from round to round."""
    rates, names = {name: [] for name in competing}, list(competing)
    for number in progress(range(args.warmup + args.rounds), unit="round"):
        first = number * args.batch_size
        numbers = [i % images for i in range(first, first + args.batch_size)]
        for place in range(len(names)):
            name = names[(place + number) % len(names)]
            repeats = args.repeats if name.startswith("packed") else 1
            started = time.process_time()
            for repeat in range(repeats):
                competing[name](numbers, number * args.repeats + repeat)
            seconds = time.process_time() - started
            if number >= args.warmup:
                rates[name].append(repeats * args.batch_size / seconds)
    return rates


def summary(rates: dict[str, list[float]]) -> dict:
    """Medians, ratios to the official pipeline (median of the rounds' own), and whether each reaches its target."""
    ratios = {
        name: statistics.median(own / base for own, base in zip(rates[name], rates["official"], strict=True))
        for name in TARGETS
    }
    return {
        "images_per_s": {name: statistics.median(values) for name, values in rates.items()},
        "ratios": ratios,
        "targets": TARGETS,
        "met": {name: ratios[name] >= target for name, target in TARGETS.items()},
        "rounds": rates,
    }


def table(result: dict) -> str:
    """The summary for the eye."""
    lines = [f"{'':12} {'images/s':>10} {'ms/image':>9} {'ratio':>7} {'target':>7}"]
    for name, rate in result["images_per_s"].items():
        line = f"{name:12} {rate:10.0f} {1e3 / rate:9.3f}"
        if name in TARGETS:
            line += f" {result['ratios'][name]:7.2f} {TARGETS[name]:7.1f}{'' if result['met'][name] else '  missed'}"
        lines.append(line)
    return "\n".join(lines)


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser("Images per second of one core, from files to batches")
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    add("--data_path", default=None, metavar="DIR", help="folder of pictures; default: ToonFaces, drawn for this")
    add("--labels", choices=("auto", "none", "folders", "metadata"), default="auto", help="what a nested folder means")
    add(
        "--jpeg_side", type=flags.count, default=None, metavar="PX",
        help="short side that the pictures of --data_path are resized to, as JPEG files; default: read as they are",
    )  # fmt: skip
    add("--images", type=flags.number(int, 24), default=96, help="pictures that are made, or taken for --jpeg_side")
    add("--canvas", type=flags.count, default=256, help="side of the packed canvases, px")
    add("--input_size", type=flags.count, default=224, help="side of the crops, px")
    flags.add_crop_arg(parser, 0.2)
    add("--batch_size", type=flags.count, default=32, help="images per batch")
    add("--rounds", type=flags.count, default=15, help="timed rounds; every contender has a turn in each")
    add("--warmup", type=flags.count0, default=3, help="rounds before the clock starts")
    add("--repeats", type=flags.count, default=10, help="batches in a turn of a packed contender: they are short")
    add("--num_workers", type=flags.count0, default=2, help="processes that make the data; timing takes one")
    add("--seed", type=flags.count0, default=0, help="of the pictures and the crops")
    args = parser.parse_args(argv)
    if args.jpeg_side and not args.data_path:
        raise UserError("--jpeg_side is for --data_path: ToonFaces are drawn at 512 px")
    return args


def prepare(args: argparse.Namespace, scratch: Path) -> tuple[Path, Path]:
    """The folder of the pictures, and the packed file of them."""
    if args.data_path is None:
        drawn = draw_toonfaces(scratch / "toonfaces", args.images, args.seed, args.num_workers)
        folder = as_jpeg(drawn, "metadata", scratch / "jpeg", args.images, TOONFACES_SIDE)
    elif args.jpeg_side:
        folder = as_jpeg(args.data_path, args.labels, scratch / "jpeg", args.images, args.jpeg_side)
    else:
        folder = Path(args.data_path)
    packed = scratch / "canvases.pack"
    options = ["--canvas", args.canvas, "--num_workers", args.num_workers, "--labels", args.labels]
    pack.pack(pack.get_args([str(part) for part in ("--data_path", folder, "--out", packed, *options)]))
    return folder, packed


@cli
def main(argv: list[str] | None = None) -> None:
    args, started = get_args(argv), time.perf_counter()
    torch.set_num_threads(1)
    device = pick_device("cpu")  # freed memory is handled as in training, for all contenders
    with tempfile.TemporaryDirectory() as scratch:
        folder, packed = prepare(args, Path(scratch))
        competing = contenders(folder, packed, args)
        images = len(open_source(packed, "train", val_fraction=0.0))
        result = summary(take_turns(competing, images, args))
    print(table(result))
    result["provenance"] = provenance({**vars(args), "out": str(args.out)}, device)
    result["wall_seconds"] = time.perf_counter() - started
    write_json(args.out, result)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
