"""ACRD (grapeot's Danbooru2018 Anime Character Recognition Dataset): 977,356 heads of 49,087 characters, long-tailed.

    python datasets/prepare_acrd.py --data_path acrd --out data/acrd --check

DIR holds faces.tsv, tagIds.tsv, trainSplit.tsv, valSplit.tsv and testSplit.tsv of the repository, and somewhere below
it (or in --images) folders 0000 ... 0999 of pictures: the head crops of the tarball, or the whole pictures of
Danbooru2018. Nothing is copied. What is left out, in this order, is counted:

    rows that are not understood, repeated or of an unknown tag; below --min_confidence; in no split; generic tags;
    with --single_character pictures of several tags; pictures that are missing or damaged, boxes without an inside;
    then, counted in pictures of the train split, identities rarer than --min_images, and in train what is over
    --max_images. An identity that is not trained on is nowhere: val and test hold known characters only.
"""

import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.pools import local_folder
from util.data.prepare import (
    Preparation,
    folders_below,
    image_sizes,
    is_number,
    prepare_parser,
    read_table,
    read_text,
    require,
)
from util.run.args import Parser, count, count0, fraction
from util.run.errors import UserError, cli
from util.run.seed import rng_for

WRITER = "prepare_acrd"
ORIGIN = "the repository grapeot/Danbooru2018AnimeCharacterRecognitionDataset"
TARBALL = "2019-07-27-grapeot-danbooru2018-animecharacterrecognition"
GENERIC = ("mithra", "elvaan", "hume", "inkling", "octoling")  # races, not persons
SPLITS = ("train", "val", "test")
BAR = 0.85  # the confidence that the published counts, and the split files, were made with
PUBLISHED = {
    "rows of faces.tsv": 977_356,
    "classes of faces.tsv": 49_087,
    "tags": 70_095,
    f"rows at {BAR}": 561_557,
    f"classes at {BAR}": 34_488,
    "train ids": 541_600,
    "val ids": 10_000,
    "test ids": 10_000,
}
BUCKET = re.compile(r"\d{3,4}")  # the tarball had folders of 3 digits and of 4


class Face(NamedTuple):
    """A row of faces.tsv. number: of the row among those of its picture. box: left, top, right, bottom, fractions."""

    picture: int
    number: int
    tag: int
    box: tuple[float, ...]
    confidence: float

    @property
    def sample_id(self) -> str:
        return f"{self.picture}_{self.number}"


def get_parser() -> Parser:
    parser = prepare_parser(
        "Prepare ACRD, the Danbooru2018 Anime Character Recognition Dataset.",
        "folder that holds faces.tsv, tagIds.tsv and the split files",
    )
    parser.add_argument("--images", metavar="DIR", help="folder of 0000 ... 0999; default: found below --data_path")
    parser.add_argument(
        "--pictures",
        choices=("auto", "crops", "full"),
        default="auto",
        help="what they are: head crops (no box is written) or whole pictures; auto: crops where the folder is called "
        "as the tarball is",
    )
    parser.add_argument("--min_confidence", type=fraction, default=BAR, help="of the head detector, fraction in 0..1")
    parser.add_argument("--min_images", type=count0, default=20, help="train pictures that an identity needs")
    parser.add_argument("--max_images", type=count, help="train pictures kept of an identity; default: all")
    parser.add_argument("--keep_generic", action="store_true", help=f"keep tags that are races: {', '.join(GENERIC)}")
    parser.add_argument(
        "--single_character", action="store_true", help="leave out pictures with more than one character tag"
    )
    parser.add_argument("--seed", type=count0, default=0, help="chooses which pictures --max_images keeps")
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    root = local_folder(args.data_path)
    tags, split_of = read_tags(root), read_splits(root)
    table = require(root / "faces.tsv", "the boxes and tags", ORIGIN)
    folder = local_folder(args.images) if args.images else find_pictures(root)
    crops = args.pictures == "crops" or (args.pictures == "auto" and is_crops(folder, root))
    print(f"{folder}: read as {'head crops, without boxes' if crops else 'whole pictures'} (--pictures)")
    work = Preparation(WRITER, folder, Path(args.out))
    faces = list(read_faces(table, tags, work))
    counts = published_counts(table, faces, tags, split_of)
    tags_of = defaultdict(set)
    for face in faces:
        tags_of[face.picture].add(face.tag)
    ambiguous = {picture for picture, found in tags_of.items() if len(found) > 1}
    chosen = [face for face in faces if is_wanted(face, work, args, tags, split_of, ambiguous)]
    add_faces(work, chosen, tags, split_of, crops)
    keep_trained(work, args.min_images, args.max_images, args.seed)
    counts["pictures of several tags"] = len(ambiguous.intersection(int(row["source"]) for row in work.rows))
    work.finish(args.check, PUBLISHED, counts)


def read_tags(root: Path) -> dict[int, str]:
    """Tag number -> name. Names may begin with a quotation mark, so this is no CSV."""
    path = require(root / "tagIds.tsv", "the names of the characters", ORIGIN)
    tags: dict[int, str] = {}
    for line, text in enumerate(read_text(path).splitlines(), start=1):
        name, _, number = text.rpartition("\t")
        if not name or not is_number(number.strip()) or int(number) in tags:
            raise UserError(f"{path}, line {line}: {text!r} is not name, tab and a number of its own: get it again")
        tags[int(number)] = name
    if len(set(tags.values())) < len(tags):
        name = Counter(tags.values()).most_common(1)[0][0]
        raise UserError(f"{path}: the name {name!r} stands there twice: get it again")
    return tags


def read_splits(root: Path) -> dict[int, str]:
    """Picture number -> split, from the three files of numbers."""
    split_of: dict[int, str] = {}
    for split in SPLITS:
        path = require(root / f"{split}Split.tsv", f"the numbers of the {split} pictures", ORIGIN)
        for line, text in enumerate(read_text(path).split(), start=1):
            if not is_number(text):
                raise UserError(f"{path}, entry {line}: {text!r} is no picture number: get it again")
            if split_of.setdefault(int(text), split) != split:
                raise UserError(f"{path}: picture {text} is in {split_of[int(text)]} too: get the files again")
    return split_of


def read_faces(path: Path, tags: dict[int, str], work: Preparation) -> Iterator[Face]:
    """The usable rows of faces.tsv; the others are dropped with the reason."""
    seen: set[tuple] = set()
    number: Counter[int] = Counter()
    for fields in read_table(path, ("file", "tag", "box"), "\t"):
        face = parse_face(fields)
        if face is None:
            work.drop("row not understood", " | ".join(fields))
            continue
        face = face._replace(number=number[face.picture])
        number[face.picture] += 1
        key = (face.picture, face.tag, face.box)
        if face.tag not in tags:
            work.drop("tag unknown", f"{face.sample_id}: tag {face.tag}")
        elif key in seen:
            work.drop("row repeated", face.sample_id)
        else:
            seen.add(key)
            yield face


def parse_face(fields: list[str]) -> Face | None:
    r"""`0446\332446.jpg`, `1`, `0.448534, 0.441995, 0.584106, 0.654420 0.337403` -> a Face with number 0; else None.

    The path may have slashes of either kind. The README puts a comma before the confidence, the file a space.
    """
    folder, _, name = fields[0].replace("\\", "/").rpartition("/")
    stem = name.partition(".")[0]
    try:
        picture, tag = int(stem), int(fields[1])
        *box, confidence = map(float, fields[2].replace(",", " ").split())
    except ValueError:
        return None
    good = len(box) == 4 and 0 <= confidence <= 1 and folder.rpartition("/")[2].isdecimal()
    return Face(picture, 0, tag, tuple(box), confidence) if good else None


def published_counts(path: Path, faces: list[Face], tags: dict[int, str], split_of: dict[int, str]) -> dict[str, int]:
    """What can be compared with PUBLISHED, whatever the filters."""
    with open(path, "rb") as file:
        lines = sum(1 for line in file if line.strip())
    certain = [face for face in faces if face.confidence >= BAR]
    ids = Counter(split_of.values())
    return {
        "rows of faces.tsv": lines,
        "classes of faces.tsv": len({face.tag for face in faces}),
        "tags": len(tags),
        f"rows at {BAR}": len(certain),
        f"classes at {BAR}": len({face.tag for face in certain}),
        **{f"{split} ids": ids[split] for split in SPLITS},
    }


def find_pictures(root: Path) -> Path:
    """The folder below `root` that holds folders called 000 ... 0999. UserError where there is none, or a choice."""
    found = [
        folder
        for folder in folders_below(root, 2)
        if not any(BUCKET.fullmatch(part) for part in folder.relative_to(root).parts) and any(buckets(folder))
    ]
    if not found:
        raise UserError(
            f"{root} holds no folders 0000 ... 0999 of pictures: unpack the head crops ({TARBALL}.tar) or the pictures "
            "of Danbooru2018 there, or give --images"
        )
    if len(found) > 1:
        raise UserError(f"{root} holds pictures in {', '.join(map(str, found))}: choose with --images")
    return found[0]


def buckets(folder: Path) -> Iterator[Path]:
    """The folders of pictures in `folder`, by name."""
    return (path for path in sorted(folder.iterdir()) if BUCKET.fullmatch(path.name) and path.is_dir())


def is_crops(folder: Path, root: Path) -> bool:
    """Whether a folder below `root`, or one between, is called as the tarball of crops is."""
    parts = folder.relative_to(root).parts if folder.is_relative_to(root) else (folder.name,)
    return any("animecharacterrecognition" in part.lower() or "crop" in part.lower() for part in parts)


def is_wanted(
    face: Face, work: Preparation, args, tags: dict[int, str], split_of: dict[int, str], ambiguous: set[int]
) -> bool:
    """Whether a row passes the filters that need no picture; if not, it is dropped with the reason."""
    reasons = (
        ("below --min_confidence", face.confidence < args.min_confidence),
        ("in no split file", face.picture not in split_of),
        ("generic tag", not args.keep_generic and tags[face.tag] in GENERIC),
        ("picture of several tags", args.single_character and face.picture in ambiguous),
    )
    for reason, failed in reasons:
        if failed:
            work.drop(reason, f"{face.sample_id}: {tags[face.tag]}, confidence {face.confidence}")
            return False
    return True


def add_faces(
    work: Preparation, faces: list[Face], tags: dict[int, str], split_of: dict[int, str], crops: bool
) -> None:
    """The rows of pictures that are there, with boxes in px of the picture as it is stored."""
    names = list_pictures(work.root, {face.picture for face in faces})
    pictures = sorted(names)
    sizes = dict(zip(pictures, image_sizes(work.root, [names[picture] for picture in pictures]), strict=True))
    for face in faces:
        size = sizes.get(face.picture, "file missing")
        row = {
            "sample_id": face.sample_id,
            "file_name": names.get(face.picture, f"{face.picture % 1000:04d}/{face.picture}.jpg"),
            "identity": tags[face.tag],
            "split": split_of[face.picture],
            "source": str(face.picture),
        }
        if not crops and not isinstance(size, str):
            row["box"] = [share * side for share, side in zip(face.box, size * 2, strict=True)]
            work.notes["boxes in a picture of 512 x 512 px, which may be a padded one"] += size == (512, 512)
        work.add(row, size)


def list_pictures(folder: Path, wanted: set[int]) -> dict[int, str]:
    """Picture number -> file name below `folder`, of the wanted ones that are there; .jpg before other formats."""
    names: dict[int, str] = {}
    for bucket in buckets(folder):
        for entry in sorted(os.listdir(bucket), key=lambda name: (not name.endswith(".jpg"), name)):
            stem = entry.partition(".")[0]
            if is_number(stem) and int(stem) in wanted and int(stem) % 1000 == int(bucket.name):
                names.setdefault(int(stem), f"{bucket.name}/{entry}")
    return names


def keep_trained(work: Preparation, least: int, most: int | None, seed: int) -> None:
    """Drop the identities that have fewer than `least` train pictures, and the train pictures over `most` of one."""
    pictures = defaultdict(set)
    for row in work.rows:
        if row["split"] == "train":
            pictures[row["identity"]].add(row["source"])
    capped = {}
    for name, found in pictures.items():
        if most is not None and len(found) > most:
            order = rng_for(seed, name, "acrd").permutation(sorted(found))
            capped[name] = set(order[:most].tolist())
    rows, work.rows = work.rows, []
    for row in rows:
        name = row["identity"]
        number = len(pictures.get(name, ()))
        if not number:
            work.drop("identity never in train", f"{row['sample_id']}: {name}")
        elif number < least:
            work.drop("rarer than --min_images in train", f"{row['sample_id']}: {name}")
        elif row["split"] == "train" and name in capped and row["source"] not in capped[name]:
            work.drop("over --max_images", f"{row['sample_id']}: {name}")
        else:
            work.rows.append(row)


if __name__ == "__main__":
    main()
