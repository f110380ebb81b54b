"""`plan.py --validate`: the planned jobs, run for some steps on this machine, and how far off the plan was."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from util.benchmark.devices import RUNTIME_BYTES, Device
from util.run import args as flags
from util.run.errors import UserError
from util.run.seed import rng_for

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = {
    "probe": "main_linprobe.py",
    "lora": "main_lora.py",
    "finetune": "main_finetune.py",
    "pretrain": "main_pretrain.py",
}
STEPS = 8
# what a process of a script holds without a model, libraries that load on first use included: it is no part of a plan
BASE = """
import importlib, sys
import torch
from torch.utils.tensorboard import SummaryWriter
from util.run.device import peak_memory_bytes, pick_device
from util.training.optim import make_optimizer
importlib.import_module(sys.argv[1])
device, layer = pick_device("cpu"), torch.nn.Linear(8, 8)
layer(torch.ones(2, 8)).sum().backward()
make_optimizer(list(layer.parameters()), 0.1, device).step()
print(peak_memory_bytes(device))
"""


def make_data(folder: Path, images: int, classes: int, side: int) -> Path:
    """Class folders of noise, side x side px, and one picture to validate on, packed so that reading costs nothing."""
    pixels = rng_for(0, "plan").integers(0, 256, (side, side, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    for i in range(max(images, classes)):
        who = folder / "train" / f"{i % classes:05d}"
        who.mkdir(parents=True, exist_ok=True)
        picture.save(who / f"{i}.png", compress_level=1)
    (folder / "val" / "00000").mkdir(parents=True)
    picture.save(folder / "val" / "00000" / "0.png")
    packed = folder.parent / "data.pack"
    run("-m", "util.data.pack", "--data_path", folder, "--out", packed, "--canvas", side, "--crop", "centre")
    return packed


def run(*command) -> str:
    """Standard output of a Python command in the repository; UserError where it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{command[0]} of the validation failed ({last}): run it by hand")
    return done.stdout


def short_job(plan, device: Device, args, data: Path, out: Path) -> dict:
    """Run a plan's script for STEPS steps; what its results.json says."""
    height, width = flags.height_width(args.input_size)
    more = ["--eval_images", 0] if plan.goal == "pretrain" else []
    if plan.goal == "pretrain":
        more += ["--mask_ratio", args.mask_ratio]
    elif plan.goal == "lora":
        more += ["--rank", args.lora_rank]
    elif plan.goal == "probe":
        more += ["--views", 1, "--feature_cache", out / "features"]
    if args.grad_checkpoint and plan.goal != "probe":
        more.append("--grad_checkpoint")
    model = f"mae_{args.model}" if plan.goal == "pretrain" else args.model
    run(
        SCRIPTS[plan.goal], "--data_path", data, "--output_dir", out, "--model", model,
        "--input_size", f"{height}x{width}", "--batch_size", plan.batch, "--accum_iter", args.accum_iter,
        "--epochs", 2, "--max_steps", STEPS, "--warmup_epochs", 0, "--num_workers", 0, "--device", device.kind,
        "--precision", device.precision, *more,
    )  # fmt: skip
    return json.loads((out / "results.json").read_text())


def compare(plan, device: Device, results: dict, images: int, base: int) -> dict:
    """Predicted and measured images/s and peak bytes. base: what the process held before."""
    seconds = results.get("encoder_pass_seconds")
    speed = images / seconds if seconds else results["images_per_s"]
    # the CUDA allocator's peak has no context in it
    memory = plan.memory - int(RUNTIME_BYTES[device.kind]) + (base if device.kind == "cpu" else 0)
    return {
        "images_per_s": {"predicted": plan.images_per_s, "measured": speed, "error": plan.images_per_s / speed - 1},
        "peak_memory_bytes": {
            "predicted": memory,
            "measured": results["peak_memory_bytes"],
            "error": memory / results["peak_memory_bytes"] - 1,
        },
        "efficiency": plan.flops * speed / device.rate,
    }


def validate(plans: list, device: Device, args) -> dict:
    """Run a short job for each plan and print how far off it was; {goal: comparison}."""
    rows = [
        "",
        "| goal | batch | images/s planned | measured | error | memory planned | measured | error | efficiency |",
        "|" + "---|" * 9,
    ]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        images = max(plan.batch for plan in plans) * args.accum_iter * STEPS
        side = max(flags.height_width(args.input_size)) * 8 // 7
        data = make_data(Path(scratch) / "data", images, args.classes, side)
        for plan in plans:
            base = int(run("-c", BASE, SCRIPTS[plan.goal].removesuffix(".py")))
            results = short_job(plan, device, args, data, Path(scratch) / plan.goal)
            one = found[plan.goal] = compare(plan, device, results, max(images, args.classes), base)
            speed, memory = one["images_per_s"], one["peak_memory_bytes"]
            rows.append(
                f"| {plan.goal} | {plan.batch} | {speed['predicted']:.3g} | {speed['measured']:.3g} | "
                f"{speed['error']:+.0%} | {memory['predicted'] / 1e6:,.0f} MB | {memory['measured'] / 1e6:,.0f} MB | "
                f"{memory['error']:+.0%} | {one['efficiency']:.0%} |"
            )
    print("\n".join(rows))
    return found
