"""Power laws are found through known costs, and the benchmark of growth measures what it names.

Run: python -m pytest tests/test_growth.py
"""

import json
import math
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.helpers import fails
from util.benchmark.growth import power_law
from util.run.seed import rng_for

SIZES = (10_000, 100_000, 1_000_000, 10_000_000)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.3, 2.0])
def test_a_power_law_is_found(exponent):
    law = power_law(SIZES[::-1], [3e-6 * size**exponent for size in SIZES[::-1]])
    assert [law.exponent, law.end, law.low, law.high] == pytest.approx([exponent] * 4, abs=1e-9)
    assert law.factor == pytest.approx(3e-6) and law.residual == pytest.approx(1)
    assert law.at(10**8) == pytest.approx([3e-6 * 10 ** (8 * exponent)] * 2)
    assert (law.largest, law.value) == pytest.approx((10**7, 3e-6 * 10 ** (7 * exponent)))


def test_the_interval_holds_the_exponent():
    held = 0
    for seed in range(300):
        noise = np.exp(rng_for(seed, "cost").normal(0, 0.2, len(SIZES)))
        law = power_law(SIZES, 2e-6 * np.array(SIZES) * noise)
        held += law.low <= 1 <= law.high
    assert 270 <= held <= 298  # 95 %, by Student's distribution with two degrees of freedom


def test_a_constant_is_seen_at_the_end():
    """A second of start-up hides the growth at small sizes: the ways to go on part, and the truth is the highest."""
    costs = [1 + 1e-6 * size for size in SIZES]
    law = power_law(SIZES, costs)
    assert law.exponent < 0.4 and 0.7 < law.end < 1 and law.residual > 1.3
    low, high = law.at(10**8)
    assert low < 0.5 * high and high == pytest.approx(1 + 1e-6 * 10**8)  # by what each row costs at the end
    assert law.at(10**7) == (law.value, law.value)
    assert math.isinf(power_law(SIZES[:2], costs[:2]).high)


def test_what_is_no_law_is_refused():
    for sizes, values in (
        ([10], [1.0]),
        ([10, 10], [1.0, 2.0]),
        ([10, 100, 100], [1.0, 2.0, 2.1]),
        ([10, 100], [0.0, 1.0]),
    ):
        with pytest.raises(ValueError, match="two sizes, all different, and values above 0"):
            power_law(sizes, values)


# --- the script -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bench(import_script):
    return import_script("scripts/bench_growth.py")


def test_sizes_stop_where_a_part_takes_too_long(bench):
    assert bench.sizes_of("manifest", [10**4, 10**6]) == [10**4, 10**6]
    assert bench.sizes_of("retrieval", [10**4, 10**5, 10**6]) == [1111, 3333, 10_000]
    assert bench.sizes_of("all_pairs", [10**5, 10**6]) == [10_000, 30_000]
    assert bench.sizes_of("order", [10**4]) == [10**4, 10**7, 10**8]
    assert bench.sizes_of("near_duplicates", [10**4, 10**5, 10**7, 10**8]) == [10**4, 10**5, 10**7]


def test_quantities_in_words(bench):
    for value, unit, said in (
        (2e-5, "s", "20 us"), (0.5, "s", "500 ms"), (90, "s", "90 s"), (600, "s", "10 min"), (3e5, "s", "3.47 days"),
        (1e9, "s", "31.7 years"), (512, "bytes", "512 B"), (2.5e9, "bytes", "2.5 GB"), (3e15, "bytes", "3,000 TB"),
    ):  # fmt: skip
        assert bench.quantity(value, unit) == said


MEASURES = """
import json, sys
sys.path[:0] = [".", "scripts"]
import numpy as np
from bench_growth import Meter
meter = Meter()
with meter.phase("kept", keeps=True):
    kept = np.ones(5_000_000)
with meter.phase("passed", keeps=True):
    np.ones(5_000_000).sum()
print(json.dumps({name: cost for name, (cost, _) in meter.costs.items()}))
"""


def test_memory_is_what_a_block_takes():
    """In a process of its own, as every part is measured: what other tests have freed is given back whenever it is."""
    done = subprocess.run([sys.executable, "-c", MEASURES], cwd=ROOT, capture_output=True, text=True)
    costs, held = json.loads(done.stdout), 5_000_000 * 8
    assert 0.95 * held <= costs["kept: memory kept"] < 1.2 * held
    assert 0.95 * held <= costs["passed: memory at the peak"] < 1.3 * held
    assert costs["passed: memory kept"] < 0.1 * held


@pytest.mark.parametrize("part", ["manifest", "pack", "order", "damaged", "workers", "near_duplicates"])
def test_parts_measure_what_they_name(bench, tmp_path, part):
    meter = bench.Meter()
    bench.PARTS[part][0](meter, 2000, tmp_path)
    assert meter.costs and all(value > 0 for value, _ in meter.costs.values())


@pytest.mark.parametrize("part", ["verification", "all_pairs", "open_set", "identification", "retrieval"])
def test_protocols_are_measured(bench, tmp_path, monkeypatch, part):
    monkeypatch.setattr(bench, "PAIRS", 500)
    meter = bench.Meter()
    bench.PARTS[part][0](meter, 400, tmp_path)
    assert sorted(name.split(": ")[1] for name in meter.costs) == ["memory at the peak", "time"]


def test_a_whole_run_goes_on_where_it_was(bench, tmp_path, capsys, monkeypatch):
    out, asked = tmp_path / "growth.json", []
    apart = bench.measure_apart
    monkeypatch.setattr(bench, "LAID_OUT", (20000,))
    monkeypatch.setattr(bench, "measure_apart", lambda part, rows: asked.append((part, rows)) or apart(part, rows))
    argv = ["--out", str(out), "--parts", "order", "damaged", "--rows", "5000", "20000"]
    bench.main([*argv, "--figure", str(tmp_path / "growth.png")])
    assert asked == [("order", 5000), ("order", 20000), ("damaged", 5000), ("damaged", 20000)]
    said = capsys.readouterr().out
    assert "| epoch entered: time | 20,000 |" in said and "at 100,000,000 |" in said
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    bench.main([*argv, "100000"])
    assert asked[4:] == [("order", 100_000), ("damaged", 100_000)]
    result = json.loads(out.read_text())
    assert set(result["measured"]["order"]) == {"5000", "20000", "100000"}
    listed = result["laws"]["list of damaged images"]
    assert listed["exponent"] == pytest.approx(1, abs=0.05) and listed["unit"] == "bytes"


def test_what_is_no_result_is_one_line(bench, tmp_path, capsys):
    (tmp_path / "x.json").write_text("[]")
    assert "is no result of this script" in fails(bench.main, capsys, ["--out", str(tmp_path / "x.json")])


def test_a_part_that_fails_is_one_line(bench, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(bench.PARTS, "order", (lambda meter, rows, scratch: 1 / 0, 10**6))
    said = fails(bench.main, capsys, ["--out", str(tmp_path / "x.json"), "--parts", "order", "--rows", "5000"])
    assert "order at 5000 rows ended with status 1" in said
