"""Where the figure is in a picture that has neither transparency nor a mask: an estimate from a thumbnail.

Background is what the border shows, and what is reached from there without crossing a line: drawn figures have
outlines (a geodesic distance, as in Wei et al., Geodesic Saliency Using Background Priors, ECCV 2012). Colour,
saliency and the faces that are known have their say too, and GrabCut follows the edges. The weights were fitted on
pictures with exact masks (ToonFaces) and looked at on real ones.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from util.data.smart_crop import rgb_to_lab, saliency

_THUMB = 96  # long side, px; three for each cell of a map
_BAND = 2  # px of the border that is looked at
_CORNER = 0.14  # how far along the upper border a corner reaches, fraction of the width (a deviation)
_TOP, _BOTTOM, _LOWEST = 0.15, 0.1, 0.01  # trust in the middle of the upper border, in the lower border, anywhere
_CLUSTERS, _ROUNDS, _SPREAD = 6, 10, 12.0  # of the border's colours: k-means, and their deviation in Lab
_STEP, _SLACK = 0.05, 2.0  # of a path: least cost of a step, and the difference in Lab that is free
# what a path pays to start at a border pixel: without trust, of a colour that is rare there, on a figure
_NO_TRUST, _RARE, _ON_FIGURE = 60.0, 8.0, 60.0
# weights of the evidence; the last is that of a figure where faces are known, against `_LEVEL` of it
_COLOUR, _DISTANCE, _REMOTE, _SALIENCY, _OFF_AXIS, _BIAS = 0.7, 1.25, 3.0, 0.65, -4.0, -2.1
_FIGURE, _LEVEL = 4.0, 0.45
_SURE = 0.15  # estimates this close to 0 or 1 are not GrabCut's to change
_LEAST = 50  # px of both kinds that GrabCut needs: ten for each of its five colours
_GRABCUT_ROUNDS = 2


def estimate_foreground(image: Image.Image, faces: Sequence[Sequence[float]] = ()) -> np.ndarray:
    """How likely each pixel of a thumbnail of an RGB image belongs to a figure: float32 (h, w) in 0..1.

    The thumbnail has the proportions of the image and a long side of 96 px. faces: boxes x1, y1, x2, y2 in px of the
    image, where they are known: they tell hair that touches the border from background. Deterministic.
    """
    scale = _THUMB / max(image.size)
    size = tuple(max(1, round(side * scale)) for side in image.size)
    # a small picture is enlarged smoothly: blocks would have edges
    resampling = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    thumb = np.asarray(image.resize(size, resampling, reducing_gap=2.0))
    prior = figure_prior(thumb.shape[:2], [[value * scale for value in box] for box in faces])
    estimate = 1.0 / (1.0 + np.exp(-_evidence(thumb, prior, bool(faces))))
    return _grabcut(thumb, estimate.astype(np.float32))


def figure_prior(shape: tuple[int, int], faces: Sequence[Sequence[float]]) -> np.ndarray:
    """How likely each pixel belongs to the head or the body of a face: float32 (h, w) in 0..1.

    shape: (h, w). faces: boxes x1, y1, x2, y2, px.
    """
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32) + 0.5
    prior = np.zeros(shape, np.float32)
    for x1, y1, x2, y2 in faces:
        # in sides of the face: the head with its hair, and a body that widens downwards and may end anywhere
        side = max(1.0, ((x2 - x1) * (y2 - y1)) ** 0.5)
        right, down = (x - (x1 + x2) / 2) / side, (y - (y1 + y2) / 2) / side
        head = np.exp(-0.5 * ((right / 0.62) ** 2 + ((down + 0.12) / 0.68) ** 2) ** 2)
        width = np.clip(0.35 + 0.55 * down, 0.35, 1.1)
        body = np.exp(-0.5 * ((right / width) ** 4 + (down / 3.5) ** 4)) * (down > 0)
        prior = np.maximum(prior, np.maximum(head, 0.8 * body))
    return prior


def _evidence(thumb: np.ndarray, prior: np.ndarray, has_faces: bool) -> np.ndarray:
    """Log odds that each pixel belongs to a figure."""
    lab = rgb_to_lab(thumb)
    on_border, trust = _border(prior)
    colour = _rarity(lab, on_border, trust)
    start = (1 - trust) * _NO_TRUST + np.maximum(colour - 1.5, 0) * _RARE + _ON_FIGURE * prior
    distance = _path_cost(_smooth(lab), np.where(on_border, start, np.inf))
    off_axis = ((np.arange(thumb.shape[1]) + 0.5) / thumb.shape[1] - 0.5) ** 2
    return (
        _BIAS
        + _COLOUR * colour
        + _DISTANCE * np.log1p(distance / 5)
        + _REMOTE * distance / max(1.0, distance.max())
        + _SALIENCY * np.log(saliency(thumb) + 0.03)
        + _OFF_AXIS * off_axis
        + (_FIGURE * (prior - _LEVEL) if has_faces else 0)
    )


def _border(prior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which pixels are the border, and how surely each of them is background, in 0..1.

    The upper corners most, then the sides, downwards less and less: hair reaches the middle of the upper border in
    portraits, and bodies nearly always the lower one.
    """
    height, width = prior.shape
    y, x = np.mgrid[:height, :width]
    left, down = (x + 0.5) / width, (y + 0.5) / height
    corners = np.exp(-0.5 * (left / _CORNER) ** 2) + np.exp(-0.5 * ((1 - left) / _CORNER) ** 2)
    trust = np.clip(1.25 - 1.1 * down, _BOTTOM, 1)
    trust = np.where(y >= height - _BAND, _BOTTOM, trust)
    trust = np.where(y < _BAND, _TOP + (1 - _TOP) * corners, trust) * (1 - 0.95 * prior)
    on_border = (x < _BAND) | (x >= width - _BAND) | (y < _BAND) | (y >= height - _BAND)
    return on_border, np.clip(trust, _LOWEST, 1)


def _rarity(lab: np.ndarray, on_border: np.ndarray, trust: np.ndarray) -> np.ndarray:
    """How unlike the colours of the border each pixel is: minus the logarithm of a mixture's density, 0 to 9.2."""
    weights = trust[on_border] ** 2
    centres, shares = _clusters(lab[on_border], weights / weights.sum())
    distances = np.linalg.norm(lab[:, :, None] - centres, axis=3)
    return -np.log(np.exp(-0.5 * (distances / _SPREAD) ** 2) @ shares + 1e-4)


def _clusters(colours: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weighted k-means that begins with colours far from each other: centres (k, 3), and their shares (k,)."""
    centres = [colours[((colours - weights @ colours) ** 2).sum(1).argmin()]]
    for _ in range(_CLUSTERS - 1):
        nearest = np.min([((colours - centre) ** 2).sum(1) for centre in centres], axis=0)
        centres.append(colours[(nearest * weights).argmax()])
    centres = np.array(centres)
    for _ in range(_ROUNDS):
        members = np.eye(_CLUSTERS)[((colours[:, None] - centres) ** 2).sum(2).argmin(1)] * weights[:, None]
        shares = members.sum(0)
        centres = np.where(shares[:, None] > 0, members.T @ colours / np.maximum(shares, 1e-12)[:, None], centres)
    return centres, shares


def _smooth(lab: np.ndarray) -> np.ndarray:
    import cv2  # a second to import, and only this needs it

    return cv2.GaussianBlur(lab, (0, 0), 0.7)


def _path_cost(lab: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Cost of the cheapest path to each pixel, (h, w): `start` where it begins, then the differences of colour."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import dijkstra

    pixels = np.arange(start.size).reshape(start.shape)
    begins = np.isfinite(start)
    rows, columns = [np.full(begins.sum(), start.size)], [pixels[begins]]  # from one node before all others
    costs = [start[begins] + 1e-3]
    for here, there in (((slice(None), slice(-1)), (slice(None), slice(1, None))), ((slice(-1),), (slice(1, None),))):
        rows.append(pixels[here].ravel())
        columns.append(pixels[there].ravel())
        difference = np.linalg.norm(lab[here] - lab[there], axis=-1).ravel()
        costs.append(np.maximum(difference - _SLACK, 0) + _STEP)
    edges = (np.concatenate(costs), (np.concatenate(rows), np.concatenate(columns)))
    graph = coo_matrix(edges, shape=(start.size + 1, start.size + 1)).tocsr()
    return dijkstra(graph, directed=False, indices=start.size)[:-1].reshape(start.shape)


def _grabcut(thumb: np.ndarray, estimate: np.ndarray) -> np.ndarray:
    """The mean of an estimate and of the region that GrabCut makes of it along the edges."""
    import cv2

    figure = estimate > 0.5
    if min(figure.sum(), (~figure).sum()) < _LEAST:
        return estimate
    labels = np.where(figure, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels[estimate < _SURE] = cv2.GC_BGD
    labels[estimate > 1 - _SURE] = cv2.GC_FGD
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # its threads do not survive a fork
    cv2.setRNGSeed(0)
    try:
        models = np.zeros((1, 65)), np.zeros((1, 65))
        bgr = np.ascontiguousarray(thumb[..., ::-1])
        cv2.grabCut(bgr, labels, None, *models, _GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
    finally:
        cv2.setNumThreads(threads)
    return (estimate + (labels & 1)) / 2  # both kinds of figure are odd
