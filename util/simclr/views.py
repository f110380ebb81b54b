"""Two random views of each picture, from the decoded picture to the batch that a contrastive step is fed with."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from util.data.augment import BLUR_SIGMA, TrainCrop, View, to_unit
from util.data.augment_batch import pictures
from util.data.images import Picture
from util.run.seed import rng_for

BLUR_SIDE = 224  # px; BLUR_SIGMA is meant for pictures of this side
JITTER_SHARE = 0.8  # of the views have their colours jittered


@dataclass(frozen=True)
class ViewPair:
    """What becomes of one picture, twice. Has the methods of a View, with one more axis of 2."""

    first: View
    second: View

    def apply(self, picture: Picture, size: tuple[int, int]) -> torch.Tensor:
        """Both views, uint8 (2, 3, H, W)."""
        return torch.stack([self.first.apply(picture, size), self.second.apply(picture, size)])

    def packed(self) -> torch.Tensor:
        """All parameters, float32 (2, P)."""
        return torch.stack([self.first.packed(), self.second.packed()])


class TwoViews:
    """SimCLR's augmentation (arXiv 2002.05709, appendix A), twice: `(picture, record, rng) -> uint8 (2, 3, H, W)`.

    crop: TrainCrop. jitter: strength 0..1; in JITTER_SHARE of the views brightness, contrast and saturation are scaled
    by 1 - jitter to 1 + jitter and the hue is turned by up to `hue` of the circle, 0..0.5, either way. grey, blur:
    shares of views, 0..1, without colour, and blurred by a deviation uniform in BLUR_SIGMA, which shrinks or grows with
    the short side against BLUR_SIDE. Colours change in one order for all, where the paper draws it: then a batch is one
    computation.

    A view's numbers are a function of those of `rng` and of which of the two it is.
    """

    def __init__(self, crop: TrainCrop, jitter: float = 0.8, hue: float = 0.0, grey: float = 0.0, blur: float = 0.5):
        self.crop, self.jitter, self.hue, self.grey, self.blur = crop, jitter, hue, grey, blur
        self.size = crop.size
        strengths = {"jitter": jitter, "hue": hue, "grey": grey, "blur": blur}
        self.effects = tuple(name for name, strength in strengths.items() if strength)

    def draw(self, picture: Picture, record: dict, rng: np.random.Generator) -> ViewPair:
        """The parameters of both views for the numbers of `rng`."""
        key = int(rng.integers(1 << 63))
        return ViewPair(*(self._draw(picture, record, rng_for(key, number)) for number in range(2)))

    def _draw(self, picture: Picture, record: dict, rng: np.random.Generator) -> View:
        view, drawn = self.crop.draw(picture, record, rng), {}
        # every number is drawn, whether it is used or not: a switch changes nothing but what it is for
        chance, turn = rng.random(3), rng.uniform(-1, 1)
        factors, sigma = rng.uniform(1 - self.jitter, 1 + self.jitter, 3), rng.uniform(*BLUR_SIGMA)
        if chance[0] < JITTER_SHARE:
            names = ("brightness", "contrast", "saturation")
            drawn = {**dict(zip(names, factors.tolist(), strict=True)), "hue": turn * self.hue}
        if chance[1] < self.grey:
            drawn["grey"] = True
        if chance[2] < self.blur:
            drawn["blur"] = sigma * min(self.size) / BLUR_SIDE
        return replace(view, **drawn)

    def render(self, picture: Picture, views: ViewPair) -> torch.Tensor:
        """The pixels of views that were drawn, uint8 (2, 3, H, W)."""
        return views.apply(picture, self.size)

    def __call__(self, picture: Picture, record: dict, rng: np.random.Generator) -> torch.Tensor:
        return self.render(picture, self.draw(picture, record, rng))

    def __repr__(self) -> str:
        return f"TwoViews({self.crop!r}, jitter={self.jitter}, hue={self.hue}, grey={self.grey}, blur={self.blur})"


def view_batch(batch: dict, views: TwoViews) -> torch.Tensor:
    """What a contrastive step is fed with, whoever makes the views: float32 (2 N, 3, H, W) in [0, 1].

    All first views, then all second ones. batch: of a loader with `views`, or with its DeferredView.
    """
    if "views" not in batch:
        return to_unit(batch["image"].transpose(0, 1).flatten(0, 1))
    # a set of views at a time: the stored pictures are not doubled
    return torch.cat([pictures({**batch, "views": batch["views"][:, number]}, views) for number in range(2)])
