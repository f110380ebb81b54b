"""A small run that was left in its second epoch, and one that was let end: fixtures for the tests of faults."""

import subprocess

import pytest

import main_pretrain
from util.toonfaces.dataset import Recipe
from util.toonfaces.split import Sizes

FACES = Recipe(Sizes(4, 40, 1.0, 1, 1, 1, 1), 32, 0)  # of a small data set
RECIPE = "--model mae_vit_nano_patch8 --input_size 16 --batch_size 8 --epochs 2 --warmup_epochs 1 --eval_images 4"
RECIPE += " --val_fraction 0.2 --lr 1e-3 --device cpu --num_workers 0 --log_every 2"


@pytest.fixture(scope="module")
def images(make_images, tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("data") / "images", 28, size=24)


def flags(data, run, *more) -> list[str]:
    return ["--data_path", str(data), "--output_dir", str(run), *RECIPE.split(), *map(str, more)]


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """A run of six steps that was left in the middle of its second epoch; and one that was let end."""
    folder = tmp_path_factory.mktemp("runs")
    main_pretrain.main(flags(images, folder / "left", "--max_steps", 4))
    main_pretrain.main(flags(images, folder / "whole"))
    return folder


@pytest.fixture
def left(whole, tmp_path):
    """A copy of the run that was left."""
    subprocess.run(["cp", "-a", whole / "left", tmp_path / "run"], check=True)
    return tmp_path / "run"
