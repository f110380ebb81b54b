"""A benchmark as files that do not change: splits, pair lists and few-shot episodes, with their checksums.

    FOLDER/VERSION                    such as 1.0.0
    FOLDER/protocol.json              the settings, and what there is of everything
    FOLDER/splits.csv                 sample_id, split, identity, source
    FOLDER/pairs/NAME.parquet         id_a, id_b, label, kind: verification, verification_tuning, official trials
    FOLDER/episodes/SETTING.parquet   episode, class, role (support, query), sample_id
    FOLDER/SHA256SUMS                 of every other file, as `sha256sum -c` reads it

Pictures are not part of it: whoever has the data set matches them by sample_id.
"""

import csv
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from util.benchmark.few_shot import Episodes
from util.benchmark.lists import write_csv
from util.benchmark.pairs import KINDS
from util.data.trials import TRIALS, read_columns
from util.run.errors import UserError
from util.run.files import is_temporary, write_atomically, write_text
from util.run.untrusted import read_json

FORMAT = 1  # of these files, as protocol.json says
SUMS, VERSION, PROTOCOL, SPLITS = "SHA256SUMS", "VERSION", "protocol.json", "splits.csv"
SPLIT_COLUMNS = ("sample_id", "split", "identity", "source")
EPISODES = pa.schema(
    [
        pa.field("episode", pa.int32(), nullable=False),
        pa.field("class", pa.string(), nullable=False),
        pa.field("role", pa.string(), nullable=False),
        pa.field("sample_id", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Release:
    """A release in memory. splits: rows of SPLIT_COLUMNS. pairs: name -> columns of TRIALS. episodes: setting ->
    columns of EPISODES. settings: what the lists were made with."""

    version: str
    settings: Mapping
    splits: Sequence[Mapping]
    pairs: Mapping[str, Mapping[str, list]]
    episodes: Mapping[str, Mapping[str, list]]

    def identities(self, split: str) -> dict[str, str]:
        """{sample_id: identity} of the samples of a split that have one, in their order."""
        rows = (row for row in self.splits if row["split"] == split and row["identity"])
        return {row["sample_id"]: row["identity"] for row in rows}

    @property
    def classes(self) -> list[str]:
        """The identities of the gallery, in alphabetical order."""
        return sorted(set(self.identities("train").values()))


def episode_columns(drawn: Episodes, sample_id: np.ndarray, names: Sequence[str]) -> dict[str, list]:
    """Episodes as columns of EPISODES. sample_id: (N,) of the rows they were drawn from. names: of the labels."""
    columns: dict[str, list] = {field.name: [] for field in EPISODES}
    for episode in range(len(drawn.classes)):
        for place, label in enumerate(drawn.classes[episode].tolist()):
            for role, rows in (("support", drawn.support), ("query", drawn.query)):
                chosen = sample_id[rows[episode, place]].tolist()
                columns["sample_id"] += chosen
                columns["episode"] += [episode] * len(chosen)
                columns["class"] += [names[label]] * len(chosen)
                columns["role"] += [role] * len(chosen)
    return columns


# --- writing --------------------------------------------------------------------------------------------------------


def write_release(folder: str | Path, release: Release) -> Path:
    """Write all files, the checksums last; returns the folder. UserError where it holds something, or the version is
    not of the form 1.0.0."""
    folder = Path(folder)
    if not re.fullmatch(r"\d+\.\d+\.\d+", release.version):
        raise UserError(f"--version {release.version} is not of the form 1.0.0")
    if folder.exists() and not all(map(is_temporary, folder.iterdir())):
        raise UserError(f"{folder} is not empty: a release is not changed; choose another folder")
    for name in ("pairs", "episodes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    write_csv(folder / SPLITS, SPLIT_COLUMNS, ([row[name] for name in SPLIT_COLUMNS] for row in release.splits))
    for kind, schema, tables in (("pairs", TRIALS, release.pairs), ("episodes", EPISODES, release.episodes)):
        for name, columns in tables.items():
            table = pa.Table.from_pydict(dict(columns), schema=schema)
            write_atomically(
                folder / kind / f"{name}.parquet",
                lambda path, table=table: pq.write_table(table, path, compression="zstd"),
            )
    facts = {"format": FORMAT, "settings": dict(release.settings), "counts": _counts(release)}
    write_text(folder / PROTOCOL, json.dumps(facts, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    write_text(folder / VERSION, release.version + "\n")
    lines = (f"{digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in _files(folder))
    write_text(folder / SUMS, "".join(lines))
    return folder


def _counts(release: Release) -> dict:
    splits: dict[str, dict[str, int]] = {}
    for name in sorted({row["split"] for row in release.splits}):
        found = release.identities(name)
        total = sum(row["split"] == name for row in release.splits)
        splits[name] = {"samples": total, "labelled": len(found), "identities": len(set(found.values()))}
    return {
        "splits": splits,
        "pairs": {name: len(columns["id_a"]) for name, columns in release.pairs.items()},
        "episodes": {name: len(set(columns["episode"])) for name, columns in release.episodes.items()},
    }


def digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SUMS and not is_temporary(path))


# --- reading --------------------------------------------------------------------------------------------------------


def check_release(folder: str | Path) -> int:
    """Compare every file with its checksum; returns how many there are. UserError names the first that differs."""
    return len(_verified(Path(folder)))


def _verified(folder: Path) -> list[str]:
    """The names of the files that a release has checksums of, which agree."""
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        sums = {name: value for value, name in (line.split("  ", 1) for line in lines)}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no release: its {SUMS} cannot be read ({error})") from error
    present = {path.relative_to(folder).as_posix(): path for path in _files(folder)}
    for name, value in sums.items():
        if name not in present:
            raise UserError(f"{folder} lacks {name}: fetch the release again")
        if digest(present[name]) != value:
            raise UserError(f"{folder / name} is not the released file: its SHA-256 differs; fetch the release again")
    extra = sorted(set(present) - set(sums))
    if extra:
        raise UserError(f"{folder / extra[0]} is not part of the release: take it out")
    for name in (VERSION, PROTOCOL, SPLITS):
        if name not in sums:
            raise UserError(f"{folder} lacks {name}: it is no whole release")
    return list(sums)


def read_release(folder: str | Path) -> Release:
    """A release whose checksums agree; UserError otherwise, and for a newer format."""
    folder = Path(folder)
    names = _verified(folder)
    try:
        facts = read_json(folder / PROTOCOL)
        if facts["format"] != FORMAT:
            raise UserError(f"{folder} is of format {facts['format']}, and this reads {FORMAT}: update the code")
        tables = {
            kind: {
                Path(name).stem: read_columns(folder / name, schema)
                for name in sorted(names)
                if Path(name).parent == Path(kind)
            }
            for kind, schema in (("pairs", TRIALS), ("episodes", EPISODES))
        }
        version = (folder / VERSION).read_text(encoding="utf-8").strip()
        release = Release(version, facts["settings"], _read_splits(folder), tables["pairs"], tables["episodes"])
        _check_lists(release)
    except (OSError, ValueError, KeyError, TypeError, csv.Error, pa.ArrowException) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder} is no release, though its checksums agree ({reason}): fetch it again") from error
    return release


def _read_splits(folder: Path) -> list[dict]:
    with open(folder / SPLITS, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, start=1):
        if set(row) != set(SPLIT_COLUMNS) or None in row.values() or not row["sample_id"]:
            raise ValueError(f"row {number} of {SPLITS} is not {', '.join(SPLIT_COLUMNS)}")
    return [{**row, "identity": row["identity"] or None} for row in rows]


def _check_lists(release: Release) -> None:
    """ValueError where the lists speak of samples that the release does not have, or a setting is of another type."""
    if not isinstance(release.settings, dict) or type(release.settings["seed"]) is not int:
        raise ValueError("its settings have no seed")
    known = {row["sample_id"] for row in release.splits}
    if len(known) < len(release.splits):
        raise ValueError(f"{SPLITS} has a sample twice")
    who = {row["sample_id"]: row["identity"] for row in release.splits if row["identity"]}
    for name in ("verification", "verification_tuning"):
        listed = release.pairs.get(name, {"id_a": [], "id_b": [], "label": [], "kind": []})
        if not who.keys() >= {*listed["id_a"], *listed["id_b"]}:
            raise ValueError(f"{name} lists a sample that is not there, or nobody's")
        if not ({0, 1}.issuperset(listed["label"]) and set(KINDS).issuperset(listed["kind"])):
            raise ValueError(f"{name} has a label or a kind that is none")
        if [who[a] == who[b] for a, b in zip(listed["id_a"], listed["id_b"], strict=True)] != listed["label"]:
            raise ValueError(f"{name} calls a pair one identity that {SPLITS} calls two, or the other way round")
    for name, columns in release.episodes.items():
        if not known.issuperset(columns["sample_id"]):
            raise ValueError(f"{name} lists a sample that is not there")


def first_difference(release: Release, rows: Sequence[Mapping]) -> str | None:
    """How a prepared folder's rows (with sample_id, split, identity) differ from a release; None if they do not."""
    own = {row["sample_id"]: (row["split"], row["identity"]) for row in rows}
    for row in release.splits:
        if row["sample_id"] not in own:
            return f"sample {row['sample_id']} is missing"
        found, expected = own[row["sample_id"]], (row["split"], row["identity"])
        if found != expected:
            here, there = (f"{who!r} of {split}" for split, who in (found, expected))
            return f"sample {row['sample_id']} is {here}, in the release {there}"
    extra = set(own) - {row["sample_id"] for row in release.splits}
    return f"sample {min(extra)} is not in the release" if extra else None
