"""Kaggle splcher/animefacedataset: 63,632 anime faces without names, for pre-training and as strata of drawing eras.

    python datasets/prepare_splcher.py --data_path animefacedataset --out data/splcher --check

DIR holds images/<index>_<year>.jpg, as the archive unpacks. Nothing is copied. The year is the only thing known of a
picture: the column `style` holds its era, "2000-2004" with the default --era 5. Many pictures are there several times;
all are kept, but equal ones, pixel for pixel, get one `source` and go to one split.
"""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.images import BadImage
from util.data.pools import add_pool_args, local_folder, pixel_digests, pool_splits
from util.data.prepare import Preparation, prepare_parser, require
from util.run.args import Parser, count
from util.run.errors import cli

WRITER = "prepare_splcher"
ORIGIN = "the Kaggle data set splcher/animefacedataset (archive.zip)"
PUBLISHED = {"pictures": 63_632}
NAME = re.compile(r"(?P<index>\d+)_(?P<year>(?:19|20)\d\d)\.jpe?g", re.IGNORECASE)


def get_parser() -> Parser:
    parser = prepare_parser(
        "Prepare Kaggle splcher/animefacedataset: faces without names, strata by era.",
        "the unpacked archive: a folder that holds images/<index>_<year>.jpg",
    )
    add_pool_args(parser, val_fraction=0.05, test_fraction=0.05)
    parser.add_argument("--era", type=count, default=5, help="years that make one era; 1: each year is one")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    folder = local_folder(args.data_path)
    if not any(NAME.fullmatch(path.name) for path in folder.iterdir()):
        folder = require(folder / "images", "the folder of pictures", ORIGIN)
    pool_splits([], args.val_fraction, args.test_fraction)  # a wrong fraction is said before any work
    work = Preparation(WRITER, folder, Path(args.out))
    names = []
    for path in sorted(folder.iterdir()):
        if NAME.fullmatch(path.name):
            names.append(path.name)
        else:
            work.drop("name is not <index>_<year>.jpg", path.name)
    first: dict[str, str] = {}
    good, copies = [], 0
    for name, digest in zip(names, pixel_digests([folder / name for name in names]), strict=True):
        if isinstance(digest, BadImage):
            work.drop("file damaged", f"{name}: {digest.reason}")
            continue
        copies += first.setdefault(digest, name) != name
        good.append((name, digest))
    splits = pool_splits([digest for _, digest in good], args.val_fraction, args.test_fraction)
    for (name, digest), split in zip(good, splits, strict=True):
        facts = {"split": split, "source": first[digest], "style": era(name, args.era)}
        work.add({"sample_id": name, "file_name": name, **facts})
    eras = sorted({row["style"] for row in work.rows})
    per_era = {f"era {name}": sum(row["style"] == name for row in work.rows) for name in eras}
    work.finish(args.check, PUBLISHED, {**per_era, "copies of another": copies})


def era(name: str, years: int) -> str:
    """The era of "<index>_<year>.jpg", counted from 2000: "2000-2004" for 5 years, "2003" for 1."""
    year = int(NAME.fullmatch(name)["year"])
    first = year - (year - 2000) % years
    return str(first) if years == 1 else f"{first}-{first + years - 1}"


if __name__ == "__main__":
    main()
