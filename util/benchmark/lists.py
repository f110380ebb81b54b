"""The lists behind a report, who was named what and which pairs were compared, to set models side by side."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from util.benchmark.identification import NOBODY, per_class_table
from util.benchmark.pairs import KINDS
from util.benchmark.protocols import Outcome
from util.data.trials import write_protocol
from util.run.files import write_atomically, write_text


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    """A CSV file, in one step; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_lists(folder: Path, outcomes: dict[str, Outcome], classes: Sequence[str]) -> dict[str, list[str]]:
    """Write what the protocols have compared; {protocol: names of the files in `folder`}."""
    written: dict[str, list[str]] = {}
    if (closed := outcomes.get("closed_set")) is not None and closed.arrays:
        write_predictions(folder / "predictions.csv", closed, classes)
        write_classes(folder / "per_class.csv", closed, classes)
        written["closed_set"] = ["predictions.csv", "per_class.csv"]
    if (checked := outcomes.get("verification")) is not None and checked.arrays:
        write_pairs(folder, checked)
        written["verification"] = ["protocols/verification.parquet", "verification_scores.npy"]
    if (errors := outcomes.get("errors")) is not None:
        write_errors(folder / "errors.csv", errors, classes)
        written["errors"] = ["errors.csv"]
    return written


def write_errors(path: Path, outcome: Outcome, classes: Sequence[str]) -> None:
    """A row for each error, the clearest first: whom it was taken for, the pictures most like it, the tags."""
    probes, gallery = (outcome.arrays[name].facts["sample_id"] for name in ("probes", "gallery"))

    def row(error: dict) -> list:
        nearest = (None if error[key] is None else gallery[error[key]] for key in ("nearest_row", "own_row"))
        named = (classes[error["label"]], classes[error["predicted"]] if error["predicted"] != NOBODY else None)
        figures = (f"{error['score']:.4f}", f"{error['margin']:.4f}", "; ".join(error["tags"]))
        return [probes[error["row"]], *named, *nearest, *figures]

    header = ["sample_id", "identity", "taken_for", "nearest_of_that", "nearest_of_its_own", "score", "margin", "tags"]
    write_csv(path, header, map(row, outcome.arrays["errors"]))


def write_predictions(path: Path, closed: Outcome, classes: Sequence[str]) -> None:
    """A row for each probe: who it is, the five best answers, whether the first is right."""
    probes, ranked, labels = (closed.arrays[name] for name in ("probes", "ranked", "labels"))
    answers = [[classes[number] if number != NOBODY else None for number in row] for row in ranked.tolist()]
    rows = (
        [sample, identity, int(row[0] == label), *named]
        for sample, identity, row, label, named in zip(
            probes.facts["sample_id"], probes.identity, ranked.tolist(), labels.tolist(), answers, strict=True
        )
    )
    write_csv(path, ["sample_id", "identity", "correct", *(f"answer{i + 1}" for i in range(ranked.shape[1]))], rows)


def write_classes(path: Path, closed: Outcome, classes: Sequence[str]) -> None:
    """A row for each identity: images, precision, recall, F1, and whom it is mostly taken for."""
    found = per_class_table(closed.arrays["ranked"][:, 0], closed.arrays["labels"], len(classes))

    def row(entry: dict) -> list:
        other = entry["most_confused_with"]
        rates = (None if entry[key] is None else round(entry[key], 4) for key in ("precision", "recall", "f1"))
        name = None if other is None else classes[other]
        return [classes[entry["class"]], entry["images"], *rates, name, entry["confusions"]]

    header = ["identity", "images", "precision", "recall", "f1", "most_confused_with", "confusions"]
    write_csv(path, header, map(row, found))


def write_pairs(folder: Path, checked: Outcome) -> None:
    """The pair list as protocols/verification.parquet, and the score of each pair, in its order, (P,) float32."""
    pairs, names = checked.arrays["pairs"], checked.arrays["split"].facts["sample_id"]
    write_protocol(
        folder,
        "verification",
        {
            "id_a": names[pairs.a].tolist(),
            "id_b": names[pairs.b].tolist(),
            "label": pairs.same.astype(np.int64).tolist(),
            "kind": [KINDS[kind] for kind in pairs.kind.tolist()],
        },
    )

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.save(file, checked.arrays["scores"])

    write_atomically(folder / "verification_scores.npy", write)
