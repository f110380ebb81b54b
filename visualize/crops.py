"""What the smart crop keeps: a contact sheet of the most elongated pictures of a data set.

    python -m visualize.crops --data_path DIR --out crops.png

Each pair shows the picture with the chosen region (and the face box, where the metadata have one) and the crop.
Where face boxes are known it also prints how many faces the crop keeps without being told of them.
"""

from pathlib import Path

from PIL import Image, ImageDraw

from util.data.augment import EvalCrop
from util.data.images import BadImage, crop_region
from util.data.roles import ROLES
from util.data.sheet import sheet
from util.data.sources import LABELS, Source, open_source
from util.run.args import Parser, count, height_width, image_size
from util.run.errors import UserError, cli
from util.run.files import write_atomically

_REGION, _FACE = (255, 40, 90), (40, 200, 255)
_LOOKED_AT = 1000  # pictures read to find elongated ones
_STRONG = 1.25  # width / height against the target's


def get_parser() -> Parser:
    parser = Parser("A contact sheet of smart crops.")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="any data set that training accepts")
    parser.add_argument("--out", required=True, metavar="FILE", help="the sheet, a .png or .jpg file")
    parser.add_argument("--role", choices=tuple(ROLES), default="train", help="which part of the data")
    parser.add_argument("--labels", choices=LABELS, default="auto", help="what a nested folder of images means")
    parser.add_argument("--input_size", type=image_size, default=224, help="of the crop: px, a side or HEIGHTxWIDTH")
    parser.add_argument("--images", type=count, default=18, help="pictures on the sheet")
    parser.add_argument("--pairs", type=count, default=3, help="pictures in a row")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    if Path(args.out).suffix.lower() not in (".png", ".jpg"):
        raise UserError(f"--out {args.out}: give a file that ends in .png or .jpg")
    source = open_source(args.data_path, args.role, labels=args.labels, val_fraction=0.0)
    size = height_width(args.input_size)
    crop = EvalCrop(size)
    aspect = size[1] / size[0]
    found = elongated(source, aspect)
    if not found:
        raise UserError(f"{args.data_path} holds no picture that a {size[0]} x {size[1]} crop would cut much of")
    shown = found[:: max(1, len(found) // args.images)][: args.images]
    cells = [cell for i in shown for cell in pair(source.load(i), source.record(i), crop)]
    width = 2 * args.pairs
    rows = [cells[i : i + width] for i in range(0, len(cells), width)]
    picture = sheet(rows, column_titles=("picture", "crop") * args.pairs, cell=max(size))
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    kind = "PNG" if out.suffix.lower() == ".png" else "JPEG"
    write_atomically(out, lambda temporary: picture.save(temporary, kind))
    print(f"{out}: {len(shown)} of {len(found)} elongated pictures of {source.name}")
    known, smart, central = faces_kept(source, found, aspect)
    if known:
        print(f"of {known} known faces the smart crop keeps {smart} without their boxes, a central crop {central}")


def elongated(source: Source, aspect: float) -> list[int]:
    """The numbers of sound pictures, spread over the source, that are far from `aspect` (width / height)."""
    found = []
    for i in range(0, len(source), max(1, len(source) // _LOOKED_AT)):
        try:
            image = source.load(i)
        except BadImage:
            continue
        shape = image.width / image.height / aspect
        if max(shape, 1 / shape) > _STRONG:
            found.append(i)
    return found


def faces_kept(source: Source, numbers: list[int], aspect: float) -> tuple[int, int, int]:
    """How many of the pictures have a face box, and how many of these faces two crops keep that are not told of it.

    A face is kept if its centre lies in the crop. The crops are the smart one and a central one of the same size.
    """
    known = smart = central = 0
    for i in numbers:
        record = source.record(i)
        if record["box"] is None:
            continue
        image = source.load(i)
        left, top, right, bottom = record["box"]
        face = ((left + right) / 2, (top + bottom) / 2)
        x1, y1, x2, y2 = crop_region(image, aspect)
        x, y = (image.width - (x2 - x1)) / 2, (image.height - (y2 - y1)) / 2
        known += 1
        smart += _holds((x1, y1, x2, y2), face)
        central += _holds((x, y, image.width - x, image.height - y), face)
    return known, smart, central


def _holds(box: tuple[float, float, float, float], point: tuple[float, float]) -> bool:
    return box[0] <= point[0] < box[2] and box[1] <= point[1] < box[3]


def pair(image: Image.Image, record: dict, crop: EvalCrop) -> tuple:
    """The picture with its region drawn, and the crop."""
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    line = max(2, max(image.size) // 120)
    if record["box"]:
        draw.rectangle(record["box"], outline=_FACE, width=line)
    x1, y1, x2, y2 = crop.draw(image, record).box
    draw.rectangle((x1, y1, x2 - 1, y2 - 1), outline=_REGION, width=line)
    return drawn, crop(image, record)


if __name__ == "__main__":
    main()
