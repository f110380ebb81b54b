"""Small things that several tests share."""

import atexit
import importlib.util
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

# the tests' networks are so small that more threads only wait for each other, and another number of them gives other
# last bits than the processes that the tests start; torch reads it when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Hugging Face's libraries cache what the tests make; they read this when they are imported
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="animask-tests-")
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)

# a masked autoencoder small enough for any test, by the arguments of MaskedAutoencoder
SMALL_MAE = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
    "decoder_embed_dim": 32,
    "decoder_depth": 2,
    "decoder_num_heads": 2,
}

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="run the tests that take minutes")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--runslow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow: give --runslow"))


def pytest_sessionfinish(session):
    """A process that a test left behind would be waited for at exit, forever: end it, and fail."""
    for child in multiprocessing.active_children():
        print(f"\nerror: a test left the process {child.name} behind")
        child.kill()
        session.exitstatus = 1


@pytest.fixture(scope="session")
def make_images():
    """make_images(folder, count, size=40): `count` smooth random pictures, named 000.png, 001.png, ..."""

    def make(folder: Path, count: int, size: int = 40) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for i in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
        return folder

    return make


@pytest.fixture(scope="session")
def import_script():
    """import_script("scripts/bench_pretrain.py"): a script outside any package, as a module."""

    def load(path: str):
        spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
def run_script():
    """run_script("main_pretrain.py", flag, ..., processes=1): a finished process, as a user would start it."""

    def run(*command, processes: int = 1, check: bool = True, **options) -> subprocess.CompletedProcess:
        start = [sys.executable]
        if processes > 1:
            start += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
        done = subprocess.run(
            [*start, *map(str, command)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,  # two processes on a core that others use
            **options,
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run
