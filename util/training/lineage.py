"""Where weights come from, and what their licence therefore is."""

from dataclasses import dataclass
from pathlib import Path

from util.run.errors import UserError
from util.training.checkpoint import read_checkpoint
from util.training.hub import RELEASES

OWN = "apache-2.0"  # of this project, hence of weights that it trained from random ones
NONCOMMERCIAL = "cc-by-nc-4.0"
_DEEPEST = 20  # weights that are initialised from weights that are ...


@dataclass(frozen=True)
class Licence:
    """name: as the Hugging Face hub spells it. reason: a sentence for the model card."""

    name: str
    reason: str


def lineage(args: dict) -> list[str]:
    """The start weights of a run, then those of these weights, and so on, as far as checkpoints on disk tell.

    args: the flags of a run. Folders of local paths are left out. Empty for weights that were random.
    """
    found, init = [], args.get("init")
    while init and len(found) < _DEEPEST:
        found.append(public_name(init))
        path = Path(init)
        init = _args_of(path).get("init") if path.is_file() and path.suffix == ".pth" else None
    return found


def public_name(spec: str | None) -> str | None:
    """What others may know of where weights lie: of a path its last part, any other name as it is."""
    return spec if spec is None or spec.partition(":")[0] in ("hf", "timm", "official") else Path(spec).name


def _args_of(path: Path) -> dict:
    try:
        args = read_checkpoint(path).get("args", {})
    except (UserError, AttributeError):  # a bare state dict, or a file of another kind: it tells nothing
        return {}
    return args if isinstance(args, dict) else vars(args)


def licence_of(sources: list[str]) -> Licence | None:
    """The licence that the origin of weights dictates, None where it is not known here.

    sources: from `lineage`. Whatever descends from the official MAE weights is CC BY-NC 4.0, as those are.
    """
    for source in sources:
        if _is_official(source):
            reason = (
                f"These weights descend from `{source}`: the official MAE weights are CC BY-NC 4.0, "
                "so these may not be used commercially either."
            )
            return Licence(NONCOMMERCIAL, reason)
    if not sources:
        return Licence(OWN, "These weights were trained from random ones with this project's code.")
    return None


def _is_official(source: str) -> bool:
    """Whether a name stands for the weights of the official MAE release, wherever they are served."""
    if source.startswith("timm:"):
        return source.endswith(".mae")
    if source.startswith("hf:"):
        return source.removeprefix("hf:").startswith("facebook/vit-mae")
    return source.startswith("official:") or Path(source).stem in RELEASES
