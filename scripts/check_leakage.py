"""Look for leaks between the splits of a data set, and between it and what a model was pre-trained on.

    python scripts/check_leakage.py --data_path data/moeimouto --pool data/huggan --pool data/splcher --out leaks
    python scripts/check_leakage.py --data_path real --splits real/splits.csv --out leaks

Leaks are identical and near-identical pictures (64-bit perceptual hash of the picture, of its mirror image and of the
face in its box), pictures alike by --embeddings, pictures of one source, and identities that should be new but were
trained on, also under another name. Exit status: 0 clean, 1 leaks were found, 2 the command line or the data are at
fault. OUT gets leaks.json (counts and all pairs), leaks.md and examples.png; --repair writes a split without leaks.
"""

import csv
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pyarrow as pa

from util.benchmark import leakage
from util.benchmark.embedded import read_embeddings
from util.benchmark.leakage import KINDS, Pictures
from util.benchmark.leakage_report import Findings, draw_examples, lines_of
from util.data.face_crop import FaceCrops
from util.data.hub import PREFIX
from util.data.images import BadImage
from util.data.manifest import MANIFEST_NAME, SCHEMA, Manifest, read_manifest, write_manifest
from util.data.phash import hash_images, join_hashes
from util.data.roles import ROLES, MissingRole, in_part
from util.data.sources import LABELS, FolderSource, Source, list_folder, open_source
from util.run.args import Parser, count, fraction, number, ratio
from util.run.errors import UserError, cli
from util.run.files import write_atomically, write_text
from util.run.log import git_commit, progress, write_json

WRITER = "check_leakage"
REASONS = ("name", "alias", "ambiguous")  # of an identity that should be new, see util.data.identity_names


class Part(NamedTuple):
    """Some of the rows: where their pictures are, and the pool and the split of each (N,)."""

    source: Source
    pool: list[str]
    split: list[str]


def get_parser() -> Parser:
    parser = Parser("Look for leaks between splits, and between a data set and pre-training pools.")
    parser.add_argument(
        "--data_path", "--data_root", metavar="DIR",
        help="prepared folder, class folders or hf:OWNER/NAME; with --splits: the folder its paths start from",
    )  # fmt: skip
    parser.add_argument("--splits", metavar="CSV", help="list of pictures: path, split; also set, identity, component")
    parser.add_argument(
        "--pool", action="append", default=[], metavar="DIR", help="data a model is pre-trained on; may be repeated"
    )
    parser.add_argument(
        "--training", nargs="+", metavar="[SET:]SPLIT",
        help="splits that are trained on; default: pretrain and train of every set",
    )  # fmt: skip
    parser.add_argument("--embeddings", metavar="FILE", help=".npz with embeddings (N, D) and sample_id (N,)")
    bits = number(int, 0, 16)
    parser.add_argument("--distance", type=bits, default=4, help="bits of 64 that near-duplicates differ in, 0 to 16")
    parser.add_argument("--face_distance", type=bits, default=2, help="the same for faces cut to their boxes, 0 to 16")
    parser.add_argument(
        "--far", type=bits, default=8, help="bits up to which a pair counts if its embeddings agree, 0 to 16"
    )
    cosine = number(float, -1.0, 1.0)
    parser.add_argument("--confirm", type=cosine, default=0.9, help="cosine (centred) that confirms a pair up to --far")
    parser.add_argument("--cosine", type=cosine, default=0.95, help="cosine (centred) that is a leak of itself")
    parser.add_argument(
        "--ignore", nargs="+", default=[], choices=(*KINDS, *REASONS), help="kinds that are no leak here"
    )
    parser.add_argument("--labels", choices=LABELS, default="auto", help="what a nested folder of images means")
    parser.add_argument(
        "--val_fraction", type=ratio, default=0.1, help="share that training holds out where there is no val split"
    )
    parser.add_argument("--out", metavar="OUT", help="folder for leaks.json, leaks.md and examples.png")
    parser.add_argument("--examples", type=count, default=16, help="pairs shown in examples.png")
    parser.add_argument("--repair", metavar="OUT", help="write a split without leaks: a list or a prepared folder")
    parser.add_argument(
        "--repair_by", choices=("drop", "move"), default="drop",
        help="training pictures that leak: drop them, or move them to the held-out split where it knows their identity",
    )  # fmt: skip
    parser.add_argument("--workers", type=count, default=2, help="threads that decode pictures")
    parser.add_argument(
        "--max_bad", type=fraction, default=0.01, help="share of unreadable pictures above which to stop, 0..1"
    )
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    started = time.perf_counter()
    parts = open_parts(args)
    if args.repair and not all(isinstance(part.source, FolderSource) for part in parts):
        raise UserError("--repair writes about folders of pictures, not about data of the Hub: download them")
    pictures = read_pictures(parts, args)
    _, sides = pictures.sides()
    forbidden = leakage.forbidden_sides(sides, parse_training(args.training, sides))
    if not forbidden.any():
        names = ", ".join(":".join(own) for own in sides)
        raise UserError(f"there is only {names}, nothing that could leak: give data with splits, or a --pool")
    links, unsure = leakage.find_links(
        pictures, distance=args.distance, face_distance=args.face_distance, far=args.far, cosine=args.cosine,
        confirm=args.confirm, ignore=args.ignore,
    )  # fmt: skip
    identities = leakage.identity_leaks(pictures, ignore=args.ignore)
    found = Findings(pictures, links, unsure, forbidden, identities)
    report = found.report()
    report |= {"args": vars(args), "git_commit": git_commit(), "seconds": round(time.perf_counter() - started, 1)}
    say(report)
    if args.out:
        write_report(Path(args.out), report, found, parts, args.examples)
    if args.repair:
        write_repair(Path(args.repair), found, parts, args)
    sys.exit(0 if report["clean"] else 1)


# --- what is compared -------------------------------------------------------------------------------------------


def open_parts(args) -> list[Part]:
    """The data set and the pools."""
    if not args.data_path and not args.splits:
        raise UserError("there is nothing to check: give --data_path DIR, or --splits CSV")
    if args.splits:
        path = Path(args.splits)
        parts = [open_list(path, Path(args.data_path) if args.data_path else path.parent)]
    else:
        parts = open_folder(args.data_path, args.labels, args.val_fraction)
    taken = {name for part in parts for name in part.pool}
    for path in args.pool:
        name = unused(Path(path.removeprefix(PREFIX)).name or "pool", taken)
        taken.add(name)
        own = open_folder(path, args.labels, 0.0)
        # a pool that was named without any training split (hf:OWNER/NAME:test) is trained on as a whole
        whole = not any(split in leakage.TRAINING for part in own for split in part.split)
        for part in own:
            split = ["pretrain"] * len(part.split) if whole else part.split
            parts.append(Part(part.source, [name] * len(split), split))
    return parts


def unused(name: str, taken: set[str]) -> str:
    """The name, with a number where it is taken."""
    return next(own for own in (name, *(f"{name}-{i}" for i in range(2, len(taken) + 3))) if own not in taken)


def open_list(path: Path, root: Path) -> Part:
    """The pictures of a CSV: path, split; set (a pool of its own), identity, component (declared near-duplicates)."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the CSV that lists the pictures")
    if not root.is_dir():
        raise UserError(f"{root} does not exist: give the folder that the paths of {path} start from")
    rows = read_list(path)
    columns = {
        "sample_id": [row["path"] for row in rows],
        "file_name": [row["path"] for row in rows],
        "identity": [row.get("identity") or None for row in rows],
        "split": [row["split"] for row in rows],
        "source": [row.get("component") or None for row in rows],
    }
    arrays = [pa.array(columns.get(field.name, [None] * len(rows)), field.type) for field in SCHEMA]
    table = pa.Table.from_arrays(arrays, schema=SCHEMA)
    manifest = Manifest(table, path.parent, root, np.arange(len(rows)), {})
    return Part(FolderSource(str(path), manifest), [row.get("set") or "data" for row in rows], columns["split"])


def read_list(path: Path) -> list[dict]:
    """The rows of a CSV with a header that names path and split."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is no CSV ({error}): write path,split and a row for each picture") from error
    if not rows:
        raise UserError(f"{path} lists no pictures: write path,split and a row for each")
    for column in ("path", "split"):
        if column not in rows[0]:
            raise UserError(f"{path} has no column {column!r}: it has {', '.join(map(str, rows[0]))}")
    for line, row in enumerate(rows, 2):
        if None in row or not row["path"] or not row["split"]:
            raise UserError(f"{path}, row {line}: path or split is empty, or there are too many fields: mend it")
    return rows


def open_folder(path: str, labels: str, val_fraction: float) -> list[Part]:
    """A data path with all its splits; where it has no val split, the one that training would hold out."""
    name = Path(path.removeprefix(PREFIX)).name or "data"
    if path.startswith(PREFIX):
        return open_hub_roles(path, name, val_fraction)
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give a prepared folder, or folders of pictures")
    if labels == "metadata" or (labels == "auto" and (folder / MANIFEST_NAME).is_file()):
        manifest = read_manifest(folder)
    else:
        manifest, _ = list_folder(folder, labels)
    source = FolderSource(path, manifest)
    split = source.column("split")
    if val_fraction and "val" not in split:
        keys = [own or file for own, file in zip(source.column("source"), source.column("file_name"), strict=True)]
        held = in_part(keys, "val", val_fraction)
        split = ["val" if out and own in ROLES["train"] else own for own, out in zip(split, held, strict=True)]
    return [Part(source, [name] * len(split), split)]


def open_hub_roles(path: str, name: str, val_fraction: float) -> list[Part]:
    """The roles that a data set of the Hub has."""
    parts = []
    for role in ROLES:
        try:
            source = open_source(path, role, val_fraction=val_fraction)
        except MissingRole:
            continue
        if role != "test" or source.split == "test":  # val stands in for a test split that is not there
            parts.append(Part(source, [name] * len(source), [role] * len(source)))
        if not val_fraction and role == "train":
            break  # of a pool, what a model is trained on
    return parts


def read_pictures(parts: list[Part], args) -> Pictures:
    """Hash everything. Raises UserError where too much cannot be read."""
    boxed = [any(box is not None for box in part.source.column("box")) for part in parts]
    whole, faces = [], []
    total = sum(len(part.pool) * (1 + box) for part, box in zip(parts, boxed, strict=True))
    with progress(total=total, desc="hashing", unit="img") as bar:
        for part, box in zip(parts, boxed, strict=True):
            whole.append(hash_images(part.source, workers=args.workers, advance=bar.update))
            crops = FaceCrops(part.source, 0.0) if box else None
            faces.append(hash_images(crops, workers=args.workers, advance=bar.update) if box else whole[-1])
    hashes = join_hashes(whole)
    if len(hashes.bad) > args.max_bad * len(hashes):
        _, path, reason = hashes.bad[0]
        raise UserError(
            f"{len(hashes.bad)} of {len(hashes)} pictures cannot be read, the first: {path} ({reason}): check the "
            "folder, mend them, or raise --max_bad"
        )
    columns = {
        name: [value for part in parts for value in part.source.column(name)]
        for name in ("sample_id", "identity", "source")
    }
    pool, split = ([value for part in parts for value in getattr(part, name)] for name in ("pool", "split"))
    embeddings = join_embeddings(args.embeddings, columns["sample_id"], pool) if args.embeddings else None
    return Pictures(
        columns["sample_id"], pool, split, columns["identity"], columns["source"],
        hashes, join_hashes(faces) if any(boxed) else None, embeddings,
    )  # fmt: skip


def join_embeddings(path: str, sample_id: list[str], pool: list[str]) -> np.ndarray:
    """The rows of an embeddings file by sample_id; an id that two pools share is written POOL:ID there."""
    embeddings, names = read_embeddings(path)
    places = {name: place for place, name in enumerate(names.tolist())}
    often = Counter(sample_id)
    rows = []
    for own, name in zip(pool, sample_id, strict=True):
        if often[name] > 1 and name in places:
            raise UserError(f"--embeddings {path}: {name!r} is in more than one pool: write {own}:{name} there")
        rows.append(places.get(f"{own}:{name}", places.get(name, -1)))
    rows = np.array(rows)
    if (rows < 0).all():
        raise UserError(f"--embeddings {path} has none of the samples: its sample_id must be those of the data")
    return np.where(rows[:, None] >= 0, embeddings[rows], np.nan).astype(np.float32)


def parse_training(names: list[str] | None, sides: list[tuple[str, str]]) -> set[tuple[str, str]] | None:
    """The sides that --training names; None for the default."""
    if names is None:
        return None
    chosen = set()
    for name in names:
        pool, _, split = name.rpartition(":")
        fitting = {side for side in sides if side[1] == split and pool in ("", side[0])}
        if not fitting:
            known = ", ".join(":".join(side) for side in sides)
            raise UserError(f"--training {name}: there is no such split, only {known}")
        chosen |= fitting
    return chosen


# --- what is written --------------------------------------------------------------------------------------------


def say(report: dict) -> None:
    lines = lines_of(report)
    for line in lines if len(lines) <= 40 else [*lines[:39], f"... {len(lines) - 40} more lines", lines[-1]]:
        print(line)
    print(f"{report['seconds']:.0f} s")


def write_report(out: Path, report: dict, found: Findings, parts: list[Part], examples: int) -> None:
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "leaks.json", report)
    args = report["args"]
    rule = f"Hash distance at most {args['distance']} of 64 bits, {args['face_distance']} of faces in boxes"
    if args["embeddings"]:
        rule += f", up to {args['far']} with a cosine of {args['confirm']}; cosine of {args['cosine']} alone"
    text = ["# Leaks", "", f"{rule}. Ignored: {', '.join(args['ignore']) or 'nothing'}.", ""]
    text += [f"* {line}" for line in lines_of(report)]
    text += ["", "## Components on more than one side", ""] if report["straddling"] else []
    text += [f"* {'; '.join(members)}" for members in report["straddling"][:200]]
    if len(report["straddling"]) > 200:
        text.append(f"* ... and {len(report['straddling']) - 200} more, in leaks.json")
    write_text(out / "leaks.md", "\n".join(text) + "\n")
    picture = draw_examples(found, lambda row: picture_of(parts, row), examples)
    if picture is not None:
        write_atomically(out / "examples.png", lambda path: picture.save(path, format="PNG"))
    else:
        (out / "examples.png").unlink(missing_ok=True)
    names = "leaks.json, leaks.md" + (", examples.png" if picture else "")
    print(f"{out}: {names}")


def picture_of(parts: list[Part], row: int):
    for part in parts:
        if row < len(part.pool):
            try:
                return part.source.load(row)
            except BadImage:
                return None
        row -= len(part.pool)
    raise ValueError("no such row")


def write_repair(out: Path, found: Findings, parts: list[Part], args) -> None:
    """A split without leaks: training yields to validation, validation to test, an identity that is not new goes."""
    yielding = leakage.not_new(found.pictures, found.identities)
    repaired = leakage.repair(
        found.pictures, found.component, found.forbidden, yielding=yielding, move=args.repair_by == "move"
    )
    start = 0
    for i, part in enumerate(parts):
        rows = slice(start, start := start + len(part.pool))
        if i == 0 and args.splits:
            write_list(out, Path(args.splits), repaired.split[rows], found.component[rows])
        else:
            folder = out if i == 0 else out / "pools" / part.pool[0]
            write_folder(folder, part.source.manifest, repaired.split[rows], found.component, rows)
    print(
        f"{out}: {repaired.moved} pictures moved, {repaired.dropped} dropped, {yielding.sum()} of them of identities "
        f"that are not new; {leakage.lost_identities(found.pictures, repaired.split)} identities lost all training"
    )


def write_list(out: Path, path: Path, split: list[str | None], component: np.ndarray) -> None:
    """The rows of a list that stay, with their splits and the components that were found."""
    rows = read_list(path)
    names = list(rows[0]) if "component" in rows[0] else [*rows[0], "component"]

    def write(temporary: Path) -> None:
        with open(temporary, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            for row, own, place in zip(rows, split, component.tolist(), strict=True):
                if own is not None:
                    writer.writerow({**row, "split": own, "component": place})

    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / path.name, write)


def write_folder(out: Path, manifest: Manifest, split: list[str | None], component: np.ndarray, rows: slice) -> None:
    """The rows of a folder that stay, as a prepared folder. `source` then names their component, if it has others.

    Masks and maps lie in the folder they were made for, and are not taken along.
    """
    sizes = Counter(component.tolist())
    kept = []
    for row, own, place in zip(manifest.table.to_pylist(), split, component[rows].tolist(), strict=True):
        if own is not None:
            source = f"component {place}" if sizes[place] > 1 else row["source"]
            kept.append({**row, "split": own, "source": source, "mask_file": None})
    if any(name is not None for name in manifest.table.column("mask_file").to_pylist()):
        print(f"{out}: the masks stay in {manifest.folder}")
    write_manifest(out, kept, str(manifest.root.resolve()), {"writer": WRITER})


if __name__ == "__main__":
    main()
