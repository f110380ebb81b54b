"""What turns an embedding (N, D) into class scores (N, C): linear, shallow MLP, and heads with an angular margin.

The margin heads compare directions: cos is the cosine between an embedding and the weight row of a class, theta its
angle, y the true class, s the scale and m the margin. They compute in float32 under any autocast.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from util.run.errors import UserError

HEADS = ("linear", "mlp", "arcface", "cosface", "curricularface")
DEFAULT_SCALE = 64.0
_EDGE = 1e-7  # cosines stay this far from +-1, where the angle has no derivative


def build_head(
    kind: str,
    dim: int,
    classes: int,
    *,
    batch_norm: bool = False,
    hidden: int | None = None,
    scale: float | None = None,
    margin: float | None = None,
) -> nn.Module:
    """A fresh head of one of the kinds in HEADS, for embeddings (N, dim).

    batch_norm: standardise the embeddings first, without learned scale, as the official linear probe does.
    hidden: width of the MLP (default: dim). scale, margin: of the margin heads. UserError for values out of range.
    """
    if kind in _MARGIN_HEADS:
        if batch_norm:
            raise UserError(f"--head {kind} takes no batch norm: linear and mlp do")
        return _MARGIN_HEADS[kind](dim, classes, scale=scale, margin=margin)
    if kind == "linear":
        head = [_linear(dim, classes)]
    elif kind == "mlp":
        head = [nn.Linear(dim, hidden or dim), nn.GELU(), _linear(hidden or dim, classes)]
    else:
        raise UserError(f"unknown head {kind!r}: choose from {', '.join(HEADS)}")
    if batch_norm:
        head.insert(0, nn.BatchNorm1d(dim, affine=False, eps=1e-6))
    return head[0] if len(head) == 1 else nn.Sequential(*head)


def _linear(dim: int, classes: int) -> nn.Linear:
    layer = nn.Linear(dim, classes)
    nn.init.trunc_normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class MarginHead(nn.Module):
    """Scaled cosines between embeddings and class directions, with a handicap for the true class in training.

    margin_factor: 0..1, multiplies the margin; see `set_margin_progress`.
    """

    default_margin = 0.5
    largest_margin = math.pi / 2

    def __init__(self, dim: int, classes: int, *, scale: float | None = None, margin: float | None = None):
        super().__init__()
        self.scale = DEFAULT_SCALE if scale is None else scale
        self.margin = self.default_margin if margin is None else margin
        self.margin_factor = 1.0
        if not 0 < self.scale < math.inf:
            raise UserError(f"a scale of {self.scale} is out of range: choose a number above 0")
        if not 0 <= self.margin < self.largest_margin:
            raise UserError(
                f"a margin of {self.margin} is out of range: choose one from 0 to below {self.largest_margin:.4g}"
            )
        self.weight = nn.Parameter(torch.empty(classes, dim))
        nn.init.xavier_normal_(self.weight)

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings (N, D), and in training labels (N,) -> scores (N, C) in -scale..scale."""
        with torch.autocast(embeddings.device.type, enabled=False):
            if embeddings.dtype in (torch.float16, torch.bfloat16):
                embeddings = embeddings.float()
            cos = F.linear(F.normalize(embeddings), F.normalize(self.weight).to(embeddings.dtype))
            if labels is not None:
                true = cos.gather(1, labels[:, None])
                cos = self.with_margin(cos, true, self.margin * self.margin_factor).scatter(
                    1, labels[:, None], self.handicap(true, self.margin * self.margin_factor)
                )
            return self.scale * cos

    def with_margin(self, cos: torch.Tensor, true: torch.Tensor, margin: float) -> torch.Tensor:
        """The cosines (N, C) of the other classes as they enter the loss; true: (N, 1)."""
        return cos

    def handicap(self, true: torch.Tensor, margin: float) -> torch.Tensor:
        """The cosine (N, 1) of the true class as it enters the loss."""
        raise NotImplementedError


class CosFace(MarginHead):
    """cos - m for the true class (arXiv 1801.09414)."""

    default_margin = 0.35
    largest_margin = 1.0

    def handicap(self, true: torch.Tensor, margin: float) -> torch.Tensor:
        return true - margin


class ArcFace(MarginHead):
    """cos(theta + m) for the true class (arXiv 1801.07698).

    Beyond theta = pi - m, where that would rise again, cos theta - m sin m, which goes on falling.
    """

    def handicap(self, true: torch.Tensor, margin: float) -> torch.Tensor:
        beyond = true <= math.cos(math.pi - margin)
        return torch.where(beyond, true - margin * math.sin(margin), _cos_plus(true, margin))


class CurricularFace(ArcFace):
    """ArcFace whose harder wrong classes count more and more as training goes on (arXiv 2004.00288).

    A wrong class that is nearer than the handicapped true one, cos_j > cos(theta_y + m), scores cos_j (t + cos_j).
    t is the running mean of the true cosines, t <- 0.99 t + 0.01 mean, taken before it is used.
    """

    def __init__(self, dim: int, classes: int, *, scale: float | None = None, margin: float | None = None):
        super().__init__(dim, classes, scale=scale, margin=margin)
        self.register_buffer("t", torch.zeros(()))

    def with_margin(self, cos: torch.Tensor, true: torch.Tensor, margin: float) -> torch.Tensor:
        if self.training:
            self._follow(true.detach())
        harder = cos > _cos_plus(true, margin).detach()
        return torch.where(harder, cos * (self.t.to(cos.dtype) + cos), cos)

    @torch.no_grad()
    def _follow(self, true: torch.Tensor) -> None:
        mean = true.mean().to(self.t.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.t.mul_(0.99).add_(mean, alpha=0.01)


_MARGIN_HEADS = {"arcface": ArcFace, "cosface": CosFace, "curricularface": CurricularFace}


def _cos_plus(cos: torch.Tensor, angle: float) -> torch.Tensor:
    """cos(theta + angle) from cos(theta), by the addition theorem: no arc cosine to lose digits in."""
    cos = cos.clamp(-1 + _EDGE, 1 - _EDGE)
    return cos * math.cos(angle) - (1 - cos.square()).sqrt() * math.sin(angle)


def set_margin_progress(head: nn.Module, epoch: int, warmup_epochs: int) -> None:
    """Let the margin of a margin head grow linearly, epoch by epoch, to its full size after `warmup_epochs`.

    It depends on the epoch alone, so a resumed run stands where it stood. Other heads are left as they are.
    """
    if isinstance(head, MarginHead):
        head.margin_factor = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0


def minimal_scale(classes: int, probability: float = 0.9) -> float:
    """The scale below which a true class can never reach a probability, however well it is separated.

    s >= (C - 1) / C ln((C - 1) p / (1 - p)); the bound is CosFace's (arXiv 1801.09414, section 3.3).
    """
    return (classes - 1) / classes * math.log((classes - 1) * probability / (1 - probability))
