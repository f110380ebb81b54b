"""Trials beside a prepared folder, `protocols/NAME.parquet`: pair lists, official trials, distractors."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from util.data.manifest import cells
from util.data.packed import PackedFile
from util.run.errors import UserError
from util.run.files import write_atomically
from util.run.untrusted import read_parquet

ICARTOONFACE = "icartoonface"  # the name of the official trials
TRIALS = pa.schema(
    [
        pa.field("id_a", pa.string(), nullable=False),
        pa.field("id_b", pa.string()),
        pa.field("label", pa.int64()),
        pa.field("kind", pa.string()),
    ]
)


def write_protocol(folder: str | Path, name: str, rows: dict[str, list]) -> Path:
    """Write trials (id_a, id_b, label, kind; equally long lists) to `folder`/protocols/NAME.parquet; returns it."""
    path = Path(folder) / "protocols" / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pydict(rows, schema=TRIALS)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary, compression="zstd"))
    return path


def read_columns(source, schema: pa.Schema) -> dict[str, list]:
    """The columns of `schema` in a Parquet file of anybody's as lists, in which equal texts are one object.

    ValueError, OSError, KeyError or pa.ArrowException where it has no such columns.
    """
    table = read_parquet(source, schema.names).select(schema.names).cast(schema)
    return {name: _shared(table.column(name)) for name in schema.names}


def _shared(column: pa.ChunkedArray) -> list:
    known: dict = {}
    return [known.setdefault(cell, cell) for cell in cells(column)]


def read_protocol(folder: str | Path, name: str) -> dict[str, list] | None:
    """The trials in `folder`/protocols/NAME.parquet, or in a packed file, as lists; None where there are none."""
    path = Path(folder) / "protocols" / f"{name}.parquet"
    if Path(folder).is_file():
        packed = PackedFile(folder)
        stored = packed.section(f"protocols/{name}") if name in packed.names("protocols") else None
    else:
        stored = path if path.is_file() else None
    if stored is None:
        return None
    try:
        return read_columns(stored, TRIALS)
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise UserError(f"{path} holds no trials ({error}): prepare the folder again") from error
