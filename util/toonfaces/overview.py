"""The contact sheet: what the data set varies, one column for each nuisance, one row for each character."""

from dataclasses import replace

from PIL import Image

from util.data.sheet import sheet
from util.toonfaces.identity import Identity
from util.toonfaces.look import draw_look
from util.toonfaces.render import render_face

_STILL = {"yaw": 0.0, "pitch": 0.0, "roll": 0.0, "expression": "neutral", "occlusion": "none", "style": "moe"}
COLUMNS = (
    ("moe", {}),
    ("shounen", {"style": "shounen"}),
    ("shoujo", {"style": "shoujo"}),
    ("sketch", {"style": "sketch"}),
    ("left", {"yaw": -32.0, "style": "shoujo"}),
    ("right", {"yaw": 32.0}),
    ("up", {"pitch": 16.0, "style": "shounen"}),
    ("down", {"pitch": -16.0}),
    ("laughing", {"expression": "laughing"}),
    ("angry", {"expression": "angry", "style": "shounen"}),
    ("surprised", {"expression": "surprised", "style": "shoujo"}),
    ("shy", {"expression": "shy"}),
    ("hat", {"occlusion": "hat"}),
    ("hand", {"occlusion": "hand", "style": "shounen"}),
    ("bangs", {"occlusion": "bangs"}),
    ("mask", {"occlusion": "mask", "style": "shoujo"}),
)


def overview(identities: list[Identity], seed: int, size: int = 128) -> Image.Image:
    """Characters (rows) by style, pose, expression and occlusion (columns)."""
    rows = []
    for identity in identities:
        row = []
        for title, fixed in COLUMNS:
            look = draw_look((seed, "overview", identity.name, title), **{**_STILL, **fixed})
            row.append(render_face(identity, replace(look, scale=0.26, place=(0.5, 0.5)), size).image)
        rows.append(row)
    return sheet(rows, column_titles=[title for title, _ in COLUMNS], cell=size, gap=3)
