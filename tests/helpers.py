"""What the tests of several training scripts share: their outcome, their refusals, and toy identities."""

import colorsys
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from models_baseline import build_baseline
from models_vit import Backbone
from tests.conftest import ROOT
from util.data.manifest import read_manifest
from util.run.seed import rng_for
from util.training.checkpoint import read_checkpoint

IDENTITIES = ("asuka", "hikari", "misato", "rei")


def outcome(run: Path) -> tuple[dict, dict, dict, list[dict]]:
    """All that must not depend on how often a run was interrupted: weights, optimizer, progress, lines of log.txt."""
    checkpoint = read_checkpoint(run / "checkpoint-last.pth")
    progress = {k: v for k, v in checkpoint["progress"].items() if "seconds" not in k}
    lines = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    return checkpoint["model"], checkpoint["optimizer"], progress, [{**line, "seconds": 0} for line in lines]


def assert_same(one, other) -> None:
    """Bitwise equality of nested dicts, lists and tensors."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


def fails(main: Callable, capsys, argv: list[str]) -> str:
    """The one line with which a script's `main` refuses a command line."""
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def results_of(run: Path) -> dict:
    """What results.json says."""
    return json.loads((run / "results.json").read_text())


def make_identities(folder: Path, names=IDENTITIES, **counts: int) -> Path:
    """Class folders of noisy pictures, 24 x 24 px: an identity is a hue, which varies a little.

    counts: pictures of each identity in a split; by default 12 to train, 5 in val, 4 in test.
    """
    rng = np.random.default_rng(7)
    for split, count in (counts or {"train": 12, "val": 5, "test": 4}).items():
        for number, name in enumerate(names):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                hue = (number / len(names) + rng.normal(0, 0.09)) % 1
                color = np.array(colorsys.hsv_to_rgb(hue, 0.7, 0.8)) * 255
                pixels = color + rng.normal(0, 40, (24, 24, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / split / name / f"{i:02d}.png")
    return folder


def transfer_flags(data, run, *more) -> list[str]:
    """A tiny run of a transfer script: on `make_identities` 6 steps of 8 images in each of two epochs."""
    recipe = "--model vit_nano_patch8 --input_size 16 --batch_size 8 --epochs 2 --warmup_epochs 1 --lr 1e-3"
    recipe += " --device cpu --num_workers 0 --log_every 2"
    return ["--data_path", str(data), "--output_dir", str(run), *recipe.split(), *map(str, more)]


def preparer(script, tmp_path: Path) -> Callable[..., dict[str, dict]]:
    """prepare(data, flag, ...): run a prepare script into tmp_path/out; the rows it writes, by sample_id."""

    def run(data: Path, *flags) -> dict[str, dict]:
        script.main(["--data_path", str(data), "--out", str(tmp_path / "out"), *map(str, flags)])
        manifest = read_manifest(tmp_path / "out")
        return {manifest.row(i)["sample_id"]: manifest.row(i) for i in range(len(manifest))}

    return run


def report_of(tmp_path: Path) -> dict:
    """What a prepare script has left beside the rows."""
    return json.loads((tmp_path / "out/preparation.json").read_text())


def waves(*key) -> Image.Image:
    """A smooth colourful picture, 40 x 48 px, another one for each key."""
    y, x = np.mgrid[0:48, 0:40] / 48
    fx, fy, phase = rng_for(*key).uniform(2, 9, (3, 3, 1, 1))
    return Image.fromarray(np.uint8(255 * (0.5 + 0.4 * np.sin(fx * x + fy * y + phase))).transpose(1, 2, 0))


def kill_when_written(command: list[str], journal: Path, least: int) -> None:
    """Start a script and kill it (SIGKILL) as soon as its journal has at least so many lines."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    while process.poll() is None and (not journal.exists() or len(journal.read_bytes().splitlines()) < least):
        time.sleep(0.002)
    assert process.poll() is None, "it had ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


META = torch.device("meta")


def on_meta(name: str, side: int) -> Backbone:
    """The network without memory for its weights: shapes and counts cost nothing."""
    with META:
        return build_baseline(name, (side, side)).eval()


def count(model: torch.nn.Module) -> int:
    """Parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_state(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values that a trained network might have, under the names and shapes given."""
    generator = torch.Generator().manual_seed(seed)

    def value(name: str, shape: tuple) -> torch.Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(1000)
        noise = torch.randn(shape, generator=generator)
        if name.endswith("running_var"):
            return noise.abs() + 0.5
        fan_in = shape[1:].numel() if len(shape) > 1 else 100
        return noise / fan_in**0.5 + (len(shape) == 1 and name.endswith("weight"))

    return {name: value(name, torch.Size(shape)) for name, shape in shapes.items()}
