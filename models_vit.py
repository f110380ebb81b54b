"""Vision transformers (Dosovitskiy et al., arXiv 2010.11929) with the state-dict names of the official MAE.

    model = build_vit("vit_base_patch16", img_size=224)
    embeddings = model.embed(images)       # (N, 3, H, W) in [0, 1] -> (N, 768)

Every backbone of the project, whatever its kind, is a `Backbone`: pictures in, embeddings out, a head on top.

An image of H x W px is cut into (H/p) x (W/p) patches, numbered row by row. A patch is a vector of
p*p*3 values in the order (row in patch, column in patch, channel).
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from util.data.augment import IMAGENET_MEAN, IMAGENET_STD
from util.mae.pos_embed import resample_pos_embed, sincos_pos_embed
from util.run.errors import UserError


def patchify(images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(N, C, H, W) images -> (N, L, p*p*C) patches, channel fastest. H and W must divide by p."""
    n, c, height, width = images.shape
    p = patch_size
    grid = images.reshape(n, c, height // p, p, width // p, p)
    return grid.permute(0, 2, 4, 3, 5, 1).reshape(n, (height // p) * (width // p), p * p * c)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """The inverse of `patchify`: (N, L, p*p*C) patches on a grid of (rows, columns) -> (N, C, H, W)."""
    n, _, values = patches.shape
    rows, columns, p = *grid, patch_size
    blocks = patches.reshape(n, rows, columns, p, p, values // (p * p))
    return blocks.permute(0, 5, 1, 3, 2, 4).reshape(n, -1, rows * p, columns * p)


class PatchEmbed(nn.Module):
    """Linear embedding of patches. The weight is kept as a convolution's, as in every ViT checkpoint."""

    def __init__(self, patch_size: int, embed_dim: int, channels: int = 3):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(N, any number of patches, p*p*C) -> (N, the same number, D)."""
        # a convolution of stride p is this matrix product; it takes any subset of the patches
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(patches, weight, self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention, (N, T, D) -> (N, T, D), or of the last few tokens only to all of them."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, last: int | None = None) -> torch.Tensor:
        n, tokens, dim = x.shape
        if last is None:
            qkv = self.qkv(x).reshape(n, tokens, 3, self.num_heads, dim // self.num_heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = self._project(x, last)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).flatten(2))

    def _project(self, x: torch.Tensor, last: int) -> tuple[torch.Tensor, ...]:
        """Queries of the last tokens, keys and values of all, each (N, heads, tokens, D / heads)."""
        n, tokens, dim = x.shape
        weight, bias = self.qkv.weight, self.qkv.bias
        q = F.linear(x[:, -last:], weight[:dim], bias[:dim])
        kv = F.linear(x, weight[dim:], bias[dim:]).reshape(n, tokens, 2, self.num_heads, dim // self.num_heads)
        return q.reshape(n, last, self.num_heads, -1).transpose(1, 2), *kv.permute(2, 0, 3, 1, 4).unbind(0)


class Mlp(nn.Module):
    """The two-layer perceptron of a block, with GELU."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Leave a residual branch out for whole samples (stochastic depth, arXiv 1603.09382), in training only."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.rate:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) >= self.rate
        return x * kept / (1 - self.rate)


class Block(nn.Module):
    """A pre-norm transformer block, (N, T, D) -> (N, T, D). drop_path: share of samples without a branch, 0..1."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: torch.Tensor, last: int | None = None) -> torch.Tensor:
        """last: compute the last few tokens only, from all of them; their values are the same."""
        attended = self.attn(self.norm1(x), last)
        x = (x if last is None else x[:, -last:]) + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_vit_weights(module: nn.Module) -> None:
    """Xavier-uniform matrices, zero biases, unit norms: the initialisation of MAE (arXiv 2111.06377, appendix A.1)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, PatchEmbed):
        nn.init.xavier_uniform_(module.proj.weight.view(module.proj.weight.shape[0], -1))
        nn.init.zeros_(module.proj.bias)


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """The (rows, columns) of patches of an image in px; UserError if its sides do not divide by the patch."""
    if height % patch_size or width % patch_size:
        raise UserError(
            f"an input of {height} x {width} px does not divide into patches of {patch_size} px: "
            f"choose an --input_size that is a multiple of {patch_size}"
        )
    return height // patch_size, width // patch_size


class Backbone(nn.Module):
    """A network that turns pictures into embeddings, and with a head into class scores.

    embed_dim: D of the embeddings. head: a module on embeddings, the identity until one is attached.
    fixed_size: whether the network takes pictures of one size only.
    Each backbone takes out the pixel statistics that it was trained with, so pictures come in [0, 1].
    """

    fixed_size = False

    def __init__(self, embed_dim: int, mean=IMAGENET_MEAN, std=IMAGENET_STD):
        super().__init__()
        self.embed_dim = embed_dim
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.head: nn.Module = nn.Identity()

    def standardize(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> the numbers that the network was trained on."""
        return (images - self.pixel_mean) / self.pixel_std

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embeddings (N, D)."""
        raise NotImplementedError

    def check_size(self, size: tuple[int, int]) -> None:
        """UserError where the network cannot take pictures of (height, width) px."""

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> what the head makes of their embeddings.

        labels: (N,) int64, for heads that put a margin between the true class and the others.
        """
        embeddings = self.embed(images)
        # scores in half precision would tie, and cost tenths of a point
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            return self.head(embeddings) if labels is None else self.head(embeddings, labels)


class VisionTransformer(Backbone):
    """The encoder of a masked autoencoder as a backbone.

    img_size: side in px or (height, width), for which the position embeddings are stored; they are re-sampled
    for inputs of another size. global_pool: embed by the mean of the patch tokens, then `fc_norm`, as the official
    fine-tuning does; else by the normalised class token. drop_path: rate of the last block, rising linearly from 0.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        global_pool: bool = True,
        drop_path: float = 0.0,
    ):
        super().__init__(embed_dim)
        self.patch_size, self.global_pool = patch_size, global_pool
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        self.grid = patch_grid(height, width, patch_size)
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio, rate) for rate in rates)
        # as in the official release, only the norm that is used is there
        if global_pool:
            self.fc_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        else:
            self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_vit_weights)
        nn.init.normal_(self.cls_token, std=0.02)

    def check_size(self, size: tuple[int, int]) -> None:
        patch_grid(*size, self.patch_size)

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> tokens (N, 1 + L, D), the class token first.

        With mean pooling they come as the last block leaves them; with the class token, after the final norm.
        """
        grid = patch_grid(*images.shape[-2:], self.patch_size)
        pos_embed = resample_pos_embed(self.pos_embed, self.grid, grid)
        x = self.patch_embed(patchify(self.standardize(images), self.patch_size))
        x = x + pos_embed[:, 1:]  # under autocast this keeps the residual stream in float32
        cls = (self.cls_token + pos_embed[:, :1]).expand(x.shape[0], -1, -1)  # len() would fix the batch on export
        x = torch.cat([cls, x], dim=1)
        for block in self.blocks:
            x = block(x)
        return x if self.global_pool else self.norm(x)

    def embed(self, images: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [0, 1] -> embeddings (N, D)."""
        tokens = self.forward_features(images)
        return self.fc_norm(tokens[:, 1:].mean(dim=1)) if self.global_pool else tokens[:, 0]


# size: (embed_dim, depth, num_heads). base, large and huge are the paper's; nano is ours, for two CPU cores.
VIT_SIZES = {
    "nano": (128, 6, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
VIT_PATCHES = {"nano": (8, 16), "tiny": (8, 16), "small": (16,), "base": (16,), "large": (16,), "huge": (14,)}

VIT_MODELS = {
    f"vit_{size}_patch{patch}": partial(
        VisionTransformer, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads
    )
    for size, (dim, depth, heads) in VIT_SIZES.items()
    for patch in VIT_PATCHES[size]
}


def build_vit(name: str, **options) -> VisionTransformer:
    """A freshly initialised backbone by its official name; UserError for an unknown one."""
    if name not in VIT_MODELS:
        raise UserError(f"unknown model {name!r}: choose from {', '.join(VIT_MODELS)}")
    return VIT_MODELS[name](**options)
