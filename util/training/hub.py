"""Weights from anywhere, named by one grammar (`--init`, `--ckpt`, `--resume`):

    runs/a/checkpoint-last.pth        a file: .pth, .bin (both with {"model": ...} or bare), .safetensors
    exports/a                         a folder: Hugging Face layout, or one that holds a checkpoint
    hf:OWNER/REPO[/FILE][@REVISION]   the Hugging Face hub
    timm:vit_base_patch16_224.mae     timm's model zoo
    official:mae_pretrain_vit_base    the official release (weights are CC BY-NC 4.0)

Whatever the source, the state dict comes back under the official MAE names. Weights that cannot be had are
a UserError that says what to download and where to put it; they are never replaced by others.
"""

import argparse
import functools
import hashlib
import http.client
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import torch
from tqdm import tqdm

from util.run.errors import UserError
from util.run.files import write_atomically, write_text
from util.run.untrusted import parse_json, read_json
from util.training.checkpoint import read_checkpoint
from util.training.convert import State, args_from_hf, to_official
from util.training.stored_flags import checked_flags

# a mirror of the released files, such as https://HOST/mae, may stand in
RELEASE_URL = os.environ.get("ANIMASK_RELEASE_URL", "https://dl.fbaipublicfiles.com/mae").rstrip("/")
# the released files and the first digits of their MD5 as the official README prints them (None: not printed)
RELEASES = {
    "mae_pretrain_vit_base": "8cad7c",
    "mae_pretrain_vit_large": "b8b06e",
    "mae_pretrain_vit_huge": "9bdbb0",
    "mae_pretrain_vit_base_full": None,
    "mae_pretrain_vit_large_full": None,
    "mae_pretrain_vit_huge_full": None,
    "mae_visualize_vit_base": None,
    "mae_visualize_vit_large": None,
    "mae_visualize_vit_large_ganloss": None,
    "mae_visualize_vit_huge": None,
}
USUAL_FILES = ("checkpoint-last.pth", "model.safetensors", "pytorch_model.bin")
TIMEOUT_S = 15


@dataclass(frozen=True)
class Weights:
    """A state dict and what is known of it.

    state: name -> tensor on the CPU, official MAE names. args: the flags it was trained with as far as they
    are known ("model", "input_size" in px, "norm_pix_loss", ...), possibly empty. source: for people.
    kind: "path", "hf", "timm" or "official".
    """

    state: State
    args: dict
    source: str
    kind: str


def load_weights(spec: str, *, official_names: bool = True) -> Weights:
    """The weights that `spec` names (grammar above); UserError if they are missing, damaged or of another kind.

    official_names: bring them to the official MAE names; False leaves them as they are, for other networks.
    """
    scheme, colon, rest = str(spec).partition(":")
    loader = {"hf": _from_hub, "timm": _from_timm, "official": _from_release}.get(scheme) if colon else None
    weights = loader(rest) if loader else _from_path(Path(spec))
    if not official_names:
        return weights
    try:
        return replace(weights, state=to_official(weights.state))
    except (ValueError, KeyError, RuntimeError) as error:
        if weights.kind == "timm":
            raise UserError(f"{weights.source} is no plain vision transformer: {error}") from error
        trained = any("lora_" in name or name.startswith("head.") for name in weights.state)
        remedy = "; a LoRA or probe checkpoint has to go through scripts/export.py first" if trained else ""
        raise UserError(f"{weights.source} holds no encoder of a masked autoencoder: {error}{remedy}") from error


def _from_path(path: Path) -> Weights:
    if path.is_dir():
        names = [item.name for item in path.iterdir() if item.is_file()]
        return _from_file(path / _choose_file(names, f"folder {path}"), kind="path")
    if not path.exists():
        raise UserError(
            f"weights {path} do not exist: give a file, a folder, hf:OWNER/REPO, timm:NAME or official:NAME"
        )
    return _from_file(path, kind="path")


def _from_file(path: Path, kind: str, source: str | None = None) -> Weights:
    source = source or str(path)
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    state = _without_wrappers(_tensors_of(content, source))
    return Weights(state, _args_of(content, path), source, kind)


def _read_safetensors(path: Path) -> dict:
    """The tensors of a file; where its metadata has our flags, {"model": tensors, "args": flags}."""
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import load_file

    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            args = parse_json((file.metadata() or {}).get("args", "null"))
        return {"model": state, "args": args} if isinstance(args, dict) else state
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file ({_reason(error)})") from error


def _tensors_of(content, source: str) -> State:
    """The state dict in a checkpoint: under "model" or "state_dict", or the whole of it."""
    state = content
    if isinstance(content, dict):
        state = content.get("model", content.get("state_dict", content))
    if not isinstance(state, dict) or not state or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise UserError(f"{source} is no checkpoint: it holds neither a state dict nor one under 'model'")
    for name, value in state.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise UserError(f"{source} holds a tensor that is no plain one ({name}): save the weights anew")
    return state


_TYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
}  # fmt: skip


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is numbers in memory: one of a billion elements that are all the same one is a few bytes."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.dtype not in _TYPES:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _without_wrappers(state: State) -> State:
    """Strip what DistributedDataParallel and torch.compile put in front of every name."""
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}


def _args_of(content: dict, path: Path) -> dict:
    """The flags stored in a checkpoint, else what its file name or a config.json beside it tells."""
    args = content.get("args", {})
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    if isinstance(args, dict) and args:
        return checked_flags(args, str(path))
    if path.stem in RELEASES:
        size = path.stem.split("_")[3]
        patch = 14 if size == "huge" else 16
        # the pretrain files predict normalised patches, the visualize files pixels (official repository, issue 12)
        return {"model": f"mae_vit_{size}_patch{patch}", "norm_pix_loss": path.stem.startswith("mae_pretrain")}
    config = path.with_name("config.json")
    if config.is_file():
        try:
            known = read_json(config)
            if "img_size" in known:  # of models_hub: the arguments that the model is built with
                return checked_flags(known | {"input_size": known["img_size"]}, str(config))
            return checked_flags(args_from_hf(known), str(config))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{config} is damaged ({_reason(error)}): restore it or remove it") from error
    return {}


def _choose_file(names: Iterable[str], where: str) -> str:
    """The checkpoint among file names: a usual name, the latest checkpoint-N.pth, or the only .pth there is."""
    names = sorted(names, key=lambda name: (name.count("/"), name))  # the top folder first
    for usual in USUAL_FILES:
        for name in names:
            if PurePosixPath(name).name == usual:
                return name
    numbered = {int(found[1]): name for name in names if (found := re.search(r"checkpoint-(\d+)\.pth$", name))}
    if numbered:
        return numbered[max(numbered)]
    candidates = [name for name in names if name.endswith((".pth", ".pt", ".safetensors"))]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        raise UserError(f"{where} holds several checkpoints: name one of {', '.join(candidates)}")
    raise UserError(f"{where} holds no checkpoint: looked for {', '.join(USUAL_FILES)} and *.pth")


def hub_folder(spec: str, files: Iterable[str]) -> Path:
    """The local folder of some files of hf:OWNER/REPO[@REVISION], downloaded if they are not in the cache.

    UserError where one of them cannot be had.
    """
    repo, file, revision = _parse(spec.removeprefix("hf:"))
    if file:
        raise UserError(f"{spec} names a file: give the repository, hf:OWNER/REPO[@REVISION]")
    places = [_hub_file(repo, name, revision) for name in files]
    return places[0].parent


def _parse(name: str) -> tuple[str, str | None, str | None]:
    """(repository, file, revision) of OWNER/REPO[/FILE][@REVISION]."""
    parsed = re.fullmatch(r"(?P<repo>[^/@]+/[^/@]+)(/(?P<file>[^@]+))?(@(?P<revision>.+))?", name)
    if parsed is None:
        raise UserError(f"hf:{name} is not of the form hf:OWNER/REPO[/FILE][@REVISION]")
    return parsed["repo"], parsed["file"], parsed["revision"]


def _from_hub(name: str) -> Weights:
    repo, file, revision = _parse(name)
    file = file or _choose_file(_hub_files(repo, revision), f"hf:{repo}")
    path = _hub_file(repo, file, revision)
    if path.suffix in (".safetensors", ".bin"):
        with suppress(UserError):  # not every repository has one; it lands beside the weights
            _hub_file(repo, str(PurePosixPath(file).with_name("config.json")), revision)
    return _from_file(path, kind="hf", source=f"hf:{repo}/{file}" + (f"@{revision}" if revision else ""))


def _hub_files(repo: str, revision: str | None) -> list[str]:
    """The file names of a hub repository; without a connection, those that are in the local cache."""
    from huggingface_hub import HfApi, constants, snapshot_download

    if _offline():
        with suppress(OSError):  # LocalEntryNotFoundError is one
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        raise _not_to_be_had(repo, "its checkpoint", f"{constants.ENDPOINT}/{repo}", _NO_CONNECTION)
    try:
        return HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # the HTTP library beneath it has changed with its versions, and so have the classes
        raise _not_to_be_had(repo, "its checkpoint", f"{constants.ENDPOINT}/{repo}", _reason(error)) from error


def _hub_file(repo: str, file: str, revision: str | None) -> Path:
    """The local path of a hub file, downloaded if it is not in the cache of huggingface_hub."""
    from huggingface_hub import constants, hf_hub_download

    offline = _offline()
    try:
        return Path(hf_hub_download(repo, file, revision=revision, local_files_only=offline))
    except Exception as error:  # as above
        url = f"{constants.ENDPOINT}/{repo}/resolve/{revision or 'main'}/{file}"
        raise _not_to_be_had(repo, file, url, _NO_CONNECTION if offline else _reason(error)) from error


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)


_NO_CONNECTION = "no connection, and it is not in the cache"


def _not_to_be_had(repo: str, what: str, url: str, reason: str) -> UserError:
    return UserError(
        f"hf:{repo}: {what} cannot be downloaded ({reason}): download {url} and give the file's path instead"
    )


def _from_timm(name: str) -> Weights:
    import timm

    try:
        repo = timm.get_pretrained_cfg(name, allow_unregistered=False).hf_hub_id
        if not repo:
            raise UserError(f"timm:{name} has no weights on the Hugging Face hub: see timm.list_pretrained()")
        # the file comes through `_hub_file`, so that a missing connection is one line here too
        file = {"file": str(_hub_file(repo, "model.safetensors", None)), "custom_load": False}
        model = timm.create_model(name, pretrained=True, num_classes=0, pretrained_cfg_overlay=file)
    except RuntimeError as error:
        raise UserError(f"timm:{name} cannot be loaded ({_reason(error)}): see timm.list_pretrained()") from error
    return Weights(model.state_dict(), {}, f"timm:{name}", "timm")


def _from_release(name: str) -> Weights:
    if name not in RELEASES:
        raise UserError(f"official:{name} was not released: choose from {', '.join(RELEASES)}")
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pth"
    if not path.is_file():
        url = f"{RELEASE_URL}/{name.split('_')[1]}/{name}.pth"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda part: _download(url, part, RELEASES[name]))
        except (OSError, http.client.HTTPException) as error:
            raise UserError(
                f"official:{name} cannot be downloaded ({_reason(error)}): download {url} and put it at {path}"
            ) from error
    return _from_file(path, kind="official", source=f"official:{name} ({_check(path, RELEASES[name])})")


def _download(url: str, target: Path, md5_prefix: str | None) -> None:
    with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response, open(target, "wb") as file:
        total = int(response.headers.get("Content-Length") or 0)
        with tqdm(total=total, unit="B", unit_scale=True, desc=url, disable=None) as bar:
            while chunk := response.read(1 << 20):
                file.write(chunk)
                bar.update(len(chunk))
        if file.tell() < total:  # a closed connection looks like the end of the file
            raise OSError(f"the transfer stopped after {file.tell()} of {total} bytes")
    if md5_prefix and not _digest(target, "md5").startswith(md5_prefix):
        raise OSError(f"its MD5 does not begin with {md5_prefix}")


def _check(path: Path, md5_prefix: str | None) -> str:
    """Compare a released file with the published MD5, else with the SHA-256 pinned when it was first seen.

    Returns what was checked, in words. UserError if the file is another one.
    """
    if md5_prefix:
        if not _digest(path, "md5").startswith(md5_prefix):
            raise UserError(f"{path} is not the released file: its MD5 does not begin with {md5_prefix}; remove it")
        return f"MD5 {md5_prefix}... as published"
    digest, pin = _digest(path, "sha256"), path.with_name(path.name + ".sha256")
    if not pin.is_file():
        write_text(pin, digest + "\n")
        return f"no checksum is published; SHA-256 {digest[:8]}... pinned on first sight"
    if pin.read_text(encoding="utf-8").strip() != digest:
        raise UserError(f"{path} has changed since its SHA-256 was pinned in {pin.name}: remove both")
    return f"SHA-256 {digest[:8]}... as pinned"


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


@functools.cache
def _reachable(url: str) -> bool:
    """Whether a host answers. huggingface_hub retries for most of a minute before it says that it does not."""
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return True  # an answer all the same
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # Python's own certificates may be missing where hub's are not
    except (OSError, http.client.HTTPException):
        return False
    return True


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
