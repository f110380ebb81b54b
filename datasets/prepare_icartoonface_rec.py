"""iCartoonFace recognition (arXiv 1907.13394), unpacked as released, to a prepared folder. Nothing is copied.

    python datasets/prepare_icartoonface_rec.py --data_path icartoonface --out data/icartoonface_rec

The training part becomes train, val (the same identities) and open_val (others); the official test becomes
open_test, with its trial list and its distractors in protocols/icartoonface.parquet. Either part may be absent.
"""

import ast
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.near_split import add_split, near_groups, pick_identities
from util.data.prepare import (
    Preparation,
    begin,
    find_below,
    fit_box,
    image_sizes,
    is_number,
    open_text,
    parse_numbers,
    picture_folder,
    prepare_parser,
)
from util.data.trials import ICARTOONFACE, write_protocol
from util.run.args import count, count0, ratio
from util.run.errors import UserError, cli
from util.run.files import write_text

WRITER = "prepare_icartoonface_rec"
PREFIX = "personai_icartoonface_"
TRAIN_LIST = "icartoonface_rectrain_det.txt"
TEST_LIST = "icartoonface_rectest_det.txt"
TEST_INFO = "icartoonface_rectest_info.txt"
NAMES = "icartoonface_rectest_idInfo.txt"  # in spite of its name: of the identities to train on
TRAIN_ORIGIN = "the download personai_icartoonface_rectrain"
TEST_ORIGIN = "the download personai_icartoonface_rectest"
OPEN_LABEL = "test_"  # the test numbers its identities by itself: they must never meet those of the training part
PUBLISHED_TRAIN = {"train pictures": 389_678, "train identities": 5_013}
PUBLISHED_TEST = {"test pictures": 22_500, "distractors": 2_500, "test faces": 20_000, "test identities": 2_000}


def get_parser():
    parser = prepare_parser(
        "Prepare iCartoonFace recognition.", "folder the archives were unpacked in, with or without their outer folders"
    )
    parser.add_argument(
        "--val_identities", type=count0, default=100, help="training identities set aside as open_val, drawn by seed"
    )
    parser.add_argument(
        "--val_fraction",
        type=ratio,
        default=0.05,
        help="share of the groups of near-identical frames held out as val, fraction from 0 to below 1",
    )
    parser.add_argument(
        "--groups",
        choices=("phash", "blocks"),
        default="phash",
        help="what is held out as a whole: components of near-identical faces and frames, which decodes every picture; "
        "or runs of file numbers, which is fast but only a guess at the albums",
    )
    parser.add_argument("--block", type=count, default=20, help="file numbers of an identity in a run, for blocks")
    parser.add_argument("--test_only", action="store_true", help="leave out the training part")
    parser.add_argument("--seed", type=int, default=0, help="draws the open_val identities")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    work = begin(args, WRITER, "iCartoonFace recognition")
    root, out = work.root, work.out
    train_list = None if args.test_only else find_below(root, TRAIN_LIST)
    info, test_list, names = (find_below(root, name) for name in (TEST_INFO, TEST_LIST, NAMES))
    if train_list is None and info is None and test_list is None:
        raise UserError(
            f"{root} holds none of {TRAIN_LIST} (with the download personai_icartoonface_rectrain), {TEST_INFO} (a "
            f"download of its own) and {TEST_LIST} (with personai_icartoonface_rectest): unpack one of the parts there"
        )
    counts, published, trials = {}, {}, None
    named = read_names(names) if names is not None and train_list is not None else None
    if train_list is not None:
        counts |= add_train(work, train_list, args)
        published |= PUBLISHED_TRAIN
    else:
        print("no training part: " + ("--test_only" if args.test_only else f"{TRAIN_LIST} is not under {root}"))
    if info is not None:
        trials = add_test(work, info, test_list, counts)
        published |= PUBLISHED_TEST
    elif test_list is not None:
        print(f"no test labels: {TEST_INFO}, a download of its own, is not under {root}: no identities, no trials")
        add_unlabelled_test(work, test_list, counts)
        published["test pictures"] = PUBLISHED_TEST["test pictures"]
    else:
        print(f"no test part: neither {TEST_INFO} nor {TEST_LIST} is under {root}")
    if work.rows:  # before metadata.parquet: where that is, the rest is
        write_names(work, named, counts)
        write_trials(out, trials)
    work.finish(args.check, published, counts, {"groups": args.groups, "seed": str(args.seed)})


# --- training part ----------------------------------------------------------------------------------------------


def add_train(work: Preparation, listed: Path, args) -> dict[str, int]:
    """Add the rows of the training list, split; returns the counts that are published."""
    lines = read_lines(listed, (5,), "file, x1, y1, x2, y2")
    folder = picture_folder(work.root, [fields[0] for _, fields in lines], TRAIN_ORIGIN)
    first = len(work.rows)
    seen = set()
    names = [folder + fields[0] for _, fields in lines]
    for (number, fields), name, size in zip(lines, names, image_sizes(work.root, names), strict=True):
        identity = identity_of(fields[0])
        if identity is None:
            work.drop("name without an identity", fields[0])
        elif fields[0] in seen:
            work.drop("repeated row", fields[0])
        else:
            seen.add(fields[0])
            box = parse_numbers(fields[1:], int, f"{listed}, line {number}")
            row = {"sample_id": sample_id(fields[0]), "file_name": name, "identity": identity}
            work.add({**row, "split": "train", "box": box}, size)
    rows = work.rows[first:]
    del work.rows[first:]
    split_train(work, rows, args)
    return {
        "train pictures": len(rows),
        "train identities": len({row["identity"] for row in rows}),
    }


def identity_of(name: str) -> str | None:
    """ "..._rectrain_00006/..._rectrain_00006_0000000.jpg" -> "00006", the folder's number; None where they differ."""
    fields = name.split("_")
    if len(fields) < 8 or not fields[6].isdigit() or not fields[3].startswith(fields[6] + "/"):
        return None
    return fields[6]


def sample_id(name: str) -> str:
    """ "a/personai_icartoonface_rectest_0000000.jpg" -> "rectest_0000000"."""
    return Path(name).stem.removeprefix(PREFIX)


def split_train(work: Preparation, rows: list[dict], args) -> None:
    """Give the rows their splits and put them back; `source` is what was held out or kept as a whole."""
    chosen = pick_identities((row["identity"] for row in rows), {"open_val": args.val_identities}, args.seed)
    if not args.val_fraction and not chosen:
        work.rows += rows
        return
    if args.groups == "phash":
        groups, bad = near_groups(work.root, rows)
    else:
        groups, bad = [block_of(row["sample_id"], args.block) for row in rows], ()
    add_split(work, rows, groups, bad, {"val": args.val_fraction}, chosen)


def block_of(name: str, length: int) -> str:
    """ "rectrain_00006_0000047" -> "rectrain_00006 2", its run of `length` file numbers."""
    stem, _, number = name.rpartition("_")
    return f"{stem} {int(number) // length}" if is_number(number) else name


def read_names(path: Path) -> list[tuple[str, str, str]]:
    """(identity, name, url or "") of each line, which is a Python dict as it prints itself, not JSON."""
    entries = []
    for number, line in text_lines(path):
        try:
            entry = ast.literal_eval(line)
            entries.append((entry["id"].rsplit("_", 1)[-1], str(entry["name"]), entry.get("url") or ""))
        except Exception as error:  # the parser's own limits are RecursionError and MemoryError
            raise UserError(f"{path}, line {number}: no dict with id, name and url: get the file again") from error
    return entries


def write_names(work: Preparation, named: list[tuple[str, str, str]] | None, counts: dict[str, int]) -> None:
    """Write OUT/identities.csv, their names; without any, that of an earlier run is removed."""
    path = work.out / "identities.csv"
    if named is None:
        path.unlink(missing_ok=True)
        return
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("identity", "name", "url"))
    writer.writerows(named)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, file.getvalue())
    identities = {row["identity"] for row in work.rows if row["split"] != "open_test"}
    counts["identities without a name"] = len(identities - {identity for identity, *_ in named})


# --- test part --------------------------------------------------------------------------------------------------


def add_test(work: Preparation, info: Path, test_list: Path | None, counts: dict[str, int]) -> dict[str, list]:
    """Add the official test; returns its protocol, as `write_protocol` takes it."""
    lines = read_lines(info, (6, 2), "file, x1, y1, x2, y2, label or probe, gallery")
    pictures = [(number, fields) for number, fields in lines if len(fields) == 6]
    pairs = [fields for _, fields in lines if len(fields) == 2]
    fallback = read_boxes(test_list) if test_list else {}
    folder = picture_folder(work.root, [fields[0] for _, fields in pictures], TEST_ORIGIN)
    labels = {}
    names = [folder + fields[0] for _, fields in pictures]
    for (number, fields), name, size in zip(pictures, names, image_sizes(work.root, names), strict=True):
        where = f"{info}, line {number}"
        *box, label = parse_numbers(fields[1:], int, where)
        if label < -1:
            raise UserError(f"{where}: the label {label} is neither -1 nor a number from 0: get the file again")
        if sample_id(fields[0]) in labels:
            work.drop("repeated row", fields[0])
            continue
        if fit_box(box, size if isinstance(size, tuple) else None)[0] is None and fields[0] in fallback:
            box = fallback[fields[0]]
            work.notes[f"box taken from {TEST_LIST}"] += 1
        identity = None if label == -1 else f"{OPEN_LABEL}{label}"
        row = {"sample_id": sample_id(fields[0]), "file_name": name, "identity": identity}
        if work.add({**row, "split": "open_test", "box": box}, size):
            labels[row["sample_id"]] = label
    counts["test pictures"] = len(labels)
    counts["distractors"] = sum(label == -1 for label in labels.values())
    counts["test faces"] = len(labels) - counts["distractors"]
    counts["test identities"] = len(set(labels.values()) - {-1})
    trials = make_trials(work, pairs, labels)
    counts["trials"] = trials["kind"].count("trial")
    return trials


def make_trials(work: Preparation, pairs: list[list[str]], labels: dict[str, int]) -> dict[str, list]:
    """The listed pairs in the file's order, then the distractors."""
    trials = []
    for pair in pairs:
        a, b = map(sample_id, pair)
        if a not in labels or b not in labels:
            work.drop("trial of a picture that is not there", " ".join(pair))
        elif labels[a] == -1 or labels[a] != labels[b]:
            work.drop("trial of two identities", " ".join(pair))
        else:
            trials.append((a, b, 1, "trial"))
    trials += [(name, None, 0, "distractor") for name, label in labels.items() if label == -1]
    columns = zip(*trials, strict=True) if trials else ((), (), (), ())
    return dict(zip(("id_a", "id_b", "label", "kind"), map(list, columns), strict=True))


def add_unlabelled_test(work: Preparation, test_list: Path, counts: dict[str, int]) -> None:
    """Add the test pictures with their boxes, where the label file is not there."""
    boxes = read_boxes(test_list)
    folder = picture_folder(work.root, list(boxes), TEST_ORIGIN)
    names = [folder + name for name in boxes]
    taken = [
        work.add({"sample_id": sample_id(name), "file_name": name, "split": "open_test", "box": box}, size)
        for name, box, size in zip(names, boxes.values(), image_sizes(work.root, names), strict=True)
    ]
    counts["test pictures"] = sum(taken)


def read_boxes(path: Path) -> dict[str, list[float]]:
    """{file: box} of icartoonface_rectest_det.txt."""
    lines = read_lines(path, (5,), "file, x1, y1, x2, y2")
    return {fields[0]: parse_numbers(fields[1:], int, f"{path}, line {number}") for number, fields in lines}


def write_trials(out: Path, trials: dict[str, list] | None) -> None:
    """Write the protocol, or remove that of an earlier run which the present data do not have."""
    if trials is None:
        (out / "protocols" / f"{ICARTOONFACE}.parquet").unlink(missing_ok=True)
    else:
        write_protocol(out, ICARTOONFACE, trials)


# --- both -------------------------------------------------------------------------------------------------------


def read_lines(path: Path, widths: tuple[int, ...], columns: str) -> list[tuple[int, list[str]]]:
    """(line number, fields) of each line of a file whose fields stand apart by blanks or tabs."""
    lines = [(number, line.split()) for number, line in text_lines(path)]
    for number, fields in lines:
        if len(fields) not in widths:
            raise UserError(f"{path}, line {number}: {len(fields)} fields, not {columns}: get the file again")
    return lines


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of each line that is not blank."""
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line.strip()


if __name__ == "__main__":
    main()
