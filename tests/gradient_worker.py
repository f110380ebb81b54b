"""Started by test_loop.py, alone or under torchrun: trains a float64 model and writes down what it saw.

gradient_worker.py IMAGES OUT BATCH ACCUM [nan]      nan: the last process returns a NaN loss at step 2
"""

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from main_pretrain import step_fn
from models_mae import build_mae
from util.data.augment import TrainCrop
from util.data.loader import TrainLoader
from util.data.sources import open_source
from util.run.device import grad_scaler
from util.run.dist import join, leave, read_world
from util.run.errors import UserError
from util.run.log import RunFolder
from util.training.checkpoint import Progress
from util.training.faults import Stopped
from util.training.loop import Setup, train
from util.training.optim import WarmupCosine, decay_groups, make_optimizer


class Float64(nn.Module):
    """Feeds a float64 model with the float32 images of the step function."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.mae = build_mae("mae_vit_nano_patch8", 16).double()

    def forward(self, images, mask_ratio, noise, predict_ratio):
        return self.mae(images.double(), mask_ratio, noise, predict_ratio)


def main(images: str, out: str, batch: str, accum: str, fault: str = "") -> None:
    world, device = read_world(), torch.device("cpu")
    join(world, device)
    max_steps = {"signal": None, "short": 2}.get(fault, 4)
    args = SimpleNamespace(
        epochs=2, accum_iter=int(accum), clip_grad=None, log_every=50, save_steps=None, max_steps=max_steps,
        eval_every=1, max_bad=0.0, seed=0, compile="off", mask_ratio=0.75, predict_ratio=1.0,
        input_size=16, min_crop=0.2, masking="random", mask_strength=4.0, mask_random=0.5, mask_schedule="constant",
    )  # fmt: skip
    source = open_source(images, "train", labels="none", val_fraction=0.0)
    loader = TrainLoader(
        source, TrainCrop((16, 16)), batch_size=int(batch), accum_iter=int(accum), seed=0, world=world, num_workers=0,
        device=device,
    )  # fmt: skip
    model = Float64()
    optimizer = make_optimizer(decay_groups(model.named_parameters(), 0.05), 1e-3, device)
    seen = []
    optimizer.register_step_pre_hook(
        lambda *_: seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    plain_step = step_fn(args, model.mae)

    def step(wrapped, batch):
        result = plain_step(wrapped, batch)
        if fault == "nan" and world.rank == world.size - 1 and len(seen) == 2:
            result["loss"] = result["loss"] * float("nan")
        return result

    def evaluate(model, epoch):
        if fault == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": 1.0}

    run = RunFolder(f"{out}-run", is_main=world.is_main)
    setup = Setup(
        args=args, model=model, step_fn=step, loader=loader, optimizer=optimizer, schedule=WarmupCosine(1e-3, 0, 0, 5),
        world=world, device=device, precision="fp32", scaler=grad_scaler(device, "fp32"), run=run,
        evaluate=evaluate if world.is_main else None,
    )  # fmt: skip
    error = ""
    try:
        train(setup, Progress())
    except (UserError, Stopped) as problem:
        error = str(problem)
    torch.save({"gradients": seen, "model": model.state_dict(), "error": error}, f"{out}.{world.rank}.pth")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
