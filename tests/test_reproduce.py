"""scripts/reproduce.sh end to end against stand-ins on loopback, its report, and the presets of published settings.

Run: python -m pytest tests/test_reproduce.py [--runslow]
"""

import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from models_mae import build_mae
from tests.conftest import ROOT
from tests.helpers import make_identities
from tests.loopback import serve

REPO = "Mercity/AnimeDiffusion_Dataset"
SMALL = {
    "MODEL": "mae_vit_nano_patch8", "INPUT_SIZE": "16", "IMAGES": "4", "RATIOS": "0.5 0.75", "EPOCHS": "1,2",
    "BATCHES": "4,8", "RANKS": "1,2", "SEEDS": "0", "PRETRAIN": "--warmup_epochs 0",
    "PROBE": "--lr_grid 1 --epochs 1", "RECONSTRUCT": "--device cpu",
    "LORA": "--epochs 1 --warmup_epochs 0", "FINETUNE": "--epochs 1 --warmup_epochs 0",
    "RECOGNITION": "--protocols closed_set verification few_shot --replicates 20 --episodes 20 --negatives 100 --ways 3"
    " --device cpu --num_workers 0",
}  # fmt: skip


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """What the hosts would serve: a data set of pictures, and a "released" checkpoint that says what it is."""
    folder = tmp_path_factory.mktemp("site")
    data = folder / "datasets" / REPO / "data"
    data.mkdir(parents=True)
    rng, cells = np.random.default_rng(0), []
    for number in range(60):
        coarse = Image.fromarray(rng.integers(0, 256, (3, 5, 3), dtype=np.uint8))
        stored = io.BytesIO()
        coarse.resize((64, 36), Image.Resampling.BICUBIC).save(stored, "JPEG")
        cells.append({"bytes": stored.getvalue(), "path": f"{number}.jpg"})
    tags = ["landscape"] * len(cells)
    pq.write_table(pa.table({"image": cells, "image_tags": tags}), data / "train-00000-of-00001.parquet")
    torch.manual_seed(0)
    released = folder / "mae" / "visualize" / "mae_visualize_vit_base.pth"
    released.parent.mkdir(parents=True)
    flags = {"model": SMALL["MODEL"], "input_size": 16, "norm_pix_loss": False}
    torch.save({"model": build_mae(SMALL["MODEL"], 16).state_dict(), "args": flags}, released)
    return folder


@pytest.fixture(scope="module")
def people(tmp_path_factory) -> Path:
    folder = make_identities(tmp_path_factory.mktemp("people"), train=6, val=3, test=3)
    return make_identities(folder, ("aoi", "haru", "nao"), novel=6)


@pytest.fixture
def reproduce(tmp_path, people):
    """reproduce(url, *arguments, **environment): scripts/reproduce.sh on everything small; pip does nothing."""
    stub = tmp_path / "bin" / "python"
    stub.parent.mkdir()
    stub.write_text(f'#!/bin/sh\ncase "$2" in pip) exit 0;; esac\nexec "{sys.executable}" "$@"\n')
    stub.chmod(0o755)

    def run(url: str, *arguments, check: bool = True, **environment) -> subprocess.CompletedProcess:
        places = {"HF_ENDPOINT": url, "ANIMASK_RELEASE_URL": f"{url}/mae", "no_proxy": "127.0.0.1"}
        caches = {"HF_HOME": str(tmp_path / "hf"), "TORCH_HOME": str(tmp_path / "torch"), "OMP_NUM_THREADS": "1"}
        clean = {key: value for key, value in os.environ.items() if key not in ("DATA", "INIT", "GRID")}
        path = f"{stub.parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", ROOT / "scripts" / "reproduce.sh", *map(str, arguments)], capture_output=True, text=True,
            env={**clean, **SMALL, **places, **caches, "PATH": path, "ANIMASK_USE_ACTIVE_ENV": "1",
                 "LABELLED": str(people), **environment},
        )  # fmt: skip
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    return run


def test_a_dry_run_shows_every_command_and_starts_none(reproduce, tmp_path, import_script):
    done = reproduce("http://127.0.0.1:9", tmp_path / "out", "--", "--device", "cpu", GRID="--dry_run")
    lines = [shlex.split(line) for line in done.stdout.splitlines() if ".py " in line and not line.startswith("==")]
    scripts = [next(word for word in line if word.endswith(".py")) for line in lines]
    counts = {name: scripts.count(name) for name in set(scripts)}
    trained = {"main_pretrain.py": 4, "main_linprobe.py": 2, "main_lora.py": 4, "main_finetune.py": 2}
    assert counts == {**trained, "eval_recognition.py": 8}
    assert done.stdout.count("visualize.reconstruct") == 1 + 4
    pretrained = set()
    for script, line in zip(scripts, lines, strict=True):
        words = line[line.index(script) + 1 :]
        args = import_script(script).get_args(words)  # every flag is one of the script's
        if script == "main_pretrain.py":
            assert args.data_path == f"hf:{REPO}" and args.init == "official:mae_visualize_vit_base"
            pretrained.add((args.epochs, args.batch_size))
            last = Path(args.output_dir) / "checkpoint-last.pth"
        elif script != "eval_recognition.py":
            assert args.init in ("official:mae_visualize_vit_base", str(last)) and args.model == "vit_nano_patch8"
    assert pretrained == {(1, 4), (1, 8), (2, 4), (2, 8)} and "epochs=2,batch_size=8" in str(last)
    assert not (tmp_path / "out").exists() and not (tmp_path / "hf").exists()


def test_bad_arguments_are_one_line(reproduce, tmp_path):
    for arguments, environment, message in (
        (("--quick",), {}, "flags for the runs come after a lone --"),
        ((), {"LABELLED": str(tmp_path / "nowhere")}, "there is no LABELLED="),
        ((), {"DATA": str(tmp_path / "nowhere")}, "there is no"),
    ):
        done = reproduce("http://127.0.0.1:9", *arguments, check=False, **environment)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    done = reproduce("http://127.0.0.1:9", tmp_path / "out", check=False)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and error.startswith("error: official:mae_visualize_vit_base cannot be downloaded")
    assert "put it at" in error


def test_fetching_takes_from_the_hosts_once(site, tmp_path, run_script):
    with serve(site) as url:
        environment = {
            **os.environ, "HF_ENDPOINT": url, "ANIMASK_RELEASE_URL": f"{url}/mae", "HF_HOME": str(tmp_path / "hf"),
            "TORCH_HOME": str(tmp_path / "torch"),
        }  # fmt: skip
        fetch = [sys.executable, "scripts/fetch.py", "--weights", "official:mae_visualize_vit_base"]
        done = subprocess.run(
            [*fetch, "--data", f"hf:{REPO}"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    numbers = sum(value.numel() for value in build_mae(SMALL["MODEL"], 16).state_dict().values())
    assert f"{numbers:,} numbers" in done.stdout and re.search(r"5\d pictures to train on", done.stdout)
    kept = tmp_path / "torch" / "hub" / "checkpoints" / "mae_visualize_vit_base.pth"
    assert kept.read_bytes() == (site / "mae/visualize/mae_visualize_vit_base.pth").read_bytes()
    again = subprocess.run(fetch, cwd=ROOT, env=environment, capture_output=True, text=True)  # nobody serves any more
    assert again.returncode == 0 and "as pinned" in again.stdout


def left_behind(folder: Path, command: str, file: str = "results.json", **content) -> None:
    """What the runner leaves of a run."""
    folder.mkdir(parents=True)
    (folder / "command.json").write_text(json.dumps({"command": shlex.split(command), "error": None}))
    if content:
        (folder / file).write_text(json.dumps(content))


def cells(text: str, *start: str) -> list[list[str]]:
    """The rows of all tables whose first cells are these."""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return [row for row in rows if row[: len(start)] == list(start)]


def test_the_report_has_the_numbers_of_the_runs(import_script, tmp_path, capsys):
    script = import_script("scripts/reproduce_report.py")

    def ratios(db: float) -> dict:
        return {"0.75": {"psnr_db": {"mean": db, "std": 1.0}, "ssim": {"mean": None, "std": None}}}

    (tmp_path / "mask_ratio").mkdir()
    floors = {"0.75": {"inpaint": ratios(14.0)["0.75"], "mean_image": {"skipped": "no pictures"}}}
    facts = {"device": "a card", "git_commit": "abc", "args": {"data_path": "hf:a/b"}}
    official = {"images": 500, "ratios": ratios(17.004), "floors": floors, "provenance": facts}
    (tmp_path / "mask_ratio" / "metrics.json").write_text(json.dumps(official))
    for batch, db in ((16, 18.0), (32, 18.5)):
        name = f"adapt/epochs=100,batch_size={batch},seed=0"
        flags = f"main_pretrain.py --batch_size {batch}"
        left_behind(tmp_path / "adapt" / name, flags, finished=True, val={"loss": 0.5}, images_per_s=1234.5)
        left_behind(tmp_path / "adapt" / "then" / name, "-m visualize.reconstruct", "metrics.json", ratios=ratios(db))
    for seed, top1 in enumerate((0.5, 0.6, 0.7)):
        name = f"lora-official/rank=8,seed={seed}"
        done = {"finished": True, "test": {"top1": top1}, "trainable_params": 1000}
        left_behind(tmp_path / "transfer" / name, "main_lora.py --rank 8", **done)
        judged = {"finished": True, "verification": {"tpr_at_fpr": {"0.01": 0.25}}} if seed else {}
        left_behind(tmp_path / "transfer" / "then" / name, "eval_recognition.py", **judged)
    left_behind(tmp_path / "transfer" / "full-official" / "seed=0", "main_finetune.py")  # never finished

    script.main(["--runs", str(tmp_path), "--out", str(tmp_path / "report.md")])
    text = (tmp_path / "report.md").read_text()
    assert "**2 runs are not finished and not in the tables.**" in text
    assert "Device: a card; commit abc; pictures: hf:a/b." in text and "500 pictures" in text
    assert cells(text, "75 %", "start weights") == [["75 %", "start weights", "17.00", *["-"] * 6]]
    assert cells(text, "75 %", "adapted, epochs 100, batch 32")[0][2] == "18.50"
    assert cells(text, "75 %", "inpainting (Telea)")[0][2] == "14.00" and not cells(text, "75 %", "shifted mean image")
    assert [row[:4] for row in cells(text, "100")] == [["100", "16", "1", "0.500"], ["100", "32", "1", "0.500"]]
    transfer, recognition = cells(text, "LoRA, rank 8", "official")
    assert transfer[2:5] == ["3", "-", "60.0 ± 10.0"] and "1,000" in transfer
    assert recognition[2] == "2" and "25.0" in recognition
    assert not cells(text, "full fine-tuning") and "    python main_lora.py --rank 8 --output_dir RUN" in text

    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        script.main(["--runs", str(tmp_path / "empty"), "--out", str(tmp_path / "none.md")])
    assert stop.value.code == 2 and "holds no finished run" in capsys.readouterr().err


@pytest.mark.slow
def test_everything_from_the_hosts_to_the_report(site, reproduce, tmp_path):
    out = tmp_path / "out"
    flags = ("--", "--device", "cpu", "--num_workers", "0")
    with serve(site) as url:
        done = reproduce(url, out, *flags)
    text = (out / "report.md").read_text()
    assert "All runs are finished." in text and text.count("\n## ") == 4
    assert len(cells(text, "linear probe")) == len(cells(text, "LoRA, rank 2")) == 4  # two tables, two starts
    official = json.loads((out / "mask_ratio" / "metrics.json").read_text())
    (row,) = cells(text, "75 %", "start weights")
    assert float(row[2]) == pytest.approx(official["ratios"]["0.75"]["psnr_db"]["mean"], abs=0.006)
    assert sum(row[1].startswith("adapted, epochs") for row in cells(text, "75 %")) == 4
    lora = json.loads((out / "transfer/lora-adapted/rank=2,seed=0/results.json").read_text())
    assert cells(text, "LoRA, rank 2", "adapted")[0][4] == f"{100 * lora['test']['top1']:.1f}"
    assert done.stdout.count("done  ") == 4 + 4 + 8 + 8

    before = {path: path.stat().st_mtime_ns for path in out.rglob("results.json")}
    again = reproduce("http://127.0.0.1:9", out, *flags, HF_HUB_OFFLINE="1")  # all that is needed is here
    assert "start  " not in again.stdout and (out / "report.md").read_text() == text
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("results.json")}
