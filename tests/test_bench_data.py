"""The data benchmark: what its contenders make, how it counts, and a small run from pictures to the result file.

Run: python -m pytest tests/test_bench_data.py
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers import fails
from util.data import pack
from util.data.augment import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(scope="module")
def bench(import_script):
    return import_script("scripts/bench_data.py")


@pytest.fixture(scope="module")
def pictures(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("pictures"), 24, size=60)


def test_contenders_make_batches_of_the_same_pictures(bench, pictures, tmp_path):
    """With a crop of the whole picture and no resizing left to chance, all show the same but for the mirror."""
    pack.main(["--data_path", str(pictures), "--out", str(tmp_path / "p"), "--canvas", "60", "--num_workers", "0"])
    args = SimpleNamespace(input_size=60, min_crop=1.0, seed=0)
    made = {name: make([5, 0, 17], 2) for name, make in bench.contenders(pictures, tmp_path / "p", args).items()}
    assert list(made) == ["official", "raw", "packed", "packed_read"]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    assert made["official"].dtype == torch.float32 and made["official"].shape == (3, 3, 60, 60)
    levels = (made["official"] * std + mean) * 255
    assert made["raw"].dtype == made["packed"].dtype == made["packed_read"].dtype == torch.uint8
    assert torch.equal(made["raw"], made["packed"]) and made["packed_read"].shape == (3, 60, 60, 3)
    for place, number in enumerate((5, 0, 17)):
        stored = torch.from_numpy(np.array(Image.open(pictures / f"{number:03d}.png"))).permute(2, 0, 1)
        assert torch.equal(made["packed_read"][place].permute(2, 0, 1), stored)
        for batch in (levels, made["raw"]):
            # a crop of ratio 3/4..4/3 does not fit the area 1, so the fallback takes the whole square picture
            apart = min((batch[place].float() - shown.float()).abs().max() for shown in (stored, stored.flip(-1)))
            assert apart < 0.01


def test_turns_are_shared_out_and_rates_count_images(bench, monkeypatch):
    clock, order = [0.0], []
    costs = {"official": 8.0, "raw": 4.0, "packed": 0.5}

    def contender(name):
        def make(numbers, epoch):
            order.append((name, tuple(numbers), epoch))
            clock[0] += costs[name]

        return make

    monkeypatch.setattr(bench.time, "process_time", lambda: clock[0])
    args = SimpleNamespace(warmup=1, rounds=2, batch_size=4, repeats=3)
    rates = bench.take_turns({name: contender(name) for name in costs}, 6, args)
    assert rates == {"official": [0.5] * 2, "raw": [1.0] * 2, "packed": [8.0] * 2}
    assert [name for name, *_ in order[:5]] == ["official", "raw", "packed", "packed", "packed"]
    assert order[5][0] == "raw" and order[5][1] == (4, 5, 0, 1)  # the next round begins with the next contender
    crops = [call[1:] for call in order if call[0] == "packed"]
    assert len(set(crops)) == len(crops) == 9  # never the same crops twice


def test_the_summary_takes_medians_of_the_rounds_own_ratios(bench):
    rates = {"official": [100, 50, 100], "raw": [200, 100, 900], "packed": [800, 500, 700], "packed_read": [6e3] * 3}
    result = bench.summary(rates)
    assert result["images_per_s"]["official"] == 100 and result["images_per_s"]["packed"] == 700
    assert result["ratios"] == {"raw": 2, "packed": 8, "packed_read": 60}
    assert result["met"] == {"raw": True, "packed": False, "packed_read": True}
    assert bench.table(result).count("missed") == 1


def test_a_run_on_given_pictures(bench, pictures, tmp_path, capsys):
    argv = "--jpeg_side 80 --canvas 32 --input_size 24 --images 24 --batch_size 4 --rounds 2 --warmup 0 --repeats 1"
    out = tmp_path / "sub/bench.json"
    bench.main(["--data_path", str(pictures), "--out", str(out), "--num_workers", "0", *argv.split()])
    result = json.loads(out.read_text())
    assert set(result["ratios"]) == set(bench.TARGETS) and all(value > 0 for value in result["ratios"].values())
    assert all(len(values) == 2 for values in result["rounds"].values())
    assert "packed_read" in capsys.readouterr().out and result["provenance"]["args"]["canvas"] == 32


def test_jpeg_files_have_the_asked_side_and_are_spread_over_the_data(bench, pictures, tmp_path):
    Image.new("RGB", (200, 100)).save(tmp_path / "wide.png")
    folder = bench.as_jpeg(tmp_path, "none", tmp_path / "jpeg", 5, 50)
    with Image.open(folder / "00000.jpg") as image:
        assert image.format == "JPEG" and image.size == (100, 50)
    assert len(list(folder.iterdir())) == 1
    some = sorted(bench.as_jpeg(pictures, "none", tmp_path / "some", 6, 60).iterdir())
    for path, number in zip(some, range(0, 24, 4), strict=True):
        difference = np.asarray(Image.open(path), int) - np.asarray(Image.open(pictures / f"{number:03d}.png"), int)
        assert np.abs(difference).mean() < 4


def test_toonfaces_are_drawn_where_no_pictures_are_given(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TOONFACES_SIDE", 64)
    args = bench.get_args(["--out", str(tmp_path / "o"), "--images", "24", "--canvas", "32", "--num_workers", "0"])
    folder, packed = bench.prepare(args, tmp_path)
    files = list(folder.iterdir())
    assert len(files) == 24 and all(Image.open(path).size == (64, 64) for path in files) and packed.is_file()


def test_what_a_user_can_get_wrong_is_one_line(bench, tmp_path, capsys):
    out = ["--out", str(tmp_path / "o")]
    assert "--data_path" in fails(bench.main, capsys, [*out, "--jpeg_side", "512"])
    assert "does not exist" in fails(bench.main, capsys, [*out, "--data_path", str(tmp_path / "nowhere")])
