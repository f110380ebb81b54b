"""What the reconstruction figures share: pictures as a model sees them, their masks, the floors, colours, flags."""

import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from models_mae import MaskedAutoencoder
from util.benchmark.reconstruction import fill_inpaint, fill_mean_image, fill_visible_mean
from util.data.augment import EvalCrop, to_unit
from util.data.images import BadImage
from util.data.maps import Maps
from util.data.sheet import INK, PAPER
from util.data.sources import LABELS, Source, open_source, spread
from util.mae.masking import random_mask, visible_count
from util.run.args import Parser, count, count0, fraction, image_size
from util.run.errors import UserError
from util.run.seed import uniform_for

FLOORS = {"visible_mean": "visible mean colour", "mean_image": "shifted mean image", "inpaint": "inpainting (Telea)"}
MEAN_IMAGES = 2000  # the mean of this many training pictures no longer changes visibly
GREY = 0.5  # masked patches in the figures
NO_VALUE = (200, 200, 200)


class Batch(NamedTuple):
    """images: (n, 3, H, W) in [0, 1]. index: (n,) int64, their numbers. maps: uint8 (n, C, rows, columns), or None."""

    images: torch.Tensor
    index: torch.Tensor
    maps: torch.Tensor | None


class Pictures:
    """Pictures of a source as a model sees them: iterates over batches.

    size: (H, W), px. maps: semantic maps, which go through the same crop, onto `grid` cells
    (rows, columns; default: one for each pixel). Pictures that cannot be read are left out, with a line each; `bad`
    holds their numbers.
    """

    def __init__(
        self,
        source: Source,
        indices: Iterable[int],
        size: tuple[int, int],
        batch_size: int,
        label: str,
        *,
        maps: Maps | None = None,
        grid: tuple[int, int] | None = None,
    ):
        self.source, self.indices, self.batch_size, self.label = source, list(indices), batch_size, label
        self.crop, self.maps, self.grid = EvalCrop(size), maps, grid or tuple(size)
        self.bad: set[int] = set()

    def __iter__(self) -> Iterator[Batch]:
        batch = []
        for index in tqdm(self.indices, desc=self.label, unit="img", disable=not sys.stderr.isatty(), leave=False):
            try:
                batch.append((*self._see(index), index))
            except BadImage as error:
                if index not in self.bad:
                    tqdm.write(f"skipped a damaged image: {error}", file=sys.stderr)
                self.bad.add(index)
            if len(batch) == self.batch_size:
                yield self._stack(batch)
                batch = []
        if batch:
            yield self._stack(batch)

    def _see(self, index: int) -> tuple[torch.Tensor, np.ndarray | None]:
        """A picture, uint8 (3, H, W), and its maps through the same view."""
        picture, record = self.source.load(index), self.source.record(index)
        view = self.crop.draw(picture, record)
        pixels = view.apply(picture, self.crop.size)
        if self.maps is None:
            return pixels, None
        return pixels, view.crop_map(self.maps.of(index), picture.size, self.grid)

    @staticmethod
    def _stack(batch: list[tuple]) -> Batch:
        pixels, maps, index = zip(*batch, strict=True)
        stacked = None if maps[0] is None else torch.from_numpy(np.stack(maps))
        return Batch(to_unit(torch.stack(pixels)), torch.tensor(index), stacked)


def mean_image(pictures: Pictures) -> torch.Tensor:
    """(3, H, W) mean of the pictures; UserError if none can be read."""
    total, seen = 0.0, 0
    for images, *_ in pictures:
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


def check_ratios(ratios: Iterable[float], patches: int) -> None:
    """UserError for a mask ratio that leaves none of the patches visible."""
    for mask_ratio in ratios:
        if not visible_count(patches, mask_ratio):
            raise UserError(f"--mask_ratios {mask_ratio:g} leaves none of the {patches} patches visible: lower it")


def percent_masked(mask_ratio: float) -> str:
    """ "75 % masked"."""
    return f"{100 * mask_ratio:.3g} % masked"


# --- drawing ----------------------------------------------------------------------------------------------------


def tile(panels: list[Image.Image], gap: int = 24, columns: int = 2) -> Image.Image:
    """Panels side by side, `columns` in a line; each column and line is as large as its largest panel. gap: px."""
    columns = min(columns, len(panels))
    widths = [max(p.width for p in panels[i::columns]) for i in range(columns)]
    lines = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(p.height for p in line) for line in lines]
    canvas = Image.new("RGB", (sum(widths) + gap * (columns - 1), sum(heights) + gap * (len(lines) - 1)), PAPER)
    for row, line in enumerate(lines):
        for column, picture in enumerate(line):
            place = sum(widths[:column]) + gap * column, sum(heights[:row]) + gap * row
            canvas.paste(picture, place)
    return canvas


def heat(values: np.ndarray, top: float) -> np.ndarray:
    """Numbers (H, W) as colours (H, W, 3) uint8 of viridis, uniform to the eye: 0 is dark, `top` and above bright.

    Grey where there is no number (NaN).
    """
    from matplotlib import colormaps  # slow to import

    values = np.asarray(values, dtype=np.float64)
    colours = np.uint8(np.rint(255 * colormaps["viridis"](np.nan_to_num(values / top).clip(0, 1))[..., :3]))
    colours[np.isnan(values)] = NO_VALUE
    return colours


def scale_bar(top: float, text: str, width: int = 260, digits: int = 0) -> Image.Image:
    """The colours of `heat` from 0 to `top` with their numbers; text: what they say, and the unit."""
    font, height = ImageFont.load_default(13), 16
    bar = Image.fromarray(heat(np.tile(np.linspace(0, top, width), (height, 1)), top))
    canvas = Image.new("RGB", (max(width, int(font.getlength(text))) + 8, height + 42), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((4, 2), text, fill=INK, font=font)
    canvas.paste(bar, (4, 20))
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        draw.text((4 + share * width, 20 + height + 3), f"{share * top:.{digits}f}", fill=INK, font=font, anchor=anchor)
    return canvas


# --- flags ------------------------------------------------------------------------------------------------------


def add_picture_args(parser: Parser, *, figure_images: int = 4) -> None:
    """Which pictures are measured, and how."""
    parser.add_argument("--data_path", required=True, metavar="DIR", help="pictures, as main_pretrain.py takes them")
    parser.add_argument("--split", choices=("train", "val", "test"), default="test", help="part of the data to measure")
    parser.add_argument("--images", type=count0, default=0, help="pictures to measure, evenly spread; 0 = all")
    parser.add_argument(
        "--figure_images", type=count, default=figure_images, help="pictures in the figure, evenly spread"
    )
    parser.add_argument(
        "--mean_data_path", metavar="DIR", help="where the mean training image comes from; default: --data_path"
    )
    add_reading_args(parser)


def add_reading_args(parser: Parser) -> None:
    """How pictures are read and where numbers are computed."""
    parser.add_argument("--labels", choices=LABELS, default="auto", help="what a nested folder of images means")
    parser.add_argument("--val_fraction", type=fraction, default=0.1, help="as in training, fraction in 0..1")
    parser.add_argument("--input_size", type=image_size, help="px, a side or HEIGHTxWIDTH; default: the checkpoint's")
    parser.add_argument("--batch_size", type=count, default=32, help="images")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument("--seed", type=count0, default=0, help="of the masks")


def make_folder(out: str) -> Path:
    """The output folder of --out; UserError where it cannot be made."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): choose another") from error
    return folder
