"""Hugging Face huggan/anime-faces: 21,551 anime faces of 64 x 64 px without names, for pre-training.

    python datasets/prepare_huggan.py --data_path anime-faces --out data/huggan --check

DIR holds the pictures of data.zip (images/N.png and images/data/N.png, each picture twice), or Parquet files with a
column `image`. Pictures that are equal pixel for pixel are kept once. Pictures in a folder are not copied; out of
Parquet files, which only a special reader opens, they are written to OUT/images.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.images import BadImage, decode_image
from util.data.pools import (
    add_pool_args,
    local_folder,
    parquet_files,
    parquet_rows,
    pixel_digest,
    pixel_digests,
    pool_splits,
    store,
    suffix_of,
)
from util.data.prepare import Preparation, prepare_parser
from util.data.sources import list_folder
from util.run.args import Parser
from util.run.errors import UserError, cli
from util.run.log import progress

WRITER = "prepare_huggan"
# the card's number, and what is there: twice that, which is expected to be each picture twice
PUBLISHED = {"pictures": 21_551, "files": 43_102}


def get_parser() -> Parser:
    parser = prepare_parser(
        "Prepare Hugging Face huggan/anime-faces: each picture once, without names.",
        "folder of the unpacked data.zip, or of the data set's Parquet files (also written hf:DIR)",
    )
    add_pool_args(parser, val_fraction=0.05, test_fraction=0.05)
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    pool_splits([], args.val_fraction, args.test_fraction)  # a wrong fraction is said before an hour's work
    folder, out = local_folder(args.data_path), Path(args.out)
    files = parquet_files(folder)
    if not files and any(folder.glob("*.zip")) and not any(path.is_dir() for path in folder.iterdir()):
        raise UserError(f"{folder} holds the packed data.zip only: unpack it there")
    work = Preparation(WRITER, out if files else folder, out)
    found = from_parquet(work, files) if files else from_folder(work, folder)
    first: dict[str, str] = {}
    total = 0
    for name, digest in found:
        total += 1
        if isinstance(digest, BadImage):
            work.drop("file damaged", f"{name}: {digest.reason}")
        elif first.setdefault(digest, name) != name:
            work.drop("same picture as another", f"{name}: {first[digest]}")
    splits = pool_splits(list(first), args.val_fraction, args.test_fraction)  # by the pixels: a file name says nothing
    for name, split in zip(first.values(), splits, strict=True):
        work.add({"sample_id": name, "file_name": name, "split": split})
    work.finish(args.check, PUBLISHED, {"files": total})


def from_folder(work: Preparation, folder: Path) -> Iterator[tuple[str, str | BadImage]]:
    """(file name, digest of its pixels) of the pictures under a folder: images/1.png before images/data/1.png."""
    names = list_folder(folder, "none")[0].table.column("file_name").to_pylist()
    return zip(names, pixel_digests([folder / name for name in names]), strict=True)


def from_parquet(work: Preparation, files: list[Path]) -> Iterator[tuple[str, str | BadImage]]:
    """The same for the rows of Parquet files. Each new picture is written to OUT/images, numbered by its row."""
    seen = set()
    for number, row in enumerate(progress(parquet_rows(files), desc="reading", unit="img")):
        data = row["bytes"] or b""
        name = f"images/{number:06d}{suffix_of(data) or ''}"
        try:
            digest = pixel_digest(decode_image(data))
        except BadImage as error:
            yield name, error
            continue
        if digest not in seen:
            seen.add(digest)
            store(work.out / name, data)
        yield name, digest


if __name__ == "__main__":
    main()
