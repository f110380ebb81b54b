"""The methods of the benchmark as recipes: pure data, from which util.benchmark.chains makes command lines.

A method is a chain: pre-training if it has any of its own, transfer, evaluation. Pre-training is shared by all methods
that name it, once per seed. A preset is a set of methods that are shown the same pictures at the same size and are
evaluated in the same way: "full" (ViT-B/16, ResNet-50, IR-50 at 224 px), "face112" (the same at 112 px) and "tiny",
which two CPU cores finish, most of it without a download.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from util.run.errors import UserError

FLOORS = "floor"
NOT_TUNED = "start values, not tuned: give --tuned after scripts/sweep.sh"

# what --init is given for each kind of weights, unless the user names a file (--weights KEY=FILE)
WEIGHTS = {
    "mae": "official:mae_pretrain_vit_base_full",
    "dino": "timm:vit_base_patch16_224.dino",
    "dinov2": "timm:vit_base_patch14_dinov2.lvd142m",
    "dinov2_large": "timm:vit_large_patch14_dinov2.lvd142m",
    "resnet50": "timm:resnet50.a1_in1k",
    "resnet10t": "timm:resnet10t.c3_in1k",
    "efficientnet_lite0": "timm:tf_efficientnet_lite0.in1k",
    "efficientnet_b0": "timm:efficientnet_b0.ra_in1k",
    "efficientnet_b3": "timm:efficientnet_b3.ra2_in1k",
}


@dataclass(frozen=True)
class Stage:
    """A script and its flags without dashes, as text: several values stand apart by spaces, a switch is ""."""

    script: str
    flags: Mapping[str, str]

    def words(self) -> tuple[str, ...]:
        """The command line, but for data, start weights, seed and output."""
        flags = (word for name, value in self.flags.items() for word in (f"--{name}", *value.split()))
        return (self.script, *flags)

    def but(self, **flags) -> "Stage":
        """The same with some flags set otherwise, numbers as text; None takes one away."""
        merged = {**self.flags, **{name: v if v is None else _text(v) for name, v in flags.items()}}
        return replace(self, flags={name: value for name, value in merged.items() if value is not None})

    def number(self, name: str, default: float = 0.0) -> float:
        """The value of a numeric flag."""
        return float(self.flags.get(name, default))


def _text(value) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Pretraining:
    """Without labels, on this data. name: methods with the same one share its runs.

    weights: of WEIGHTS, what it starts from; None: random numbers.
    """

    name: str
    stage: Stage
    weights: str | None = None


@dataclass(frozen=True)
class Method:
    """One row of the leaderboard.

    weights: of WEIGHTS, what transfer starts from where there is no pretraining; None: random numbers. tuned: where
    its hyper-parameters come from.
    """

    name: str
    label: str
    family: str
    transfer: Stage
    weights: str | None = None
    pretraining: Pretraining | None = None
    tuned: str = NOT_TUNED

    @property
    def needed_weights(self) -> str | None:
        """The key of WEIGHTS without which there is no such method."""
        return self.pretraining.weights if self.pretraining else self.weights


@dataclass(frozen=True)
class Preset:
    """Methods by name, in the order of the table, at one size in px, with one evaluation for all.

    reference: the method that all are set against. weights: as WEIGHTS.
    """

    name: str
    input_size: int
    methods: Mapping[str, Method]
    evaluation: Stage
    reference: str
    weights: Mapping[str, str] = field(default_factory=lambda: WEIGHTS)

    def choose(self, names: list[str]) -> list[Method]:
        """The methods of these names, "all" for every one, in the preset's order; UserError for an unknown one."""
        for name in names:
            if name != "all" and name not in self.methods:
                raise UserError(f"--methods {name} is not in the preset {self.name}: {', '.join(self.methods)}")
        return [method for name, method in self.methods.items() if "all" in names or name in names]


def with_settings(methods: Iterable[Method], settings: Mapping[str, Mapping]) -> list[Method]:
    """The methods with other flags. settings: those of a method's transfer by its name, or of a pre-training by its;
    "from" among them says where they come from."""
    found = []
    for method in methods:
        own, shared = dict(settings.get(method.name, {})), {}
        if method.pretraining:
            shared = dict(settings.get(method.pretraining.name, {}))
            stage = method.pretraining.stage.but(**{k: v for k, v in shared.items() if k != "from"})
            method = replace(method, pretraining=replace(method.pretraining, stage=stage))
        origin = own.pop("from", shared.pop("from", method.tuned))
        found.append(replace(method, transfer=method.transfer.but(**own), tuned=origin))
    return found


def _preset(name: str, size: int, methods: list[Method], evaluation: Stage, reference: str) -> Preset:
    return Preset(name, size, {method.name: method for method in methods}, evaluation, reference)


def _evaluation(size: int, **flags) -> Stage:
    """Of every run of a preset: at its own size, which is also the one whose latency is measured."""
    protocols = {"protocols": "closed_set verification open_set few_shot resolution", "ways": "5", "shots": "1 5"}
    sizes = {"input_size": str(size), "resolutions": str(size), "cascade": ""}
    return Stage("eval_recognition.py", {**protocols, **sizes}).but(**flags)


# --- what the presets are made of -----------------------------------------------------------------------------------

_MARGIN_LABELS = {"arcface": "ArcFace", "cosface": "CosFace", "curricularface": "CurricularFace"}


@dataclass(frozen=True)
class _Cnn:
    """A network of other people, trained end to end. key: its name in those of methods, and of its weights."""

    model: str
    key: str
    label: str

    def softmax(self, base: Stage, tuned: str, weights: str | None = None) -> Method:
        return self._method("", "softmax", "CNN", base.but(head="linear"), tuned, weights)

    def margins(
        self, base: Stage, tuned: str, sizes: Mapping[str, float], scale: float, warmup: int, weights: str | None = None
    ) -> list[Method]:
        """With each head that puts a margin between identities. sizes: margin by head. warmup: epochs it grows in."""
        return [
            self._method(
                f"{head}_",
                _MARGIN_LABELS[head],
                "margin",
                base.but(head=head, margin=margin, scale=scale, margin_warmup=warmup),
                tuned,
                weights,
            )
            for head, margin in sizes.items()
        ]

    def _method(self, head: str, words: str, family: str, stage: Stage, tuned: str, weights: str | None) -> Method:
        start, label = ("imagenet", "ImageNet") if weights else ("scratch", "scratch")
        name, label = f"{self.key}_{head}{start}", f"{self.label} {words}, {label}"
        return Method(name, label, family, stage.but(model=self.model), weights=weights, tuned=tuned)


def _probes(model: str, key: str, label: str, base: Stage, tuned: str) -> list[Method]:
    """Frozen weights made elsewhere, with a linear and an MLP head."""
    heads = {"linear": "linear", "mlp": "MLP"}
    return [
        Method(
            f"{key}_{head}",
            f"{label} + {words}",
            "self-distillation",
            base.but(model=model, head=head),
            weights=key,
            tuned=tuned,
        )
        for head, words in heads.items()
    ]


@dataclass(frozen=True)
class _Recipes:
    """How a preset trains an encoder `model`: a stage for each way of transfer, and where the settings come from."""

    model: str
    probe: Stage
    lora: Stage
    finetune: Stage
    tuned: str
    ranks: tuple[int, ...] = (8, 16)

    def transfers(self, name: str, label: str, family: str, **start) -> list[Method]:
        """Linear probe, LoRA and full fine-tuning from the same start (`weights` or `pretraining`)."""
        ways = [("linear", "linear", self.probe)]
        ways += [(f"lora_r{rank}", f"LoRA r = {rank}", self.lora.but(rank=rank)) for rank in self.ranks]
        ways += [("finetune", "fine-tuning", self.finetune)]
        return [
            Method(
                f"{name}_{way}", f"{label} + {words}", family, stage.but(model=self.model), **start, tuned=self.tuned
            )
            for way, words, stage in ways
        ]

    def floors(self) -> list[Method]:
        """What the same encoder reaches without any pre-training."""
        ways = [("linear", "linear", self.probe), ("finetune", "fine-tuning", self.finetune)]
        return [
            Method(f"random_{way}", f"random ViT + {words}", FLOORS, stage.but(model=self.model), tuned=self.tuned)
            for way, words, stage in ways
        ]

    def simclr(self, stage: Stage) -> Method:
        return Method(
            "simclr_linear",
            "SimCLR on this data + linear",
            "contrastive",
            self.probe.but(model=self.model),
            pretraining=Pretraining("simclr", stage.but(model=self.model)),
            tuned=self.tuned,
        )


# --- presets --------------------------------------------------------------------------------------------------------


def _large(name: str, size: int) -> Preset:
    """ViT-B/16, ResNet-50, EfficientNets and IR-50 for one GPU, at `size` px."""
    px = {"input_size": str(size)}
    tuned = f"defaults of the scripts and the papers; {NOT_TUNED}"
    cnn = Stage(
        "main_finetune.py",
        {**px, "epochs": "50", "warmup_epochs": "5", "batch_size": "64", "lr": "1e-3", "min_lr": "1e-6",
         "head_lr": "1e-3", "weight_decay": "0.05", "clip_grad": "5", "min_crop": "0.5"},
    )  # fmt: skip
    imagenet = cnn.but(lr="3e-4")
    resnet, ir = _Cnn("resnet50", "resnet50", "ResNet-50"), _Cnn("ir_50", "ir_50", "IR-50")
    small = _Cnn("efficientnet_b0", "efficientnet_b0", "EfficientNet-B0")
    large = _Cnn("efficientnet_b3", "efficientnet_b3", "EfficientNet-B3")
    methods = []
    for net in (resnet, small, large):
        methods += [net.softmax(cnn, tuned), net.softmax(imagenet, tuned, net.key)]
    margins = {"sizes": {"arcface": 0.5, "cosface": 0.35, "curricularface": 0.5}, "scale": 64.0, "warmup": 5}
    methods += resnet.margins(cnn, tuned, **margins)
    methods += resnet.margins(imagenet, tuned, **margins, weights="resnet50")
    methods += [ir.softmax(cnn, tuned), *ir.margins(cnn, tuned, **margins)]
    probe = Stage(
        "main_linprobe.py",
        {**px, "epochs": "50", "warmup_epochs": "0", "batch_size": "256", "lr": "1e-3",
         "lr_grid": "0.3 1 3 10 30", "head_norm": ""},
    )  # fmt: skip
    common = {**px, "epochs": "50", "warmup_epochs": "2", "batch_size": "64"}
    lora = Stage("main_lora.py", {**common, "lr": "2e-4", "min_lr": "1e-6", "head_lr": "1e-3", "clip_grad": "1"})
    finetune = Stage(
        "main_finetune.py",
        {**common, "lr": "5e-5", "min_lr": "1e-6", "head_lr": "2e-4", "layer_decay": "0.75", "drop_path": "0.1",
         "clip_grad": "1"},
    )  # fmt: skip
    vit = _Recipes("vit_base_patch16", probe, lora, finetune, tuned)
    long = {**px, "batch_size": "128", "warmup_epochs": "10", "clip_grad": "1"}
    methods.append(vit.simclr(Stage("main_simclr.py", {**long, "epochs": "100", "batch_size": "256"})))
    methods += _probes("dino_vitb16", "dino", "DINO ViT-B/16", probe, tuned)
    methods += _probes("dinov2_vitb14", "dinov2", "DINOv2 ViT-B/14", probe, tuned)
    methods += _probes("dinov2_vitl14", "dinov2_large", "DINOv2 ViT-L/14", probe, tuned)
    adaptation = Stage(
        "main_pretrain.py", {**long, "model": "mae_vit_base_patch16", "epochs": "100", "min_crop": "0.5"}
    )
    adapted = Pretraining("mae_adapted", adaptation, weights="mae")
    methods += vit.transfers("mae", "MAE official", "MAE", weights="mae")
    methods += vit.transfers("mae_adapted", "MAE adapted", "MAE", pretraining=adapted)
    methods += vit.floors()
    return _preset(name, size, methods, _evaluation(size), "random_finetune")


def _tiny() -> Preset:
    """A nano ViT and narrow CNNs at 48 px for two CPU cores, 12 methods that need no download, and 5 that do.

    DINOv2 is not among these: its patches of 14 px do not fill 48.
    """
    px = {"input_size": "48"}
    tuned = (
        "by validation top-1 on ToonFaces, seed 0, scripts/tune.py (RESULTS.md, Methods compared); CosFace and "
        "CurricularFace have ArcFace's, r = 16 has those of r = 8, ImageNet starts those from scratch"
    )
    few = {**px, "epochs": "3", "warmup_epochs": "1", "batch_size": "32", "clip_grad": "1"}
    cnn = Stage("main_finetune.py", {**few, "lr": "6e-3", "min_lr": "1e-5", "head_lr": "6e-3", "min_crop": "0.8"})
    lite_cnn = cnn.but(lr="1.8e-3", head_lr="1.8e-3", min_crop="0.5")
    probe = Stage(
        "main_linprobe.py",
        {**px, "epochs": "50", "warmup_epochs": "0", "batch_size": "256", "lr": "1e-3", "lr_grid": "1 3 10 30 100",
         "head_norm": ""},
    )  # fmt: skip
    lora = Stage("main_lora.py", {**few, "lr": "4e-3", "min_lr": "1e-5", "head_lr": "8e-3", "min_crop": "0.8"})
    finetune = Stage("main_finetune.py", {**few, "lr": "1e-3", "min_lr": "1e-5", "head_lr": "4e-3"})
    vit = _Recipes("vit_nano_patch8", probe, lora, finetune, tuned)
    resnet = _Cnn("timm:resnet10t", "resnet10t", "ResNet-10-T")
    lite = _Cnn("timm:tf_efficientnet_lite0", "efficientnet_lite0", "EfficientNet-Lite0")
    methods = []
    for net, stage in ((resnet, cnn), (lite, lite_cnn)):
        methods += [net.softmax(stage, tuned), net.softmax(stage, tuned, net.key)]
    sizes = {"arcface": 0.2, "cosface": 0.1, "curricularface": 0.2}
    methods += resnet.margins(cnn, tuned, sizes, scale=16.0, warmup=1)
    long = {**px, "warmup_epochs": "1", "clip_grad": "1"}
    contrast = {"epochs": "3", "batch_size": "128", "blr": "1e-3", "min_crop": "0.3", "eval_every": "3"}
    methods.append(vit.simclr(Stage("main_simclr.py", {**long, **contrast})))
    masked = {"epochs": "12", "batch_size": "32", "lr": "6e-4", "min_crop": "0.8", "eval_every": "12"}
    scratch = Stage("main_pretrain.py", {**long, "model": "mae_vit_nano_patch8", **masked})
    own = Pretraining("mae_scratch", scratch)
    methods += vit.transfers("mae_scratch", "MAE from scratch", "MAE on this data alone", pretraining=own)
    methods += vit.floors()
    methods += _probes("dino_vitb16", "dino", "DINO ViT-B/16", probe, tuned)
    official = "MAE official ViT-B/16 + linear"
    methods.append(Method("mae_linear", official, "MAE", probe.but(model="vit_base_patch16"), "mae", tuned=tuned))
    evaluation = _evaluation(48, replicates="200", negatives="20000", episodes="500", batch_size="64", no_figures="")
    return _preset("tiny", 48, methods, evaluation, "random_finetune")


PRESETS = {"full": _large("full", 224), "face112": _large("face112", 112), "tiny": _tiny()}
