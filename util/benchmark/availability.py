"""Which start weights can be had: asked once, before anything is trained."""

import subprocess
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from util.run.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 1800  # large weights on a slow line
# in a process of its own: the weights are in no memory afterwards, and a library that crashes takes nothing along
_LOAD = """
import sys
from util.run.errors import cli
from util.training.hub import load_weights

cli(load_weights)(sys.argv[1], official_names=False)
"""


def named_weights(texts: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """{key: what --init is given} of KEY=PATH texts; UserError for an unknown key and for a file that is not there."""
    found = {}
    for text in texts:
        key, equals, spec = text.partition("=")
        if not equals or not spec or key not in known:
            raise UserError(f"--weights {text} is not of the form KEY=PATH with a KEY of {', '.join(known)}")
        if ":" not in spec and not Path(spec).exists():
            raise UserError(f"--weights {text}: there is no {spec}: give a file, hf:OWNER/REPO or timm:NAME")
        found[key] = spec
    return found


def why_not(spec: str) -> str | None:
    """None where the weights are there now (downloaded, if need be), else the one line that says why they are not."""
    command = [sys.executable, "-c", _LOAD, spec]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        return f"{spec} did not come within {PATIENCE_S // 60} minutes: download it, and name it with --weights"
    if done.returncode == 0:
        return None
    lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no word about it"]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[-1])


def unavailable(specs: Mapping[str, str]) -> dict[str, str]:
    """{key: why} of the weights that cannot be had. specs: key -> what --init is given."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        reasons = dict(zip(specs, pool.map(why_not, specs.values()), strict=True))
    return {key: reason for key, reason in reasons.items() if reason}
