"""Models on the Hugging Face hub: save_pretrained, push_to_hub and from_pretrained, and a model card.

    model = HubMAE.from_pretrained("Max13241/MAE_Anime")            # any layout that util.training.hub reads
    model = HubViT.from_pretrained("OWNER/REPO", revision="v1.0")   # an encoder, or a recogniser with its classes
    trained = load_adapters("OWNER/REPO")                           # LoRA adapters in PEFT's format, and their head

A folder that `save_pretrained` has written holds model.safetensors (official MAE names), config.json and README.md, and
is named by the usual grammar too: `--init hf:OWNER/REPO`.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from huggingface_hub import ModelCard, PyTorchModelHubMixin

from models_mae import MAE_MODELS, MaskedAutoencoder
from models_mae_weights import decoder_options, has_decoder, load_mae_weights, model_name
from models_transfer import Transferred, attach_head, start_backbone
from models_vit import VIT_MODELS, VisionTransformer
from util.run.errors import UserError
from util.run.files import write_atomically, write_text
from util.run.untrusted import read_json
from util.training.hub import Weights, hub_folder, load_weights
from util.training.lineage import OWN, Licence, public_name
from util.training.model_card import Card
from util.training.pretrained import count_blocks, grid_of_weights, load_exactly, load_pretrained
from util.training.stored_flags import checked_flags
from util.transfer.heads import build_head
from util.transfer.lora import add_lora, load_lora, load_peft, merge_lora, save_peft

WEIGHTS, CONFIG, HEAD = "model.safetensors", "config.json", "head.safetensors"
_UNKNOWN = Card("Anime face weights", "Weights of AniMask.", "", Licence(OWN, "Not stated."))


class OnHub(PyTorchModelHubMixin):
    """What the models here share. `card`: what README.md says; set it before saving."""

    card: Card = _UNKNOWN

    @classmethod
    def from_pretrained(cls, name: str, *, revision: str | None = None, device: torch.device | str = "cpu"):
        """A trained model in eval mode.

        name: OWNER/REPO of the hub, a folder, or any weights that util.training.hub names. revision: a branch, tag or
        commit of the hub. Where the cache lies and whether the hub is asked is up to HF_HOME and HF_HUB_OFFLINE.
        UserError where the weights cannot be had, or are of another kind of model.
        """
        return cls.of_weights(load_weights(hub_spec(name, revision))).to(device).eval()

    @classmethod
    def of_weights(cls, weights: Weights):
        """The model that weights belong to; UserError for those of another kind."""
        raise NotImplementedError

    @classmethod
    def _own_options(cls, weights: Weights) -> dict | None:
        """The arguments that the model was built with, where `save_pretrained` has written them down."""
        if "img_size" not in weights.args:
            return None
        options = {key: weights.args[key] for key in cls._hub_mixin_init_parameters if key in weights.args}
        own = {}
        for key, stack in (("depth", "blocks"), ("decoder_depth", "decoder_blocks")):
            own[key] = count_blocks(weights.state, stack)
        if (kernel := weights.state.get("patch_embed.proj.weight")) is not None:
            own["embed_dim"] = len(kernel)
        if (token := weights.state.get("mask_token")) is not None:
            own["decoder_embed_dim"] = token.shape[-1]
        for key, value in own.items():  # before memory is asked for by them
            if options.get(key, value) != value:
                raise UserError(f"{weights.source} says {key} {options[key]}, its weights say {value}: restore it")
        return options

    def _save_pretrained(self, save_directory: Path) -> None:
        super()._save_pretrained(save_directory)
        config = {**self._hub_mixin_config, "library_name": "animask"} | self._config_notes()
        write_text(save_directory / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")

    def _config_notes(self) -> dict:
        """What config.json says beside the arguments."""
        return {}

    def generate_model_card(self, *args, **kwargs) -> ModelCard:
        """The model card that `card` describes."""
        return ModelCard(self.card.text())


class HubMAE(MaskedAutoencoder, OnHub):
    """A masked autoencoder, encoder and decoder."""

    @classmethod
    def of_weights(cls, weights: Weights) -> "HubMAE":
        if not has_decoder(weights.state):
            raise UserError(f"{weights.source} holds an encoder only: load it with HubViT")
        options = cls._own_options(weights)
        if options is None:
            shape = MAE_MODELS[model_name(weights)].keywords
            options = {**shape, "img_size": _size_of(weights, shape["patch_size"]), **decoder_options(weights.state)}
            options["norm_pix_loss"] = bool(weights.args.get("norm_pix_loss", False))
        model = cls(**options)
        load_mae_weights(model, weights)
        return model

    def _config_notes(self) -> dict:
        return {"model": _named(MAE_MODELS, self._hub_mixin_config)}


class HubViT(VisionTransformer, OnHub):
    """An encoder as a backbone, and with `classes` a recogniser: its head scores them in their order.

    The rest as of VisionTransformer and util.transfer.heads.build_head.
    """

    def __init__(
        self,
        img_size: int | list[int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        global_pool: bool = True,
        classes: Sequence[str] = (),
        head: str = "linear",
        head_norm: bool = False,
        scale: float | None = None,
        margin: float | None = None,
    ):
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, global_pool)
        self.classes = tuple(classes)
        if classes:
            self.head = build_head(head, embed_dim, len(classes), batch_norm=head_norm, scale=scale, margin=margin)

    @classmethod
    def of(cls, trained: Transferred) -> "HubViT":
        """What a transfer run has trained, adapters merged. UserError for another kind of network."""
        net, args = trained.model, trained.args
        if not isinstance(net, VisionTransformer):
            raise UserError(
                f"{args['model']} is no vision transformer of this project: give one of {', '.join(VIT_MODELS)}"
            )
        if trained.lora:
            merge_lora(net)
        options = {key: args[key] for key in ("head", "scale", "margin") if args.get(key) is not None}
        options |= VIT_MODELS[args["model"]].keywords | {"head_norm": bool(args.get("head_norm"))}
        model = cls(args["input_size"], global_pool=net.global_pool, classes=list(trained.classes), **options)
        model.load_state_dict(net.state_dict())
        return model.eval()

    @classmethod
    def of_weights(cls, weights: Weights) -> "HubViT":
        options = cls._own_options(weights)
        if options is not None:
            model = cls(**options)
            load_exactly(model, weights)
            return model
        shape = VIT_MODELS[model_name(weights).removeprefix("mae_").partition("_dec")[0]].keywords
        model = cls(_size_of(weights, shape["patch_size"]), **shape)
        load_pretrained(model, weights, optional=("norm.", "fc_norm."))
        return model

    def _config_notes(self) -> dict:
        return {"model": _named(VIT_MODELS, self._hub_mixin_config)}


def save_adapters(folder: str | Path, trained: Transferred, card: Card) -> None:
    """Write LoRA adapters as a folder that PEFT reads, with the head, config.json and README.md beside them."""
    from safetensors.torch import save_file

    if trained.lora is None:
        raise UserError("this run has no LoRA adapters: push it as a recogniser")
    folder = Path(folder)
    args = {**trained.args, "init": public_name(trained.args["init"])}
    save_peft(folder, trained.model, trained.lora, args["init"])
    head = {name: value.detach().cpu().contiguous() for name, value in trained.model.head.state_dict().items()}
    write_atomically(folder / HEAD, lambda path: save_file(head, path, metadata={"format": "pt"}))
    kept = (
        "model",
        "init",
        "input_size",
        "global_pool",
        "seed",
        "head",
        "head_norm",
        "scale",
        "margin",
        "face_padding",
    )
    config = {
        "library_name": "animask", "classes": list(trained.classes), "lora": asdict(trained.lora),
        "args": {key: args.get(key) for key in kept}, "base": trained.model.origin,
    }  # fmt: skip
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
    write_text(folder / "README.md", card.text())


def load_adapters(
    name: str, *, revision: str | None = None, init: str | None = None, device: torch.device | str = "cpu"
) -> Transferred:
    """A recogniser from adapters that `save_adapters` has written, on the hub or in a folder.

    init: the start weights, where they lie elsewhere than the run named them. UserError where these are others than
    the run began with, or files are missing or damaged.
    """
    folder = Path(name) if Path(name).is_dir() else hub_folder(hub_spec(name, revision), _ADAPTER_FILES)
    try:
        config = read_json(folder / CONFIG)
        args, classes = checked_flags(config["args"], name), tuple(config["classes"])
        base, _ = config["base"], (args["model"], args["init"], args["seed"], args["input_size"], args["head"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{name} holds no adapters of this project ({error}): push them with scripts/push_to_hub.py"
        ) from error
    args = args | ({"init": init} if init else {})
    model = start_backbone(args)
    if model.origin != base:
        raise UserError(f"{name} was trained on other start weights than {args['init'] or 'random ones'}: give its own")
    lora, state = load_peft(folder)
    lora = replace(lora, dropout=0.0)
    add_lora(model, lora)
    load_lora(model, state, name)
    attach_head(model, args, len(classes))
    load_exactly(model.head, replace(load_weights(str(folder / HEAD), official_names=False), source=f"{name}/{HEAD}"))
    return Transferred(model.to(device).eval(), classes, args, lora)


_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", HEAD, CONFIG)


def push_folder(folder: str | Path, repo: str, *, revision: str | None = None, private: bool = False) -> str:
    """Upload a folder to a repository of the hub, made where there is none; returns the commit's address.

    UserError where the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo, branch=revision, exist_ok=True)
        return str(api.upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message="Weights"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{repo} cannot be pushed ({reason}): log in with `hf auth login`, and check its name"
        ) from error


def hub_spec(name: str, revision: str | None = None) -> str:
    """A name as `from_pretrained` takes it in the grammar of weights; UserError for a revision of no hub name."""
    if Path(name).exists() or ":" in name:
        if revision:
            raise UserError(f"{name} has no revisions: leave out revision, or give OWNER/REPO")
        return name
    return f"hf:{name}" + (f"@{revision}" if revision else "")


def _size_of(weights: Weights, patch_size: int) -> list[int]:
    return [cells * patch_size for cells in grid_of_weights(weights, patch_size)]


def _named(models: dict, config: dict) -> str | None:
    """The name of the model that arguments describe, None for a shape without one."""
    for name, build in models.items():
        if all(config.get(key) == value for key, value in build.keywords.items()):
            return name
    return None
