"""How one picture shows a character: everything that changes from picture to picture."""

from dataclasses import dataclass

import numpy as np

from util.run.seed import rng_for
from util.toonfaces.geometry import View
from util.toonfaces.style import STYLES, Style


@dataclass(frozen=True)
class Expression:
    """What a mood does to the face. Lengths are model units."""

    name: str
    open: float = 1.0  # height of the eye opening; 0 is shut
    shut: str = ""  # "down": asleep, "up": laughing, "wink": one eye laughing
    slant: float = 0.0  # the inner end of the upper lid is lower by this
    pupil: float = 1.0  # size of the iris
    brow_lift: float = 0.0
    brow_slant: float = 0.0  # the inner end of the brow is lower by this
    mouth: str = "line"  # line, smile, open, grin, frown, o, wave, cat
    blush: float = 0.0


EXPRESSIONS = {
    e.name: e
    for e in (
        Expression("neutral"),
        Expression("smile", open=0.94, mouth="smile", blush=0.2, brow_lift=0.03),
        Expression("open_mouth", mouth="open", brow_lift=0.06, blush=0.1),
        Expression("laughing", shut="up", mouth="grin", brow_lift=0.08, blush=0.4),
        Expression("closed_eyes", shut="down", mouth="smile"),
        Expression("angry", open=0.84, slant=0.1, brow_slant=0.13, brow_lift=-0.05, mouth="frown", pupil=0.92),
        Expression("surprised", open=1.1, pupil=0.78, brow_lift=0.14, mouth="o"),
        Expression("sad", open=0.86, slant=-0.07, brow_slant=-0.12, brow_lift=0.05, mouth="wave"),
        Expression("shy", open=0.82, slant=-0.03, brow_slant=-0.07, mouth="wave", blush=1.0),
        Expression("wink", shut="wink", mouth="cat", brow_lift=0.04, blush=0.2),
    )
}
OCCLUSIONS = ("none", "hat", "hand", "bangs", "mask")
HATS = ("beanie", "cap", "witch", "straw", "beret")
HANDS = ("mouth", "cheek", "eye", "wave")
OUTFITS = ("sailor", "shirt", "hoodie", "turtleneck", "kimono", "dress", "armour")
BACKGROUNDS = ("gradient", "sky", "rays", "bokeh", "dots", "stripes", "room", "petals", "night", "plain")
POSES = ("front", "left", "right", "up", "down")

CLOTHES = (
    (244, 242, 246), (48, 52, 80), (186, 60, 70), (84, 130, 96), (240, 190, 120), (112, 150, 206), (90, 76, 104),
    (236, 164, 184), (70, 66, 70), (150, 112, 84),
)  # fmt: skip
BACKDROPS = (
    (188, 220, 246), (250, 214, 222), (216, 240, 206), (255, 238, 196), (222, 212, 246), (120, 140, 186),
    (86, 80, 120), (236, 236, 240), (238, 182, 150), (150, 196, 196), (204, 110, 120), (60, 66, 84),
)  # fmt: skip
LIGHTS = ((255, 255, 255), (255, 246, 230), (236, 242, 255), (255, 228, 208), (224, 230, 250))


@dataclass(frozen=True)
class Look:
    """The nuisances of one picture. Angles are degrees, place and scale fractions of the picture's shorter side."""

    key: tuple
    style: Style
    expression: Expression
    yaw: float
    pitch: float
    roll: float
    scale: float  # one model unit (half a face)
    place: tuple[float, float]
    occlusion: str
    hat: str
    hand: str
    hidden_side: int  # -1 or 1: the side that a hand or blown hair covers
    outfit: str
    cloth: tuple[int, int, int]
    trim: tuple[int, int, int]
    background: str
    backdrop: tuple[int, int, int]
    backdrop_2: tuple[int, int, int]
    light: tuple[int, int, int]
    light_angle: float  # degrees
    contrast: float  # strength of the light's gradient
    light_side: int  # -1 or 1: where the light comes from

    @property
    def pose(self) -> str:
        """Which of POSES the head takes: the larger of the two turns decides, below 12 degrees it is the front."""
        if max(abs(self.yaw), 1.6 * abs(self.pitch)) < 12:
            return "front"
        if abs(self.yaw) >= 1.6 * abs(self.pitch):
            return "right" if self.yaw > 0 else "left"
        return "up" if self.pitch > 0 else "down"

    def rng(self, part: str) -> np.random.Generator:
        """The picture's own generator for the detail of a part."""
        return rng_for(*self.key, part)

    def view(self, width: int, height: int) -> View:
        """The head's place in a picture of that size, px."""
        side = min(width, height)
        yaw, pitch, roll = (float(np.deg2rad(a)) for a in (self.yaw, self.pitch, self.roll))
        return View((self.place[0] * width, self.place[1] * height), self.scale * side, yaw, pitch, roll)


def draw_look(key: tuple, **fixed) -> Look:
    """A random look keyed by `key`; `fixed` replaces single fields. Expression is a name, style a name or a Style."""
    rng = rng_for(*key, "look")

    def pick(options, weights=None):
        if weights is None:
            return options[int(rng.integers(len(options)))]
        return options[int(np.searchsorted(np.cumsum(weights), rng.random() * sum(weights), side="right"))]

    def spread(limit: float) -> float:
        return float(np.clip(rng.normal(0.0, limit / 1.9), -limit, limit))

    scale = float(rng.uniform(0.205, 0.3))
    drawn = {
        "key": key,
        "style": pick(tuple(STYLES), (0.3, 0.25, 0.25, 0.2)),
        "expression": pick(tuple(EXPRESSIONS), (5, 4, 3, 2, 2, 2, 2, 2, 2, 1)),
        "yaw": spread(36.0),
        "pitch": spread(17.0),
        "roll": spread(16.0),
        "scale": scale,
        "place": (
            0.5 + float(rng.uniform(-0.09, 0.09)),
            0.47 + 0.25 * (scale - 0.25) + float(rng.uniform(-0.05, 0.06)),
        ),
        "occlusion": pick(OCCLUSIONS, (0.56, 0.12, 0.11, 0.11, 0.1)),
        "hat": pick(HATS),
        "hand": pick(HANDS),
        "hidden_side": pick((-1, 1)),
        "outfit": pick(OUTFITS),
        "cloth": pick(CLOTHES),
        "trim": pick(CLOTHES),
        "background": pick(BACKGROUNDS),
        "backdrop": pick(BACKDROPS),
        "backdrop_2": pick(BACKDROPS),
        "light": pick(LIGHTS, (4, 2, 2, 1, 1)),
        "light_angle": float(rng.uniform(0.0, 360.0)),
        "contrast": float(rng.uniform(0.03, 0.17)),
        "light_side": pick((-1, 1)),
    }
    drawn |= fixed
    if isinstance(drawn["style"], str):
        drawn["style"] = STYLES[drawn["style"]].by_hand(rng_for(*key, "hand"))
    drawn["expression"] = EXPRESSIONS[drawn["expression"]]
    return Look(**drawn)
