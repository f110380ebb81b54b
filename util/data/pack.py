"""Pack a data set: decode every picture once, into one file of canvases that every script reads as --data_path.

    python -m util.data.pack --data_path DIR --out data.pack --canvas 256
    python -m util.data.pack --out data.pack --check

The short side of a picture becomes the side of the canvas (bicubic, antialiased), the rest of the long side is cut
off, around the character (`util.data.images.crop_region`) or in equal parts. All splits are packed. A packing that
was stopped goes on where it was when the command is given again, and its file does not depend on how often that
happened nor on the number of workers: pixels go to their place in FILE.part, and what is done to FILE.part.jsonl.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from util.data.arrow_sink import ArrowSink
from util.data.augment import View
from util.data.face_crop import visible_region
from util.data.images import crop_region
from util.data.manifest import SLICE
from util.data.pack_journal import CHUNK, Chunks, Journal, difference, list_bad, write_chunks, write_error
from util.data.pack_origin import Origin, open_origin
from util.data.packed import (
    ALIGNMENT,
    CHUNKS,
    LARGEST_CANVAS,
    MAP_CELLS,
    PACKED_SCHEMA,
    SAMPLES,
    Header,
    PackedFile,
    aligned,
    end_of_pixels,
    new_checksum,
)
from util.data.sources import LABELS, Source
from util.run import args as flags
from util.run.errors import UserError, cli
from util.run.log import progress

CROPS = ("smart", "centre")
_ROW_BYTES = 1024  # of the sections for a sample, about; maps come on top
BATCH_ROWS = 2**24  # of the section of samples that lie in one piece: 3 GB while they are written

Box = tuple[int, int, int, int]


def shown_region(
    picture: Image.Image, box: list[float] | None, crop: str = "smart", face_padding: float | None = None
) -> Box:
    """The square x1, y1, x2, y2 (px) of a picture that its canvas shows.

    box: the face, px, if it is known. face_padding: take it from the square around the face (`util.data.face_crop`),
    not from the whole picture; None: whole pictures. Raises ValueError where that square is outside the picture.
    """
    left, top, right, bottom = (0, 0, *picture.size)
    if face_padding is not None and box is not None:
        left, top, right, bottom = visible_region(box, face_padding, picture.size)
        if left >= right or top >= bottom:
            raise ValueError(f"its face box {box} lies outside the picture of {picture.width} x {picture.height} px")
        picture, box = picture.crop((left, top, right, bottom)), _shift(box, left, top)
    if crop == "smart":
        x1, y1, x2, y2 = crop_region(picture, 1.0, box)
    else:
        side = min(picture.size)
        x1, y1 = (picture.width - side) // 2, (picture.height - side) // 2
        x2, y2 = x1 + side, y1 + side
    return left + x1, top + y1, left + x2, top + y2


def carried_box(box: list[float] | None, region: Box, canvas: int) -> list[float] | None:
    """A box (px of the picture) in px of the canvas that shows `region`, cut at its border; None if none of it is seen.

    canvas: px.
    """
    if box is None:
        return None
    x1, y1, x2, y2 = (np.array(_shift(box, *region[:2])) * (canvas / (region[2] - region[0]))).clip(0, canvas).tolist()
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def _shift(box: list[float], left: float, top: float) -> list[float]:
    return [box[0] - left, box[1] - top, box[2] - left, box[3] - top]


class Canvases(Chunks):
    """The canvases of a source as chunks of rows; what is known of one is [x1, y1, x2, y2, width, height], its region
    and the size of its picture in px."""

    def __init__(self, source: Source, path: Path, canvas: int, crop: str, face_padding: float | None):
        super().__init__(source, path, (canvas, canvas, 3), ALIGNMENT)
        self.canvas, self.crop, self.face_padding = canvas, crop, face_padding

    def fill(self, values: np.ndarray, i: int) -> list[int]:
        """Draw canvas `i` into `values`. Raises BadImage, and ValueError where a box is outside the picture."""
        picture = self.source.load(i)
        region = shown_region(picture, self.source.record(i)["box"], self.crop, self.face_padding)
        values[:] = picture.resize((self.canvas, self.canvas), Image.Resampling.BICUBIC, box=region)
        return [*region, *picture.size]


def packed_tables(origin: Origin, journal: Journal) -> Iterator[pa.Table]:
    """The section "samples", BATCH_ROWS of it at a time: the manifest, its boxes in px of the canvases, and the columns
    of PACKED_SCHEMA."""
    facts, samples = journal.rows(), len(origin.table)
    for start in range(0, samples, BATCH_ROWS):
        parts, end = [], min(start + BATCH_ROWS, samples)
        for first in range(start, end, SLICE):
            part, keys = (whole.slice(first, min(SLICE, end - first)) for whole in (origin.table, origin.keys))
            parts += _packed_part(part, keys, list(islice(facts, len(part))), journal.plan["canvas"]).to_batches()
        yield pa.Table.from_batches(parts, PACKED_SCHEMA).combine_chunks()


def _packed_part(table: pa.Table, keys: pa.ChunkedArray, facts: list, canvas: int) -> pa.Table:
    """Some rows of it. keys, facts: theirs; canvas: px."""
    regions = [None if isinstance(fact, str) else fact[:4] for fact in facts]
    boxes, eyes = (table.column(name).to_pylist() for name in ("box", "eyes"))
    changed = {
        "box": [region and carried_box(box, region, canvas) for box, region in zip(boxes, regions, strict=True)],
        "eyes": [
            region and ([carried for eye in found or () if (carried := carried_box(eye, region, canvas))] or None)
            for found, region in zip(eyes, regions, strict=True)
        ],
        "mask_file": [None] * len(facts),  # a mask lies over the picture, not over the canvas
        "bad": [fact if isinstance(fact, str) else None for fact in facts],
        "region": regions,
        "picture_size": [None if isinstance(fact, str) else fact[4:] for fact in facts],
    }
    kept = {"split_key": keys, **{name: table.column(name) for name in table.column_names}}
    columns = [
        pa.array(changed[field.name], field.type) if field.name in changed else kept[field.name]
        for field in PACKED_SCHEMA
    ]
    return pa.Table.from_arrays(columns, schema=PACKED_SCHEMA)


class Sections:
    """Writes what follows the pixels, each part aligned. sections: name -> (offset, bytes, checksum)."""

    def __init__(self, file, offset: int):
        self.file, self.end, self.sections = file, offset, {}

    def write(self, name: str, data) -> None:
        """Add a section: anything that has a buffer."""
        self.write_parts(name, lambda part: part.write(data))

    def write_parts(self, name: str, write: Callable[["_Part"], object]) -> None:
        """Add a section that `write` writes to what it is given, bit by bit."""
        offset = aligned(self.end)
        self.file.seek(offset)
        part = _Part(self.file)
        write(part)
        self.end = offset + part.length
        self.sections[name] = (offset, part.length, part.checksum.hexdigest())


class _Part(ArrowSink):
    """Writes on to the file that is open, and adds up the length and the checksum."""

    def __init__(self, file):
        self.file, self.length, self.checksum = file, 0, new_checksum()

    def take(self, data) -> None:
        self.file.write(data)
        self.checksum.update(data)
        self.length += memoryview(data).nbytes


def resampled_map(values: np.ndarray, facts: Iterable) -> np.ndarray:
    """A semantic map over whole pictures, uint8 (N, h, w), as the canvases show it: uint8 (N, 32, 32).

    facts: the rows of the journal. Each cell is the mean of the map over its area; the map of a bad picture is 0.
    """
    result = np.zeros((len(values), MAP_CELLS, MAP_CELLS), np.uint8)
    for i, fact in enumerate(facts):
        if not isinstance(fact, str):
            result[i] = View(tuple(fact[:4])).crop_map(values[i], tuple(fact[4:]), (MAP_CELLS, MAP_CELLS))
    return result


def finish(origin: Origin, journal: Journal) -> None:
    """Write the sections and, when all else is on the disk, the header; then give the file its name."""
    plan = journal.plan
    try:
        with open(journal.part, "rb+") as file:
            file.truncate(journal.end_of_pixels)
            sections = Sections(file, journal.end_of_pixels)
            sections.write_parts(SAMPLES, lambda part: _write_ipc(part, packed_tables(origin, journal)))
            sections.write(CHUNKS, b"".join(bytes.fromhex(done["checksum"]) for done in journal.in_order()))
            for name, values in origin.maps.items():
                sections.write(f"maps/{name}", resampled_map(values, journal.rows()))
            for name, path in origin.protocols.items():
                sections.write(f"protocols/{name}", path.read_bytes())
            file.flush()
            os.fsync(file.fileno())
            header = Header(plan["samples"], plan["canvas"], CHUNK, sections.end, plan, sections.sections)
            file.seek(0)
            file.write(header.to_bytes())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise write_error(journal.part, error) from error
    list_bad(journal, origin.source)
    journal.finish()


def _write_ipc(part: _Part, tables: Iterable[pa.Table]) -> None:
    with pa.ipc.new_file(pa.PythonFile(part, "w"), PACKED_SCHEMA) as writer:
        for table in tables:
            writer.write_table(table)


def check_room(journal: Journal, maps: int) -> None:
    """Raise UserError where the disk has less room than the file still needs. maps: how many there are."""
    allocated = journal.part.stat().st_blocks * 512
    rest = journal.plan["samples"] * (_ROW_BYTES + maps * MAP_CELLS**2)
    needed = journal.end_of_pixels + rest - allocated
    free = shutil.disk_usage(journal.part.parent).free
    if needed > free:
        raise UserError(
            f"{journal.out} needs {needed / 1e9:.2f} GB more, and its disk has {free / 1e9:.2f} GB left: make room, "
            "choose another --out, or a smaller --canvas"
        )


def pack(args: argparse.Namespace) -> None:
    """Pack what the flags say, or go on with it."""
    out = Path(args.out)
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give the name of a file in it")
    origin = open_origin(args.data_path, args.labels)
    choices = {"canvas": args.canvas, "crop": args.crop, "face_padding": args.face_padding}
    plan = {**origin.plan(), **choices, "chunk": CHUNK}
    if out.exists() and not args.overwrite:
        if changed := difference(Header.read(out).plan, plan):
            raise UserError(
                f"{out} was packed from other data or with other flags ({changed}): give another --out, or --overwrite"
            )
        Journal.remove_rest(out)
        print(f"{out}: complete already, nothing to do")
        return
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with Journal(out, plan, end_of_pixels(plan["samples"], args.canvas), args.overwrite) as journal:
            if journal.chunks:
                print(f"{journal.part}: going on after {len(journal.chunks)} chunks of {CHUNK} canvases")
            check_room(journal, len(origin.maps))
            canvases = Canvases(origin.source, journal.part, args.canvas, args.crop, args.face_padding)
            write_chunks(canvases, journal, args.num_workers, args.max_bad)
            finish(origin, journal)
            report(origin, journal)
    except OSError as error:
        raise write_error(out, error) from error


def report(origin: Origin, journal: Journal) -> None:
    """Say what was packed, and what was not carried over."""
    canvas, samples, table = journal.plan["canvas"], journal.plan["samples"], PackedFile(journal.out).table
    size = journal.out.stat().st_size
    print(
        f"{journal.out}: {samples} canvases of {canvas} x {canvas} px, {size / 1e9:.3f} GB, "
        f"{size / samples:.0f} bytes each"
    )
    hidden = table.column("box").null_count - origin.table.column("box").null_count
    masks = samples - origin.table.column("mask_file").null_count
    # flatten leaves out the bad ones, which have no region
    regions = np.asarray(pc.list_flatten(table.column("region"))).reshape(-1, 4)
    remarks = {
        "smaller than the canvas, enlarged": int((regions[:, 2] - regions[:, 0] < canvas).sum()),
        f"cannot be read, listed in {journal.out}.bad_images.jsonl": len(journal.bad),
        "face boxes not on the canvas, left out": hidden,
        "foreground masks, not carried over": masks,
    }
    for remark, number in remarks.items():
        if number:
            print(f"  {number} {remark}")
    for kind, names in (("maps", origin.maps), ("protocols", origin.protocols)):
        if names:
            print(f"  {kind}: {', '.join(names)}")


def check(path: Path) -> None:
    """Compare every chunk with its checksum. Raises UserError that names the first that differs."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: check --out")
    file, damaged = PackedFile(path), []
    chunks = -(-file.header.samples // file.header.chunk) + len(file.header.sections)
    with progress(total=chunks, unit="chunk") as bar:
        for found in file.damage():
            bar.update()
            damaged += [found] if found else []
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise UserError(f"{path}: {damaged[0]}{more} differs from its checksum: copy or pack the file again")
    print(f"{path}: {file.header.samples} canvases, every checksum is right")


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = flags.Parser("Pack a data set: every picture decoded once, in one file that scripts take as --data_path")
    add = parser.add_argument
    add("--data_path", metavar="DIR", help="prepared folder, class folders, folder of images, or hf:OWNER/NAME[:SPLIT]")
    add("--out", required=True, metavar="FILE", help="file to write, or with --check to check")
    side = flags.number(int, 1, LARGEST_CANVAS)
    add("--canvas", type=side, default=256, help="side of the stored pictures, px; 3 * side^2 bytes each")
    add(
        "--crop",
        choices=CROPS,
        default="smart",
        help="what of a long side is kept: around the character, or the centre",
    )
    add("--labels", choices=LABELS, default="auto", help="what a nested folder of images means, as in training")
    add(
        "--face_padding", type=flags.rate, default=None, metavar="X",
        help="pack only the face box, enlarged by X of its side on each side (0.5 doubles it); default: whole pictures",
    )  # fmt: skip
    add("--num_workers", type=flags.count0, default=2, help="processes that decode; the file does not depend on it")
    add("--max_bad", type=flags.fraction, default=0.01, help="share of unreadable images above which it stops, 0..1")
    add("--overwrite", action="store_true", help="replace a file of other data or other flags")
    add("--check", action="store_true", help="pack nothing: compare FILE with its checksums")
    args = parser.parse_args(argv)
    if not args.check and not args.data_path:
        raise UserError("there is nothing to pack: give --data_path DIR, or --check")
    return args


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    if args.check:
        check(Path(args.out))
    else:
        pack(args)


if __name__ == "__main__":
    main()
