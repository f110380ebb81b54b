"""Semantic maps of a data set: where in each picture the face, the eyes and the figure are.

    python datasets/prepare_maps.py --data_path DIR
    python datasets/prepare_maps.py --data_path DIR --maps face eyes --finder cascade:lbpcascade_animeface.xml

writes DIR/maps/NAME.npy (or OUT/NAME.npy), uint8 (N, 32, 32) over the whole picture, 0..255 the share of a cell that
is covered, for all rows of all splits. Faces and eyes are those of the metadata, else of the finder; the figure is
the alpha channel, else the mask_file, else an estimate (`util.data.foreground`). maps.json says how each was had, and
overview.png is to be looked at. Stopped and started again, it goes on where it was, to the same bytes.
"""

import argparse
import sys
from collections import Counter
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from models_finders import KINDS, finder_parts, open_finder
from util.data.faces import find_faces
from util.data.hub import PREFIX
from util.data.images import BadImage
from util.data.map_rows import MAP_NAMES, MapChunks
from util.data.maps import ROWS_FILE, file_stamp, read_map, row_keys
from util.data.pack_journal import CHUNK, Journal, difference, list_bad, write_chunks, write_error
from util.data.packed import MAP_CELLS, checksum
from util.data.sheet import sheet
from util.data.sources import LABELS, MAPS_FOLDER, MAPS_NOTE, FolderSource, open_folder
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.files import write_atomically
from util.run.log import provenance, write_json
from util.run.untrusted import read_json

OVERVIEW = "overview.png"
DATA, SETTINGS = ("samples", "fingerprint", "stamp"), ("finder", "finder_files", "min_score")  # of a plan
NO_MAP = "none"
_BLOCK = 4096  # maps that are copied at once
_TRIPLES = 4  # pictures side by side in the overview
_FACE, _EYES, _FIGURE = (255, 60, 60), (60, 220, 255), (60, 60, 255)  # tints


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser("Draw semantic maps of a data set: where in each picture the face, the eyes, the figure are")
    add = parser.add_argument
    add("--data_path", required=True, metavar="DIR", help="prepared folder, class folders, or folder of images")
    add("--maps", nargs="+", choices=MAP_NAMES, default=list(MAP_NAMES), help="which maps to make")
    add(
        "--finder",
        metavar="SPEC",
        help=f"what looks for faces where the metadata has none: {', '.join(KINDS)}, several joined by +",
    )
    # above the finders' own: a map of the wrong place misleads more than an empty one
    add("--min_score", type=flags.fraction, default=0.5, help="faces found below this score are left out, 0..1")
    add("--out", metavar="DIR", help="folder to write; default: DIR/maps of the data")
    add("--labels", choices=LABELS, default="auto", help="what a nested folder of images means, as in training")
    add("--num_workers", "--workers", type=flags.count0, default=2, help="processes; the maps do not depend on it")
    add("--max_bad", type=flags.fraction, default=0.01, help="share of unreadable images above which it stops, 0..1")
    add("--sheet", type=flags.count0, default=24, help=f"pictures in {OVERVIEW}; 0: no sheet")
    add("--overwrite", action="store_true", help="replace maps of other data or other flags")
    return parser.parse_args(argv)


class MapJournal(Journal):
    """The journal of a drawing of maps: MAPS/maps.json.part and MAPS/maps.json.part.jsonl."""

    work = "drawing of maps"

    def __init__(self, folder: Path, plan: dict, overwrite: bool):
        size = plan["samples"] * len(plan["maps"]) * MAP_CELLS**2
        super().__init__(folder / MAPS_NOTE, plan, size, overwrite)
        self.bad_list = folder / "bad_images.jsonl"


def open_data(data_path: str, labels: str) -> FolderSource:
    """All rows of a folder. Raises UserError where there is none."""
    if data_path.startswith(PREFIX) or Path(data_path).is_file():
        raise UserError(
            f"{data_path} is not a folder of pictures, which maps are drawn for: give the folder (a packed file takes "
            "its maps from the folder that is packed)"
        )
    return FolderSource(data_path, *open_folder(data_path, labels))


def settings(args: argparse.Namespace) -> dict:
    """What the maps depend on beside the data."""
    if not args.finder:
        return dict.fromkeys(SETTINGS)
    files = [Path(part.partition(":")[2]) for part in finder_parts(args.finder)]
    # weights of the Hub are told by their name and revision
    sums = [checksum(path.read_bytes()).hex() if path.is_file() else None for path in files]
    return dict(zip(SETTINGS, (args.finder, sums, args.min_score), strict=True))


def noted(folder: Path) -> dict:
    """What maps.json says; {} where there is none."""
    path = folder / MAPS_NOTE
    if not path.is_file():
        return {}
    try:
        note = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it, and make the maps again") from error
    if not isinstance(note, dict) or not {"data", "maps"} <= note.keys():
        raise UserError(f"{path} is no note of maps: remove it, and make the maps again")
    return note


def missing_maps(note: dict, data: dict, chosen: dict, args: argparse.Namespace, folder: Path) -> list[str]:
    """Those of --maps that are not there yet. Raises UserError where others are, of other data or flags."""
    if not note or args.overwrite:
        return args.maps
    done = [name for name in args.maps if name in note["maps"] and (folder / f"{name}.npy").is_file()]
    changed = [difference(note["data"], data), *(difference(note["maps"][name]["settings"], chosen) for name in done)]
    if any(changed):
        what = next(filter(None, changed))
        raise UserError(
            f"{folder} has maps of other data or with other flags ({what}): give another --out, or --overwrite"
        )
    return [name for name in args.maps if name not in done]


def finish(source: FolderSource, journal: MapJournal, note: dict, args: argparse.Namespace) -> dict:
    """Give the maps their files, maps.json last; returns what it says. note: what it said before."""
    folder, names = journal.out.parent, journal.plan["maps"]
    data, chosen = ({key: journal.plan[key] for key in keys} for keys in (DATA, SETTINGS))
    if note.get("data") != data:  # the rows are others: no old map may pass for one of theirs
        journal.out.unlink(missing_ok=True)
        for name in note.get("maps", ()):
            (folder / f"{name}.npy").unlink(missing_ok=True)
        note = {}
    drawn = np.memmap(journal.part, np.uint8, "r", shape=(len(source), len(names), MAP_CELLS, MAP_CELLS))
    for column, name in enumerate(names):
        write_atomically(folder / f"{name}.npy", partial(_write_map, drawn, column))
    write_atomically(folder / ROWS_FILE, lambda path: _write_array(path, row_keys(source.column("sample_id"))))
    origins = [Counter() for _ in names]
    for row in journal.rows():
        for counter, origin in zip(origins, ["unreadable"] * len(names) if isinstance(row, str) else row, strict=True):
            counter[origin] += 1
    made = {
        name: {
            "settings": chosen,
            "origins": dict(origins[column]),
            "covered": float(np.mean([block[:, column].mean() for block in _blocks(drawn)])) / 255,
        }
        for column, name in enumerate(names)
    }
    sums = {name: checksum(read_map(folder / f"{name}.npy")).hex() for name in names}
    stamps = {name: file_stamp(folder / f"{name}.npy") for name in names}
    note = {
        "data": data,
        "maps": {**note.get("maps", {}), **made},
        "checksums": {**note.get("checksums", {}), **sums},
        "stamps": {**note.get("stamps", {}), **stamps},
        "provenance": provenance(vars(args), torch.device("cpu"), source.fingerprint),
    }
    list_bad(journal, source)
    write_json(journal.out, note)
    journal.discard()
    return note


def _blocks(drawn: np.ndarray):
    return (drawn[first : first + _BLOCK] for first in range(0, len(drawn), _BLOCK))


def _write_map(drawn: np.ndarray, column: int, path: Path) -> None:
    shape = (len(drawn), MAP_CELLS, MAP_CELLS)
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in _blocks(drawn):
            file.write(np.ascontiguousarray(block[:, column]))


def _write_array(path: Path, values: np.ndarray) -> None:
    with open(path, "wb") as file:  # np.save would append .npy to the name
        np.save(file, values, allow_pickle=False)


def report(folder: Path, note: dict, names: list[str]) -> None:
    """Say for each map where it comes from, shares of the rows."""
    for name in names:
        origins = note["maps"][name]["origins"]
        total = sum(origins.values())
        having = total - origins.get(NO_MAP, 0) - origins.get("unreadable", 0)
        listed = ", ".join(f"{100 * n / total:.1f} % {origin}" for origin, n in sorted(origins.items()))
        covered = note["maps"][name]["covered"]
        print(f"{name}: {100 * having / total:.1f} % of {total} rows have a map: {listed}; it covers {covered:.1%}")
    print(f"written to {folder}; {OVERVIEW} is to be looked at")


def overview(source: FolderSource, folder: Path, count: int) -> Image.Image:
    """The picture, its face and eyes, and its figure, for `count` rows evenly spread; pictures that are bad are left
    out."""
    maps = {name: read_map(folder / f"{name}.npy") for name in MAP_NAMES if (folder / f"{name}.npy").is_file()}
    cells = []
    for i in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist():
        try:
            picture = source.load(i)
        except BadImage:
            continue
        picture.thumbnail((192, 192))
        parts = [(maps[name][i], tint) for name, tint in (("face", _FACE), ("eyes", _EYES)) if name in maps]
        figure = [(255 - maps["foreground"][i], _FIGURE)] if "foreground" in maps else []
        cells += [picture, _tinted(picture, parts), _tinted(picture, figure)]
    rows = [cells[first : first + 3 * _TRIPLES] for first in range(0, len(cells), 3 * _TRIPLES)]
    titles = ["picture", "face and eyes", "figure"] * min(_TRIPLES, len(cells) // 3)
    return sheet(rows or [[None]], column_titles=titles, title=source.name, cell=128)


def _tinted(picture: Image.Image, parts: list[tuple[np.ndarray, tuple[int, int, int]]]) -> Image.Image:
    for shares, tint in parts:
        mask = Image.fromarray(np.asarray(shares)).resize(picture.size, Image.Resampling.BILINEAR)
        picture = Image.composite(Image.new("RGB", picture.size, tint), picture, mask.point(lambda share: share * 0.6))
    return picture


def draw(args: argparse.Namespace) -> None:
    """Draw the maps that the flags say, or go on with it."""
    source = open_data(args.data_path, args.labels)
    folder = Path(args.out) if args.out else source.manifest.folder / MAPS_FOLDER
    find = partial(_find, open_finder(args.finder), args.min_score) if args.finder else None
    data = dict(zip(DATA, (len(source), source.fingerprint, source.stamp()), strict=True))
    chosen, note = settings(args), noted(folder)
    names = missing_maps(note, data, chosen, args, folder)
    plan = {**data, **chosen, "maps": names, "chunk": CHUNK}
    if names:
        folder.mkdir(parents=True, exist_ok=True)
        with MapJournal(folder, plan, args.overwrite) as journal:
            if journal.chunks:
                print(f"{folder}: going on after {len(journal.chunks)} chunks of {CHUNK} rows")
            write_chunks(MapChunks(source, journal.part, names, find), journal, args.num_workers, args.max_bad)
            note = finish(source, journal, noted(folder), args)  # another drawing may have ended meanwhile
    else:
        if (folder / f"{MAPS_NOTE}.part.jsonl").is_file():  # it was killed when all but this was done
            with MapJournal(folder, plan, overwrite=True) as journal:
                journal.discard()
        print(f"{folder}: complete already, nothing to do")
    if args.sheet and (names or not (folder / OVERVIEW).is_file()):
        write_atomically(folder / OVERVIEW, lambda path: overview(source, folder, args.sheet).save(path, "PNG"))
    report(folder, note, args.maps)


def _find(finder, min_score: float, image: Image.Image, name: str) -> list:
    return find_faces(image, finder, name=name, min_score=min_score)


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    try:
        draw(args)
    except OSError as error:
        raise write_error(Path(args.out or args.data_path), error) from error


if __name__ == "__main__":
    main()
