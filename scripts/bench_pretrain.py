"""Step time and peak memory of pre-training: ours, the official design, and Hugging Face's, side by side.

python scripts/bench_pretrain.py --out bench.json --model mae_vit_base_patch16 --input_size 224 --batch_size 8

All contenders get the same weights, images, masks and precision, and must agree on the loss before the clock
starts. A step is a whole optimizer step. They take turns within one process, so that whatever else the machine
does falls on all of them; the medians count. Memory is measured apart, in a process of its own for each.
"""

import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import nn

from models_mae import MAE_MODELS, MaskedAutoencoder, build_mae
from models_vit import Attention, patchify
from util.mae.masking import visible_count
from util.run import args as flags
from util.run.device import autocast, grad_scaler, peak_memory_bytes, pick_device, pick_precision, synchronize
from util.run.errors import cli
from util.run.log import provenance, write_json
from util.run.seed import uniform_for
from util.training.convert import hf_config, save_hf
from util.training.faults import NonFiniteGuard
from util.training.optim import decay_groups, make_optimizer

CONTENDERS = {
    "ours": "visible patches embedded only, fused attention, fused AdamW, the loss stays on the device",
    "official_design": "all patches embedded, explicit softmax attention, plain AdamW, the loss is read every step",
    "hf": "transformers' ViTMAEForPreTraining with fused attention and fused AdamW",
}
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-2}  # relative


class SoftmaxAttention(Attention):
    """Attention as the paper's code computes it: softmax(q k^T / sqrt(d)) v, every matrix in memory."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, tokens, dim = x.shape
        qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = (q @ k.transpose(-2, -1) * (dim // self.num_heads) ** -0.5).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(n, tokens, dim))


class OfficialDesign(MaskedAutoencoder):
    """The official design, restated from its description (arXiv 2111.06377): a convolution embeds every
    patch, the masked ones are dropped after, and the decoder's input is put back in order by a gather."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for block in (*self.blocks, *self.decoder_blocks):
            block.attn = SoftmaxAttention(block.attn.proj.in_features, block.attn.num_heads)

    def forward(self, images: torch.Tensor, mask_ratio: float, noise: torch.Tensor) -> torch.Tensor:
        """images: (N, 3, H, W), normalised, of the model's size. noise: (N, L). Returns the loss."""
        x = self.patch_embed.proj(images).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        n, length, dim = x.shape
        keep = visible_count(length, mask_ratio)
        shuffled = noise.argsort(dim=1)
        restore = shuffled.argsort(dim=1)
        x = x.gather(1, shuffled[:, :keep, None].expand(-1, -1, dim))
        mask = torch.ones(n, length, device=x.device)
        mask[:, :keep] = 0
        mask = mask.gather(1, restore)

        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_embed(self.norm(x))

        patches = torch.cat([x[:, 1:], self.mask_token.to(x.dtype).expand(n, length - keep, -1)], dim=1)
        patches = patches.gather(1, restore[:, :, None].expand(-1, -1, x.shape[2]))
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred = self.decoder_pred(self.decoder_norm(x))[:, 1:]

        target = patchify(images, self.patch_size)
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        return (((pred - target) ** 2).mean(-1) * mask).sum() / mask.sum()


class Contender:
    """One implementation with its optimizer: `step` is one optimizer step as its training loop does it."""

    def __init__(self, name: str, args, device: torch.device, precision: str, weights: dict | None = None):
        """weights: a state dict under the official names; None keeps the random ones."""
        self.name, self.args, self.device, self.precision = name, args, device, precision
        model = _hugging_face(args, weights) if name == "hf" else _by_our_names(name, args, weights)
        self.model = model.to(device).train()
        groups, lr = decay_groups(self.model.named_parameters(), 0.05), 1.5e-4 * args.batch_size / 256
        if name == "official_design":
            self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        else:
            self.optimizer = make_optimizer(groups, lr, device)
        self.scaler = grad_scaler(device, precision)
        self.guard = NonFiniteGuard(self.optimizer, self.scaler, device)

    def loss(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            if self.name == "hf":
                return self.model(images, noise=noise).loss
            out = self.model(images, self.args.mask_ratio, noise)
            return out[0] if self.name == "ours" else out

    def step(self, images: torch.Tensor, noise: torch.Tensor) -> None:
        loss = self.loss(images, noise)
        if self.name == "official_design" and not math.isfinite(loss.item()):
            raise FloatingPointError("the loss of the official design is not finite")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.name == "ours":
            self.guard.step(loss.detach(), norm, 0)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.name == "official_design":
            synchronize(self.device)


def _by_our_names(name: str, args, weights: dict | None) -> MaskedAutoencoder:
    kind = {"ours": MaskedAutoencoder, "official_design": OfficialDesign}[name]
    model = kind(img_size=args.input_size, norm_pix_loss=args.norm_pix_loss, **MAE_MODELS[args.model].keywords)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def _hugging_face(args, weights: dict | None) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with torch.device("meta"):
        shapes = build_mae(args.model, args.input_size)
    config = hf_config(
        shapes.state_dict(),
        num_heads=shapes.blocks[0].attn.num_heads,
        decoder_num_heads=shapes.decoder_blocks[0].attn.num_heads,
        norm_pix_loss=args.norm_pix_loss,
        mask_ratio=args.mask_ratio,
    )
    if weights is None:
        return ViTMAEForPreTraining(ViTMAEConfig(**config))
    with tempfile.TemporaryDirectory() as folder:
        return ViTMAEForPreTraining.from_pretrained(save_hf(folder, weights, config), attn_implementation="sdpa")


def make_batch(args, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, H, W) and noise (N, L), the same for every contender."""
    patches = (args.input_size // MAE_MODELS[args.model].keywords["patch_size"]) ** 2
    index = torch.arange(args.batch_size)
    images = uniform_for(args.seed, 0, index, 3 * args.input_size**2).view(-1, 3, args.input_size, args.input_size)
    return (images * 4 - 2).to(device), uniform_for(args.seed, 1, index, patches).to(device)


def assert_same_objective(contenders: list[Contender], batch: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Every contender's first loss must be ours; returns it."""
    with torch.no_grad():
        losses = {contender.name: float(contender.loss(*batch)) for contender in contenders}
    for name, loss in losses.items():
        if abs(loss / losses["ours"] - 1) > LOSS_TOLERANCE[contenders[0].precision]:
            raise AssertionError(f"{name} does not compute our objective: the losses are {losses}")
    return losses["ours"]


def time_steps(contenders: list[Contender], batch: tuple[torch.Tensor, torch.Tensor], args) -> dict[str, list[float]]:
    """Milliseconds per step, a figure for each round. The order changes from round to round."""
    device, times = contenders[0].device, {contender.name: [] for contender in contenders}
    for turn in range(args.warmup + args.steps):
        first = turn % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            synchronize(device)
            started = time.perf_counter()
            for _ in range(args.steps_per_turn):
                contender.step(*batch)
            synchronize(device)
            if turn >= args.warmup:
                times[contender.name].append((time.perf_counter() - started) * 1e3 / args.steps_per_turn)
    return times


def measure_memory(args, device: torch.device, precision: str) -> int:
    """Bytes that the one contender `args.only` adds to this process at its peak, over two steps."""
    before = peak_memory_bytes(device)
    contender, batch = Contender(args.only, args, device, precision), make_batch(args, device)
    for _ in range(2):
        contender.step(*batch)
    synchronize(device)
    return peak_memory_bytes(device) - before


def memory_in_own_process(name: str, argv: list[str]) -> int:
    """`measure_memory` in a fresh process, because a peak is a process's and never goes down."""
    # a shell in between, because Linux hands the peak of a process on to what it executes
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, str(Path(__file__).resolve()), *argv, "--only", name]
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"the memory of {name} could not be measured:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def get_args(argv: list[str] | None = None):
    parser = flags.Parser("Step time and peak memory against the official design and Hugging Face's")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="result file, JSON")
    parser.add_argument("--model", choices=MAE_MODELS, default="mae_vit_base_patch16", metavar="NAME", help="model")
    parser.add_argument("--input_size", type=flags.count, default=224, help="side of the square images, px")
    parser.add_argument("--batch_size", type=flags.count, default=8, help="images per step")
    parser.add_argument("--mask_ratio", type=flags.ratio, default=0.75, help="removed patches, fraction in 0..1")
    parser.add_argument("--norm_pix_loss", action="store_true", help="the loss on normalised patches")
    parser.add_argument(
        "--steps", type=flags.count, default=10, help="timed rounds; every contender has a turn in each"
    )
    parser.add_argument("--steps_per_turn", type=flags.count, default=None, help="steps; default: 10 on cuda, else 1")
    parser.add_argument("--warmup", type=flags.count0, default=1, help="rounds before the clock starts")
    parser.add_argument("--device", default="auto", help="auto, cuda, mps or cpu")
    parser.add_argument(
        "--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of the forward pass"
    )
    parser.add_argument("--threads", type=flags.count0, default=0, help="CPU threads; 0: as torch chooses")
    parser.add_argument("--seed", type=flags.count0, default=0, help="of the weights, images and masks")
    parser.add_argument("--only", choices=CONTENDERS, default=None, help="print the peak memory of one, bytes, and end")
    return parser.parse_args(argv)


@cli
def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = get_args(argv)
    started = time.perf_counter()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    torch.manual_seed(args.seed)
    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    args.steps_per_turn = args.steps_per_turn or (10 if device.type == "cuda" else 1)
    if args.only:
        print(measure_memory(args, device, precision))
        return

    names = [name for name in CONTENDERS if name != "hf" or importlib.util.find_spec("transformers")]
    weights = build_mae(args.model, args.input_size).state_dict()
    memory = {name: memory_in_own_process(name, argv) for name in names}
    contenders = [Contender(name, args, device, precision, weights) for name in names]
    batch = make_batch(args, device)
    loss = assert_same_objective(contenders, batch)
    times = time_steps(contenders, batch, args)

    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        name: {
            "ms_per_step": medians[name],
            "peak_memory_bytes": memory[name],
            "ms_of_each_round": times[name],
            "what": CONTENDERS[name],
        }
        for name in names
    }
    result["ratio_official"] = medians["official_design"] / medians["ours"]
    result["ratio_hf"] = medians["hf"] / medians["ours"] if "hf" in medians else None
    result["loss"] = loss
    where = "resident, libraries loaded on first use included" if device.type == "cpu" else "on the device"
    result["memory"] = f"what one contender alone adds to its process at the peak ({where})"
    result["provenance"] = provenance({**vars(args), "out": str(args.out), "precision": precision}, device)
    result["wall_seconds"] = time.perf_counter() - started
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.out, result)
    for name in names:
        print(f"{name:16} {medians[name]:9.1f} ms per step  {memory[name] / 2**20:8.0f} MiB")
    print(f"ours against the official design: {result['ratio_official']:.2f}x as fast; written to {args.out}")


if __name__ == "__main__":
    main()
