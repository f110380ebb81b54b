"""The flags that a checkpoint or a config.json says a model was trained with, checked before a model is built by them.

They come with weights from anywhere: a picture of a million pixels a side, or a thousand layers, would be memory that
is asked for before anything is compared with the weights.
"""

from collections.abc import Mapping

from util.run.errors import UserError

MOST_PX = 4096  # side of the pictures of a network that --input_size could have been
_SIDES = ("input_size", "img_size", "image_size")
_COUNTS = ("patch_size", "embed_dim", "depth", "num_heads", "decoder_embed_dim", "decoder_depth", "decoder_num_heads")
_MOST = 16_384
_TEXTS = ("model", "init", "head")


def checked_flags(flags: Mapping, source: str) -> dict:
    """The flags as they are; UserError that names the source and the first one that no run can have had."""
    if not isinstance(flags, Mapping) or not all(isinstance(name, str) for name in flags):
        raise UserError(f"{source} holds flags that are none: restore it, or give other weights")
    for name, value in flags.items():
        if value is not None and not _is_possible(name, value):
            text = repr(value)[:40]
            raise UserError(f"{source} says it was trained with {name} {text}: restore it, or give other weights")
    return dict(flags)


def _is_possible(name: str, value) -> bool:
    if name in _SIDES:
        sides = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
        return all(_is_count(side, MOST_PX) for side in sides)
    if name in _COUNTS:
        return _is_count(value, _MOST)
    return isinstance(value, str) if name in _TEXTS else True


def _is_count(value, most: int) -> bool:
    return type(value) is int and 0 < value <= most
