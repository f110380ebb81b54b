"""What the views of representations share: encoders by name, pictures and their embeddings, flags, tables of pictures.

--ckpt takes what eval_recognition.py takes: a masked autoencoder's checkpoint, a transfer run's (adapters are merged),
hf:OWNER/REPO, timm:NAME, official:NAME; and "random", an encoder that has learned nothing, by --model and --seed.
"""

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models_transfer import load_recogniser, start_backbone
from models_vit import Backbone
from util.benchmark.figure_style import INK, families, plain
from util.data.roles import ROLES
from util.data.sheet import to_pil
from util.data.sources import LABELS, Source, spread
from util.run import args as flags
from util.run.errors import UserError
from util.run.log import provenance, write_json
from visualize.pictures import Pictures

RANDOM = "random"
DPI = 160
_WIDTH = 7.2  # inches, the least of a figure
_TITLE = 68  # characters of a line of the title in that width


@dataclass(frozen=True)
class Encoder:
    """spec: as it was named. model: in eval mode, on its device. size: (H, W) px of the pictures it is shown.

    args: the flags it was made with. name: what to call it in figures, None: by its model and its run.
    """

    spec: str
    model: Backbone
    size: tuple[int, int]
    args: dict
    name: str | None = None

    @property
    def device(self) -> torch.device:
        return self.model.pixel_mean.device

    @property
    def label(self) -> str:
        """For titles: its name, or the model and where its weights come from, without the folders above its run."""
        return self.name or f"{self.args['model']}, {name_of(self.spec)}"


def open_encoder(spec: str, args, device: torch.device, *, model: str | None = None) -> Encoder:
    """The encoder that --ckpt names, at --input_size or the size it was trained at.

    model: the name of a network, for weights that do not say it and for "random"; default: args.model. Where
    args.face_padding is None, it becomes what the encoder was trained with.
    """
    name = model or args.model
    if spec == RANDOM:
        if not name:
            raise UserError("--ckpt random needs --model: give the network's name, such as vit_base_patch16")
        made = {
            "model": name.removeprefix("mae_"), "init": None, "seed": args.seed, "global_pool": not args.cls_token,
            "input_size": args.input_size or 224,
        }  # fmt: skip
        drawn = start_backbone(made).to(device).eval()
        return Encoder(spec, drawn, flags.height_width(made["input_size"]), made, getattr(args, "name", None))
    trained = load_recogniser(
        str(file_in(spec)), model=name, input_size=args.input_size, global_pool=not args.cls_token, device=device
    )
    if args.face_padding is None:
        args.face_padding = trained.args.get("face_padding")
    size = flags.height_width(args.input_size or trained.args["input_size"])
    trained.model.check_size(size)
    return Encoder(spec, trained.model, size, trained.args, getattr(args, "name", None))


def name_of(spec: str) -> str:
    """What weights are called in a figure: a run by its folder and the one above."""
    if spec == RANDOM:
        return "random weights"
    path = Path(spec)
    if ":" in spec or not path.exists():
        return spec
    parts = path.parts[:-1] if path.is_file() and path.stem.startswith("checkpoint") else path.parts
    return "/".join(parts[-2:])


def file_in(spec: str) -> str | Path:
    """The best checkpoint of a run folder, or its last; anything else as it is."""
    folder = Path(spec)
    files = (folder / name for name in ("checkpoint-best.pth", "checkpoint-last.pth"))
    return next((file for file in files if file.is_file()), spec) if folder.is_dir() else spec


def stages_in(spec: str) -> list[str]:
    """The checkpoint-N.pth of a folder in the order of N, where there are several; else what was named."""
    folder = Path(spec)
    numbered = [(int(found[1]), file) for file in folder.glob("checkpoint-*.pth")
                if (found := re.fullmatch(r"checkpoint-(\d+)", file.stem))]  # fmt: skip
    return [str(file) for _, file in sorted(numbered)] if len(numbered) > 1 else [spec]


# --- pictures and their embeddings --------------------------------------------------------------------------------


def look(encoder: Encoder, source: Source, indices: Sequence[int], args, label: str) -> Pictures:
    """Pictures of a source as the encoder sees them."""
    return Pictures(source, indices, encoder.size, args.batch_size, label)


def see(encoder: Encoder, source: Source, count: int, label: str = "reading") -> tuple[torch.Tensor, list[int]]:
    """`count` readable pictures spread over a source, (n, 3, H, W) on the encoder's device, and their numbers."""
    pictures = Pictures(source, spread(len(source), count), encoder.size, count, label)
    batch = next(iter(pictures), None)
    if batch is None:
        raise UserError(f"no picture of {source.name} can be read: check the files")
    return batch.images.to(encoder.device), batch.index.tolist()


@torch.inference_mode()
def embed(encoder: Encoder, source: Source, indices: Sequence[int], args, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (n, D) float32, rows of length 1, of the readable ones of `indices`, and their numbers (n,)."""
    found, numbers = [], []
    for images, index, _ in look(encoder, source, indices, args, label):
        found.append(encoder.model.embed(images.to(encoder.device)).float().cpu())
        numbers.append(index)
    if not found:
        raise UserError(f"no picture of {source.name} can be read: check the files")
    embeddings = torch.cat(found).numpy()
    if not np.isfinite(embeddings).all():
        raise UserError(f"the embeddings of {encoder.spec} are not finite: check the weights")
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(lengths > 0, lengths, 1), torch.cat(numbers).numpy()


def identities(source: Source, numbers: Sequence[int]) -> list[str | None]:
    """Who is on each picture; None where the data do not say."""
    column = source.column("identity")
    return [column[i] for i in numbers]


def thumbnail(source: Source, number: int, encoder: Encoder, side: int = 192) -> Image.Image:
    """A picture that was read before, as the encoder sees it, enlarged smoothly for print."""
    batch = next(iter(Pictures(source, [number], encoder.size, 1, "drawing")))
    return enlarged(batch.images[0], side)


def enlarged(image: torch.Tensor, side: int = 192) -> Image.Image:
    """(3, H, W) in [0, 1] -> the picture with at least `side` px on its longer side."""
    picture = to_pil(image)
    scale = max(1.0, side / max(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    return picture.resize(size, Image.Resampling.BICUBIC)


# --- tables of pictures -------------------------------------------------------------------------------------------


def picture_table(rows: int, columns: int, title: str, *, cell: float = 1.25, head: float = 0.5, foot: float = 0.0,
                  label: float = 0.0, below: float = 0.0, gap: float = 0.06, aspect: float = 1.0):  # fmt: skip
    """A figure of rows x columns empty axes of equal size, for pictures, and the axes as an array.

    Lengths in inches. cell: width of a picture at most; it shrinks to 0.72 before the figure gets wider. head: room for
    the titles of columns. foot: room below all. label: room left of the rows. below: room under each picture.
    gap: between pictures. aspect: height / width of one. title: what `finish` will write; room for it is kept.
    """
    from matplotlib.figure import Figure  # slow to import

    margin = 0.1
    cell = min(cell, max(0.72, (_WIDTH - label - 2 * margin) / columns - gap))
    width = max(_WIDTH, 2 * margin + label + columns * (cell + gap))
    lines = len(textwrap.wrap(title, _TITLE))
    top = 0.16 + 0.2 * lines + head
    row = cell * aspect + gap + below
    height = top + rows * row + foot + margin
    figure = Figure(figsize=(width, height), dpi=DPI)
    axes = np.empty((rows, columns), dtype=object)
    for r in range(rows):
        for c in range(columns):
            left = margin + label + c * (cell + gap)
            bottom = height - top - r * row - cell * aspect
            place = (left / width, bottom / height, cell / width, cell * aspect / height)
            axes[r, c] = figure.add_axes(place)
            axes[r, c].set(xticks=[], yticks=[])
            axes[r, c].spines[:].set_visible(False)
    return figure, axes


def show(axes, picture, **options) -> None:
    """A picture or a map in one cell, whole."""
    axes.imshow(picture, aspect="auto", interpolation=options.pop("interpolation", "nearest"), **options)


def column_titles(axes, titles: Sequence[str], size: float = 8.5) -> None:
    """Titles over the first row of cells; they may hold line breaks."""
    for cell, text in zip(axes[0], titles, strict=True):
        cell.set_title(plain(text), fontsize=size, color=INK, pad=4, fontfamily=families(), linespacing=1.15)


def row_labels(axes, labels: Sequence[str], size: float = 8.0) -> None:
    """Words left of each row of cells."""
    for cell, text in zip(axes[:, 0], labels, strict=True):
        style = {"fontsize": size, "color": INK, "fontfamily": families(), "linespacing": 1.25}
        cell.text(-0.06, 0.5, plain(text), ha="right", va="center", transform=cell.transAxes, **style)


# --- flags and files ----------------------------------------------------------------------------------------------


def add_encoder_args(parser: flags.Parser, *, ckpt: bool = True) -> None:
    """Which encoder is looked at."""
    group = parser.add_argument_group("encoder")
    if ckpt:
        group.add_argument(
            "--ckpt", required=True, metavar="W",
            help="file, run folder, hf:OWNER/REPO, timm:NAME, official:NAME; random: an untrained --model",
        )  # fmt: skip
        group.add_argument("--name", default=None, help="what to call it in the figure; default: its model and run")
    group.add_argument("--model", default=None, metavar="NAME", help="model of weights that do not say it")
    group.add_argument(
        "--cls_token",
        action="store_true",
        help="embed by the class token where there is no head; default: mean pooling",
    )
    group.add_argument("--input_size", type=flags.image_size, help="px, a side or HEIGHTxWIDTH; default: as trained")


def add_picture_args(parser: flags.Parser, *, images: int, images_help: str, split: str | None = "test") -> None:
    """Which pictures are looked at, and where the figure goes. split: None where the view has flags of its own."""
    group = parser.add_argument_group("pictures")
    group.add_argument("--data_path", required=True, metavar="DIR", help="pictures, as main_pretrain.py takes them")
    if split:
        group.add_argument("--split", choices=tuple(ROLES), default=split, help="part of the data to show")
    group.add_argument("--images", type=flags.count, default=images, help=images_help)
    group.add_argument("--labels", choices=LABELS, default="auto", help="what a nested folder of images means")
    group.add_argument("--val_fraction", type=flags.fraction, default=0.1, help="as in training, fraction in 0..1")
    group.add_argument(
        "--face_padding", type=flags.rate, default=None, metavar="X",
        help="show only the face box, enlarged by X of its side on each side; default: as the encoder was trained",
    )  # fmt: skip
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", required=True, metavar="FILE", help="the figure, a .png file; numbers go into a .json beside"
    )
    group.add_argument("--batch_size", type=flags.count, default=32, help="images")
    group.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    group.add_argument("--seed", type=flags.count0, default=0, help="of everything random")


def check_out(out: str) -> Path:
    """The figure's path; UserError for another kind of file, and where its folder cannot be made."""
    path = Path(out)
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {out}: give a file that ends in .png")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out}: its folder cannot be made ({error.strerror}): choose another") from error
    return path


def write_numbers(path: Path, numbers: dict, args, device: torch.device, source: Source | None = None) -> Path:
    """The numbers behind a figure, as JSON beside it; returns that path."""
    beside = path.with_suffix(".json")
    traced = provenance(vars(args), device, None if source is None else source.fingerprint)
    write_json(beside, numbers | {"provenance": traced})
    return beside
