"""Find faces in any picture or folder and draw them; with --crops also cut them out, ready for recognition.

    python -m visualize.detect --ckpt RUN/checkpoint-best.pth --images FILE_OR_FOLDER --out OUT
    python -m visualize.detect --finder cascade:FILE.xml --images FOLDER --out OUT --crops

OUT/drawn has each picture with its boxes, OUT/faces.json the boxes (--finder boxes:OUT/faces.json reads them), and
OUT/bad_images.jsonl the files that cannot be read. --crops makes OUT/crops a prepared folder, a row a face. A run that
was stopped goes on where it was.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from models_detect import load_detector
from models_finders import KINDS, DetectorFinder, open_finder
from util.benchmark.detection_figures import FOUND, OTHER, draw_boxes
from util.data.face_crop import visible_region
from util.data.faces import Box, Finder, find_faces
from util.data.images import SUFFIXES, BadImage, decode_image
from util.data.manifest import write_manifest
from util.run.args import Parser, count, fraction, rate
from util.run.device import pick_device
from util.run.errors import UserError, cli
from util.run.files import write_atomically, write_text
from util.run.log import progress, write_json
from visualize.pictures import make_folder

WRITER = "visualize.detect"
JOURNAL, FLAGS = "finds.jsonl", "run.json"
SPLITS = ("pretrain", "train", "val", "test", "open_test", "novel")


def parse_args(argv: list[str] | None):
    """The flags."""
    parser = Parser(__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--ckpt", metavar="W", help="checkpoint of main_detect.py")
    what.add_argument("--finder", metavar="SPEC", help=f"{', '.join(KINDS)}; + unites several")
    parser.add_argument("--images", required=True, metavar="FILE_OR_FOLDER", help="a picture, or a folder of any depth")
    parser.add_argument("--out", required=True, metavar="OUT", help="folder for drawn/, faces.json and crops/")
    parser.add_argument("--min_score", type=fraction, default=0.5, help="finds below are left out, 0..1")
    parser.add_argument("--size", type=count, help="longer side of the input of --ckpt, px; default: as in training")
    parser.add_argument("--crops", action="store_true", help="also cut the faces out: OUT/crops, a prepared folder")
    parser.add_argument(
        "--face_padding", type=rate, default=0.5,
        help="crops reach beyond the face box by X of its longer side on each side; 0.5 doubles it",
    )  # fmt: skip
    parser.add_argument("--split", choices=SPLITS, default="train", help="part of the data that the crops are for")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    if args.size and not args.ckpt:
        raise UserError("--size goes with --ckpt: a finder has sizes of its own, leave it out")
    return args


def list_pictures(images: str, out: Path) -> tuple[Path, list[str]]:
    """The folder, and the names in it of the pictures below it, sorted; of a file the folder it lies in.

    What lies in `out` is left out. UserError where there is no picture.
    """
    path = Path(images)
    if path.is_file():
        return path.parent, [path.name]
    if not path.is_dir():
        raise UserError(f"--images {images} does not exist: give a picture or a folder of pictures")
    own = out.resolve()
    names = []
    for folder, below, files in os.walk(path):
        below[:] = [name for name in below if not name.startswith(".") and (Path(folder) / name).resolve() != own]
        pictures = (name for name in files if Path(name).suffix.lower() in SUFFIXES and not name.startswith("."))
        names += [(Path(folder) / name).relative_to(path).as_posix() for name in pictures]
    if not names:
        raise UserError(f"--images {images} holds no pictures: give a folder of {', '.join(sorted(SUFFIXES))} files")
    return path, sorted(names)


class Journal:
    """What was done with each picture, a line each, written when all of it is on disk. A file that changed is new.

    flags: what decides the result; UserError where the folder holds that of others.
    """

    def __init__(self, out: Path, flags: dict):
        self.path = out / JOURNAL
        kept = out / FLAGS
        if kept.is_file() and json.loads(kept.read_text(encoding="utf-8")) != flags:
            raise UserError(f"--out {out} holds finds with other flags or weights: choose another folder")
        if not kept.is_file() and self.path.exists():
            raise UserError(f"--out {out} holds {JOURNAL} of something else: choose another folder")
        write_json(kept, flags)
        # a last line that was cut short is of a picture that will be done again
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1] if self.path.exists() else []
        self.entries = {entry["file_name"]: entry for entry in map(json.loads, lines)}
        write_text(self.path, "".join(f"{line}\n" for line in lines))

    def has(self, name: str, stamp: list[int]) -> bool:
        """Whether the picture was done, and is still the same."""
        return self.entries.get(name, {}).get("stamp") == stamp

    def add(self, entry: dict) -> None:
        """Note a picture that is done."""
        self.entries[entry["file_name"]] = entry
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


def stamp_of(path: Path) -> list[int]:
    """What changes with a file: its size in bytes and its time; of no file -1."""
    try:
        found = path.stat()
        return [found.st_size, found.st_mtime_ns]
    except OSError:
        return [-1, -1]


def flags_of(args) -> dict:
    """What decides the result, the weights by their size and time."""
    files = [args.ckpt] if args.ckpt else [part.partition(":")[2] for part in args.finder.split("+")]
    names = ("ckpt", "finder", "min_score", "size", "crops", "face_padding")
    return {name: getattr(args, name) for name in names} | {"files": [stamp_of(Path(file)) for file in files]}


def process(finder: Finder, root: Path, name: str, out: Path, args) -> dict:
    """Find, draw and cut out the faces of one picture; what the journal says of it, without its stamp."""
    try:
        name.encode()
        picture = decode_image(root / name)
    except UnicodeEncodeError:
        return {"file_name": name, "bad": "the file name is not valid UTF-8: rename it"}
    except BadImage as error:
        return {"file_name": name, "bad": error.reason}
    faces = find_faces(picture, finder, name, args.min_score)
    if args.crops:
        for number, face in enumerate(faces):
            crop = picture.crop(visible_region(list(face.box), args.face_padding, picture.size))
            save(out / "crops" / crop_name(name, number), crop, "PNG")
    rows = [{"score": face.score, "box": list(face.box), "eyes": [list(eye) for eye in face.eyes]} for face in faces]
    size = list(picture.size)
    draw_boxes(picture, [eye for face in faces for eye in face.eyes], OTHER)
    draw_boxes(picture, [face.box for face in faces], FOUND, [f"{face.score:.2f}" for face in faces])
    # the whole name, suffix and all: a.png and a.jpg are two pictures
    save(out / "drawn" / f"{name}.jpg", picture, "JPEG", quality=92, subsampling=0)
    return {"file_name": name, "size": size, "faces": rows}


def crop_name(name: str, number: int) -> str:
    """Of a face of a picture, relative to the folder of the crops; no two faces share one."""
    return f"images/{name}-{number}.png"


def save(path: Path, picture: Image.Image, kind: str, **options) -> None:
    """Write a picture in one step, and make its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: picture.save(part, format=kind, **options))


def crop_rows(entry: dict, padding: float, split: str) -> Iterator[dict]:
    """The rows of a picture's crops, boxes in px of the crop."""
    for number, face in enumerate(entry["faces"]):
        left, top, right, bottom = visible_region(face["box"], padding, tuple(entry["size"]))
        frame = (left, top, right, bottom)
        eyes = [shown for eye in face["eyes"] if (shown := on_crop(eye, frame))]
        name = entry["file_name"]
        yield {
            "sample_id": f"{name}#{number}", "file_name": crop_name(name, number), "split": split, "source": name,
            "box": on_crop(face["box"], frame), "eyes": eyes or None,
        }  # fmt: skip


def on_crop(box: list[float], frame: tuple[int, int, int, int]) -> list[float] | None:
    """The part of a box that lies in the region `frame` of a picture, in px of that; None if nothing does."""
    left, top, right, bottom = frame
    x1, y1, x2, y2 = np.clip(np.subtract(box, [left, top] * 2), 0, [right - left, bottom - top] * 2).tolist()
    return [x1, y1, x2, y2] if x1 < x2 and y1 < y2 else None


def stored(entry: dict) -> dict:
    """The faces of a picture as `boxes:FILE` reads them."""
    faces = []
    for face in entry["faces"]:
        eyes = dict(zip(("left_eye", "right_eye"), map(_extent, face["eyes"]), strict=False))
        faces.append({"score": face["score"], "face": _extent(face["box"]), **eyes})
    return {"size": entry["size"], "faces": faces}


def _extent(box: Box | list[float]) -> list[float]:
    return [box[0], box[1], box[2] - box[0], box[3] - box[1]]


def write_lists(out: Path, root: Path, entries: list[dict], args) -> None:
    """faces.json, bad_images.jsonl and, with --crops, the prepared folder."""
    good = [entry for entry in entries if "bad" not in entry]
    bad = [{"file_name": entry["file_name"], "reason": entry["bad"]} for entry in entries if "bad" in entry]
    write_json(out / "faces.json", {entry["file_name"]: stored(entry) for entry in good})
    write_text(out / "bad_images.jsonl", "".join(json.dumps(row) + "\n" for row in bad))
    if args.crops:
        rows = [row for entry in good for row in crop_rows(entry, args.face_padding, args.split)]
        notes = {"writer": WRITER, "face_padding": f"{args.face_padding:g}", "finder": args.ckpt or args.finder}
        write_manifest(out / "crops", rows, extra={**notes, "originals": str(root.resolve())})
    faces = sum(len(entry["faces"]) for entry in good)
    print(f"{out}: {faces} faces in {len(good)} pictures, {sum(not entry['faces'] for entry in good)} without one")
    if bad:
        first = f"{bad[0]['file_name']!a} ({bad[0]['reason']})"
        print(f"  {len(bad)} files cannot be read, such as {first}: see bad_images.jsonl")
    if args.crops and faces:
        print(f"  faces cut out with --face_padding {args.face_padding:g}: --data_path {out / 'crops'}")


@cli
def main(argv: list[str] | None = None) -> None:
    """Every picture that was not done before, then the lists."""
    args = parse_args(argv)
    device, out = pick_device(args.device), make_folder(args.out)
    root, names = list_pictures(args.images, out)
    if args.ckpt:
        finder = DetectorFinder(load_detector(args.ckpt, device), args.size, args.min_score)
    else:
        finder = open_finder(args.finder, device)
    journal = Journal(out, flags_of(args))
    for name in progress(names, desc="finding", unit="picture"):
        stamp = stamp_of(root / name)
        if not journal.has(name, stamp):
            journal.add({**process(finder, root, name, out, args), "stamp": stamp})
    write_lists(out, root, [journal.entries[name] for name in names], args)


if __name__ == "__main__":
    main()
