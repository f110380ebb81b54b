"""DAF:re (DanbooruAnimeFaces revamped, arXiv 2101.08674), unpacked as released, to a prepared folder.

    python datasets/prepare_dafre.py --data_path dafre --out data/dafre

Pictures lie at faces/<id modulo 1000, 4 digits>/<id>.jpg, lists in labels/. The published split is kept as it is:
`source` names a run of uploads of one character, and the published split cuts through some of them. With --grouped
it does not: what is in the test stays there, and the rest of the run leaves training. Nothing is copied.
"""

import sys
from bisect import bisect_left
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.prepare import (
    Preparation,
    begin,
    find_below,
    image_sizes,
    is_number,
    picture_folder,
    prepare_parser,
    read_table,
    require,
)
from util.run.errors import UserError, cli

WRITER = "prepare_dafre"
LISTS = ("train", "val", "test")
CLASSES = "classid_classname.csv"
ORIGIN = "labels.tar.gz of DAF:re"
NEAR = 5  # two uploads of a character whose numbers differ by no more belong to one run
PUBLISHED = {"rows": 463_437, "identities": 3_263, "train": 322_947, "val": 46_050, "test": 94_440}


def get_parser():
    parser = prepare_parser("Prepare DAF:re.", "folder the archives were unpacked in")
    parser.add_argument(
        "--labels",
        metavar="DIR",
        help=f"folder of train, val, test.csv and {CLASSES}; default: found under --data_path",
    )
    parser.add_argument(
        "--variant",
        choices=("faces", "fullMin256"),
        default="faces",
        help="face crops, or the whole illustrations with a short side of 256 px",
    )
    parser.add_argument(
        "--resplit",
        action="store_true",
        help="split each class anew by the published rule, in the order of the lists one after the other",
    )
    parser.add_argument(
        "--grouped",
        action="store_true",
        help=f"no run of uploads (a class, ids at most {NEAR} apart) in two splits: train yields to val, both to test",
    )
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    work = begin(args, WRITER, "DAF:re")
    root = work.root
    listed = read_lists(work, Path(args.labels) if args.labels else root, args.resplit)
    counts, published = {}, PUBLISHED
    if {row["split"] for row in listed} == set(LISTS):
        counts["classes split by another rule"] = by_another_rule(listed)
    if args.resplit:
        resplit(listed)
    add_rows(work, listed, args.variant)
    name_runs(work.rows)
    near = f"test pictures with one of their class within {NEAR} ids in train"
    counts[near] = near_train(work.rows)
    if args.grouped:
        keep_runs_whole(work)
        counts[f"{near}, grouped"] = near_train(work.rows)
        published = {name: PUBLISHED[name] for name in ("identities", "test")}  # what grouping leaves as it was
    work.finish(args.check, published, counts, {"variant": args.variant, "grouped": str(args.grouped)})


# --- the lists --------------------------------------------------------------------------------------------------


def read_lists(work: Preparation, labels: Path, all_needed: bool) -> list[dict]:
    """{"class", "dir", "split"} of each listed picture; class: the name. What is listed twice or unknown is dropped."""
    require(labels, "the label files", ORIGIN)
    classes = find_below(labels, f"labels/{CLASSES}", CLASSES)
    if classes is None:
        raise UserError(f"{labels / 'labels' / CLASSES} is missing: it comes with {ORIGIN}; put it there")
    names = dict(read_table(classes, ("class_id", "class_name")))
    if len(set(names.values())) < len(names):
        raise UserError(f"{classes} gives two classes one name: get the file again")
    listed, seen, absent = [], set(), []
    for split in LISTS:
        found = [path for tags in ("", "_tags") if (path := classes.with_name(f"{split}{tags}.csv")).is_file()]
        if not found:
            absent.append(f"{split}.csv")
            continue
        for number, place in read_table(found[0], ("class_id", "dir")):
            if number not in names:
                work.drop("class id unknown", f"{number},{place}")
            elif not is_upload(place):
                work.drop("folder and upload number disagree", f"{number},{place}")
            elif place in seen:
                work.drop("listed twice", f"{number},{place}")
            else:
                seen.add(place)
                listed.append({"class": names[number], "dir": place, "split": split})
    if absent and (all_needed or len(absent) == len(LISTS)):
        raise UserError(f"{', '.join(absent)} missing beside {classes}: they come with {ORIGIN}; put them there")
    if absent:
        print(f"no {', '.join(absent)} beside {classes}: prepared without")
    return listed


def is_upload(place: str) -> bool:
    """Whether a path is of the form 0291/1796291.jpg: the upload's number, in the folder of its last three digits."""
    folder, _, name = place.partition("/")
    upload = name.partition(".")[0]
    return is_number(upload) and Path(name).stem == upload and folder == f"{int(upload) % 1000:04d}"


def split_sizes(pictures: int) -> tuple[int, int, int]:
    """How many of a class go to train, val and test, as DAF:re was split.

    In binary, 0.7 + 0.1 is 0.7999999999999999, and so is the published split: 20 pictures give 14, 1 and 5.
    """
    train, both = int(pictures * 0.7), int(pictures * (0.7 + 0.1))
    return train, both - train, pictures - both


def by_class(listed: list[dict]) -> dict[str, list[dict]]:
    """The rows of each class, in order."""
    classes = defaultdict(list)
    for row in listed:
        classes[row["class"]].append(row)
    return classes


def by_another_rule(listed: list[dict]) -> int:
    """How many classes the lists do not split as `split_sizes` says."""
    return sum(
        split_sizes(len(rows)) != tuple(sum(row["split"] == split for row in rows) for split in LISTS)
        for rows in by_class(listed).values()
    )


def resplit(listed: list[dict]) -> None:
    """Split each class by the published rule, in the order of the rows."""
    for rows in by_class(listed).values():
        splits = [split for split, size in zip(LISTS, split_sizes(len(rows)), strict=True) for _ in range(size)]
        for row, split in zip(rows, splits, strict=True):
            row["split"] = split


def add_rows(work: Preparation, listed: list[dict], variant: str) -> None:
    """Add a row for each listed picture that is there."""
    places = [row["dir"] for row in listed]
    try:  # the folder itself was given
        folder = picture_folder(work.root, places, variant, depth=0)
    except UserError:
        origin = f"the archive {variant} of DAF:re"
        folder = picture_folder(work.root, [f"{variant}/{place}" for place in places], origin) + f"{variant}/"
    names = [folder + place for place in places]
    for row, name, size in zip(listed, names, image_sizes(work.root, names), strict=True):
        upload = Path(name).stem
        work.add({"sample_id": upload, "file_name": name, "identity": row["class"], "split": row["split"]}, size)


# --- runs of uploads --------------------------------------------------------------------------------------------


def name_runs(rows: list[dict]) -> None:
    """Fill `source`: the class, and the first upload of the run that a picture belongs to."""
    for name, uploads in uploads_of(rows).items():
        first = last = -1
        for upload, row in uploads:
            if last < 0 or upload - last > NEAR:
                first = upload
            last = upload
            row["source"] = f"{name} {first}"


def uploads_of(rows: list[dict]) -> dict[str, list[tuple[int, dict]]]:
    """(upload number, row) of each class, ascending."""
    classes = defaultdict(list)
    for row in rows:
        classes[row["identity"]].append((int(row["sample_id"]), row))
    return {name: sorted(own, key=lambda item: item[0]) for name, own in classes.items()}


def near_train(rows: list[dict]) -> int:
    """How many test pictures have one of their class in train that was uploaded at most NEAR numbers away."""
    near = 0
    for own in uploads_of(rows).values():
        train = [upload for upload, row in own if row["split"] == "train"]
        for upload in (upload for upload, row in own if row["split"] == "test"):
            place = bisect_left(train, upload - NEAR)
            near += place < len(train) and train[place] <= upload + NEAR
    return near


def keep_runs_whole(work: Preparation) -> None:
    """Leave each run in one split: train yields to val and both to test, so that the test stays as it was published.

    A class that would lose all its training pictures keeps them, and the rest of its runs yields to them.
    """
    splits_of = defaultdict(set)
    for row in work.rows:
        splits_of[row["source"]].add(row["split"])
    winner = {run: next(split for split in reversed(LISTS) if split in splits) for run, splits in splits_of.items()}
    trained = {row["identity"] for row in work.rows if winner[row["source"]] == "train"}
    for row in work.rows:
        if row["identity"] not in trained and row["split"] == "train":
            winner[row["source"]] = "train"
    rows, work.rows = work.rows, []
    for row in rows:
        stays = winner[row["source"]]
        if stays == row["split"]:
            work.rows.append(row)
        else:
            work.drop(f"{row['split']} yields to {stays}", row["sample_id"])


if __name__ == "__main__":
    main()
