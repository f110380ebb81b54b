"""Several characters in one picture, for detection: small, overlapping and hidden faces among them."""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageChops

from util.run.seed import rng_for
from util.toonfaces.background import paint_background
from util.toonfaces.canvas import Canvas
from util.toonfaces.identity import Identity
from util.toonfaces.look import Look, draw_look
from util.toonfaces.render import Face, draw_figure, face_of, figure_mask, finish, seen_fraction, to_mask

MAX_FACES = 6
SCALES = (0.028, 0.24)  # half a face as a fraction of the picture's height
BODY_LENGTH = 9.0  # model units: a figure must be low enough for its body to reach the lower edge
MIN_SEEN = 0.35  # a face of which less can be seen is left out: nobody could say whether it is there


@dataclass(frozen=True)
class Scene:
    """A picture, the mask of all its figures together, and its faces, the farthest first."""

    image: Image.Image
    mask: Image.Image
    faces: list[tuple[Identity, Look, Face]]


def render_scene(identities: list[Identity], key: tuple, width: int, height: int) -> Scene:
    """A scene keyed by `key` with 1 to MAX_FACES of the characters, width x height px, in one style and light."""
    rng = rng_for(*key, "scene")
    count = int(min(1 + rng.binomial(MAX_FACES - 1, 0.5), len(identities)))
    cast = [identities[i] for i in rng.choice(len(identities), count, replace=False)]
    stage = draw_look((*key, "stage"))
    looks = [_actor(key, number, stage, place) for number, place in enumerate(_places(rng, count))]
    actors = list(zip(cast, looks, strict=True))
    while True:
        scene, seen = _draw(actors, stage, width, height)
        worst = int(np.argmin(seen))
        if seen[worst] >= MIN_SEEN:
            return scene
        del actors[worst]


def _places(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """x, y, scale for each figure, small ones first because they stand behind."""
    low, high = np.log(SCALES)
    scales = np.sort(np.exp(rng.uniform(low, high, count)))
    columns = (rng.permutation(count) + 0.5 + rng.uniform(-0.4, 0.4, count)) / count
    places = []
    for x, scale in zip(columns, scales, strict=True):
        highest = max(0.2 + scale, 1.0 - BODY_LENGTH * scale)
        places.append((float(x), float(rng.uniform(highest, max(highest, 0.72))), float(scale)))
    return places


def _actor(key: tuple, number: int, stage: Look, place: tuple[float, float, float]) -> Look:
    look = draw_look((*key, number), style=stage.style, light_side=stage.light_side)
    return replace(look, place=place[:2], scale=place[2])


def _draw(actors: list[tuple[Identity, Look]], stage: Look, width: int, height: int) -> tuple[Scene, list[float]]:
    """The scene, and the fraction of each face that nobody in front of it hides."""
    scale = 2
    image = Image.new("RGB", (width * scale, height * scale))
    paint_background(Canvas(image, scale), stage, width, height)
    figures = [draw_figure(Canvas(image, scale), who, look, look.view(width, height)) for who, look in actors]
    covered = Image.new("L", image.size)  # by all figures nearer than the one at hand
    faces, seen = [], []
    for fig in reversed(figures):
        seen.append(seen_fraction(covered, fig.box, scale))
        faces.append((fig.identity, fig.look, face_of(fig, covered)))
        covered = ImageChops.lighter(covered, figure_mask(fig))
    return Scene(finish(image, scale, stage), to_mask(covered, scale), faces[::-1]), seen[::-1]
