"""Turn pictures you already have into a prepared folder. Nothing is copied: it writes OUT/metadata.parquet only.

    # class folders, with or without train/ and val/; a flat or nested folder
    python datasets/prepare_folder.py --data_path my_faces --out data/my_faces

    # a list of pictures with splits (columns path, split and any of set, identity, component), some of its sets
    python datasets/prepare_folder.py --data_path real --splits real/splits.csv --out data/pool \\
        --include splcher illus moeimouto:train icf_det:train --parts real/parts_silver.json
"""

import csv
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from util.data.images import BadImage, decode_image
from util.data.manifest import SPLITS, is_inside, write_manifest
from util.data.prepare import open_text, refuse_foreign
from util.data.roles import in_part
from util.data.sources import LABELS, list_folder
from util.run.args import Parser, fraction, ratio
from util.run.errors import UserError, cli
from util.run.untrusted import read_json

WRITER = "prepare_folder"


def get_parser() -> Parser:
    parser = Parser("Write a metadata.parquet for pictures that stay where they are.")
    parser.add_argument("--data_path", required=True, metavar="DIR", help="folder that holds the pictures")
    parser.add_argument("--out", required=True, metavar="OUT", help="prepared folder to write")
    parser.add_argument("--splits", metavar="CSV", help="list of the pictures: path (relative to DIR), split, ...")
    parser.add_argument(
        "--include", nargs="+", metavar="SET[:SPLIT,...]", help="rows of the CSV to keep, splits by their names there"
    )
    parser.add_argument(
        "--rename",
        nargs="*",
        metavar="OLD=NEW",
        default=["recon_val=val", "recon_test=test"],
        help="names of splits in the CSV and what they become here",
    )
    parser.add_argument("--parts", metavar="JSON", help="face and eye boxes, {path: {faces: [{score, face, ...}]}}")
    parser.add_argument(
        "--min_score", type=fraction, default=0.8, help="faces of --parts below this score are left out, 0..1"
    )
    parser.add_argument("--labels", choices=LABELS[:3], default="auto", help="what nested folders mean, without a CSV")
    parser.add_argument(
        "--val_fraction",
        type=ratio,
        default=0.1,
        help="share held out of folders that have no val/, fraction from 0 to below 1",
    )
    parser.add_argument("--verify", action="store_true", help="decode every picture and drop the damaged ones")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    folder, out = Path(args.data_path), Path(args.out)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give the folder that holds the pictures")
    refuse_foreign(out, WRITER)
    dropped = Counter()
    if args.splits:
        rows = rows_from_csv(Path(args.splits), args.include, args.rename, dropped)
    elif args.include:
        raise UserError("--include chooses rows of a list: give the list with --splits CSV")
    else:
        rows = rows_from_folder(folder, args.labels, args.val_fraction)
    rows = keep_readable(rows, folder, args.verify, dropped)
    if not rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
        raise UserError(f"no picture is left ({reasons}): check --data_path and --include")
    faces = add_parts(rows, Path(args.parts), args.min_score) if args.parts else 0
    inside = folder.resolve() == out.resolve()
    path = write_manifest(out, rows, None if inside else str(folder.resolve()), {"writer": WRITER})
    report(path, rows, faces, dropped)


def rows_from_csv(path: Path, include: list[str] | None, rename: list[str], dropped: Counter) -> list[dict]:
    """The rows of a list that `include` names, as manifest rows."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: give the CSV that lists the pictures")
    needed = ("path", "split", *(["set"] if include else []))
    with open_text(path) as file:
        lines = csv.DictReader(file, restkey="", restval="")
        try:
            listed = list(lines)
        except csv.Error as error:
            raise UserError(f"{path}, line {lines.line_num + 1}: no text ({error}): get the file again") from error
    for column in needed:
        if listed and column not in (lines.fieldnames or ()):
            raise UserError(f"{path} has no column {column!r}: it has {', '.join(lines.fieldnames or ())}")
    new_name = parse_rename(rename)
    wanted = parse_include(include, listed, path)
    rows = []
    for row in listed:
        if wanted is not None and row["split"] not in wanted.get(row["set"], ()):
            dropped["not included"] += 1
            continue
        split = new_name.get(row["split"], row["split"])
        if split not in SPLITS:
            raise UserError(f"{path}: split {split!r} is not one of {', '.join(SPLITS)}: give --rename {split}=NEW")
        rows.append(
            {
                "sample_id": row["path"],
                "file_name": row["path"],
                "identity": row.get("identity") or None,
                "split": split,
                "source": row.get("component") or None,
            }
        )
    return rows


def parse_rename(pairs: list[str]) -> dict[str, str]:
    """["recon_val=val"] -> {"recon_val": "val"}."""
    for pair in pairs:
        if pair.count("=") != 1:
            raise UserError(f"--rename {pair} is not understood: write OLD=NEW")
    return dict(pair.split("=") for pair in pairs)


def parse_include(include: list[str] | None, listed: list[dict], path: Path) -> dict[str, set[str]] | None:
    """["a", "b:train,val"] -> the splits that are wanted of each set; None for all of everything."""
    if include is None:
        return None
    splits_of = {}
    for row in listed:
        splits_of.setdefault(row["set"], set()).add(row["split"])
    wanted = {}
    for item in include:
        name, _, splits = item.partition(":")
        if name not in splits_of:
            raise UserError(f"{path} has no set {name!r}: it has {', '.join(sorted(splits_of))}")
        chosen = set(splits.split(",")) if splits else splits_of[name]
        if not chosen <= splits_of[name]:
            known = ", ".join(sorted(splits_of[name]))
            raise UserError(f"{path}: set {name!r} has no split {min(chosen - splits_of[name])!r}: it has {known}")
        wanted.setdefault(name, set()).update(chosen)
    return wanted


def rows_from_folder(folder: Path, labels: str, val_fraction: float) -> list[dict]:
    """The pictures under a folder as manifest rows; a fixed hash of the path holds some out if there is no val/."""
    manifest, _ = list_folder(folder, labels)
    columns = ("sample_id", "file_name", "identity", "split")
    rows = manifest.table.select(columns).to_pylist()
    if all(row["split"] != "val" for row in rows):
        held_out = in_part([row["file_name"] for row in rows], "val", val_fraction)
        for row, held in zip(rows, held_out, strict=True):
            if held and row["split"] == "train":
                row["split"] = "val"
    return rows


def keep_readable(rows: list[dict], folder: Path, verify: bool, dropped: Counter) -> list[dict]:
    """The rows whose picture is there, is not empty and, if asked, can be decoded."""
    kept = []
    for row in tqdm(rows, desc="checking", unit="picture", disable=None, leave=False):
        name = row["file_name"]
        reason = fault(folder / name, verify) if is_inside(name, folder) else "outside --data_path"
        if reason:
            dropped[reason] += 1
        else:
            kept.append(row)
    return kept


def fault(path: Path, verify: bool) -> str | None:
    """Why a picture cannot be used, None if it can."""
    try:
        if not path.stat().st_size:
            return "empty"
        if verify:
            decode_image(path)
    except OSError:
        return "missing"
    except BadImage:
        return "damaged"
    return None


def add_parts(rows: list[dict], path: Path, min_score: float) -> int:
    """Fill `box` and `eyes` from the best face that a detector found in each picture; returns how many have one."""
    try:
        parts = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}): check --parts") from error
    if not isinstance(parts, dict):
        raise UserError(f"{path} is no JSON object: give {{path: {{faces: [{{score, face, ...}}], size}}}} as --parts")
    for row in rows:
        try:
            row |= best_face(parts.get(row["file_name"], {"faces": []}), min_score)
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{path}, {row['file_name']}: {type(error).__name__}: {error}: give faces with score and face "
                "[x, y, width, height], and size [width, height]"
            ) from error
    return sum(row.get("box") is not None for row in rows)


def best_face(found: dict, min_score: float) -> dict:
    """{"box", "eyes"} of the face of best score, empty where none is good enough."""
    best = max(found["faces"], key=lambda face: float(face["score"]), default=None)
    if best is None or not best["score"] >= min_score:
        return {}
    eyes = [corners(best[eye], found["size"]) for eye in ("left_eye", "right_eye") if best.get(eye)]
    return {"box": corners(best["face"], found["size"]), "eyes": [eye for eye in eyes if eye] or None}


def corners(box: list[float], size: list[int]) -> list[float] | None:
    """[x, y, width, height] to [x1, y1, x2, y2] inside a picture of `size` (width, height); None if nothing is left."""
    x, y, width, height = map(float, box)
    x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + width, size[0]), min(y + height, size[1])
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def report(path: Path, rows: list[dict], faces: int, dropped: Counter) -> None:
    splits = Counter(row["split"] for row in rows)
    identities = len({row["identity"] for row in rows} - {None})
    print(f"{path}: {len(rows)} pictures, {identities} identities, {faces} with a face box")
    print("  kept     " + ", ".join(f"{split} {splits[split]}" for split in SPLITS if splits[split]))
    print("  dropped  " + (", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items())) or "none"))


if __name__ == "__main__":
    main()
