"""Whether every file of a folder can be read, whatever was killed while it was written."""

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from util.run.files import is_temporary

_UNFINISHED = (".part", ".part.jsonl")  # of a packing or a drawing of maps (util.data.pack_journal)


def files_of(folder: Path) -> Iterator[Path]:
    """All files below a folder, in the order of their names."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def unreadable(folder: Path) -> list[str]:
    """ "name: why" of each file below `folder` that its reader refuses.

    Those under temporary names are not looked at.
    """
    found = []
    for path in files_of(folder):
        if is_temporary(path) or path.name.endswith(_UNFINISHED):
            continue
        try:
            _reader(path)(path)
        except Exception as error:  # whatever a reader says of a damaged file
            found.append(f"{path.relative_to(folder)}: {' '.join(str(error).split()) or type(error).__name__}")
    return found


def _reader(path: Path) -> Callable[[Path], object]:
    readers = {
        ".pth": _read_checkpoint, ".pack": _read_pack, ".safetensors": _read_safetensors, ".npz": _read_arrays,
        ".npy": _read_array, ".parquet": _read_table, ".png": _read_picture, ".json": _read_json,
        ".jsonl": _read_lines, ".csv": _read_text, ".md": _read_text, ".tex": _read_text,
    }  # fmt: skip
    if path.name == "log.txt":
        return _read_lines
    # events and output.txt are only ever added to: what was cut off at the end is not read
    return readers.get(path.suffix, Path.read_bytes)


def _read_checkpoint(path: Path) -> None:
    from util.training.checkpoint import read_checkpoint

    if not zipfile.is_zipfile(path):
        raise ValueError("cut short")
    read_checkpoint(path)


def _read_pack(path: Path) -> None:
    from util.data.packed import PackedFile

    for damaged in filter(None, PackedFile(path).damage()):
        raise ValueError(f"{damaged} differs from its checksum")


def _read_safetensors(path: Path) -> None:
    from safetensors.torch import load_file

    load_file(path)


def _read_arrays(path: Path) -> None:
    import numpy as np

    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays:
            arrays[name]


def _read_array(path: Path) -> None:
    import numpy as np

    np.load(path, allow_pickle=False)


def _read_table(path: Path) -> None:
    import pyarrow.parquet as pq

    pq.read_table(path, partitioning=None)


def _read_picture(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as picture:
        picture.load()


def _read_json(path: Path) -> None:
    json.loads(path.read_text(encoding="utf-8"))


def _read_lines(path: Path) -> None:
    for line in path.read_text(encoding="utf-8").splitlines():
        json.loads(line)


def _read_text(path: Path) -> None:
    path.read_text(encoding="utf-8")
