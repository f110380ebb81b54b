"""A stand-in for an Apple GPU on a machine without one: real numbers, MPS's own refusals.

`pretend_mps(monkeypatch)` makes a device "mps" that scripts find with --device mps. Its tensors say that they lie on
mps:0, hold their numbers on the CPU, and refuse what MPS refuses:

* float64 and complex128, of which Metal has none;
* operations that torch's own dispatch table (native_functions.yaml, which every wheel carries) gives no MPS kernel;
* the cases of operations that torch's tests list as failing there (torch/testing/_internal/common_mps.py, 2.14);
* mixing tensors of two devices, and NumPy's view of a tensor on the device.

Fused AdamW ignores found_inf, as the kernel of MPS does. What Metal computes differently in the last digits, its own
bugs and its speed are not pretended.
"""

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MPS = torch.device("mps", 0)
WIDE = (torch.float64, torch.complex128)
# in torch's tests' list of what is not expected to work, though its table calls them composite
_LISTED = {"frexp", "heaviside", "logspace", "put", "float_power", "linalg_eig", "linalg_eigvals", "mode"}
# what the CPU chooses for operations that are others on MPS
_OF_THE_CPU = {"_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"}
_ACROSS_DEVICES = {"copy_", "to", "cpu", "type_as", "__getitem__", "__setitem__", "__set__",
                   "_has_compatible_shallow_copy_type"}  # fmt: skip


class Refused(TypeError):
    """What MPS cannot do."""


@cache
def _dispatch_table() -> dict[str, tuple[str | None, list[str]]]:
    """Operation -> (the one that its kernel is of, the keys it has kernels for)."""
    path = Path(__import__("torchgen").__file__).parent / "packaged/ATen/native/native_functions.yaml"
    table = {}
    for block in re.split(r"^- func: ", path.read_text(), flags=re.MULTILINE)[1:]:
        delegate = re.search(r"^  structured_delegate: (\S+)", block, re.MULTILINE)
        kernels = re.search(r"^  dispatch:\n((?:    .*\n)+)", block, re.MULTILINE)
        keys = re.findall(r"\w+", " ".join(re.findall(r"^    ([\w, ]+):", kernels[1], re.MULTILINE))) if kernels else []
        table[block.split("(", 1)[0]] = delegate and delegate[1], keys
    return table


@cache
def has_kernel(name: str) -> bool:
    """Whether torch has an operation such as "sort.stable" on MPS: a kernel of its own, or one made of others."""
    delegate, keys = _dispatch_table().get(name, (None, []))
    if delegate:
        return has_kernel(delegate)
    return not keys or "MPS" in keys or any(key.startswith("Composite") for key in keys)


def _name(func) -> str:
    return str(func).removeprefix("aten.").removesuffix(".default")


def _refuse(func, args: tuple) -> None:
    """Refused for an operation, or a case of one, that MPS lacks. args: with the numbers on the CPU."""
    name = _name(func)
    if func.namespace == "aten" and name not in _OF_THE_CPU and (name.split(".")[0] in _LISTED or not has_kernel(name)):
        raise Refused(f"aten::{name} has no kernel on MPS")
    if name == "convolution" and args[6] and args[0].dtype == torch.bfloat16:
        raise Refused("transposed convolutions of bfloat16 fail on MPS")
    if name in ("_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward"):
        other = args[1].shape[-2:] if isinstance(args[1], torch.Tensor) else args[1]
        small, large = sorted((list(args[0].shape[-2:]), list(other)))
        if any(side % to for side, to in zip(large, small, strict=True)):
            raise Refused("Adaptive pool MPS: input sizes must be divisible by output sizes")


class OnMPS(torch.Tensor):
    """A tensor that says it lies on mps:0. `numbers`: where its values are."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers: torch.Tensor):
        if numbers.dtype in WIDE:
            raise Refused("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, strides=numbers.stride(), storage_offset=numbers.storage_offset(), dtype=numbers.dtype
        )

    def __init__(self, numbers: torch.Tensor):
        self.numbers = numbers

    @property
    def device(self) -> torch.device:
        return MPS

    def __repr__(self) -> str:
        return f"OnMPS({self.numbers!r})"

    def __reduce_ex__(self, protocol: int):
        return self.numbers.detach().__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = _without_device(args, kwargs or {})
        given = {id(tensor.numbers): tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, OnMPS)}
        args, kwargs = tree_map_only(OnMPS, lambda tensor: tensor.numbers, (args, kwargs))
        _refuse(func, args)
        if _name(func) == "_fused_adamw_":
            kwargs = {**kwargs, "found_inf": None, "grad_scale": None}
        out = func(*args, **kwargs)
        return tree_map_only(torch.Tensor, lambda new: given[id(new)] if id(new) in given else OnMPS(new), out)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return OnMPS(x.detach().clone())

    @staticmethod
    def backward(ctx, grad):
        return leave(grad)


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.numbers.detach().clone()

    @staticmethod
    def backward(ctx, grad):
        return enter(grad)


def enter(x: torch.Tensor) -> torch.Tensor:
    """A tensor, copied to the device that is pretended."""
    if isinstance(x, OnMPS):
        return x
    return _Enter.apply(x) if x.requires_grad and torch.is_grad_enabled() else OnMPS(x.detach().clone())


def leave(x: torch.Tensor) -> torch.Tensor:
    """A tensor, copied to the CPU."""
    if not isinstance(x, OnMPS):
        return x
    return _Leave.apply(x) if x.requires_grad and torch.is_grad_enabled() else x.numbers.detach().clone()


def _is_device(value) -> bool:
    return isinstance(value, torch.device) or (isinstance(value, str) and value in ("mps", "mps:0", "cpu"))


def _without_device(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    cpu = torch.device("cpu")
    args = tuple(cpu if isinstance(value, torch.device) else value for value in args)
    return args, {name: cpu if _is_device(value) else value for name, value in kwargs.items()}


def _wanted(func_name: str, args: tuple, kwargs: dict) -> str | None:
    """The kind of device that a call asks for, if it asks for any."""
    if func_name == "cpu":
        return "cpu"
    if func_name in ("to", "type_as") and len(args) > 1 and isinstance(args[1], torch.Tensor):
        return args[1].device.type
    named = [value for value in (*args[: 2 if func_name == "to" else 0], *kwargs.values()) if _is_device(value)]
    return torch.device(named[0]).type if named else None


class _Calls(TorchFunctionMode):
    """Calls that name the device make tensors there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, OnMPS)]
        if here and name in ("numpy", "__array__"):
            raise TypeError("can't convert mps:0 device type tensor to numpy. Use Tensor.cpu() first")
        if here and name == "tolist":
            return args[0].numbers.tolist()
        elsewhere = [x for x in tensors if not isinstance(x, OnMPS) and x.dim() and x.numel()]
        if here and elsewhere and name not in _ACROSS_DEVICES:
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got some of mps:0 and cpu")
        wanted = _wanted(name, args, kwargs)
        if wanted is None:
            out = func(*args, **kwargs)
            new = here and (name.startswith("new_") or name.endswith("_like"))
            return tree_map_only(torch.Tensor, enter, out) if new else out
        args = tuple(torch.device("cpu") if _is_device(value) else value for value in args)
        if name in ("to", "type_as") and len(args) > 1 and isinstance(args[1], OnMPS):
            args = (args[0], args[1].dtype, *args[2:])
        out = func(*args, **_without_device((), kwargs)[1])
        return tree_map_only(torch.Tensor, enter if wanted == "mps" else leave, out)


class _Factories(TorchDispatchMode):
    """The same for what torch's own Python functions make inside."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else it is imported, for seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        if isinstance(wanted, torch.device) and wanted.type == "mps":
            return tree_map_only(torch.Tensor, enter, func(*args, **{**kwargs, "device": torch.device("cpu")}))
        return func(*args, **kwargs)


class _Autocast(torch.autocast):
    """Autocast of the device that computes in its place."""

    def __init__(self, device_type: str, *args, **kwargs):
        super().__init__("cpu" if device_type == "mps" else device_type, *args, **kwargs)


def _enter_no_grad(mode: torch.inference_mode) -> None:
    mode.in_its_place = torch.no_grad()  # a subclass cannot be made of views in inference mode
    mode.in_its_place.__enter__()


def _exit_no_grad(mode: torch.inference_mode, *error) -> None:
    mode.in_its_place.__exit__(*error)


class PretendMPS:
    """A context in which there is an Apple GPU. monkeypatch: pytest's."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch
        self.modes = (_Factories(), _Calls())

    def __enter__(self):
        patch: Callable = self.monkeypatch.setattr
        patch(torch.backends.mps, "is_available", cache(lambda: True))  # torch looks at its __wrapped__
        patch(torch.mps, "synchronize", lambda: None)
        patch(torch.mps, "driver_allocated_memory", lambda: 1 << 30)
        patch(torch.mps, "recommended_max_memory", lambda: 1 << 33)
        patch(torch.mps, "get_rng_state", lambda: torch.get_rng_state())
        patch(torch.mps, "set_rng_state", lambda state: torch.set_rng_state(state))
        patch(torch, "autocast", _Autocast)
        patch(torch.inference_mode, "__enter__", _enter_no_grad)
        patch(torch.inference_mode, "__exit__", _exit_no_grad)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
