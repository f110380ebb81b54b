"""The small weights that ship with the demo, and what is written in them beside the numbers.

    visualize/demo/weights/recogniser.safetensors    mae.safetensors    detector.safetensors

Each is half precision, at most 10 MB together, made by scripts/make_demo_weights.py. The metadata of the recogniser
has the threshold below which a face is nobody's, and the calibration that turns a similarity into a probability.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from util.run.errors import UserError
from util.run.files import write_atomically

FOLDER = Path(__file__).parent / "weights"
KEY = "demo"  # of the facts in a file's metadata
PADDING = 0.4  # of pictures that ToonFaces draws: half their side is the face, so is a fifth on each side of a crop


@dataclass(frozen=True)
class Calibration:
    """Platt scaling: the probability that two faces are one character is 1 / (1 + exp(-slope * s - intercept)).

    s: their cosine. same and different were equally likely where it was fitted. about: on what, and how well it does.
    """

    slope: float
    intercept: float
    about: dict = field(default_factory=dict)

    def probability(self, similarity: float) -> float:
        """In 0..1."""
        return 1 / (1 + math.exp(-max(-700.0, min(700.0, self.slope * similarity + self.intercept))))


@dataclass(frozen=True)
class Facts:
    """What a recogniser's file says of how to use it.

    face_padding: how far a crop reaches beyond the face box, in sides of the box; None where nothing is said.
    threshold: cosine below which a face is of nobody in the gallery. made: from what, when, how, and the licence.
    """

    face_padding: float | None = None
    threshold: float | None = None
    calibration: Calibration | None = None
    made: dict = field(default_factory=dict)


def shipped(name: str) -> str:
    """The path of weights that ship with the demo: "recogniser", "mae" or "detector". UserError where they are not."""
    path = FOLDER / f"{name}.safetensors"
    if not path.is_file():
        flag = {"recogniser": "--ckpt", "mae": "--mae", "detector": "--finder"}[name]
        raise UserError(f"the demo's own {path.name} is not there: run scripts/make_demo_weights.py, or give {flag}")
    return str(path)


def read_facts(ckpt: str) -> Facts:
    """The facts in the metadata of a safetensors file; those of any other weights are not known."""
    from safetensors import SafetensorError, safe_open

    if not ckpt.endswith(".safetensors") or not Path(ckpt).is_file():
        return Facts()
    try:
        with safe_open(ckpt, framework="pt") as file:
            stored = json.loads((file.metadata() or {}).get(KEY, "{}"))
        if calibration := stored.get("calibration"):
            stored["calibration"] = Calibration(**calibration)
        return Facts(**stored)
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{ckpt}: its metadata cannot be read ({error}): make the file again") from error


def write_weights(path: Path, state: dict[str, torch.Tensor], args: dict, facts: Facts) -> None:
    """Write a state dict in half precision. args: the flags of the run, as `util.training.hub` reads them back.

    UserError for numbers that half precision cannot hold.
    """
    from safetensors.torch import save_file

    half = {name: v.half() if v.is_floating_point() else v for name, v in state.items()}
    half = {name: value.contiguous().clone() for name, value in half.items()}
    if broken := [name for name, value in half.items() if not value.isfinite().all()]:
        raise UserError(f"{path.name}: {broken[0]} does not fit into half precision: train on, or ship other weights")
    metadata = {"format": "pt", "args": json.dumps(args), KEY: json.dumps(asdict(facts))}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda part: save_file(half, part, metadata=metadata))
