"""A prepared folder made from another one: some of its rows, the pictures where they are."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from util.data.manifest import Manifest, write_manifest
from util.data.prepare import refuse_foreign
from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.untrusted import read_parquet


@dataclass(frozen=True)
class Derived:
    """What was written. masks: rows whose mask_file was left out. protocols, lost: names copied, and not copied
    because they speak of rows that are gone."""

    path: Path
    masks: int
    protocols: list[str]
    lost: list[str]


def check_target(manifest: Manifest, out: Path, writer: str) -> None:
    """UserError where `out` is the folder that is read, or holds another program's rows."""
    if out.resolve() == manifest.folder.resolve():
        raise UserError(f"--out {out} is the folder that is read: choose another, nothing is written over")
    refuse_foreign(out, writer)


def write_part(
    manifest: Manifest, chosen: np.ndarray, out: Path, writer: str, extra: Mapping[str, str] | None = None
) -> Derived:
    """Write the rows where `chosen` (len,) bool is true to `out`/metadata.parquet, and the protocols that still hold.

    Masks lie in the folder itself, not under its image_root, so their names are left out. Semantic maps are numbered
    by row: they have to be made again. UserError where `out` may not be written or no row is left.
    """
    check_target(manifest, out, writer)
    part = manifest.keep(np.asarray(chosen, dtype=bool))
    if not len(part):
        raise UserError(f"no row is left for {out}: check --data_path")
    rows = part.table.to_pylist()
    masks = sum(row["mask_file"] is not None for row in rows)
    rows = [{**row, "mask_file": None} for row in rows]
    facts = {"writer": writer, "derived_from": str(manifest.folder.resolve()), **(extra or {})}
    path = write_manifest(out, rows, str(manifest.root.resolve()), facts)
    protocols, lost = _copy_protocols(manifest.folder, out, part.table.column("sample_id"))
    return Derived(path, masks, protocols, lost)


def _copy_protocols(source: Path, out: Path, ids: pa.ChunkedArray) -> tuple[list[str], list[str]]:
    copied, lost = [], []
    for path in sorted((source / "protocols").glob("*.parquet")):
        try:
            table = read_parquet(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path} holds no trials ({error}): prepare the folder again") from error
        mentioned = [table.column(name).drop_null() for name in ("id_a", "id_b") if name in table.column_names]
        if all(pc.all(pc.is_in(names, value_set=ids.combine_chunks())).as_py() is not False for names in mentioned):
            (out / "protocols").mkdir(exist_ok=True)
            data = path.read_bytes()
            write_atomically(out / "protocols" / path.name, lambda temporary, data=data: temporary.write_bytes(data))
            copied.append(path.stem)
        else:
            lost.append(path.stem)
    return copied, lost
