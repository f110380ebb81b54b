"""Trials beside a prepared folder, `protocols/NAME.parquet`: pair lists, official trials, distractors."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

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
        return read_parquet(stored).select(TRIALS.names).cast(TRIALS).to_pydict()
    except (pa.ArrowException, KeyError, OSError, ValueError) as error:
        raise UserError(f"{path} holds no trials ({error}): prepare the folder again") from error
