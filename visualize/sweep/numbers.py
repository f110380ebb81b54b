"""The numbers of a mask-ratio study: what each training makes of each picture at each ratio, and how sure that is.

Rows are the trainings (`visualize.sweep.trained.by_recipe`; repetitions under other seeds are averaged) and the floors.
Intervals are a bootstrap over pictures, paired: every row is drawn with the same pictures.
"""

import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from util.benchmark.bootstrap import intervals
from util.benchmark.reconstruction import METRICS, summarise
from util.benchmark.regions import FIGURES, REGIONS
from util.data.sources import Source
from util.run.errors import UserError
from visualize.measure import MODEL, Measured
from visualize.sweep.trained import Trained

# of METRICS, without the loss: models with and without norm_pix_loss have different ones
COMPARED = ("psnr_db", "ssim", "blockiness", "delta_e", "hf_energy_ratio")
GROUP_COLUMNS = ("identity", "source", "style", "pose", "occlusion", "expression")
NO_GROUP = "not known"


@dataclass
class Sweep:
    """trainings: label -> its runs. measured: ckpt -> its figures; those of the first run hold the floors, too."""

    ratios: list[float]
    trainings: dict[str, list[Trained]]
    measured: dict[str, Measured]
    floors: list[str]
    seed: int = 0

    @property
    def rows(self) -> list[str]:
        """Labels of the trainings, then names of the floors."""
        return [*self.trainings, *self.floors]

    @property
    def index(self) -> np.ndarray:
        """(N,) the numbers of the pictures in their source."""
        return next(iter(self.measured.values())).index

    @property
    def regions(self) -> list[str]:
        """The regions that were measured, in the order of REGIONS."""
        found = {key[2] for key in next(iter(self.measured.values())).regions}
        return [region for region in REGIONS if region in found]

    def runs(self, row: str, *key, of: str = "values") -> list[np.ndarray]:
        """The values (N,) of each run of a row; none where the row has no such figure. key: (ratio, metric) or more."""
        if row in self.trainings:
            found = [getattr(self.measured[run.ckpt], of).get((MODEL, *key)) for run in self.trainings[row]]
        else:
            found = [getattr(measured, of).get((row, *key)) for measured in self.measured.values()]
        return [values for values in found if values is not None]

    def values(self, row: str, *key, of: str = "values") -> np.ndarray | None:
        """The value of each picture (N,), the mean over runs; None where the row has none."""
        runs = self.runs(row, *key, of=of)
        return np.mean(runs, axis=0) if runs else None

    def summary(self, row: str, *key, of: str = "values") -> dict:
        """{"mean", "std"} over pictures, and "std_runs", the sample deviation of the runs' means (None of one run)."""
        runs = self.runs(row, *key, of=of)
        if not runs:
            return {"mean": None, "std": None, "std_runs": None}
        means = [summarise(values)["mean"] for values in runs]
        several = len(means) > 1 and None not in means
        return summarise(np.mean(runs, axis=0)) | {"std_runs": statistics.stdev(means) if several else None}

    def table(self) -> dict[str, dict[float, dict[str, dict]]]:
        """{row: {ratio: {metric: summary}}}."""
        return {r: {x: {m: self.summary(r, x, m) for m in METRICS} for x in self.ratios} for r in self.rows}

    def region_table(self) -> dict[str, dict[float, dict[str, dict[str, dict]]]]:
        """{row: {ratio: {region: {figure: summary}}}}; psnr_db and delta_e with "ci95"."""
        keys = [(r, x, region, f) for r in self.rows for x in self.ratios for region in self.regions for f in FIGURES]
        values = {key: self.values(*key, of="regions") for key in keys}
        bounds = mean_intervals({key: v for key, v in values.items() if key[3] != "share"}, seed=self.seed)
        table: dict = {}
        for key in keys:
            row, ratio, region, figure = key
            summary = self.summary(*key, of="regions") | ({"ci95": bounds[key]} if key in bounds else {})
            table.setdefault(row, {}).setdefault(ratio, {}).setdefault(region, {})[figure] = summary
        return table

    def differences(self) -> list[dict]:
        """Every two trainings at every ratio: {"test_ratio", "metric", "a", "b", "difference" (a - b), "ci95"}.

        Where nothing is removed there is nothing to compare.
        """
        labels, found = list(self.trainings), {}
        for ratio in filter(None, self.ratios):
            for metric in COMPARED:
                of_label = {label: self.values(label, ratio, metric) for label in labels}
                for i, a in enumerate(labels):
                    found |= {(ratio, metric, a, b): of_label[a] - of_label[b] for b in labels[i + 1 :]}
        bounds, names = mean_intervals(found, seed=self.seed), ("test_ratio", "metric", "a", "b")
        return [
            dict(zip(names, key, strict=True)) | {"difference": summarise(values)["mean"], "ci95": bounds[key]}
            for key, values in found.items()
        ]

    def best(self, ratio: float) -> str | None:
        """The training of the highest mean PSNR at a ratio; None where nothing was removed."""
        means = {label: self.summary(label, ratio, "psnr_db")["mean"] for label in self.trainings}
        known = {label: mean for label, mean in means.items() if mean is not None}
        return max(known, key=known.get, default=None)

    def groups(self, source: Source, column: str) -> dict[str, dict]:
        """PSNR by the value of a column: {value: {"images", "psnr_db": {row: {ratio: {"mean", "ci95"}}}}}, sorted.

        UserError for a column that is not of GROUP_COLUMNS, or that the data do not fill.
        """
        if column not in GROUP_COLUMNS:
            raise UserError(f"--groups {column} is no column to group by: choose from {', '.join(GROUP_COLUMNS)}")
        known = np.array([value or NO_GROUP for value in source.column(column)])[self.index]
        if (known == NO_GROUP).all():
            raise UserError(f"--groups {column}: {source.name} does not say the {column} of its pictures: name another")
        columns = {(row, ratio): self.values(row, ratio, "psnr_db") for row in self.rows for ratio in self.ratios}
        report = {}
        for value in sorted(set(known.tolist()), key=lambda value: (value == NO_GROUP, value)):
            inside = known == value
            own = {key: values[inside] for key, values in columns.items()}
            bounds, psnr = mean_intervals(own, seed=self.seed), {}
            for (row, ratio), values in own.items():
                entry = {"mean": summarise(values)["mean"], "ci95": bounds[row, ratio]}
                psnr.setdefault(row, {})[ratio] = entry
            report[value] = {"images": int(inside.sum()), "psnr_db": psnr}
        return report

    def error_map(self, label: str, ratio: float) -> np.ndarray:
        """(H, W) mean absolute error of removed pixels, 8-bit grey levels, the mean over runs; NaN: never removed."""
        return np.mean([self.measured[run.ckpt].errors[ratio] for run in self.trainings[label]], axis=0)


def mean_intervals(
    columns: Mapping[Hashable, np.ndarray], *, seed: int = 0, **options
) -> dict[Hashable, list[float] | None]:
    """95 % bootstrap interval of the mean of each column (N,), all drawn with the same samples.

    Values that are not finite (the PSNR of equal pictures, or of nothing) are left out. None where there are fewer
    than two samples, or hardly any finite one. options: as of `bootstrap.intervals`.
    """
    if not columns:
        return {}
    table = np.stack(list(columns.values()), axis=1)
    finite = np.isfinite(table)
    table = np.where(finite, table, 0.0)

    def means(weights: np.ndarray) -> dict[Hashable, float]:
        with np.errstate(invalid="ignore"):  # no finite value was drawn: NaN
            return dict(zip(columns, (weights @ table) / (weights @ finite), strict=True))

    return intervals(means, len(table), seed=seed, **options)


def own_ratio(runs: Sequence[Trained], ratios: Sequence[float]) -> float | None:
    """The mask ratio that runs were trained at, if it was tested."""
    return runs[0].mask_ratio if runs[0].mask_ratio in ratios else None
