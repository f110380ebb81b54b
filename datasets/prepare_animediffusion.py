"""Hugging Face Mercity/AnimeDiffusion_Dataset: about 8,200 anime wallpapers with tags, for pre-training.

    python datasets/prepare_animediffusion.py --data_path AnimeDiffusion_Dataset --out data/animediffusion --check

DIR holds the data set's Parquet files, or a folder of pictures. Out of Parquet files the pictures are written to
OUT/images as they are, not decoded, and what is said of them to OUT/tags.jsonl; the columns of embeddings are not
read. A run that was stopped goes on where it was. Pictures in a folder are not copied.
"""

import hashlib
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from util.data.pools import add_pool_args, local_folder, parquet_files, parquet_rows, pool_splits, store, suffix_of
from util.data.prepare import Preparation, image_sizes, prepare_parser
from util.data.sources import list_folder
from util.run.args import Parser
from util.run.errors import cli
from util.run.files import write_text
from util.run.log import progress

WRITER = "prepare_animediffusion"
TEXTS = ("image_tags", "resolution", "page_number", "image_path", "long_prompt", "short_prompt", "source", "image_url")
ROUNDED = "rows, to the nearest hundred"
PUBLISHED = {ROUNDED: 8200}  # the card says "8.2k" and no more


def get_parser() -> Parser:
    parser = prepare_parser(
        "Prepare Hugging Face Mercity/AnimeDiffusion_Dataset: wallpapers with tags, without faces or names.",
        "folder of the data set's Parquet files (also written hf:DIR), or of pictures",
    )
    add_pool_args(parser, val_fraction=0.05, test_fraction=0.0)
    return parser


@cli
def main(argv: list[str] | None = None) -> None:
    args = get_parser().parse_args(argv)
    folder, out = local_folder(args.data_path), Path(args.out)
    pool_splits([], args.val_fraction, args.test_fraction)
    files = parquet_files(folder)
    work = Preparation(WRITER, out if files else folder, out)
    if files:
        total, names = unpack(work, files)
    else:
        names = list_folder(folder, "none")[0].table.column("file_name").to_pylist()
        total = len(names)
    splits = pool_splits(names, args.val_fraction, args.test_fraction)
    for name, split, size in zip(names, splits, image_sizes(work.root, names), strict=True):
        work.add({"sample_id": name, "file_name": name, "split": split}, size)
    work.finish(args.check, PUBLISHED, {"rows read": total, ROUNDED: round(total, -2)})


def unpack(work: Preparation, files: list[Path]) -> tuple[int, list[str]]:
    """Write the pictures of Parquet files to OUT/images and their texts to OUT/tags.jsonl; rows read, file names."""
    first: dict[bytes, str] = {}
    lines, number = [], -1
    for number, row in enumerate(progress(parquet_rows(files, TEXTS), desc="unpacking", unit="img")):
        data, label = row["bytes"], f"row {number}: {row['image_url'] or row['path']}"
        suffix = suffix_of(data or b"")
        if suffix is None:
            work.drop("no picture in the row" if not data else "picture of no known format", label)
            continue
        name, digest = f"images/{number:04d}{suffix}", hashlib.blake2b(data, digest_size=16).digest()
        if first.setdefault(digest, name) != name:
            work.drop("same file as another", f"{label}: {first[digest]}")
            continue
        store(work.out / name, data)
        facts = {"file_name": name, **{text: row[text] for text in TEXTS}}
        lines.append(json.dumps(facts, ensure_ascii=False, default=str))
    work.out.mkdir(parents=True, exist_ok=True)
    write_text(work.out / "tags.jsonl", "".join(line + "\n" for line in lines))
    return number + 1, list(first.values())


if __name__ == "__main__":
    main()
