"""Classification heads on embeddings (N, D): linear, MLP, and three that put a margin between identities.

    head = build_head("arcface", 768, 3263)
    set_margin_progress(head, epoch, warmup_epochs)
    loss = F.cross_entropy(head(embeddings, labels), labels)    # training: with the margin
    scores = head(embeddings)                                   # evaluation: scaled cosines

Whether a head takes labels is told by its class, MarginHead; the scores of every head are (N, C).
"""

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from util.run.errors import UserError


class MarginHead(nn.Module):
    """Scaled cosines between embeddings and one direction per class; in training with a margin.

    weight: (C, D), of which only the directions count. scale: above 0, what cosines are multiplied by.
    margin: its full size, an angle in rad or a cosine. margin_factor: share of it that counts now, 0..1.
    """

    default_margin = 0.5
    margin_limit = math.pi / 2  # the fallback of `widen` falls for every angle below a right one

    def __init__(self, dim: int, classes: int, scale: float = 64.0, margin: float | None = None):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_uniform_(torch.empty(classes, dim)))
        self.scale = float(scale)
        self.margin = float(self.default_margin if margin is None else margin)
        self.margin_factor = 1.0
        if not 0 < self.scale < math.inf:
            raise UserError(f"a head's scale of {scale} is out of range: choose a number above 0, such as 64")
        if not 0 <= self.margin < self.margin_limit:
            raise UserError(
                f"a margin of {margin} is out of range: choose one from 0 up to below {self.margin_limit:.4g}, "
                f"such as {self.default_margin}"
            )

    @property
    def effective_margin(self) -> float:
        """The margin that counts now."""
        return self.margin * self.margin_factor

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Embeddings (N, D) -> logits (N, C): scale x cosine, and with labels (N,) int64 the margin of those classes.

        Computed in float32 under any autocast, in float64 for such embeddings.
        """
        # a bf16 cosine has steps of 0.004 near 1, and the scale makes 0.25 of them
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = self.cosine(embeddings)
            if labels is not None:
                cosine = self.with_margin(cosine, labels)
            return self.scale * cosine

    def cosine(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Cosines (N, C) between embeddings (N, D) and the class directions, at least in float32."""
        precise = torch.promote_types(embeddings.dtype, torch.float32)
        return F.linear(F.normalize(embeddings.to(precise)), F.normalize(self.weight.to(precise)))

    def with_margin(self, cosine: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cosines (N, C) -> what stands in their place in the loss, (N, C), for labels (N,)."""
        raise NotImplementedError


class ArcFace(MarginHead):
    """The angle to the true class is widened by the margin: cos(th + m) (arXiv 1801.07698)."""

    def with_margin(self, cosine, labels):
        widened, _ = widen(_of_class(cosine, labels), self.effective_margin)
        return cosine.scatter(1, labels[:, None], widened)


class CosFace(MarginHead):
    """The margin is taken off the cosine of the true class: cos th - m (arXiv 1801.09414)."""

    default_margin = 0.35
    margin_limit = 1.0

    def with_margin(self, cosine, labels):
        return cosine.scatter(1, labels[:, None], _of_class(cosine, labels) - self.effective_margin)


class CurricularFace(MarginHead):
    """ArcFace in which hard negatives count more as training goes on (arXiv 2004.00288).

    A negative is hard where cos_j > cos(th_y + m); it becomes cos_j (t + cos_j), also with a margin of 0. t is a
    running mean of the true classes' cosines. Every call with labels in training mode moves it, before it is used, by
    the mean over the batches of all processes, which are of one size; so in training mode all must make the call.
    """

    momentum = 0.99

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("t", torch.zeros(()))

    def with_margin(self, cosine, labels):
        true = _of_class(cosine, labels)
        if self.training:
            self._move(true)
        widened, shifted = widen(true, self.effective_margin)
        negatives = torch.where(cosine > shifted, cosine * (self.t + cosine), cosine)
        return negatives.scatter(1, labels[:, None], widened)

    @torch.no_grad()
    def _move(self, true: torch.Tensor) -> None:
        mean = true.mean()
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        self.t.copy_((1 - self.momentum) * mean + self.momentum * self.t)


def widen(cosine: torch.Tensor, margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(monotone, plain) forms of cos(th + m) for cos th of any shape and m in rad, 0 <= m < pi/2.

    The plain form rises again beyond th = pi - m; the monotone one is cos th - m sin m there and falls on all of 0..pi.
    Both come from the addition theorem, without an arccosine.
    """
    # the root's gradient is infinite at cos th = +-1: rounding blurs sin th there, so a floor costs nothing
    sine = ((1 - cosine) * (1 + cosine)).clamp_min(torch.finfo(cosine.dtype).eps).sqrt()
    plain = cosine * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosine < -math.cos(margin), cosine - margin * math.sin(margin), plain), plain


def _of_class(cosine: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The cosines (N, 1) of the classes (N,)."""
    return cosine.gather(1, labels[:, None])


_MARGIN_HEADS: dict[str, type[MarginHead]] = {"arcface": ArcFace, "cosface": CosFace, "curricularface": CurricularFace}


def _linear(dim: int, classes: int) -> nn.Linear:
    """A linear classifier that starts with almost equal scores."""
    layer = nn.Linear(dim, classes)
    nn.init.trunc_normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


def _mlp(dim: int, classes: int, hidden: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden or dim), nn.GELU(), _linear(hidden or dim, classes))


_PLAIN_HEADS: dict[str, Callable[..., nn.Module]] = {"linear": _linear, "mlp": _mlp}
HEADS = (*_PLAIN_HEADS, *_MARGIN_HEADS)


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
    """A fresh head, one of HEADS, for embeddings (N, dim) and a number of classes.

    batch_norm: linear and mlp only; standardise the embeddings first, without a scale or shift to be learnt, as MAE's
    linear probe does (arXiv 2111.06377, appendix A.1). hidden: width inside the mlp; None stands for dim.
    scale, margin: margin heads only; None stands for 64, and for 0.5 rad or CosFace's 0.35. Margins lie in 0..<pi/2,
    CosFace's in 0..<1. UserError for an unknown kind, a value out of range, or one that the kind does not take.
    """
    if kind not in HEADS:
        raise UserError(f"unknown head {kind!r}: choose from {', '.join(HEADS)}")
    own_width = {} if hidden is None else {"hidden": hidden}
    own_margin = {name: value for name, value in (("scale", scale), ("margin", margin)) if value is not None}
    if own_width and kind != "mlp":
        raise UserError(f"the {kind} head has no hidden layer: leave its width out, or choose mlp")
    if kind in _MARGIN_HEADS:
        if batch_norm:
            raise UserError(f"the {kind} head takes no batch norm: leave it out, or choose {' or '.join(_PLAIN_HEADS)}")
        return _MARGIN_HEADS[kind](dim, classes, **own_margin)
    if own_margin:
        raise UserError(
            f"the {kind} head has no {' and no '.join(own_margin)}: leave it out, or choose {', '.join(_MARGIN_HEADS)}"
        )
    head = _PLAIN_HEADS[kind](dim, classes, **own_width)
    return nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), head) if batch_norm else head


def set_margin_progress(head: nn.Module, epoch: int, warmup_epochs: int) -> None:
    """Set how much of the margin counts in an epoch: 0 in epoch 0, all of it from epoch `warmup_epochs` on.

    Nothing happens to heads without a margin.
    """
    if isinstance(head, MarginHead):
        head.margin_factor = min(1.0, epoch / warmup_epochs) if warmup_epochs else 1.0


def minimal_scale(classes: int, p: float = 0.9) -> float:
    """The least scale at which the true class can have a probability of p (arXiv 1801.09414).

    That is with the directions of C >= 2 classes as far apart as they can be and every embedding on its own:
    (C - 1) / C ln((C - 1) p / (1 - p)). p: in 0<..<1.
    """
    others = classes - 1
    return others / classes * math.log(others * p / (1 - p))
