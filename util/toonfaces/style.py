"""The four drawing styles and the small shared palette."""

import math
from dataclasses import dataclass, replace

import numpy as np

Colour = tuple[int, int, int]

# Few colours on purpose: identities share them, so that colour alone does not name a character.
HAIR = {
    "black": (62, 58, 76),
    "brown": (140, 92, 66),
    "blond": (242, 206, 120),
    "pink": (242, 152, 178),
    "blue": (92, 126, 204),
    "silver": (202, 208, 224),
}
EYE = {
    "blue": (58, 120, 214),
    "green": (58, 160, 104),
    "amber": (206, 132, 40),
    "red": (200, 58, 70),
    "violet": (138, 84, 196),
}
SKIN = {"light": (255, 232, 216), "medium": (250, 214, 190), "tan": (226, 176, 140)}
ACCENT = {"red": (214, 62, 70), "blue": (70, 104, 196), "yellow": (246, 200, 74), "white": (246, 244, 246)}

WHITE: Colour = (255, 255, 255)


def mix(a: Colour, b: Colour, t: float) -> Colour:
    """a at t = 0, b at t = 1."""
    return tuple(int(x + (y - x) * t + 0.5) for x, y in zip(a, b, strict=True))


def luminance(colour: Colour) -> int:
    """Grey value, 0..255 (integer Rec. 601 weights)."""
    return (299 * colour[0] + 587 * colour[1] + 114 * colour[2]) // 1000


@dataclass(frozen=True)
class Style:
    """How a drawing school draws. Lengths are model units (half a face = 1), the rest fractions in 0..1."""

    name: str
    line: float  # width of a contour
    ink: Colour
    ink_tint: float  # how much of the filled colour enters its line
    saturation: float
    lift: float  # how far colours move towards the paper
    paper: Colour
    shade: float  # strength of shadows
    shade_tint: Colour  # what shadows lean to
    eye_width: float
    eye_height: float
    lash: float  # thickness of the upper lash line
    lashes: int  # single lashes at the outer corner
    sparkle: int  # highlights in the iris
    blush: float
    gloss: float  # strength of the highlight ring on the hair
    brow: float  # thickness
    chin: float  # length of the lower face, relative
    hatch: bool = False  # pencil: hatching, doubled lines, paper grain
    hue: float = 0.0  # turn of all colours, radians

    def tone(self, colour: Colour) -> Colour:
        """A palette colour as this style paints it."""
        grey = luminance(colour)
        # Rodrigues' rotation about the grey axis turns the hue and keeps the grey value
        cos, sin = self.saturation * math.cos(self.hue), self.saturation * math.sin(self.hue) / math.sqrt(3)
        r, g, b = (c - grey for c in colour)
        turned = (r * cos + (b - g) * sin, g * cos + (r - b) * sin, b * cos + (g - r) * sin)
        return mix(tuple(min(255, max(0, int(grey + c + 0.5))) for c in turned), self.paper, self.lift)

    def shadow(self, colour: Colour, strength: float = 1.0) -> Colour:
        """The colour of a painted surface in shadow: darker and cooler."""
        dark = tuple(c * t // 255 for c, t in zip(colour, self.shade_tint, strict=True))
        return mix(colour, dark, self.shade * strength)

    def light(self, colour: Colour, strength: float = 1.0) -> Colour:
        """The colour of a painted surface in full light."""
        return mix(colour, WHITE, min(1.0, self.gloss * strength))

    def line_of(self, colour: Colour) -> Colour:
        """The colour of the line around a surface."""
        dark = tuple(c // 3 for c in colour)
        return mix(self.ink, dark, self.ink_tint)

    def by_hand(self, rng: np.random.Generator) -> "Style":
        """The style as one artist practises it: his colours, line and eyes are a little different."""
        return replace(
            self,
            hue=float(rng.uniform(-0.2, 0.2)),
            saturation=self.saturation * float(rng.uniform(0.8, 1.12)),
            lift=min(0.7, self.lift + float(rng.uniform(0.0, 0.12))),
            line=self.line * float(rng.uniform(0.85, 1.15)),
            eye_height=self.eye_height * float(rng.uniform(0.94, 1.06)),
        )


STYLES = {
    style.name: style
    for style in (
        Style(
            name="moe", line=0.034, ink=(82, 46, 58), ink_tint=0.55, saturation=1.0, lift=0.04, paper=WHITE,
            shade=0.62, shade_tint=(206, 168, 196), eye_width=1.02, eye_height=1.04, lash=0.1, lashes=1, sparkle=2,
            blush=0.55, gloss=0.5, brow=0.055, chin=0.97,
        ),
        Style(
            name="shounen", line=0.056, ink=(22, 18, 26), ink_tint=0.0, saturation=1.15, lift=0.0, paper=WHITE,
            shade=1.0, shade_tint=(164, 140, 176), eye_width=0.97, eye_height=0.68, lash=0.115, lashes=0, sparkle=1,
            blush=0.0, gloss=0.3, brow=0.095, chin=1.05,
        ),
        Style(
            name="shoujo", line=0.022, ink=(120, 66, 92), ink_tint=0.3, saturation=0.8, lift=0.22,
            paper=(255, 244, 250), shade=0.5, shade_tint=(226, 184, 216), eye_width=1.14, eye_height=1.22, lash=0.085,
            lashes=4, sparkle=4, blush=0.7, gloss=0.8, brow=0.038, chin=1.02,
        ),
        Style(
            name="sketch", line=0.028, ink=(74, 70, 80), ink_tint=0.0, saturation=0.05, lift=0.55,
            paper=(253, 251, 247), shade=0.3, shade_tint=(176, 174, 184), eye_width=1.0, eye_height=0.94, lash=0.09,
            lashes=2, sparkle=2, blush=0.0, gloss=0.85, brow=0.05, chin=1.0, hatch=True,
        ),
    )
}  # fmt: skip
