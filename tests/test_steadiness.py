"""A leak of known size is found, a level that only wavers is not, and readings of processes are what they hold.

Run: python -m pytest tests/test_steadiness.py
"""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
from scipy import stats

from util.benchmark.steadiness import (
    EQUAL,
    FASTER,
    FLAT,
    GROWS,
    SLOWER,
    UNDECIDED,
    judge_growth,
    judge_speed,
    settled,
    trend,
)
from util.run.process_tree import descendants, usage
from util.run.seed import rng_for

STEPS = np.arange(250, 100_001, 250)
ONE = np.zeros(len(STEPS), int)
MIB = 2**20


def wavering(seed: int, spread: float, memory: float = 0.8, readings: int = len(STEPS)) -> np.ndarray:
    """Readings about 0 that follow each other, as those of memory do."""
    noise, values = rng_for(seed, "wavering").normal(0, spread, readings), np.zeros(readings)
    for i in range(1, len(values)):
        values[i] = memory * values[i - 1] + noise[i]
    return values


def growth(values, segments=ONE, bound=256 * 100_000) -> dict:
    return judge_growth(STEPS, values, segments, bound=bound, over=100_000)


@pytest.mark.parametrize("seed", range(10))
def test_a_flat_noisy_level_is_flat(seed):
    found = growth(600 * MIB + wavering(seed, 2 * MIB))
    assert found["verdict"] == FLAT and found["level"] == pytest.approx(600 * MIB, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("leak", [500, 2000])
def test_a_leak_of_known_size_is_found(seed, leak):
    found = growth(600 * MIB + leak * STEPS + wavering(seed, MIB))
    low, high = found["per_step_ci95"]
    assert found["verdict"] == GROWS and found["gain"] == pytest.approx(leak * 100_000, rel=0.25)
    assert low < found["per_step"] < high


@pytest.mark.parametrize("readings, least", [(100, 172), (400, 180)])
def test_the_interval_holds_the_slope_as_often_as_it_says(readings, least):
    leak, held, steps = 100.0, 0, STEPS[:readings]
    for seed in range(200):
        found = trend(steps, leak * steps + wavering(seed, MIB, readings=readings), ONE[:readings])
        held += found.low <= leak <= found.high
    # 95 % of them, less four standard deviations; of so few readings that a verdict is given it may be 90 %; without
    # the correction 130
    assert least <= held <= 200


def test_few_readings_have_the_interval_of_student():
    """Against SciPy's regression and quantile, where neighbours do not resemble each other."""
    steps, values = np.arange(6.0), np.array([1.0, -1.0, 1.2, -1.0, 1.0, -1.1])
    found, fit = trend(steps, values, [0] * 6), stats.linregress(steps, values)
    assert found.freedom == 4 and found.slope == pytest.approx(fit.slope)
    assert found.high - found.slope == pytest.approx(stats.t.ppf(0.975, 4) * fit.stderr)


@pytest.mark.parametrize("leak", [0, 2000])
def test_too_few_readings_decide_nothing(leak):
    """Of readings that follow each other, the interval of so few is too narrow: it holds the slope too seldom."""

    def verdict(readings: int, memory: float) -> str:
        kept = slice(0, readings)
        values = 600 * MIB + leak * STEPS[kept] + wavering(0, 1000, memory, readings)
        return judge_growth(STEPS[kept], values, ONE[kept], bound=256 * 100_000, over=100_000)["verdict"]

    assert verdict(99, 0.0) == UNDECIDED and verdict(100, 0.0) == (GROWS if leak else FLAT)
    assert verdict(110, 0.97) == UNDECIDED  # a handful of independent ones


def test_a_line_without_noise_is_known_exactly():
    found = trend(STEPS, 3 * STEPS + 7, ONE)
    assert found.slope == pytest.approx(3) and found.high - found.low < 1e-6
    level = growth(np.full(len(STEPS), 4.0), bound=2)
    assert level["gain"] == 0 and level["verdict"] == FLAT


def test_a_short_run_is_undecided():
    few = slice(0, 12)
    found = judge_growth(
        STEPS[few], 600 * MIB + wavering(1, 8 * MIB)[few], ONE[few], bound=256 * 3000, over=3000
    )  # fmt: skip
    assert found["verdict"] == UNDECIDED
    with pytest.raises(ValueError, match="5 readings in 1 processes are too few"):
        trend(STEPS[:5], STEPS[:5], ONE[:5])


def test_a_resumed_run_starts_at_another_level():
    """A process that holds 50 MiB more than the one before is no leak; a leak within both is one."""
    segments = (STEPS > 50_000).astype(int)
    level = 600 * MIB + 50 * MIB * segments + wavering(3, MIB)
    assert growth(level, segments)["verdict"] == FLAT and growth(level)["verdict"] != FLAT
    assert growth(level + 1000 * STEPS, segments)["verdict"] == GROWS


def test_a_handle_for_every_epoch_is_found():
    epochs = STEPS // 500
    assert growth(10 + epochs, bound=2)["verdict"] == GROWS
    to_and_fro = 10 + rng_for(0, "handles").integers(0, 2, len(STEPS))
    assert growth(to_and_fro, bound=2)["verdict"] == FLAT


def test_readings_before_the_caches_are_full_do_not_count():
    assert settled([0] * 10 + [1] * 5, 0.2).tolist() == [False] * 2 + [True] * 8 + [False] + [True] * 4
    filling = 600 * MIB + 100 * MIB * np.minimum(STEPS / 8000, 1)
    kept = settled(ONE, 0.1)
    assert judge_growth(STEPS[kept], filling[kept], ONE[kept], bound=1e6, over=100_000)["verdict"] == FLAT


@pytest.mark.parametrize(("drift", "verdict"), [(0.0, EQUAL), (0.15, SLOWER), (-0.15, FASTER)])
def test_speed_at_the_end_against_the_start(drift, verdict):
    for seed in range(5):
        noise = rng_for(seed, "speed").normal(1, 0.03, 400)
        costs = 0.02 * noise * (1 + drift * np.linspace(0, 1, 400))
        found = judge_speed(costs)
        assert found["verdict"] == verdict and found["windows_at_each_end"] == 40
        assert found["ratio"] == pytest.approx((1 + drift * 0.95) / (1 + drift * 0.05), rel=0.03)
        assert found["ratio_ci95"][0] <= found["ratio"] <= found["ratio_ci95"][1]


def test_too_few_windows_and_too_much_noise():
    with pytest.raises(ValueError, match="5 windows are too few"):
        judge_speed([1.0] * 5)
    assert judge_speed(rng_for(1, "noise").uniform(0.5, 1.5, 20))["verdict"] == UNDECIDED


# --- readings of processes --------------------------------------------------------------------------------------------

PARENT = """
import subprocess, sys, time
held = bytearray(b"x") * (40 << 20)
files = [open(sys.argv[0]) for _ in range(7)]
code = "import time; held = bytearray(b'x') * (20 << 20); print('up', flush=True); time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", code])
while time.process_time() < 0.3: pass
time.sleep(600)
"""


@pytest.fixture
def family(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout.readline() == "up\n"
    yield parent
    for pid in [*descendants(parent.pid), parent.pid]:
        os.kill(pid, 9)
    parent.wait()


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="reads /proc, which only Linux has")
def test_usage_counts_a_process_and_its_children(family):
    deadline = time.monotonic() + 60
    while (found := usage(family.pid)).cpu_seconds < 0.3 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert found.children == 1 and found.threads == 2 and found.cpu_seconds >= 0.3
    assert 60 * MIB < found.memory < 90 * MIB  # both bytearrays
    assert 40 * MIB < found.private <= found.resident < 65 * MIB
    assert found.handles >= 3 + 7 + 3
    with pytest.raises(ProcessLookupError):
        usage(2**22 + 1)
