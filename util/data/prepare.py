"""What the prepare scripts share: rows checked against the pictures, counts of what was kept and why the rest was not.

    work = Preparation("dafre", root, out)
    work.add({"sample_id": ..., "file_name": ..., "identity": ..., "split": ...}, size=(width, height))
    work.drop("label unknown", name)
    work.finish(args.check, published={"pictures": 463437})

A script reads an unpacked folder where it lies; nothing is copied. Running it again writes the same file.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from util.data.images import BadImage, image_size
from util.data.manifest import MANIFEST_NAME, SPLITS, is_inside, read_manifest, write_manifest
from util.run.args import Parser
from util.run.errors import UserError
from util.run.log import progress, write_json

EXAMPLES = 20  # of what was dropped, for each reason
REPORT_NAME = "preparation.json"
_DEPTH = 4  # folders below --data_path that an archive may have been unpacked in
_WIDE = 100  # a folder of more folders than this holds pictures, not archives
_PROBES = 64  # pictures of a list that are looked for to find their folder
_THREADS = 16  # reading headers waits for the disk
_AHEAD = 4096
_DIGITS = 18  # of the largest number of a picture or a class; such numbers fit in 64 bits


def prepare_parser(description: str, data_help: str) -> Parser:
    """The flags of every prepare script: --data_path, --out, --check."""
    parser = Parser(description)
    parser.add_argument("--data_path", required=True, metavar="DIR", help=data_help)
    parser.add_argument("--out", required=True, metavar="OUT", help="prepared folder to write: OUT/metadata.parquet")
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the counts with the published ones; exit status 1 where they differ",
    )
    return parser


def require(path: Path, what: str, origin: str) -> Path:
    """`path` if it is there; else a UserError that says what is missing and where it comes from."""
    if not path.exists():
        raise UserError(f"{path} is missing ({what}): it comes with {origin}; unpack it there")
    return path


def find_below(root: Path, *names: str) -> Path | None:
    """The first of `names` (files or folders, relative) in the shallowest folder that holds one; None if none does.

    It does not matter whether an archive was unpacked with or without its outer folder, nor into which subfolder.
    """
    found = (folder / name for folder in folders_below(root) for name in names if (folder / name).exists())
    return next(found, None)


def picture_folder(root: Path, names: Sequence[str], origin: str, depth: int = _DEPTH) -> str:
    """What stands before the listed names in a `file_name`: "" or "some/folders/".

    It is the shallowest folder, `root` or at most `depth` below it, in which some of the listed files or folders lie
    (`names`, relative; some of them, spread over the list, are looked for). UserError where there is none; origin:
    the download that has them.
    """
    if not names:
        raise UserError(f"no picture is listed for {root}: get the label files again")
    probes = names[:: max(1, len(names) // _PROBES)]
    for folder in folders_below(root, depth):
        if any(os.path.exists(folder / name) for name in probes):  # False also for what is no file name at all
            below = folder.relative_to(root).as_posix()
            return "" if below == "." else f"{below}/"
    raise UserError(
        f"{names[0]}, like the others that are listed, cannot be found under {root}: it comes with {origin}; "
        "unpack it there"
    )


def folders_below(root: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """`root` and the folders below it where archives may have been unpacked, the shallow ones first."""
    level = [root]
    for _ in range(depth):
        yield from level
        level = [below for folder in level for below in _subfolders(folder)]
    yield from level


def _subfolders(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder} cannot be listed ({error.strerror}): check --data_path") from error
    return [folder / name for name in names] if len(names) <= _WIDE else []


def image_sizes(root: Path, names: Sequence[str], label: str = "reading sizes") -> Iterable[tuple[int, int] | str]:
    """(width, height) in px of each picture, from its header and in order; or why there is none, a str."""

    def size(name: str) -> tuple[int, int] | str:
        if not is_inside(name, root):
            return "name leads outside the folder"  # a list may name any file of this machine: it is not even opened
        try:
            return image_size(root / name)
        except FileNotFoundError:
            return "file missing"
        except BadImage:
            return "file damaged"

    with ThreadPoolExecutor(_THREADS) as pool, progress(total=len(names), desc=label, unit="img") as bar:
        for first in range(0, len(names), _AHEAD):
            for found in pool.map(size, names[first : first + _AHEAD]):
                bar.update()
                yield found


class Preparation:
    """The rows of a prepared folder in the making.

    name: the writer's, kept in the file. root: folder that `file_name` is relative to. out: the prepared folder.
    """

    def __init__(self, name: str, root: Path, out: Path):
        self.name, self.root, self.out = name, root, out
        self.rows: list[dict] = []
        self.notes: Counter[str] = Counter()  # what was mended, or is worth knowing, but not dropped
        self._dropped: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}
        refuse_foreign(out, name)

    def drop(self, reason: str, example: str) -> None:
        """Count something that is left out, and keep some of it as examples."""
        self._dropped[reason] += 1
        examples = self._examples.setdefault(reason, [])
        if len(examples) < EXAMPLES:
            examples.append(example)

    def add(self, row: Mapping, size: tuple[int, int] | str | None = None) -> bool:
        """Take a row, or drop it with the reason; whether it was taken.

        size: (width, height) px of its picture, or why there is none, as `image_sizes` says it; None: not looked at.
        A box that reaches over the border is cut there and counted; one without an inside is dropped.
        """
        row = dict(row)
        if isinstance(size, str):
            self.drop(size, row["file_name"])
            return False
        if row.get("box") is not None:
            box, reason = fit_box(row["box"], size)
            if box is None:
                self.drop(reason, f"{row['sample_id']}: {list(row['box'])}")
                return False
            if reason:
                self.notes[reason] += 1
            row["box"] = box
        self.rows.append(row)
        return True

    def finish(
        self,
        check: bool = False,
        published: Mapping[str, int] | None = None,
        counts: Mapping[str, int] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Path:
        """Write metadata.parquet and preparation.json, and say what was kept and dropped.

        published: {name of a count: its published number}, compared where `check`. counts: further counts of the
        script's own, beside "rows", "pictures", "identities" and each split's. extra: for the file's metadata.
        A difference ends the process with status 1, after everything is written.
        """
        if not self.rows:
            reasons = ", ".join(f"{reason} {number}" for reason, number in self._dropped.items()) or "nothing was there"
            raise UserError(f"no row is left for {self.out} ({reasons}): check --data_path")
        inside = self.root.resolve() == self.out.resolve()
        path = write_manifest(
            self.out, self.rows, None if inside else str(self.root.resolve()), {"writer": self.name, **(extra or {})}
        )
        found = self._counts() | dict(counts or {})
        differences = [
            f"{name}: {found.get(name, 0)} found, {number} published"
            for name, number in (published or {}).items()
            if found.get(name, 0) != number
        ]
        write_json(
            self.out / REPORT_NAME,
            {
                "writer": self.name,
                "counts": found,
                "notes": self.notes,
                "dropped": self._dropped,
                "examples": self._examples,
                "published": dict(published or {}),
            },
        )
        self._say(path, found)
        if check:
            for line in differences:
                print(f"  differs  {line}")
            names = ", ".join(published or {}) or "nothing is published"
            print(f"  check    {'differs from' if differences else 'equals'} what is published ({names})")
            if differences:
                sys.exit(1)
        return path

    def _counts(self) -> dict[str, int]:
        splits = Counter(row["split"] for row in self.rows)
        return {
            "rows": len(self.rows),
            "pictures": len({row["file_name"] for row in self.rows}),
            "identities": len({row.get("identity") for row in self.rows} - {None}),
            **{split: splits[split] for split in SPLITS if splits[split]},
        }

    def _say(self, path: Path, found: Mapping[str, int]) -> None:
        def listed(counts: Mapping[str, int]) -> str:
            return ", ".join(f"{name} {number}" for name, number in counts.items() if number) or "none"

        print(f"{path}: {listed(found)}")
        print(f"  dropped  {listed(self._dropped)}")
        if any(self.notes.values()):
            print(f"  noted    {listed(self.notes)}")


def begin(args: argparse.Namespace, writer: str, what: str) -> Preparation:
    """The preparation that the flags of `prepare_parser` describe. what: the data set, for the error of no folder."""
    root = Path(args.data_path)
    if not root.is_dir():
        raise UserError(f"{root} does not exist: give the folder that {what} was unpacked in")
    return Preparation(writer, root, Path(args.out))


def fit_box(box: Sequence[float], size: tuple[int, int] | None) -> tuple[list[float] | None, str | None]:
    """The part of a box x1, y1, x2, y2 (px) that lies in a picture of `size` (width, height), and a remark.

    (box, None): it fits. (box, remark): it was cut at the border. (None, reason): nothing of it is left.
    """
    try:
        x1, y1, x2, y2 = map(float, box)
    except OverflowError:
        return None, "box outside the picture"
    if not (x1 < x2 and y1 < y2):  # also where one is no number
        return None, "degenerate box"
    if size is None:
        return [x1, y1, x2, y2], None
    cut = [max(x1, 0.0), max(y1, 0.0), min(x2, float(size[0])), min(y2, float(size[1]))]
    if not (cut[0] < cut[2] and cut[1] < cut[3]):
        return None, "box outside the picture"
    return cut, None if cut == [x1, y1, x2, y2] else "box cut at the border"


def refuse_foreign(out: Path, writer: str) -> None:
    """UserError where `out` holds a metadata.parquet that another program wrote."""
    if (out / MANIFEST_NAME).is_file() and read_manifest(out).metadata.get("writer") != writer:
        raise UserError(f"{out / MANIFEST_NAME} was written by another program: choose another --out, or remove it")


def read_table(path: Path, columns: Sequence[str], separator: str = ",") -> list[list[str]]:
    """The fields `columns` of the rows of a delimited text file whose first line may or may not be a header.

    A first line that names all of `columns` is the header; it says where they stand, and what else there is.
    Without one, a row holds just these fields. A row with another number of fields, and a file that is no text,
    are UserErrors that name the line. Quoted fields may hold the separator.
    """
    import csv

    rows, places, width = [], range(len(columns)), len(columns)
    with open_text(path) as file:
        lines = csv.reader(file, delimiter=separator)
        try:
            for row in lines:
                fields = [field.strip() for field in row]
                if not any(fields):
                    continue
                names = [field.lower() for field in fields]
                if lines.line_num == 1 and set(columns) <= set(names):
                    places, width = [names.index(column) for column in columns], len(names)
                elif len(fields) != width:
                    raise UserError(
                        f"{path}, line {lines.line_num}: {len(fields)} fields, not {width} ({', '.join(columns)}): "
                        "get the file again"
                    )
                else:
                    rows.append([fields[place] for place in places])
        except (UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{path}, line {lines.line_num + 1}: no text ({error}): get the file again") from error
    return rows


@contextmanager
def open_text(path: Path) -> Iterator[TextIO]:
    """A text file, whose first characters may be a byte order mark. UserError where it cannot be opened or is no text.

    Ends of lines are left as they are.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            yield file
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text ({error}): get the file again") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): get the file again") from error


def read_text(path: Path) -> str:
    """The whole of a text file, as `open_text` opens it."""
    with open_text(path) as file:
        return file.read()


def is_number(text: str) -> bool:
    """Whether a text is a number of pictures or classes: digits and nothing else, and not thousands of them."""
    return text.isdecimal() and len(text) <= _DIGITS


def parse_numbers(fields: Iterable[str], kind: Callable[[str], float], where: str) -> list[float]:
    """Fields as numbers; UserError that names the place for one that is none."""
    fields = list(fields)
    try:
        return [kind(field) for field in fields]
    except ValueError:
        raise UserError(f"{where}: {', '.join(fields)!r} are no numbers: get the file again") from None
