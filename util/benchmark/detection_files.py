"""What a detector found, from a file: COCO's result form, or the lists of the iCartoonFace challenge."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from util.benchmark.detection import FACE, NAMES
from util.data.prepare import parse_numbers, read_table
from util.run.errors import UserError
from util.run.untrusted import read_json

COLUMNS = (
    "image",
    "xmin",
    "ymin",
    "xmax",
    "ymax",
    "face",
    "score",
)  # of an iCartoonFace list, with or without a header


class Stored(NamedTuple):
    """What was found in a picture, as `util.benchmark.detection.Finds`."""

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray


def read_predictions(path: str | Path, files: Sequence[str]) -> tuple[list[Stored], int]:
    """What a file says of each of the pictures `files`, and how many of its finds are for other pictures.

    path: .json, a list of {"image_id", "category_id": 1 for a face, 2 for an eye, "bbox": [x, y, width, height],
    "score"}; or .csv with COLUMNS, whose sixth field is "face". A picture is named by its file name, by the last part
    of that where no other picture shares it, or by its number in `files`, from 1 (the ids of annotations.json).
    Raises UserError where the file is of another form, or names none of the pictures.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--predictions {path} does not exist: give a .json of COCO results or an iCartoonFace .csv")
    rows = _from_csv(path) if path.suffix.lower() == ".csv" else _from_json(path)
    numbers = _numbers(files)
    found: list[list] = [[] for _ in files]
    elsewhere = 0
    for picture, *find in rows:
        number = numbers.get(picture)
        if number is None:
            elsewhere += 1
        else:
            found[number].append(find)
    if rows and elsewhere == len(rows):
        raise UserError(
            f"{path} names none of the {len(files)} pictures ({rows[0][0]!r} is none): give their file names, such as "
            f"{files[0]!r}, or their numbers from 1"
        )
    return [_stored(own) for own in found], elsewhere


def _stored(finds: list) -> Stored:
    boxes = np.array([box for box, _, _ in finds], np.float64).reshape(-1, 4)
    return Stored(boxes, np.array([find[1] for find in finds], np.float64), np.array([f[2] for f in finds], np.int64))


def _numbers(files: Sequence[str]) -> dict[str | int, int]:
    """What may stand for a picture -> its place in `files`."""
    numbers: dict[str | int, int] = {}
    shared = set()
    for number, name in enumerate(files):
        last = name.rpartition("/")[2]
        if last in numbers:
            shared.add(last)
        numbers[last] = number
    for last in shared:
        del numbers[last]
    return numbers | {name: i for i, name in enumerate(files)} | {i + 1: i for i in range(len(files))}


def _from_json(path: Path) -> list[tuple]:
    try:
        listed = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): give a list of COCO results") from error
    if not isinstance(listed, list):
        raise UserError(f"{path} holds no list: give COCO results, [{{image_id, category_id, bbox, score}}, ...]")
    return [_coco_row(row, f"{path}, result {number}") for number, row in enumerate(listed, start=1)]


def _coco_row(row: dict, where: str) -> tuple:
    try:
        picture, label, (x, y, width, height), score = (
            row[key] for key in ("image_id", "category_id", "bbox", "score")
        )
        box = tuple(map(float, (x, y, x + width, y + height)))
        find = picture, box, float(score), label
        if not isinstance(picture, (str, int)):
            raise ValueError("a picture has a name or a number")
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"{where}: {type(error).__name__}: {error}: give image_id, category_id, bbox [x, y, width, height], score"
        ) from error
    if not isinstance(label, (int, float)) or isinstance(label, bool) or label not in NAMES:
        names = ", ".join(f"{number} is {name}" for number, name in NAMES.items())
        raise UserError(f"{where}: category_id {label!r} is not known: {names}")
    return find


def _from_csv(path: Path) -> list[tuple]:
    rows = []
    for number, (picture, *box, name, score) in enumerate(read_table(path, COLUMNS), start=1):
        if name != NAMES[FACE]:
            raise UserError(f"{path}, row {number}: {name!r} is not known: the sixth field of a find is {NAMES[FACE]}")
        *corners, value = parse_numbers([*box, score], float, f"{path}, row {number}")
        rows.append((picture, tuple(corners), value, FACE))
    return rows
