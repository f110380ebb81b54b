"""FSDP2: weights, gradients and optimizer states are shared out over the processes, each holding an equal part of all.

(ZeRO's third stage, arXiv 1910.02054; FSDP, arXiv 2304.11277.) A run that is sharded reads and writes the checkpoints
of any other: its state is cut up after it was put back whole, and gathered before it is saved.
"""

import torch
from torch import nn
from torch.utils._pytree import tree_map

from util.run.dist import World
from util.run.errors import UserError
from util.training.memory import transformer_blocks

# beside `forward`, methods of models that are called from outside and use weights that are no block's
_ENTRANCES = ("reconstruct", "hardness")


def shard(model: nn.Module, optimizer: torch.optim.Optimizer, world: World, device: torch.device) -> None:
    """Share a model and its optimizer out over all processes, in place, and move it to the device.

    All processes hold the same state when they call it. A block's weights are gathered when the block is run, forward
    or backward, and given up after it; those of no block are one more such part. They are gathered in float32, so
    that autocast does what it does on one process. UserError for a model without transformer blocks.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    blocks = transformer_blocks(model)
    if not blocks:
        raise UserError("--fsdp shares out transformer blocks, and this model has none: leave it out")
    mesh = init_device_mesh(device.type, (world.size,))
    before = list(model.parameters())
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    for name in _ENTRANCES:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
    _follow(optimizer, dict(zip(before, model.parameters(), strict=True)))


def _follow(optimizer: torch.optim.Optimizer, after: dict[nn.Parameter, nn.Parameter]) -> None:
    """Let an optimizer go on with the parameters that have taken the place of its own, and with parts of its states."""
    for group in optimizer.param_groups:
        group["params"] = [after[parameter] for parameter in group["params"]]
    before = dict(optimizer.state)
    optimizer.state.clear()
    for parameter, state in before.items():
        new = after[parameter]
        optimizer.state[new] = {name: _like(value, new) for name, value in state.items()}


def _like(value, parameter: torch.Tensor):
    """A tensor of a parameter's shape cut up as the parameter is; any other one, such as a count of steps, beside it.

    Every process has all of the value and takes its part of it.
    """
    if not isinstance(value, torch.Tensor) or not is_sharded(parameter):
        return value
    value = value.to(parameter.device)
    if value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: all of an ordinary one."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor on every process, which all must call for."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_state(state: dict, keep: bool) -> dict:
    """A state dict, of a model or an optimizer, as one process would have it; its shards are gathered to the CPU.

    All processes must call it; those that do not keep the result are spared its memory.
    """

    def gather(value):
        if not isinstance(value, torch.Tensor) or not is_sharded(value):
            return value
        value = whole(value)
        return value.cpu() if keep else None

    return tree_map(gather, state)


def put_back(model: nn.Module, state: dict) -> None:
    """Load some or all of a model's state, whole as in a checkpoint, into the model, whether it is sharded or not."""
    own = model.state_dict()
    model.load_state_dict({**own, **{name: _like(value, own[name]) for name, value in state.items()}})
