"""The implementations of a pre-training step that bench_pretrain.py sets against each other.

Each does what its own users get: ours runs as the training loop runs it, the official design and the peers as their
scripts do, with the fastest attention and optimizer that they offer.
"""

import math
import tempfile
from importlib.util import find_spec

import torch
from torch import nn

from models_mae import MAE_MODELS, MaskedAutoencoder, build_mae
from models_vit import Attention, patchify
from util.mae.masking import visible_count
from util.run.device import autocast, grad_scaler, synchronize
from util.run.errors import UserError
from util.training.convert import hf_config, save_hf
from util.training.faults import NonFiniteGuard
from util.training.optim import decay_groups, make_optimizer

CONTENDERS = {
    "ours": "only visible patches embedded, only masked ones in the last block, fused attention and AdamW, no waiting",
    "ours_compiled": "the same through torch.compile",
    "ours_fast": "cross-attention decoder that predicts a third of the masked patches",
    "official_design": "all patches embedded, explicit softmax attention, plain AdamW, the loss is read every step",
    "hf": "transformers' ViTMAEForPreTraining with fused attention and fused AdamW",
    "lightly": "lightly's masked ViT and decoder on timm's blocks with fused attention and fused AdamW",
}
EXACT = ("ours", "ours_compiled", "official_design", "hf", "lightly")  # those with the objective of the paper
_FAST = {"decoder": "cross"}
_FAST_SHARE = 1 / 3


def installed(name: str) -> bool:
    """Whether the library behind a contender is there."""
    library = {"hf": "transformers", "lightly": "lightly"}.get(name)
    return library is None or find_spec(library) is not None


class SoftmaxAttention(Attention):
    """Attention as the paper's code computes it: softmax(q k^T / sqrt(d)) v, every matrix in memory."""

    def forward(self, x: torch.Tensor, last: None = None) -> torch.Tensor:
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


class LightlyMae(nn.Module):
    """A masked autoencoder put together from lightly's parts as its example does (docs.lightly.ai, examples/mae)."""

    def __init__(self, shape: dict, img_size: int):
        from lightly.models.modules import MAEDecoderTIMM, MaskedVisionTransformerTIMM
        from timm.models.vision_transformer import VisionTransformer

        super().__init__()
        self.patch_size, dim = shape["patch_size"], shape["embed_dim"]
        vit = VisionTransformer(
            img_size, self.patch_size, num_classes=0, embed_dim=dim, depth=shape["depth"], num_heads=shape["num_heads"]
        )
        self.backbone = MaskedVisionTransformerTIMM(vit=vit)
        self.decoder = MAEDecoderTIMM(
            num_patches=vit.patch_embed.num_patches,
            patch_size=self.patch_size,
            embed_dim=dim,
            decoder_embed_dim=shape["decoder_embed_dim"],
            decoder_depth=shape["decoder_depth"],
            decoder_num_heads=shape["decoder_num_heads"],
        )

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take over a state dict with the official names."""
        decoder = {name: weights[name] for name in self.decoder.state_dict()}
        encoder = {name: weights[name] for name in self.backbone.vit.state_dict()}
        self.decoder.load_state_dict(decoder)
        self.backbone.vit.load_state_dict(encoder)

    def forward(self, images: torch.Tensor, mask_ratio: float, noise: torch.Tensor) -> torch.Tensor:
        from lightly.models import utils

        n, length = noise.shape
        order = torch.cat([noise.new_full((n, 1), -1.0), noise], dim=1).argsort(dim=1)  # the class token is kept
        keep, masked = order.split(
            [1 + visible_count(length, mask_ratio), length - visible_count(length, mask_ratio)], 1
        )
        encoded = self.decoder.embed(self.backbone.encode(images=images, idx_keep=keep))
        tokens = utils.repeat_token(self.decoder.mask_token, (n, 1 + length))
        tokens = utils.set_at_index(tokens, keep, encoded.type_as(tokens))
        pred = self.decoder.predict(utils.get_at_index(self.decoder.decode(tokens), masked))
        target = utils.get_at_index(utils.patchify(images, self.patch_size), masked - 1)
        return nn.functional.mse_loss(pred, target)


class Contender:
    """One implementation with its optimizer: `step` is one optimizer step as its training loop does it.

    weights: a state dict under the official names; None keeps the random ones.
    """

    def __init__(self, name: str, args, device: torch.device, precision: str, weights: dict | None = None):
        self.name, self.args, self.device, self.precision = name, args, device, precision
        self.ours = name.startswith("ours")
        self.model = _build(name, args, weights).to(device).train()
        groups, lr = decay_groups(self.model.named_parameters(), 0.05), 1.5e-4 * args.batch_size / 256
        if name == "official_design":
            self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
        else:
            self.optimizer = make_optimizer(groups, lr, device)
        self.scaler = grad_scaler(device, precision)
        self.guard = NonFiniteGuard(self.optimizer, self.scaler, device)
        self.run = torch.compile(self.model) if name == "ours_compiled" else self.model

    def loss(self, images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        with autocast(self.device, self.precision):
            if self.name == "hf":
                return self.run(images, noise=noise).loss
            if self.ours:
                share = _FAST_SHARE if self.name == "ours_fast" else 1.0
                return self.run(images, self.args.mask_ratio, noise, share)
            return self.run(images, self.args.mask_ratio, noise)

    def step(self, images: torch.Tensor, noise: torch.Tensor) -> None:
        loss = self.loss(images, noise)
        if self.name == "official_design" and not math.isfinite(loss.item()):
            raise FloatingPointError("the loss of the official design is not finite")
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.ours:
            self.guard.step(loss.detach(), norm, 0)
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.name == "official_design":
            synchronize(self.device)


def _build(name: str, args, weights: dict | None) -> nn.Module:
    shape = MAE_MODELS[args.model].keywords
    if name == "hf":
        return _hugging_face(args, weights)
    if name == "lightly":
        if args.norm_pix_loss:
            raise UserError("lightly's objective is on raw pixels: leave out --norm_pix_loss, or lightly")
        model = LightlyMae(shape, args.input_size)
        if weights is not None:
            model.load(weights)
        return model
    kind = OfficialDesign if name == "official_design" else MaskedAutoencoder
    options = _FAST if name == "ours_fast" else {}
    model = kind(img_size=args.input_size, norm_pix_loss=args.norm_pix_loss, **options, **shape)
    if weights is not None and name in EXACT:
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
