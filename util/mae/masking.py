"""Which patches are removed. Every sample of a batch keeps exactly the same number of patches.

A masking strategy is a score map: Gumbel noise is added to it and the highest sums are removed, which is sampling
without replacement with odds exp(strength * score) (Gumbel top-k, arXiv 1903.06059). `random` is the map of zeros.
"""

from collections.abc import Mapping

import torch

from util.mae.scores import SCORES, Batch
from util.run.errors import UserError
from util.run.seed import hash32, uniform_for

# above it the noise is lost beside the scores in float32, and with it the order of what scores alike
STRONGEST = 1e5
SCHEDULES = ("constant", "easy_to_hard", "hard_to_easy")


def visible_count(patches: int, mask_ratio: float) -> int:
    """keep = int(L * (1 - mask_ratio)), the number of patches left visible."""
    return int(patches * (1 - mask_ratio))


def rank_patches(noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Order patches by noise, the patches to keep first (MAE's shuffle, arXiv 2111.06377, section 3).

    noise: (N, L). Returns (ids_shuffle, ids_restore), both (N, L) int64: the patches in order of
    rising noise (ties in raster order), and the place of each patch in that order.
    """
    ids_shuffle = torch.argsort(noise, dim=1, stable=True)
    return ids_shuffle, torch.argsort(ids_shuffle, dim=1)


def random_mask(noise: torch.Tensor, mask_ratio: float) -> torch.Tensor:
    """(N, L) noise -> (N, L) float mask, 0 = kept and 1 = removed; the patches of least noise are kept.

    Masks of the same noise are nested: what a lower ratio removes, a higher one removes too.
    """
    _, ids_restore = rank_patches(noise)
    return (ids_restore >= visible_count(noise.shape[1], mask_ratio)).float()


def by_chance(masked_ids: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Removed patches in an order that has nothing to do with why they were removed.

    masked_ids: (N, M) places. noise: (N, L), what they were removed by. Returns masked_ids (N, M) in the order of a
    hash of the bits of their noise: the first few are a random part, whatever the masking strategy.
    """
    bits = noise.float().contiguous().view(torch.int32).gather(1, masked_ids).long() & 0xFFFFFFFF
    return masked_ids.gather(1, hash32(bits).argsort(dim=1, stable=True))


class Masking:
    """A masking strategy: for each batch the order in which patches are kept, by `order`.

    strategy: NAME[:WEIGHT][+NAME[:WEIGHT]...] of SCORES, such as "face" or "face:2+lineart"; a weight below 0 inverts,
    so that this part is rather kept. Weights are scaled so that their absolute values sum to 1.
    strength: at a score of 1 the odds to be removed are exp(strength) times those at 0; 0 is random masking.
    random_share: samples that are masked at random, fraction in 0..1 (AttMask's default, arXiv 2203.12719, is half).
    schedule: of SCHEDULES; the strength rises from 0 over the epochs, or falls to 0. UserError for anything else.
    """

    def __init__(
        self,
        strategy: str = "random",
        *,
        strength: float = 4.0,
        random_share: float = 0.5,
        schedule: str = "constant",
        epochs: int = 1,
        seed: int = 0,
    ):
        if schedule not in SCHEDULES:
            raise UserError(f"--mask_schedule {schedule} is not known: choose one of {', '.join(SCHEDULES)}")
        if not 0 <= strength <= STRONGEST:
            raise UserError(f"--mask_strength {strength:g} is out of range: choose from 0 to {STRONGEST:g}")
        self.weights = parse_strategy(strategy)
        self.strength, self.random_share, self.schedule = strength, random_share, schedule
        self.epochs, self.seed = epochs, seed
        self.maps = tuple(dict.fromkeys(name for part in self.weights for name in SCORES[part].maps))
        self.hard = any(SCORES[part].hard for part in self.weights)

    def strength_at(self, epoch: int) -> float:
        """The strength in an epoch, counted from 0."""
        done = epoch / max(1, self.epochs - 1)
        return self.strength * {"constant": 1.0, "easy_to_hard": done, "hard_to_easy": 1 - done}[self.schedule]

    def scores(
        self,
        images: torch.Tensor,
        grid: tuple[int, int],
        epoch: int,
        index: torch.Tensor,
        maps: torch.Tensor | None = None,
        hard: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The score of each patch, (N, L) in -1..1; high is rather removed. It does not depend on the other samples.

        images: (N, 3, H, W) in [0, 1]. grid: (rows, columns) of patches. index: (N,) int64, of the samples. maps:
        (N, C, rows, columns) uint8, the share of each patch that each of `self.maps` covers, times 255. hard: (N, L),
        the model's prediction of its errors, where `self.hard`.
        """
        named = {} if maps is None else dict(zip(self.maps, maps.flatten(2).float().div(255).unbind(1), strict=True))
        batch = Batch(images, grid, self.seed, epoch, index, named, hard)
        total = torch.zeros(len(index), grid[0] * grid[1], device=index.device)
        # autocast would round the scores to 8 bits
        with torch.no_grad(), torch.autocast(index.device.type, enabled=False):
            for name, weight in self.weights.items():
                if SCORES[name].of is not None:
                    total += weight * SCORES[name].of(batch)
        return total

    def order(
        self,
        images: torch.Tensor,
        grid: tuple[int, int],
        epoch: int,
        index: torch.Tensor,
        maps: torch.Tensor | None = None,
        hard: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(N, L) finite numbers: the patches of least are kept. The "noise" of the model and of `random_mask`.

        Arguments as of `scores`. A sample that is left to chance, and every one at strength 0, gets the very numbers
        of random masking, those of `uniform_for(seed, epoch, index, L)`.
        """
        length = grid[0] * grid[1]
        noise = uniform_for(self.seed, epoch, index, length)
        strength = self.strength_at(epoch)
        if self.is_random or strength == 0:
            return noise
        scores = self.scores(images, grid, epoch, index, maps, hard)
        chance = uniform_for(self.seed, epoch, index, 1, "masked at random") < self.random_share
        return torch.where(chance, noise, gumbel(noise) + strength * scores)

    @property
    def is_random(self) -> bool:
        """Whether it has no score but the map of zeros."""
        return self.weights.keys() == {"random"}


def parse_strategy(text: str) -> Mapping[str, float]:
    """The weight of each score map in a strategy; UserError for what is no strategy."""
    weights: dict[str, float] = {}
    for part in text.split("+"):
        name, colon, number = part.partition(":")
        if name not in SCORES:
            raise UserError(f"--masking {text}: {name!r} is no strategy; choose from {', '.join(SCORES)}, joined by +")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            weight = 0.0
        if not 0 < abs(weight) < float("inf"):
            raise UserError(f"--masking {text}: {number!r} is no weight: write it like face:2 or face:-1")
        if name in weights:
            raise UserError(f"--masking {text} names {name} twice: add up its weights")
        weights[name] = weight
    scale = sum(abs(weight) for weight in weights.values())
    return {name: weight / scale for name, weight in weights.items()}


def gumbel(uniform: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel numbers from uniform ones in [0, 1), in the same order; 0 counts as 2^-25."""
    return -torch.log(-torch.log(uniform.clamp(min=2**-25)))
