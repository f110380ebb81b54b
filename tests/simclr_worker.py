"""Started by test_simclr.py, alone or under torchrun: one backward pass of the contrastive loss in float64.

simclr_worker.py OUT      writes OUT.RANK.pth: the loss and top1 of this process, and the exchanged gradients
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn.parallel import DistributedDataParallel

from models_vit import build_vit
from util.run.dist import join, leave, read_world
from util.simclr.head import ProjectionHead
from util.simclr.loss import nt_xent

PICTURES = 12


def main(out: str) -> None:
    world = read_world()
    join(world, torch.device("cpu"))
    torch.manual_seed(0)
    model = build_vit("vit_nano_patch8", img_size=16)
    model.head = ProjectionHead(model.embed_dim)
    model.double()
    views = torch.rand(2, PICTURES, 3, 16, 16, dtype=torch.float64)
    own = views.chunk(world.size, dim=1)[world.rank].flatten(0, 1)
    wrapped = DistributedDataParallel(model) if world.size > 1 else model
    loss, top1 = nt_xent(wrapped(own), 0.2, world)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    torch.save({"loss": loss.detach(), "top1": top1, "gradients": gradients}, f"{out}.{world.rank}.pth")
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
