"""Few-shot identification: N classes that were never trained on, K images of each, who is on the other images?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from util.benchmark.bootstrap import REPLICATES, mean_interval
from util.benchmark.identification import blocks, checked_embeddings, tensor
from util.run.errors import UserError
from util.run.seed import rng_for

SETTINGS = ((5, 1), (5, 5), (20, 1), (20, 5))  # ways, shots
METHODS = ("prototype", "nearest", "logistic")
_EPISODES_AT_A_TIME = 50


# --- episodes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Episodes:
    """E episodes of N ways, K shots and Q queries a class; rows are those of the labels they were drawn from.

    support: (E, N, K) rows. query: (E, N, Q) rows, so the true class of a query is its place along the second axis.
    classes: (E, N) the labels of the drawn classes. eligible: labels that could be drawn. excluded: how many other
    labels there are, with too few images.
    """

    support: np.ndarray
    query: np.ndarray
    classes: np.ndarray
    eligible: np.ndarray
    excluded: int


def episodes(
    labels: np.ndarray, *, ways: int, shots: int, queries: int = 15, count: int = 1000, seed: int = 0,
    sources: np.ndarray | None = None,
) -> Episodes:  # fmt: skip
    """`count` episodes, a function of the labels, sources, their order and the seed: the same for every model.

    labels: (N,) any codes; keep the rows in one fixed order (by sample_id, say), for an image is known by its row.
    sources: (N,) what each image was cut from, any codes; an episode shows at most one image of a class from each, for
    a near-copy of a support image is no query. None: each image is a source of its own. In what follows the images of
    a class are counted by their sources. A class takes part if it has shots + queries images. Where that would leave
    out more than half of the classes that have any query to offer, or fewer than `ways` would remain, all classes get
    fewer queries, the largest number that does neither. UserError where fewer than `ways` have shots + 1 images.
    """
    names, members = _members(labels, sources)
    sizes = np.array([len(own) for own in members], dtype=np.int64)
    spare = np.sort(sizes[sizes > shots] - shots)[::-1]
    if len(spare) < ways:
        raise UserError(
            f"{ways}-way {shots}-shot episodes need {ways} identities with {shots + 1} or more images, and there are "
            f"{len(spare)}: give more images, or ask for fewer ways or shots"
        )
    queries = min(queries, int(spare[max(ways, -(-len(spare) // 2)) - 1]))
    eligible = np.flatnonzero(sizes >= shots + queries)
    drawn = np.empty((count, ways, shots + queries), dtype=np.int64)
    classes = np.empty((count, ways), dtype=np.int64)
    for episode in range(count):
        rng = rng_for(seed, ways, shots, episode, "few-shot episode")
        classes[episode] = rng.choice(eligible, ways, replace=False)
        for place, number in enumerate(classes[episode]):
            own = members[number]
            chosen = rng.choice(len(own), shots + queries, replace=False)
            drawn[episode, place] = [_one(own[source], rng) for source in chosen]
    return Episodes(
        drawn[:, :, :shots], drawn[:, :, shots:], names[classes], names[eligible], len(names) - len(eligible)
    )


def _members(labels: np.ndarray, sources: np.ndarray | None) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """The labels there are, ascending, and of each its rows, apart by source."""
    names, codes = np.unique(np.asarray(labels), return_inverse=True)
    sources = np.arange(len(codes)) if sources is None else np.unique(sources, return_inverse=True)[1]
    members: list[dict[int, list[int]]] = [{} for _ in names]
    for row, (number, source) in enumerate(zip(codes.tolist(), sources.tolist(), strict=True)):
        members[number].setdefault(source, []).append(row)
    return names, [[np.array(rows) for rows in own.values()] for own in members]


def _one(rows: np.ndarray, rng: np.random.Generator) -> int:
    return int(rows[0] if len(rows) == 1 else rows[rng.integers(len(rows))])


# --- accuracy ---------------------------------------------------------------------------------------------------


def few_shot_report(
    embeddings: np.ndarray,
    labels: np.ndarray,
    settings: tuple[tuple[int, int], ...] = SETTINGS,
    base_mean: np.ndarray | None = None,
    methods: tuple[str, ...] = METHODS,
    *,
    queries: int = 15,
    count: int = 1000,
    replicates: int = REPLICATES,
    seed: int = 0,
    sources: np.ndarray | None = None,
) -> dict[str, dict]:
    """{"5way_1shot": {...}, ...} for each setting (ways, shots); {"skipped": why} where there are too few images.

    Arrays as in `episode_accuracies`, sources as in `episodes`; `methods` has "prototype". A setting holds "mean" and
    "ci95" of the prototype method (see `summarise`), "class_bootstrap_ci95" [low, high], "episodes", "queries" (of a
    class, in an episode), "classes" that episodes are drawn from, "excluded_classes" with too few images, and for each
    other method its name with {"mean", "ci95", "class_bootstrap_ci95"}. ci95 tells how much other episodes from the
    same classes would differ; the bootstrap draws the classes of the queries, so it tells how much other classes would.
    """
    if "prototype" not in methods:
        raise ValueError('the figures of a setting are those of "prototype": it has to be among the methods')
    checked_embeddings(embeddings)
    report: dict[str, dict] = {}
    for ways, shots in settings:
        name = f"{ways}way_{shots}shot"
        try:
            drawn = episodes(labels, ways=ways, shots=shots, queries=queries, count=count, seed=seed, sources=sources)
        except UserError as error:
            report[name] = {"skipped": str(error)}
            continue
        figures = {}
        for method in methods:
            accuracies = episode_accuracies(embeddings, drawn, method, base_mean)
            interval = mean_interval(accuracies.ravel(), drawn.classes.ravel(), replicates=replicates, seed=seed)
            figures[method] = summarise(accuracies.mean(axis=1)) | {"class_bootstrap_ci95": interval}
        report[name] = figures.pop("prototype") | {
            "episodes": count,
            "queries": drawn.query.shape[2],
            "classes": len(drawn.eligible),
            "excluded_classes": drawn.excluded,
            **figures,
        }
    return report


def episode_accuracies(
    embeddings: np.ndarray, drawn: Episodes, method: str = "prototype", base_mean: np.ndarray | None = None
) -> np.ndarray:
    """The share of right answers for each class of each episode, (E, ways); the mean over ways is the episode's.

    embeddings: (N, D), rows as in the labels. base_mean: (D,) the mean embedding of the images trained on, which is
    subtracted; then every row is L2-normalised ("CL2N", SimpleShot, arXiv 1911.04623). method, on these features:
    "prototype": the class whose mean is nearest (Euclidean, the mean as it is); "nearest": the class of the most
    similar support image; "logistic": logistic regression on the support images (`logistic_scores`). Equal scores
    count against the true class. ValueError for embeddings that are not finite.
    """
    score = {"prototype": _prototype_scores, "nearest": _nearest_scores, "logistic": logistic_scores}[method]
    features = tensor(checked_embeddings(embeddings))
    if base_mean is not None:
        features = features - tensor(base_mean)
    features = torch.nn.functional.normalize(features, dim=1)
    episode_count, ways, queries = drawn.query.shape
    accuracies = np.empty((episode_count, ways))
    for part, support, query in _features_of(features, drawn):
        scores = score(support, query).view(len(support), ways, queries, ways)
        true = scores.diagonal(dim1=1, dim2=3).transpose(1, 2)[..., None]
        right = (scores >= true).sum(dim=3) == 1
        accuracies[part] = right.double().mean(dim=2).numpy()
    return accuracies


def _features_of(features: torch.Tensor, drawn: Episodes) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some episodes at a time: support (e, N, K, D) and query (e, N * Q, D) features."""
    for part in blocks(len(drawn.support), _EPISODES_AT_A_TIME):
        support, query = (torch.from_numpy(rows[part]) for rows in (drawn.support, drawn.query))
        yield part, features[support], features[query.flatten(1)]


def _prototype_scores(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    means = support.mean(dim=2)
    return query @ means.mT - means.square().sum(dim=2)[:, None] / 2  # -|q - m|^2 / 2, less what all classes share


def _nearest_scores(support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    similarity = query @ support.flatten(1, 2).mT
    return similarity.unflatten(2, support.shape[1:3]).amax(dim=3)


def logistic_scores(
    support: torch.Tensor, query: torch.Tensor, strength: float = 1.0, tolerance: float = 1e-6, max_steps: int = 5000
) -> torch.Tensor:
    """Class scores (E, Q, N) of multinomial logistic regression, fitted to each episode's support (E, N, K, D).

    query: (E, Q, D). The optimum is scikit-learn's LogisticRegression(C=strength): summed cross-entropy plus
    |W|^2 / (2 strength), intercept free. By Nesterov's accelerated gradient for all episodes at once. W stays in the
    span of the support images, so W = X^T A with A (N K, N), and a gradient step on W is one on A that needs the
    Gram matrix alone. RuntimeError if A still moves by more than `tolerance` after `max_steps`.
    """
    episode_count, ways, shots, _ = support.shape
    images = support.flatten(1, 2).double()
    centre = images.mean(dim=1, keepdim=True)
    images = images - centre  # the intercept takes that up; it makes the problem much better conditioned
    gram = images @ images.mT
    truth = torch.eye(ways, dtype=torch.float64).repeat_interleave(shots, dim=0)
    # the intercept is one more feature, a constant, as large as makes it no harder to fit than the others
    spread = gram.abs().sum(dim=2).amax(dim=1)[:, None, None].clamp(min=ways / strength)  # bounds the eigenvalues
    constant = spread / (ways * shots)
    curvature = spread / 2 + 1 / strength  # at most: that of softmax is 1/2 at most
    rate, root = 1 / curvature, (curvature * strength).sqrt()
    momentum = (root - 1) / (root + 1)
    weights = ahead = torch.zeros(episode_count, ways * shots, ways, dtype=torch.float64)
    offset = offset_ahead = torch.zeros(episode_count, 1, ways, dtype=torch.float64)
    for _ in range(max_steps):
        excess = (gram @ ahead + offset_ahead).softmax(dim=2) - truth
        new = ahead - rate * (excess + ahead / strength)
        new_offset = offset_ahead - rate * constant * excess.sum(dim=1, keepdim=True)
        moved = max((new - weights).abs().max().item(), (new_offset - offset).abs().max().item())
        ahead, offset_ahead = new + momentum * (new - weights), new_offset + momentum * (new_offset - offset)
        weights, offset = new, new_offset
        if moved < tolerance:
            return ((query.double() - centre) @ (images.mT @ weights) + offset).float()
    raise RuntimeError(f"logistic regression has not converged in {max_steps} steps")


# --- summaries --------------------------------------------------------------------------------------------------


def summarise(accuracies: np.ndarray) -> dict[str, float | None]:
    """{"mean", "ci95"} of episode accuracies (E,): ci95 is the half width 1.96 sd / sqrt(E), sd with E - 1.

    None for a single episode.
    """
    count = len(accuracies)
    half_width = float(1.96 * np.std(accuracies, ddof=1) / np.sqrt(count)) if count > 1 else None
    return {"mean": float(np.mean(accuracies)), "ci95": half_width}


def paired_difference(accuracies_a: np.ndarray, accuracies_b: np.ndarray) -> dict[str, float | None]:
    """`summarise` of a - b, for two models on the same episodes: (E,) each. ValueError for different numbers."""
    if accuracies_a.shape != accuracies_b.shape or accuracies_a.ndim != 1:
        raise ValueError("a paired difference is of one accuracy for each episode, the same episodes for both")
    return summarise(accuracies_a - accuracies_b)
