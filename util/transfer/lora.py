"""Low-rank adaptation (LoRA, arXiv 2106.09685) of a vision transformer's blocks, and PEFT's adapter format.

    config = LoRAConfig(rank=8, targets=("q", "v"))
    add_lora(model, config)                 # freezes the model, adds the adapters
    save_peft(folder, model, config)        # what `peft.PeftModel.from_pretrained(plain_model, folder)` reads
    config, state = load_peft(folder)       # the way back: add_lora(model, config), load_lora(model, state, folder)
    merge_lora(model)                       # a plain model again, with the adapters in its weights

A layer y = W x + b becomes y = W x + b + s B A x with A (rank, in), B (out, rank), s = alpha / rank. The base
keeps its state-dict names; `blocks.0.attn.qkv.weight` merely gains `.lora_A` and `.lora_B` as neighbours.
"""

import json
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from util.run.errors import UserError
from util.run.files import write_atomically, write_text
from util.run.untrusted import read_json
from util.training.optim import blocks_prefix

State = dict[str, torch.Tensor]

# the layers of a block, each with the targets that lie in it one below the other
_LAYERS = {"attn.qkv": ("q", "k", "v"), "attn.proj": ("proj",), "mlp.fc1": ("fc1",), "mlp.fc2": ("fc2",)}
TARGETS = tuple(target for slots in _LAYERS.values() for target in slots)


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers are adapted, and how.

    rank: of B A, from 1. alpha: above 0; updates are scaled by alpha / rank; None stands for 2 * rank.
    targets: some of TARGETS. dropout: share of a layer's inputs hidden from its adapter in training, 0..<1.
    """

    rank: int = 8
    alpha: float | None = None
    targets: tuple[str, ...] = TARGETS
    dropout: float = 0.0

    @property
    def scaling(self) -> float:
        """The factor s = alpha / rank."""
        return 2.0 if self.alpha is None else self.alpha / self.rank

    def validate(self) -> None:
        """UserError for a value out of range."""
        if self.rank < 1:
            raise UserError(f"a LoRA rank of {self.rank} adapts nothing: choose 1 or more")
        if self.alpha is not None and not 0 < self.alpha <= sys.float_info.max:
            raise UserError(f"a LoRA alpha of {self.alpha} is out of range: choose a number above 0")
        if not self.targets:
            raise UserError(f"no LoRA target is given: choose some of {', '.join(TARGETS)}")
        for target in self.targets:
            if target not in TARGETS:
                raise UserError(f"unknown LoRA target {target!r}: choose some of {', '.join(TARGETS)}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"a LoRA dropout of {self.dropout} is out of range: choose a fraction in 0..<1")

    def parts(self) -> dict[str, tuple[int, ...]]:
        """Layer within a block -> the adapted ones of its slots: {"attn.qkv": (0, 2)} for targets q and v."""
        found = {
            layer: tuple(i for i, target in enumerate(slots) if target in self.targets)
            for layer, slots in _LAYERS.items()
        }
        return {layer: parts for layer, parts in found.items() if parts}


class LoRALinear(nn.Linear):
    """A linear layer that has taken over another's weight and bias, with adapters for parts of its output.

    The output consists of `slots` equal stretches, three in a fused qkv. Those listed in `parts` have an A and a B
    each: lora_A (parts, rank, in), lora_B (parts, out/slots, rank). B starts at zero: at first nothing changes.
    """

    def __init__(
        self, base: nn.Linear, rank: int, scaling: float, slots: int = 1, parts: tuple[int, ...] = (0,), dropout=0.0
    ):
        # on "meta", since the weights are thrown away at once
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.rank, self.scaling, self.slots, self.parts, self.dropout = rank, scaling, slots, parts, dropout
        like = {"device": base.weight.device, "dtype": base.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(len(parts), rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(len(parts), self.out_features // slots, rank, **like))
        for matrix in self.lora_A:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.train(base.training)

    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All parts as one A (parts * rank, in) and one B (out, parts * rank) with the parts' own on its diagonal."""
        return self.lora_A.flatten(0, 1), _spread(self.lora_B, self.slots, self.parts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        a, b = self.factors()
        hidden = F.linear(F.dropout(x, self.dropout, self.training), a)
        return super().forward(x) + self.scaling * F.linear(hidden, b)

    def merged(self) -> nn.Linear:
        """A plain layer of weight W + s B A, computed in float64."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        # on the CPU, because MPS has no float64
        a, b, weight = (tensor.detach().cpu().double() for tensor in (*self.factors(), self.weight))
        weight = (weight + self.scaling * (b @ a)).to(self.weight)
        plain.weight = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        plain.bias = self.bias
        return plain.train(self.training)


def add_lora(model: nn.Module, config: LoRAConfig) -> None:
    """Freeze every parameter of the model and put adapters into the layers of its `blocks`, in place.

    The adapters alone are trainable; a head that is to be trained is attached, or thawed, afterwards.
    UserError for a wrong config, a model without such blocks, one with adapters, and too large a rank.
    """
    config.validate()
    layers = _plain_layers(model, config)
    largest = min(min(base.in_features, base.out_features // len(_LAYERS[layer])) for _, layer, base in layers)
    if config.rank > largest:
        raise UserError(f"a LoRA rank of {config.rank} is larger than the layers allow: choose at most {largest}")
    model.requires_grad_(False)
    parts = config.parts()
    for name, layer, base in layers:
        adapted = LoRALinear(base, config.rank, config.scaling, len(_LAYERS[layer]), parts[layer], config.dropout)
        model.set_submodule(name, adapted)


def is_adapter(name: str) -> bool:
    """Whether a state-dict name is an adapter's."""
    return name.endswith((".lora_A", ".lora_B"))


def lora_state(model: nn.Module) -> State:
    """The adapters alone, under their state-dict names; the tensors share memory with the model's."""
    return {name: value for name, value in model.state_dict().items() if is_adapter(name)}


@torch.no_grad()
def load_lora(model: nn.Module, state: State, source: str) -> None:
    """Put the tensors of a `lora_state`, or of `load_peft`, into a model with adapters of the same config.

    UserError, which names the source, if they are for another model or of another config; nothing is changed then.
    """
    own, prefix = lora_state(model), blocks_prefix(model)
    state = {f"{prefix}{name}" if name.startswith("blocks.") else name: value for name, value in state.items()}
    if misfit := _misfit(own, state):
        raise UserError(f"the adapters of {source} do not fit: {misfit}")
    for name, value in own.items():
        value.copy_(state[name])


def merge_lora(model: nn.Module) -> None:
    """Make every adapted layer a plain one of weight W + s B A, in place. What was frozen stays frozen."""
    for name, layer in list(_adapted(model)):
        model.set_submodule(name, layer.merged())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters; all of them includes the adapters."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(n for n, trainable in counts if trainable), sum(n for n, _ in counts)


def _spread(b: torch.Tensor, slots: int, parts: tuple[int, ...]) -> torch.Tensor:
    """(parts, out/slots, rank) -> (out, parts * rank): each part's matrix in its slot's rows, zeros elsewhere."""
    if slots == 1:
        return b[0]
    count, rows, rank = b.shape
    spread = b.new_zeros(slots, rows, count, rank)
    for i, part in enumerate(parts):
        spread[part, :, i] = b[i]
    return spread.flatten(2).flatten(0, 1)


def _plain_layers(model: nn.Module, config: LoRAConfig) -> list[tuple[str, str, nn.Linear]]:
    """(name in the model, layer within the block, module) of all that the config targets, or UserError."""
    blocks, prefix = getattr(model, "blocks", None), blocks_prefix(model)
    layers = []
    for i, block in enumerate(blocks if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else ()):
        for layer in config.parts():
            try:
                module = block.get_submodule(layer)
            except AttributeError:
                module = None
            if isinstance(module, LoRALinear):
                raise UserError("the model has LoRA adapters already: merge them first, or start from a plain model")
            if not isinstance(module, nn.Linear):
                raise UserError(f"block {i} of the model has no linear {layer}: LoRA needs a plain vision transformer")
            layers.append((f"{prefix}blocks.{i}.{layer}", layer, module))
    if not layers:
        raise UserError("the model has no transformer blocks: LoRA needs a plain vision transformer")
    return layers


def _adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRALinear))


def _misfit(own: State, other: State) -> str | None:
    """What stands against loading `other` into adapters of the names and shapes of `own`, and the remedy."""
    (own_ranks, own_targets), (ranks, targets) = _layout(own), _layout(other)
    if ranks and own_ranks and ranks != own_ranks:
        return f"their rank is {_listed(ranks)}, the model's {_listed(own_ranks)}: use the rank they were trained with"
    if targets != own_targets:
        return "they adapt other layers than the model's: use the targets they were trained with"
    for name in [*own, *other]:
        if name not in other or name not in own:
            where = "is missing" if name in own else "has no place in the model"
            return f"{name} {where}: use the model they were trained for"
        if own[name].shape != other[name].shape:
            shapes = f"{tuple(other[name].shape)}, the model needs {tuple(own[name].shape)}"
            return f"{name} is {shapes}: use the model they were trained for"
    return None


def _layout(state: State) -> tuple[set[int], set[tuple[str, int]]]:
    """The ranks of adapters, and the (layer within the block, number of adapted parts) they are for."""
    a = {name: value.shape for name, value in state.items() if name.endswith(".lora_A") and value.ndim == 3}
    return {shape[1] for shape in a.values()}, {(_within_block(name), shape[0]) for name, shape in a.items()}


def _within_block(name: str) -> str:
    """A name without the number of its block and what stands before that: "blocks.3.mlp.fc1" -> "mlp.fc1"."""
    return re.sub(r"^(\w+\.)?blocks\.\d+\.", "", name)


def _listed(values) -> str:
    return ", ".join(str(value) for value in sorted(values))


_CONFIG_FILE, _WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_PEFT_KEY = re.compile(
    rf"({re.escape(_PEFT_PREFIX)})?blocks\.(?P<block>[0-9]{{1,4}})\.(?P<layer>{'|'.join(map(re.escape, _LAYERS))})"
    r"\.lora_(?P<factor>[AB])\.weight"
)
# our own note in the weights file: with all of B at zero, its shape does not tell q, v from q, k
_PARTS_NOTE = "animask_qkv_parts"
# settings that leave y = W x + b + s B A x as it is; of any other, one that is switched on may change it
_PLAIN_SETTINGS = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_core",
    "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision", "target_modules", "task_type",
    "use_rslora",
}  # fmt: skip
# the other initialisations change the base weights too
_PLAIN_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
_MERGE_IT = "merge it into the weights with peft (merge_and_unload) and use those"


def save_peft(folder: str | Path, model: nn.Module, config: LoRAConfig, base_model_name: str | None = None) -> None:
    """Write the adapters of a model as a folder that PEFT reads (`adapter_config.json`, `adapter_model.safetensors`).

    config: the one of `add_lora`. base_model_name: a name or path that tells others which weights to start from.
    PEFT has one A and one B for the fused qkv; ours become one of rank (parts * rank) with a block-diagonal B.
    """
    folder = Path(folder)
    layers = dict(_adapted(model))
    if not layers:
        raise ValueError("the model has no adapters")
    parts = {_within_block(name): layer.parts for name, layer in layers.items()}
    made_with = {(layer.rank, layer.scaling) for layer in layers.values()}
    if parts != config.parts() or made_with != {(config.rank, config.scaling)}:
        raise ValueError(f"the model was not adapted with {config}")
    tensors, prefix = {}, blocks_prefix(model)
    for name, layer in layers.items():
        for factor, value in zip("AB", layer.factors(), strict=True):
            key = f"{_PEFT_PREFIX}{name.removeprefix(prefix)}.lora_{factor}.weight"
            tensors[key] = value.detach().cpu().clone().contiguous()
    own = [target for target in _LAYERS["attn.qkv"] if target in config.targets]
    metadata = {"format": "pt", _PARTS_NOTE: ",".join(own)}
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / _WEIGHTS_FILE, lambda path: save_file(tensors, path, metadata=metadata))
    settings = _peft_settings(config, base_model_name)
    write_text(folder / _CONFIG_FILE, json.dumps(settings, indent=2, sort_keys=True) + "\n")


def load_peft(folder: str | Path) -> tuple[LoRAConfig, State]:
    """Read a PEFT adapter, ours or another's, for the blocks of a vision transformer.

    Returns the config for `add_lora` and the state for `load_lora`. Where the fused qkv shares one A, each of
    q, k, v gets a copy of it. Layers of smaller rank are filled up with zeros, which stay zeros in training;
    different scalings go into B. UserError for what is no plain LoRA of these layers, and for damaged files.
    """
    folder = Path(folder)
    settings = _read_settings(folder)
    layers, parts = _read_layers(folder)
    scalings = {key: _peft_scaling(settings, folder, *key, len(a)) for key, (a, _) in layers.items()}
    scaling = next(iter(scalings.values()))
    separated = {
        (block, layer): _separated(a, b, len(_LAYERS[layer]), parts if layer == "attn.qkv" else None)
        for (block, layer), (a, b) in layers.items()
    }
    rank = max(a.shape[1] for a, _ in separated.values())
    state = {}
    for (block, layer), (a, b) in separated.items():
        b = (b.double() * (scalings[block, layer] / scaling)).to(b)
        missing = rank - a.shape[1]
        state[f"blocks.{block}.{layer}.lora_A"] = F.pad(a, (0, 0, 0, missing)).contiguous()
        state[f"blocks.{block}.{layer}.lora_B"] = F.pad(b, (0, missing)).contiguous()
    targets = [
        target
        for layer, slots in _LAYERS.items()
        for slot, target in enumerate(slots)
        if (0, layer) in layers and (layer != "attn.qkv" or parts is None or slot in parts)
    ]
    config = LoRAConfig(rank, scaling * rank, tuple(targets), settings["lora_dropout"])
    config.validate()
    return config, state


def _peft_settings(config: LoRAConfig, base_model_name: str | None) -> dict:
    layers, alpha = config.parts(), config.alpha or 2 * config.rank
    fused = len(layers.get("attn.qkv", ()))
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": alpha,
        "lora_dropout": config.dropout,
        # the whole name of a layer: "proj" alone would adapt patch_embed.proj, a suffix the blocks of a decoder
        "target_modules": rf"blocks\.\d+\.({'|'.join(map(re.escape, layers))})",
        "rank_pattern": {"attn.qkv": fused * config.rank} if fused > 1 else {},
        "alpha_pattern": {"attn.qkv": fused * alpha} if fused > 1 else {},
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def _read_settings(folder: Path) -> dict:
    """The settings of a PEFT folder, if they are those of a plain LoRA; UserError otherwise."""
    path = folder / _CONFIG_FILE
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder of a PEFT adapter")
    try:
        settings = read_json(path)
        kind = settings["peft_type"]
        given = {name: value for name, value in settings.items() if value is not None}
        settings = {"lora_dropout": 0.0, "alpha_pattern": {}, **given}
        numbers = [settings["lora_alpha"], settings["lora_dropout"], *settings["alpha_pattern"].values()]
        if not all(isinstance(number, (int, float)) and number >= 0 for number in numbers):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged or no PEFT configuration: restore it") from error
    if kind != "LORA":
        raise UserError(f"{folder} is a PEFT adapter of the kind {kind}, not LORA: {_MERGE_IT}")
    strange = {name for name, value in settings.items() if value and name not in _PLAIN_SETTINGS}
    if settings.get("bias") not in (None, "none"):
        strange.add("bias")
    if settings.get("init_lora_weights") not in _PLAIN_INITS:
        strange.add("init_lora_weights")
    if strange:
        raise UserError(f"{folder} is no plain LoRA adapter ({_listed(strange)}): {_MERGE_IT}")
    return settings


def _is_cheap(pattern: str) -> bool:
    """Whether a pattern can be tried on a layer's name: repeated repetitions would take years."""
    return len(pattern) <= 200 and len(re.findall(r"[*+{?]", pattern)) <= 3 and not re.search(r"\)[*+{]", pattern)


def _peft_scaling(settings: dict, folder: Path, block: int, layer: str, rank: int) -> float:
    """The factor of B A in a layer; its rank is that of the file."""
    patterns = settings["alpha_pattern"]
    if not all(map(_is_cheap, patterns)):
        raise UserError(f"{folder / _CONFIG_FILE} is damaged (alpha_pattern): restore it, or name layers in it")
    try:
        own = [alpha for key, alpha in patterns.items() if re.match(rf"(.*\.)?({key})$", f"blocks.{block}.{layer}")]
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{folder / _CONFIG_FILE} is damaged (alpha_pattern): restore it") from error
    alpha = (own or [settings["lora_alpha"]])[0]
    if not 0 < alpha <= sys.float_info.max:  # JSON has integers beyond it
        raise UserError(f"{folder} scales an adapter by {alpha}: correct lora_alpha in {_CONFIG_FILE}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


_Layers = dict[tuple[int, str], tuple[torch.Tensor, torch.Tensor]]


def _read_layers(folder: Path) -> tuple[_Layers, tuple[int, ...] | None]:
    """{(block, layer): (A (rank, in), B (out, rank))} of a PEFT folder, and which of q, k, v have an A of their own.

    The second is None where they share one. UserError for damaged files and for what lies outside the blocks.
    """
    tensors, note = _read_tensors(folder / _WEIGHTS_FILE)
    found: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        key = _PEFT_KEY.fullmatch(name)
        if key is None:
            raise UserError(f"{folder} holds {name}, which is outside the transformer blocks: {_MERGE_IT}")
        found.setdefault((int(key["block"]), key["layer"]), {})[key["factor"]] = value.float()
    layers = {}
    for block, layer in sorted(found, key=lambda key: (key[0], list(_LAYERS).index(key[1]))):
        a, b = found[block, layer].get("A"), found[block, layer].get("B")
        whole = a is not None and b is not None and a.ndim == b.ndim == 2 and 0 < len(a) == b.shape[1]
        if not whole or len(b) % len(_LAYERS[layer]) or not (a.isfinite().all() and b.isfinite().all()):
            raise UserError(f"{folder / _WEIGHTS_FILE} is damaged (blocks.{block}.{layer}): restore it")
        layers[block, layer] = (a, b)
    blocks = {block for block, _ in layers}
    if set(layers) != {(block, layer) for block in range(len(blocks)) for _, layer in layers}:
        raise UserError(f"{folder} does not adapt the same layers in every block: {_MERGE_IT}")
    return layers, _own_parts(layers, note)


def _own_parts(layers: _Layers, note: str | None) -> tuple[int, ...] | None:
    """The parts that our note speaks of, if the fused qkv is still made up of them."""
    fused = [factors for (_, layer), factors in layers.items() if layer == "attn.qkv"]
    slots = _LAYERS["attn.qkv"]
    parts = tuple(i for i, target in enumerate(slots) if target in (note or "").split(","))
    for a, b in fused:
        if not parts or len(a) % len(parts):
            return None
        if not torch.equal(_spread(_separated(a, b, len(slots), parts)[1], len(slots), parts), b):
            return None
    return parts if fused else None


def _separated(
    a: torch.Tensor, b: torch.Tensor, slots: int, parts: tuple[int, ...] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, in), B (out, R) of a whole layer -> A (parts, rank, in), B (parts, out/slots, rank).

    parts: those that have rank = R / parts rows of A each; None: all slots share A, so each gets the whole of it.
    """
    b = b.unflatten(0, (slots, -1))
    if parts is None:
        return a.expand(slots, -1, -1), b
    b = b.unflatten(-1, (len(parts), -1))
    return a.unflatten(0, (len(parts), -1)), torch.stack([b[part, :, i] for i, part in enumerate(parts)])


def _read_tensors(path: Path) -> tuple[State, str | None]:
    """The tensors of a safetensors file and our note in it; UserError for one that is missing, damaged or empty."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder of a PEFT adapter saved as safetensors")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
            note = (file.metadata() or {}).get(_PARTS_NOTE)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or no safetensors file: restore it") from error
    if not tensors:
        raise UserError(f"{path} holds no adapters: name the folder of another PEFT adapter")
    return tensors, note
