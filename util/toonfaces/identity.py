"""Who a character is: traits that every picture of it shares."""

from dataclasses import dataclass

import numpy as np

from util.run.seed import rng_for
from util.toonfaces import style

HAIR_STYLES = (
    "bob", "short", "spiky", "long", "wavy", "twintails", "low_tails", "ponytail", "buns", "drills", "braids", "flip",
)  # fmt: skip
BANGS = ("blunt", "side", "parted", "between_eyes", "spiky", "wispy", "swept_back", "curtain", "over_eye")
SIDELOCKS = ("none", "short", "long", "curled")
EYE_SHAPES = ("round", "tall", "almond", "upturned", "droopy", "half_lidded")
FACES = ("round", "oval", "pointed", "square")
HEAD_ACCESSORIES = (
    "none", "ribbon", "bow", "hairpin", "flower", "hairband", "headphones", "cat_ears", "horns",
)  # fmt: skip
FACE_ACCESSORIES = ("none", "glasses", "earrings", "mole", "freckles", "plaster")
AHOGE = ("none", "one", "two")

# The traits that are seen at a glance in every style and most poses, and in how many of them two characters differ.
CLEAR_TRAITS = ("hair", "bangs", "eyes", "head_accessory")
MIN_DISTANCE = 2
MAX_IDENTITIES = 2000  # of len(HAIR_STYLES) * len(BANGS) * len(EYE_SHAPES) * len(HEAD_ACCESSORIES) = 5832


@dataclass(frozen=True)
class Traits:
    """The traits that are shapes, which survive a change of colours and of style."""

    hair: str
    bangs: str
    sidelocks: str
    eyes: str
    face: str
    head_accessory: str
    face_accessory: str
    ahoge: str

    def distance(self, other: "Traits") -> int:
        """In how many of CLEAR_TRAITS the two differ."""
        return sum(getattr(self, name) != getattr(other, name) for name in CLEAR_TRAITS)


@dataclass(frozen=True)
class Identity:
    """One character. Colours are names in the palettes of `style`; key seeds its fine detail (single locks)."""

    name: str
    key: tuple
    traits: Traits
    hair_colour: str
    eye_colour: str
    skin: str
    accent: str  # colour of the accessories
    side: int  # -1 or 1: where the parting, side tails and pins are
    brow: float  # thickness, 0.7..1.5
    eye_gap: float  # model units added to the distance of each eye from the middle
    eye_size: float  # relative, 0.93..1.07

    def rng(self, part: str) -> np.random.Generator:
        """The character's own generator for the fine detail of a part: the same in every picture."""
        return rng_for(*self.key, part)


def make_identities(count: int, seed: int, prefix: str = "id", known: tuple[Identity, ...] = ()) -> list[Identity]:
    """`count` characters named `prefix` and a number, any two of which differ in clear traits, those in `known` too.

    They differ in MIN_DISTANCE traits; where no such character is found any more, in one. At most
    MAX_IDENTITIES in all.
    """
    made: list[Identity] = []
    taken = [other.traits for other in known]
    for number in range(count):
        rng = rng_for(seed, "identity", prefix, number)
        traits = _distinct_traits(rng, taken)
        taken.append(traits)
        made.append(_with_colours(f"{prefix}{number:03d}", (seed, "detail", prefix, number), traits, rng))
    return made


def _distinct_traits(rng: np.random.Generator, taken: list[Traits]) -> Traits:
    for attempt in range(10_000):
        wanted = MIN_DISTANCE if attempt < 400 else 1
        traits = _draw_traits(rng)
        if all(traits.distance(other) >= wanted for other in taken):
            return traits
    raise RuntimeError(f"no combination of traits is left after {len(taken)} characters")


def _pick(rng: np.random.Generator, options, weights=None) -> str:
    options = list(options)
    odds = None if weights is None else np.array(weights) / sum(weights)
    return str(rng.choice(options, p=odds))


def _draw_traits(rng: np.random.Generator) -> Traits:
    return Traits(
        hair=_pick(rng, HAIR_STYLES),
        bangs=_pick(rng, BANGS),
        sidelocks=_pick(rng, SIDELOCKS),
        eyes=_pick(rng, EYE_SHAPES),
        face=_pick(rng, FACES),
        head_accessory=_pick(rng, HEAD_ACCESSORIES, [4, 1, 1, 1, 1, 1, 1, 1, 1]),
        face_accessory=_pick(rng, FACE_ACCESSORIES, [5, 2, 1, 1, 1, 1]),
        ahoge=_pick(rng, AHOGE, [3, 1, 1]),
    )


def _with_colours(name: str, key: tuple, traits: Traits, rng: np.random.Generator) -> Identity:
    return Identity(
        name=name,
        key=key,
        traits=traits,
        hair_colour=_pick(rng, style.HAIR),
        eye_colour=_pick(rng, style.EYE),
        skin=_pick(rng, style.SKIN, [10, 7, 3]),
        accent=_pick(rng, style.ACCENT),
        side=int(rng.integers(2)) * 2 - 1,
        brow=float(rng.uniform(0.7, 1.5)),
        eye_gap=float(rng.uniform(-0.025, 0.025)),
        eye_size=float(rng.uniform(0.93, 1.07)),
    )
