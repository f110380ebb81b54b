"""Masking strategies: exact counts, exact odds, and masks that depend on (seed, epoch, sample index) alone.

Run: python -m pytest tests/test_masking.py
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats

from util.mae.masking import SCHEDULES, Masking, by_chance, gumbel, parse_strategy, random_mask, rank_patches
from util.mae.scores import FLAT, GREEN_SIGMAS, LINE_SIGMAS, SCORES, Batch, green_scores, hard_scores, lineart_scores
from util.run.errors import UserError
from util.run.seed import uniform_for

GRID = (14, 14)
STRATEGIES = (*SCORES, "face:-1", "foreground:-1", "lineart:-1", "face:2+lineart+random", "green+block:-0.5")


def sample(count: int, grid=GRID, patch: int = 4, first: int = 0) -> dict:
    """Arguments of `Masking.order` for `count` samples, each a function of its index."""
    index = torch.arange(first, first + count)
    side = (grid[0] * patch, grid[1] * patch)
    images = uniform_for(1, 0, index, 3 * side[0] * side[1]).view(count, 3, *side)
    hard = uniform_for(2, 0, index, grid[0] * grid[1])
    maps = torch.zeros(count, 3, *grid, dtype=torch.uint8)
    for row, number in enumerate(index.tolist()):
        x, y = number % 5, number // 5 % 4
        maps[row, 0, y : y + 6, x : x + 5] = 255  # face
        maps[row, 1, y + 2 : y + 4, x + 1 : x + 4] = 180  # eyes
        maps[row, 2, y:, x : x + 9] = 255  # figure
    return {"images": images, "grid": grid, "epoch": 0, "index": index, "maps": maps, "hard": hard}


def order(masking: Masking, given: dict, **changed) -> torch.Tensor:
    given = {**given, **changed}
    places = [("face", "eyes", "foreground").index(name) for name in masking.maps]
    return masking.order(**{**given, "maps": given["maps"][:, places]})


# --- counts, determinism ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75, 0.9])
def test_every_sample_keeps_exactly_the_same_number(strategy, ratio):
    for strength, share in [(4.0, 0.5), (1000.0, 0.0), (0.0, 0.0)]:
        found = order(Masking(strategy, strength=strength, random_share=share), sample(40))
        assert found.shape == (40, 196) and found.isfinite().all()
        assert (random_mask(found, ratio).sum(dim=1) == 196 - int(196 * (1 - ratio))).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_mask_depends_on_seed_epoch_and_index_alone(strategy):
    masking = Masking(strategy, epochs=5)
    whole = order(masking, sample(24))
    assert torch.equal(order(masking, sample(24)), whole)
    assert torch.equal(torch.cat([order(masking, sample(10)), order(masking, sample(14, first=10))]), whole)
    alone = torch.cat([order(masking, sample(1, first=i)) for i in range(24)])
    assert torch.equal(alone.argsort(dim=1), whole.argsort(dim=1))
    turned = order(masking, {name: v.flip(0) if torch.is_tensor(v) else v for name, v in sample(24).items()})
    assert torch.equal(turned.flip(0).argsort(dim=1), whole.argsort(dim=1))
    for other in (order(masking, sample(24), epoch=1), order(Masking(strategy, epochs=5, seed=1), sample(24))):
        assert (other != whole).any(dim=1).all()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strength_0_and_a_whole_random_share_are_random_masking(strategy):
    given = sample(32)
    noise = uniform_for(0, 0, given["index"], 196)
    for options in ({"strength": 0.0}, {"random_share": 1.0}, {"schedule": "easy_to_hard", "random_share": 0.0}):
        assert torch.equal(order(Masking(strategy, epochs=3, **options), given), noise)


def test_random_is_the_map_of_zeros_and_needs_nothing():
    masking = Masking("random", random_share=0.0, strength=9.0)
    assert masking.maps == () and not masking.hard
    assert torch.equal(order(masking, sample(8)), uniform_for(0, 0, torch.arange(8), 196))


def test_gumbel_noise_keeps_the_order_of_its_uniform_numbers():
    """So a map of equal scores removes what random masking removes."""
    noise = uniform_for(0, 0, torch.arange(3000), 196)
    sorted_noise = noise.sort(dim=1).values
    assert (gumbel(sorted_noise).diff(dim=1) >= 0).all()
    kept, equal = random_mask(noise, 0.75), random_mask(gumbel(noise) + 3.0, 0.75)
    assert (kept != equal).sum() <= 4  # two neighbours can become equal numbers
    assert gumbel(torch.tensor([0.0])).isfinite().all()
    assert stats.kstest(gumbel(uniform_for(3, 0, torch.arange(50), 196)).flatten().numpy(), "gumbel_r").pvalue > 0.01


# --- odds -------------------------------------------------------------------------------------------------------


def removal_rates(weights: list[float], removed: int) -> np.ndarray:
    """How often each patch is removed when patches are drawn without replacement, by enumeration of all sequences."""
    rates = np.zeros(len(weights))
    for sequence in itertools.permutations(range(len(weights)), removed):
        rest, probability = sum(weights), 1.0
        for patch in sequence:
            probability *= weights[patch] / rest
            rest -= weights[patch]
        rates[list(sequence)] += probability
    return rates


@pytest.mark.parametrize("strength", [0.7, 2.0, 4.0])
@pytest.mark.parametrize("ratio", [1 / 6, 0.5, 4 / 6])
def test_removal_rates_are_those_of_drawing_without_replacement(strength, ratio):
    count = 20_000
    scores = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.8, 1.0])
    maps = (scores.view(1, 1, 2, 3) * 255).round().byte().expand(count, 1, 2, 3)
    given = {"images": torch.zeros(count, 3, 2, 3), "grid": (2, 3), "epoch": 0, "index": torch.arange(count)}
    found = Masking("foreground", strength=strength, random_share=0.0).order(**given, maps=maps)
    exact = removal_rates([math.exp(strength * s) for s in (maps[0].flatten() / 255).tolist()], round(6 * ratio))
    rates = random_mask(found, ratio - 1e-9).mean(dim=0).double().numpy()
    assert np.abs(rates - exact).max() < 4.5 * 0.5 / math.sqrt(count)


def test_removal_rates_at_196_patches():
    """Against NumPy's own drawing without replacement, with odds of e^4 between the two halves of the picture."""
    count, removed = 4000, 147
    maps = torch.zeros(count, 1, 14, 14, dtype=torch.uint8)
    maps[:, :, :, :7] = 255
    given = {"images": torch.zeros(count, 3, 14, 14), "grid": GRID, "epoch": 0, "index": torch.arange(count)}
    mask = random_mask(Masking("foreground", random_share=0.0).order(**given, maps=maps), 0.75)
    weights = np.exp(4.0 * maps[0].flatten().numpy() / 255)
    rng = np.random.default_rng(0)
    drawn = np.zeros(196)
    for _ in range(count):
        drawn[rng.choice(196, removed, replace=False, p=weights / weights.sum())] += 1 / count
    left = maps[0].flatten().numpy() > 0
    rates = mask.double().mean(dim=0).numpy()
    assert abs(rates[left].mean() - drawn[left].mean()) < 0.003
    assert np.abs(rates - np.where(left, drawn[left].mean(), drawn[~left].mean())).max() < 5 * 0.5 / math.sqrt(count)


def test_half_of_the_samples_are_left_to_chance():
    given = sample(2000)
    found, noise = order(Masking("face"), given), uniform_for(0, 0, given["index"], 196)
    left = (found == noise).all(dim=1)
    assert abs(left.float().mean() - 0.5) < 4 * 0.5 / math.sqrt(2000)
    eyes = given["maps"][:, 1].flatten(1) > 0
    removed = random_mask(found, 0.75)
    rate = [(removed[rows] * eyes[rows]).sum() / eyes[rows].sum() for rows in (left, ~left)]
    assert abs(rate[0] - 0.75) < 0.01 and rate[1] > 0.95


@pytest.mark.parametrize("strategy, inverted", [("face", "face:-1"), ("foreground", "foreground:-2.5")])
def test_a_negative_weight_inverts(strategy, inverted):
    given, rates = sample(400), []
    for name in (strategy, "random", inverted):
        removed = random_mask(order(Masking(name, random_share=0.0), given), 0.75)
        part = given["maps"][:, 0 if strategy == "face" else 2].flatten(1) > 0
        rates.append(float((removed * part).sum() / part.sum()))
    assert rates[0] > rates[1] + 0.1 and rates[2] < rates[1] - 0.1


def test_mixtures_are_weighted_sums_of_their_maps():
    given = sample(8)

    def scores(name: str) -> torch.Tensor:
        masking = Masking(name)
        places = [("face", "eyes", "foreground").index(part) for part in masking.maps]
        return masking.scores(**{**given, "maps": given["maps"][:, places]})

    mixed = scores("face:2+lineart:-1+random:1")
    assert torch.allclose(mixed, (2 * scores("face") - scores("lineart")) / 4, atol=1e-6)
    assert parse_strategy("face:2+lineart:-1+random:1") == {"face": 0.5, "lineart": -0.25, "random": 0.25}


def test_schedules():
    for schedule, expected in zip(SCHEDULES, ([4, 4, 4, 4, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]), strict=True):
        masking = Masking("face", strength=4.0, schedule=schedule, epochs=5)
        assert [masking.strength_at(epoch) for epoch in range(5)] == expected
    assert Masking("face", schedule="hard_to_easy", epochs=1).strength_at(0) == 4.0


@pytest.mark.parametrize(
    "text", ["", "faces", "face:", "face:x", "face:0", "face:inf", "face+face:2", "face++lineart", "face:nan"]
)
def test_what_is_no_strategy_is_refused_in_one_line(text):
    with pytest.raises(UserError) as refusal:
        Masking(text)
    assert "\n" not in str(refusal.value) and "--masking" in str(refusal.value)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(UserError, match="mask_schedule later"):
        Masking("face", schedule="later")


@pytest.mark.parametrize(
    "strategy, strength", [("random", 0.0), ("face", 4.0), ("grid", 1000.0), ("foreground", 1000.0)]
)
def test_a_part_of_the_removed_patches_is_a_random_part(strategy, strength):
    """Not the part that was removed last, which of a semantic mask is the dull one."""
    found = order(Masking(strategy, strength=strength, random_share=0.0), sample(2000))
    removed = rank_patches(found)[0][:, 49:]
    shuffled = by_chance(removed, found)
    assert torch.equal(shuffled.sort(dim=1).values, removed.sort(dim=1).values)
    rank = torch.empty_like(found).long().scatter_(1, removed, torch.arange(147).expand(2000, -1))
    first = rank.gather(1, shuffled[:, :49]).double()
    assert abs(first.mean() - 73) < 5 * 42.4 / math.sqrt(2000 * 49)
    picked = torch.bincount(rank.gather(1, shuffled[:, :49]).flatten(), minlength=147) / 2000
    assert (picked - 1 / 3).abs().max() < 5 * math.sqrt(2 / 9 / 2000)


# --- score maps -------------------------------------------------------------------------------------------------


def batch_of(**changed) -> Batch:
    given = {**sample(6), "seed": 0, "maps": {}, **changed}
    return Batch(**given)


def test_line_scores_against_scipy():
    """The difference of two blurs as SciPy makes it, away from the border, where weights outside are cut off."""
    images = batch_of(grid=(4, 5), images=torch.rand(2, 3, 64, 80, generator=torch.manual_seed(0)))
    found = lineart_scores(images).view(2, 4, 5)
    for picture, scores in zip(images.images.double().numpy(), found, strict=True):
        luma = np.tensordot([0.299, 0.587, 0.114], picture, 1)
        ones = np.ones_like(luma)
        fine, coarse = (
            ndimage.gaussian_filter(luma, sigma, mode="constant", truncate=20)
            / ndimage.gaussian_filter(ones, sigma, mode="constant", truncate=20)
            for sigma in LINE_SIGMAS
        )
        energy = np.abs(fine - coarse).reshape(4, 16, 5, 16).mean(axis=(1, 3))
        assert np.allclose(scores, energy / (energy + energy.mean() + FLAT), atol=1e-4)


def test_lines_score_high_flat_areas_low_and_contrast_does_not_matter():
    picture = torch.full((1, 3, 64, 64), 0.8)
    picture[:, :, 20, 8:24] = 0.0  # a line through two patches
    scores = [lineart_scores(batch_of(images=1 - c * (1 - picture), grid=(4, 4))).view(4, 4) for c in (1.0, 0.2)]
    assert torch.allclose(*scores, atol=0.01)
    assert scores[0][1, 0] > 0.8 and scores[0][1, 1] > 0.8 and scores[0][3, 3] < 0.01
    for level, side in ((0.3, 64), (0.9, 224)):
        flat = torch.full((1, 3, side, side), level)
        assert (lineart_scores(batch_of(images=flat, grid=(4, 4))) < 0.01).all()


def test_green_noise_is_uniform_and_lacks_low_and_high_frequencies():
    index = torch.arange(3000)
    scores = green_scores(batch_of(index=index))
    assert abs(scores.mean() - 0.5) < 0.01
    assert stats.kstest(scores[:, ::53].flatten().numpy(), "uniform").statistic < 0.02
    maps = torch.erfinv((2 * scores.double() - 1).clamp(-1 + 1e-7, 1 - 1e-7)).view(-1, 14, 14)
    power = torch.fft.fft2(maps).abs().square().mean(dim=0)
    line = [
        torch.fft.fft(torch.tensor([math.exp(-(min(d, 14 - d) ** 2) / (2 * s * s)) for d in range(14)])).real
        for s in GREEN_SIGMAS
    ]
    band = [torch.outer(one, one) / one[0] ** 2 for one in line]
    expected = (band[0] - band[1]).square().double()
    assert (power / power.max() - expected / expected.max()).abs().max() < 0.1
    assert power[0, 0] < 0.01 * power.max() and power[7, 7] < 0.05 * power.max()


def test_blocks_are_rectangles_and_the_first_is_removed_first():
    """A rectangle has about 8 % of the patches or more: the first 7 % that go, 14 of 196, lie in the first one."""
    given = sample(300)
    masking = Masking("block", strength=1000.0, random_share=0.0)
    first = masking.scores(**{**given, "maps": None}).view(-1, 14, 14) == 1
    few = random_mask(order(masking, given), 0.07).view(-1, 14, 14) > 0
    for rectangle, removed in zip(first, few, strict=True):
        rows, columns = (rectangle.any(side).nonzero()[:, 0] for side in (1, 0))
        assert rectangle.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
        assert removed.sum() == 14 and (rectangle.sum() < 14 or not (removed & ~rectangle).any())
    assert (first.sum(dim=(1, 2)) >= 14).float().mean() > 0.9
    masks = random_mask(order(masking, given), 0.25)
    # neighbours of removed patches are far more often removed than the rate of removal
    maps = masks.view(-1, 14, 14)
    together = (maps[:, :, 1:] * maps[:, :, :-1]).mean() / maps.mean()
    assert together > 0.75


def test_a_strength_of_1000_nearly_always_takes_the_highest_scores():
    given = sample(300)
    for name in ("grid", "green"):
        masking = Masking(name, strength=1000.0, random_share=0.0)
        removed = random_mask(order(masking, given), 0.75)
        sharp = random_mask(masking.scores(**{**given, "maps": None}), 0.75)
        assert (removed != sharp).sum(dim=1).max() <= 4 and (removed != sharp).any(dim=1).float().mean() < 0.25


@pytest.mark.parametrize("strength", [float("inf"), float("nan"), -1.0, 2e5])
def test_a_strength_that_means_nothing_is_refused(strength):
    with pytest.raises(UserError, match="--mask_strength"):
        Masking("face", strength=strength)


@pytest.mark.parametrize("ratio, kept", [(0.75, 4), (0.5, 2)])
def test_grid_masks_are_regular(ratio, kept):
    """One patch of every 2 x 2 square is kept at 75 %, a checkerboard at 50 %."""
    given = sample(64, grid=(16, 16))
    visible = 1 - random_mask(order(Masking("grid", strength=1e5, random_share=0.0), given), ratio).view(-1, 16, 16)
    squares = visible.unfold(1, 2, 2).unfold(2, 2, 2).sum(dim=(3, 4))
    assert (squares == 4 // kept).all()
    assert (visible.mean(dim=0) - 1 / kept).abs().max() < 0.25  # the pattern moves about


def test_a_box_has_the_area_and_the_score_of_the_face():
    given = sample(200)
    masking = Masking("box")
    scores = masking.scores(**{**given, "maps": given["maps"][:, :2]})
    face = Masking("face").scores(**{**given, "maps": given["maps"][:, :2]})
    assert torch.allclose(scores.sum(dim=1), face.sum(dim=1), rtol=1e-4)
    area = (scores > 0).sum(dim=1)
    assert area.float().mean() > 30 and area.max() <= 56  # 30 patches, and those that a border cuts
    assert (scores > 0).float().mean(dim=0).min() > 0  # anywhere
    nobody = masking.scores(**{**given, "maps": torch.zeros(200, 2, 14, 14, dtype=torch.uint8)})
    assert (nobody == 0).all()


def test_hard_scores_rank_patches_as_the_model_does():
    given = sample(5)
    scores = hard_scores(batch_of(hard=given["hard"]))
    assert torch.equal(scores.argsort(dim=1), given["hard"].argsort(dim=1))
    assert torch.allclose(scores, hard_scores(batch_of(hard=3 * given["hard"] - 7)), atol=1e-4)
