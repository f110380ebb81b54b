"""NT-Xent, the contrastive loss of SimCLR (arXiv 2002.05709, equation 1), over the batches of all processes."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from util.run.dist import World


def nt_xent(projections: torch.Tensor, temperature: float, world: World | None = None) -> tuple[torch.Tensor, ...]:
    """(loss, top1), scalars, of 2 N views of N pictures: all first views, then all second ones.

    Each view is an anchor, its partner the one right answer among all other views of the batch; the loss is the
    cross-entropy of their cosines divided by the temperature, ln(2 N - 1) where it is by chance. top1: share of
    anchors, 0..1, that are nearest to their partner.

    projections: (2 N, D), of any length; at least float32 is computed in. world: with several processes, all of which
    must call, the batch is that of all, and the results are the means over this one's anchors. The mean over the
    processes of the loss, and of its gradient as DistributedDataParallel takes it, is that of one process.
    """
    world = world or World()
    with torch.autocast(projections.device.type, enabled=False):  # a bf16 cosine has steps of 0.004 near 1
        precise = torch.promote_types(projections.dtype, torch.float32)
        own = F.normalize(projections.to(precise))
        everyone = _Gather.apply(own, world) if world.size > 1 else own
        number = torch.arange(len(own), device=own.device)
        first = world.rank * len(own)
        itself = first + number[:, None] == torch.arange(len(everyone), device=own.device)
        scores = (own @ everyone.T / temperature).masked_fill(itself, -torch.inf)
        partner = first + (number + len(own) // 2) % len(own)
        loss = F.cross_entropy(scores, partner)
        return loss, (scores.argmax(dim=1) == partner).to(precise).mean()


class _Gather(torch.autograd.Function):
    """The rows of all processes, in rank order; the gradient of a row is the sum of what all processes want of it."""

    @staticmethod
    def forward(ctx, own: torch.Tensor, world: World) -> torch.Tensor:
        ctx.rows = slice(world.rank * len(own), (world.rank + 1) * len(own))
        parts = [torch.empty_like(own) for _ in range(world.size)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # it is reduced in place
        dist.all_reduce(gradient)
        return gradient[ctx.rows], None
