"""What the prepare scripts of unlabelled pools share: held-out parts, exact duplicates, pictures in Parquet files."""

import argparse
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from util.data.images import BadImage, decode_image
from util.data.roles import in_part
from util.run.args import ratio
from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.log import progress
from util.run.untrusted import open_parquet, spelled_type

_AHEAD = 1024  # pictures decoded before the first of them is asked for
# how the files of each format begin; WEBP and AVIF say it a few bytes in
_SIGNATURES = (
    (0, b"\xff\xd8\xff", ".jpg"),
    (0, b"\x89PNG", ".png"),
    (0, b"GIF8", ".gif"),
    (0, b"BM", ".bmp"),
    (0, b"II*\x00", ".tif"),
    (0, b"MM\x00*", ".tif"),
    (8, b"WEBP", ".webp"),
    (4, b"ftypavi", ".avif"),
)


def add_pool_args(parser: argparse.ArgumentParser, val_fraction: float, test_fraction: float) -> None:
    """How much of a pool is kept back from pre-training, to measure reconstruction on."""
    for split, default in (("val", val_fraction), ("test", test_fraction)):
        parser.add_argument(
            f"--{split}_fraction",
            type=ratio,
            default=default,
            help=f"share of the pictures that become {split}, by a fixed hash; fraction from 0 to below 1",
        )


def pool_splits(keys: Sequence[str], val_fraction: float, test_fraction: float) -> list[str]:
    """The split of each key, "pretrain", "val" or "test", by a fixed hash: whatever the others, equal keys together.

    UserError where nothing would be left for pre-training.
    """
    if val_fraction + test_fraction >= 1:
        raise UserError(
            f"--val_fraction {val_fraction} and --test_fraction {test_fraction} leave nothing for pre-training: "
            "lower them"
        )
    val = in_part(keys, "val", val_fraction)
    held_out = in_part(keys, "val", val_fraction + test_fraction)
    return np.select([val, held_out], ["val", "test"], "pretrain").tolist()


def pixel_digest(image: Image.Image) -> str:
    """32 hex digits from the size and the pixels of an RGB image: equal pictures, equal digits, whatever the file."""
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()


def pixel_digests(paths: Iterable[Path], label: str = "decoding") -> Iterator[str | BadImage]:
    """`pixel_digest` of each picture file in order, or the BadImage that says why there is none."""

    def digest(path: Path) -> str | BadImage:
        try:
            return pixel_digest(decode_image(path))
        except BadImage as error:
            return error

    paths = list(paths)
    with ThreadPoolExecutor() as pool, progress(total=len(paths), desc=label, unit="img") as bar:
        for first in range(0, len(paths), _AHEAD):
            for found in pool.map(digest, paths[first : first + _AHEAD]):
                bar.update()
                yield found


def parquet_files(folder: Path) -> list[Path]:
    """The Parquet files under a folder, sorted by path; a metadata.parquet of ours is none of them."""
    return sorted(path for path in folder.rglob("*.parquet") if path.name != "metadata.parquet")


def parquet_rows(files: Sequence[Path], texts: Sequence[str] = ()) -> Iterator[dict]:
    """{"bytes": bytes or None, "path": str or None, and each of `texts`} for the rows of Parquet files, in order.

    The picture is in the column `image`, as Hugging Face's library writes it: {bytes, path}, undecoded. A text column
    that a file lacks reads as None; other columns are not read. One row is in memory at a time. UserError where a
    file is damaged or has no such column.
    """
    for path in files:
        try:
            with open_parquet(path, ["image", *texts]) as file:
                _check_picture_column(file.schema_arrow, path)
                names = file.schema_arrow.names
                known = [name for name in texts if names.count(name) == 1]
                # one row at a time: one picture may stand in all of them
                for batch in file.iter_batches(1, columns=["image", *known]):
                    (row,) = batch.to_pylist()
                    cell = row["image"] or {"bytes": None}
                    yield {"bytes": cell["bytes"], "path": cell.get("path"), **{name: row.get(name) for name in texts}}
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as Parquet ({error}): download it again") from error


def _check_picture_column(schema: pa.Schema, path: Path) -> None:
    if schema.names.count("image") != 1:
        raise UserError(f"{path} has no column 'image', only {', '.join(schema.names)}: check --data_path")
    kind = spelled_type(schema.field("image").type)
    at = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    # text there would be taken for the path of a file on this machine
    if at < 0 or not (pa.types.is_binary(kind[at].type) or pa.types.is_large_binary(kind[at].type)):
        raise UserError(f"{path}: column 'image' is {kind}, not {{bytes, path}}: check --data_path")


def suffix_of(data: bytes) -> str | None:
    """The file name's end that fits the bytes of a picture, None where they are of no known format."""
    return next((suffix for at, mark, suffix in _SIGNATURES if data[at : at + len(mark)] == mark), None)


def store(path: Path, data: bytes) -> bool:
    """Write a file in one step, unless one of this size is there; whether it was written."""
    try:
        if path.stat().st_size == len(data):
            return False
    except OSError:
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    return True


def local_folder(data_path: str) -> Path:
    """The folder behind --data_path; "hf:FOLDER" is that folder. UserError where there is none."""
    folder = Path(data_path.removeprefix("hf:"))
    if not folder.is_dir():
        name = str(folder)
        remedy = f"download it first: hf download {name} --repo-type dataset --local-dir DIR, and give DIR"
        if not data_path.startswith("hf:"):
            remedy = "give the folder that the download was unpacked to"
        raise UserError(f"{data_path} is no folder on this disk: {remedy}")
    return folder
