"""moeImouto (nagadomi's animeface-character-dataset), unpacked as released, to a prepared folder. Nothing is copied.

    python datasets/prepare_moeimouto.py --data_path animeface-character-dataset --out data/moeimouto --labels GLSIM

Pictures lie in class folders, <3 digits>_<name>/face_*.png. With the lists of GLSim (train.csv, val.csv, test.csv,
classid_classname.csv) the split is the one published with them. Without, components of near-identical faces are held
out by a fixed hash, and whole identities for open_val and open_test if asked.
"""

import os
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.images import SUFFIXES
from util.data.near_split import add_split, near_groups, pick_identities
from util.data.prepare import (
    Preparation,
    begin,
    find_below,
    folders_below,
    image_sizes,
    picture_folder,
    prepare_parser,
    read_table,
    require,
)
from util.run.args import count0, ratio
from util.run.errors import UserError, cli

WRITER = "prepare_moeimouto"
LISTS = ("train", "val", "test")
CLASSES = "classid_classname.csv"
ORIGIN = "the repository arkel23/GLSim, folder data/moe"
ARCHIVE = "the archive animeface-character-dataset"
CLASS_FOLDER = re.compile(r"\d{3}_.+")
PUBLISHED = {"rows": 14_397, "identities": 173}
PUBLISHED_SPLIT = {"train": 9_098, "val": 2_356, "test": 2_943}


def get_parser():
    parser = prepare_parser("Prepare moeImouto.", "folder the archive was unpacked in, or of its class folders")
    parser.add_argument(
        "--labels",
        metavar="DIR",
        help=f"folder of train, val, test.csv and {CLASSES}; default: looked for in DIR",
    )
    group = parser.add_argument_group("without lists")
    group.add_argument("--val_fraction", type=ratio, default=0.15, help="share of the near-identical groups in val")
    group.add_argument("--test_fraction", type=ratio, default=0.2, help="share of the near-identical groups in test")
    group.add_argument(
        "--open_identities", type=count0, default=0, help="identities in open_val, and as many others in open_test"
    )
    group.add_argument("--seed", type=int, default=0, help="draws the open identities")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    work = begin(args, WRITER, "moeImouto")
    root = work.root
    if args.test_fraction + args.val_fraction >= 1:
        raise UserError("--test_fraction and --val_fraction leave nothing to train on: lower them")
    labels = Path(args.labels) if args.labels else root
    require(labels, "the lists", ORIGIN)
    classes = find_below(labels, CLASSES)
    if classes is not None:
        add_listed(work, classes)
        work.finish(args.check, PUBLISHED | PUBLISHED_SPLIT, extra={"split": "published"})
        return
    if args.labels:
        raise UserError(f"{labels / CLASSES} is missing: it comes with {ORIGIN}; put it there, or leave out --labels")
    print(f"no lists: {CLASSES} is not under {root}: groups of near-identical faces are held out instead")
    add_folders(work, args)
    work.finish(args.check, PUBLISHED, extra={"split": "near-identical groups", "seed": str(args.seed)})


# --- the published split ----------------------------------------------------------------------------------------


def add_listed(work: Preparation, classes: Path) -> None:
    """Add a row for each picture of the lists beside `classes`."""
    names = dict(read_table(classes, ("class_id", "class_name")))
    listed, seen = [], set()
    for split in LISTS:
        path = require(classes.with_name(f"{split}.csv"), f"the {split} list", ORIGIN)
        for number, place in read_table(path, ("class_id", "dir")):
            if number not in names:
                work.drop("class id unknown", f"{number},{place}")
            elif names[number] != place.partition("/")[0]:
                work.drop("class id and folder disagree", f"{number},{place}")
            elif place in seen:
                work.drop("listed twice", f"{number},{place}")
            else:
                seen.add(place)
                listed.append((names[number], place, split))
    folder = picture_folder(work.root, sorted({name for name, *_ in listed}), ARCHIVE)
    stored = {name: stored_names(work.root / folder / name) for name in {name for name, *_ in listed}}
    places = [(stored[name].get(Path(place).stem, place), place) for name, place, _ in listed]
    sizes = image_sizes(work.root, [folder + there for there, _ in places])
    for (name, _, split), (there, place), size in zip(listed, places, sizes, strict=True):
        work.notes["stored in another format"] += there != place
        work.add({"sample_id": place, "file_name": folder + there, "identity": name, "split": split}, size)


def stored_names(folder: Path) -> dict[str, str]:
    """{"face_1_2_3": "<class>/face_1_2_3.jpg"} of a class folder: some copies hold JPEG files for the PNG listed."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return {}
    return {Path(name).stem: f"{folder.name}/{name}" for name in names if Path(name).suffix.lower() in SUFFIXES}


# --- class folders alone ----------------------------------------------------------------------------------------


def add_folders(work: Preparation, args) -> None:
    """Add all pictures of the class folders, split by components of near-identical faces."""
    top = next((folder for folder in folders_below(work.root) if class_folders(folder)), None)
    if top is None:
        raise UserError(
            f"{work.root} holds no class folders such as 000_hatsune_miku: they come with {ARCHIVE}; unpack it there"
        )
    rows = [
        {"sample_id": place, "file_name": (top / place).relative_to(work.root).as_posix(), "identity": name}
        for name in class_folders(top)
        for place in stored_names(top / name).values()
    ]
    sizes = image_sizes(work.root, [row["file_name"] for row in rows])
    for row, size in zip(rows, sizes, strict=True):
        work.add({**row, "split": "train"}, size)
    rows, work.rows = work.rows, []
    asked = {"open_val": args.open_identities, "open_test": args.open_identities}
    chosen = pick_identities((row["identity"] for row in rows), asked, args.seed)
    groups, bad = near_groups(work.root, rows)
    add_split(work, rows, groups, bad, {"test": args.test_fraction, "val": args.val_fraction}, chosen)


def class_folders(folder: Path) -> list[str]:
    """The folders called <3 digits>_<name> in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if CLASS_FOLDER.fullmatch(entry.name) and entry.is_dir())


if __name__ == "__main__":
    main()
