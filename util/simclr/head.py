"""The projection head: the space in which views are compared, and which transfer leaves behind."""

import torch
from torch import nn

from util.run.dist import World
from util.run.errors import UserError

NORMS = ("layer", "batch", "none")


class ProjectionHead(nn.Module):
    """A perceptron with one hidden layer on embeddings, (N, D) -> (N, 128) (arXiv 2002.05709, section 4.2).

    dim: D. norm: of the hidden layer. "batch" is the published one; "layer" takes no statistics over a batch, so that
    the views of a picture tell nothing of each other and any number of processes computes the same.
    """

    def __init__(self, dim: int, norm: str = "layer", out_dim: int = 128):
        super().__init__()
        self.fc1 = nn.Linear(dim, dim, bias=norm == "none")  # the norms have biases of their own
        self.norm = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": lambda _: nn.Identity()}[norm](dim)
        self.fc2 = nn.Linear(dim, out_dim)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.norm(self.fc1(embeddings)).relu())


def share_batch_statistics(model: nn.Module, world: World, device: torch.device) -> nn.Module:
    """The model with its batch norms over the batches of all processes, which only CUDA can do.

    A norm over the pictures of one process would make a view's partner easier to find than the views of the other
    processes, and the loss depend on how many there are. UserError where several processes have no CUDA.
    """
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if world.size == 1 or not any(isinstance(module, norms) for module in model.modules()):
        return model
    if device.type != "cuda":
        raise UserError(
            f"batch norms are shared between processes on CUDA only, and this is {device.type}: use one process, "
            "or a network and a --head_norm without them"
        )
    from timm.layers import convert_sync_batchnorm  # knows norms with an activation inside; slow to import

    return convert_sync_batchnorm(model)
