"""torch.compile around a model, with a way back."""

from collections.abc import Callable

import torch
from torch import nn


class Compiled(nn.Module):
    """A model that runs through torch.compile, or as it is where compiling fails, after one line of warning.

    Only the forward function is compiled: the parameters, the state dict and the hooks stay the model's own, and the
    model itself, which evaluates and is saved, is not touched. Under several processes DistributedDataParallel goes
    around it: inside, the graph is cut at the gradient buckets (torch's DDPOptimizer), so that the exchange of
    gradients overlaps the backward pass.
    """

    def __init__(self, model: nn.Module, say: Callable[[str], None]):
        super().__init__()
        self.model, self._say = model, say
        self._run = torch.compile(model.forward)
        self.works: bool | None = None  # whether it could be compiled; that takes place in the first call

    def forward(self, *args, **kwargs):
        """What the model makes of the arguments."""
        if self.works is not None:
            return self._run(*args, **kwargs)
        try:
            out = self._run(*args, **kwargs)
            self.works = True
        except Exception as error:  # whatever compilers raise; what is the model's own fault, it raises again
            self._say(f"warning: torch.compile fails here, so the model runs without it: {_reason(error)}")
            self.works, self._run = False, self.model.forward
            out = self._run(*args, **kwargs)
        return out


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
