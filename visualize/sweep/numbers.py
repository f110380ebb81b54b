"""The numbers of a mask-ratio study: what each training makes of each picture at each ratio, and how sure that is.

Rows are the trainings (`visualize.sweep.trained.by_recipe`; repetitions under other seeds are averaged) and the floors.
Intervals of means are a bootstrap over pictures; those of differences are paired, and cover seeds too where trainings
were repeated under the same ones (`util.benchmark.paired`).
"""

import itertools
import statistics
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from util.benchmark.bootstrap import intervals
from util.benchmark.paired import difference
from util.benchmark.reconstruction import METRICS, summarise
from util.benchmark.regions import FIGURES, REGIONS
from util.data.sources import Source
from util.run.errors import UserError
from visualize.measure import MODEL, PictureFigures
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
    measured: dict[str, PictureFigures]
    floors: list[str]
    seed: int = 0
    origins: np.ndarray | None = None  # of all pictures of the source: what each was cut from

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
        """Every two trainings at every ratio: {"test_ratio", "metric", "a", "b", "difference" (a - b), "ci95", "over"}.

        over: what the interval covers, "seeds and samples" where both have two seeds or more in common, else "samples":
        these very runs on other pictures. Where nothing is removed there is nothing to compare.
        """
        names = ("test_ratio", "metric", "a", "b")
        pairs = itertools.product(filter(None, self.ratios), COMPARED, itertools.combinations(self.trainings, 2))
        return [
            dict(zip(names, (ratio, metric, a, b), strict=True)) | self._difference(a, b, ratio, metric)
            for ratio, metric, (a, b) in pairs
        ]

    def _difference(self, a: str, b: str, ratio: float, metric: str) -> dict:
        ways = [
            {run.args.get("seed"): values for run, values in zip(self.trainings[label], found, strict=True)}
            for label in (a, b)
            if (found := self.runs(label, ratio, metric))
        ]
        if len(ways) < 2:
            return {"difference": None, "ci95": None, "over": "samples"}
        shared = [seed for seed in ways[0] if seed in ways[1]]
        if len(shared) < 2:
            rows = [np.mean(list(way.values()), axis=0)[None] for way in ways]
        else:
            rows = [np.stack([way[seed] for seed in shared]) for way in ways]
        try:
            found = difference(rows[1], rows[0], self.groups_of_pictures)
        except ValueError:  # no picture has a finite value of both
            return {"difference": None, "ci95": None, "over": "samples"}
        return {"difference": found.mean, "ci95": found.ci95, "over": found.over}

    @property
    def groups_of_pictures(self) -> np.ndarray:
        """(N,) what each picture was cut from: pictures of one are not independent."""
        return self.index if self.origins is None else self.origins[self.index]

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
