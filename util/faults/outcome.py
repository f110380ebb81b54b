"""What a job leaves, without what must differ from run to run: wall time, dates, memory, processes, the commit."""

import hashlib
import json
import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from util.faults.readable import files_of

# keys of results and arrays, at any depth; how large a batch and how often it is timed depends on how long it takes
_WALL = re.compile(
    r"(.*_)?seconds(_.*)?|.*per_s|.*_ms(_.*)?|date|peak(_.*)?|git_commit|stamps?|memory|speedup.*"
    r"|(latency|batch)_repeats|batch|process"
)
_EVENTS = "events.out.tfevents.*"  # every start begins another one


def outcome(folder: Path, leaves: Sequence[str] = ()) -> dict[str, str]:
    """Digest of each file below `folder`, by its name. leaves: patterns of names that are left out, beside events.

    Files that remember wall time (checkpoints, JSON, NumPy archives) are compared by all else that they hold, bit for
    bit; all others by their bytes.
    """
    patterns = (_EVENTS, *leaves)
    kept = (path for path in files_of(folder) if not any(fnmatch(path.name, pattern) for pattern in patterns))
    return {str(path.relative_to(folder)): _digest(path) for path in kept}


def differences(found: dict[str, str], wanted: dict[str, str]) -> list[str]:
    """What is missing, too much or different, in words."""
    return [
        *(f"{name} is missing" for name in sorted(wanted.keys() - found.keys())),
        *(f"{name} is left over" for name in sorted(found.keys() - wanted.keys())),
        *(f"{name} differs" for name in sorted(found.keys() & wanted.keys()) if found[name] != wanted[name]),
    ]


def _digest(path: Path) -> str:
    state = hashlib.blake2b(digest_size=16)
    if path.suffix == ".pth":
        from util.training.checkpoint import read_checkpoint

        _feed(state, read_checkpoint(path))
    elif path.suffix == ".json":
        _feed(state, json.loads(path.read_text(encoding="utf-8")))
    elif path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            _feed(state, {name: arrays[name] for name in arrays})
    elif path.name == "log.txt":
        _feed(state, [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
    else:
        state.update(path.read_bytes())
    return state.hexdigest()


def _feed(state, value) -> None:
    """Add a nested value to a digest: kinds, shapes and bits; without wall time."""
    if isinstance(value, dict):
        kept = {str(key): item for key, item in value.items() if not _WALL.fullmatch(str(key))}
        state.update(f"dict {len(kept)};".encode())
        for key in sorted(kept):
            state.update(f"{key}:".encode())
            _feed(state, kept[key])
    elif isinstance(value, (list, tuple)):
        state.update(f"list {len(value)};".encode())
        for item in value:
            _feed(state, item)
    elif hasattr(value, "detach"):  # a tensor
        import torch

        flat = value.detach().cpu().contiguous().reshape(-1)
        state.update(f"tensor {value.dtype} {tuple(value.shape)};".encode())
        state.update(flat.view(torch.uint8).numpy().tobytes())
    elif hasattr(value, "tobytes"):  # an array
        state.update(f"array {value.dtype} {value.shape};".encode())
        state.update(value.tobytes())
    else:
        state.update(f"{type(value).__name__} {value!r};".encode())
