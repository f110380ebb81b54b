"""iCartoonFace detection (arXiv 1907.13394, 2007.00899), unpacked as released, to a prepared folder: a row a face.

    python datasets/prepare_icartoonface_det.py --data_path icartoonface --out data/icartoonface_det

dettrain becomes train and val, detval (labelled after the challenge) becomes test. Either may be absent. Nothing is
copied.
"""

import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.images import SUFFIXES
from util.data.prepare import (
    Preparation,
    begin,
    find_below,
    image_sizes,
    parse_numbers,
    picture_folder,
    prepare_parser,
    read_table,
)
from util.data.roles import in_part
from util.run.args import ratio
from util.run.errors import UserError, cli

WRITER = "prepare_icartoonface_det"
PREFIX = "personai_icartoonface_"
COLUMNS = ("image", "xmin", "ymin", "xmax", "ymax")
UPDATED = "personai_icartoonface_dettrain_anno_updatedv1.0.csv"
ORIGINAL = "icartoonface_dettrain.csv"
TEST_LIST = "personai_icartoonface_detval.csv"
PUBLISHED_TRAIN = {"train pictures on disk": 50_000, "train rows listed": 91_160}
PUBLISHED_TEST = {"test pictures on disk": 10_000, "test rows listed": 18_647}


def get_parser():
    parser = prepare_parser(
        "Prepare iCartoonFace detection.", "folder the archives were unpacked in, with or without their outer folders"
    )
    parser.add_argument(
        "--val_fraction",
        type=ratio,
        default=0.05,
        help="share of the training pictures held out as val by a fixed hash of their names, from 0 to below 1",
    )
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    work = begin(args, WRITER, "iCartoonFace detection")
    root = work.root
    updated, original, test = (find_below(root, name) for name in (UPDATED, ORIGINAL, TEST_LIST))
    if updated is None and original is None and test is None:
        raise UserError(
            f"{root} holds none of {UPDATED} (with the download personai_icartoonface_dettrain_anno_updatedv1.0), "
            f"{ORIGINAL} (with personai_icartoonface_dettrain) and {TEST_LIST} (a download of its own): unpack one"
        )
    counts, published = {}, {}
    if updated is None and original is not None:
        print(f"warning: {UPDATED} is not under {root}: the first labels, {ORIGINAL}, are taken; they hold more faults")
    if updated is not None or original is not None:
        counts |= add_part(work, updated or original, "train", args.val_fraction)
        published |= PUBLISHED_TRAIN
    else:
        print(f"no training part: neither {UPDATED} nor {ORIGINAL} is under {root}")
    if test is not None:
        counts |= add_part(work, test, "test")
        published |= PUBLISHED_TEST
    else:
        print(f"no test part: {TEST_LIST}, a download of its own, is not under {root}")
    work.finish(args.check, published, counts)


def add_part(work: Preparation, listed: Path, split: str, val_fraction: float = 0.0) -> dict[str, int]:
    """Add a row for each face of a list; returns its counts."""
    rows = read_table(listed, COLUMNS)
    pictures = list(dict.fromkeys(row[0] for row in rows))
    folder = picture_folder(work.root, pictures, f"the download {PREFIX}{'detval' if split == 'test' else 'dettrain'}")
    sizes = dict(zip(pictures, image_sizes(work.root, [folder + name for name in pictures]), strict=True))
    held_out = dict(zip(pictures, in_part(pictures, "val", val_fraction), strict=True))
    faces, seen = Counter(), set()
    for number, (picture, *box) in enumerate(rows, start=1):
        corners = parse_numbers(box, float, f"{listed}, row {number}")
        face, faces[picture] = faces[picture], faces[picture] + 1
        if (picture, *corners) in seen:
            work.drop("repeated row", ",".join((picture, *box)))
            continue
        seen.add((picture, *corners))
        stem = Path(picture).stem.removeprefix(PREFIX)
        row = {"sample_id": f"{stem}#{face}", "file_name": folder + picture, "source": stem, "box": corners}
        work.add({**row, "split": "val" if held_out[picture] else split}, sizes[picture])
    on_disk = pictures_in(work.root / folder, pictures[0])
    name = "pictures without a face in the list"
    work.notes[f"{split} {name}"] += len(on_disk - set(pictures))
    return {f"{split} rows listed": len(rows), f"{split} pictures on disk": len(on_disk)}


def pictures_in(folder: Path, like: str) -> set[str]:
    """The pictures in a folder whose names begin like `like` does, up to its number: a flat archive shares folders."""
    stem = like.rpartition("_")[0]
    return {
        entry.name
        for entry in os.scandir(folder)
        if entry.name.startswith(stem) and os.path.splitext(entry.name)[1].lower() in SUFFIXES
    }


if __name__ == "__main__":
    main()
