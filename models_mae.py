"""Masked autoencoder (He et al., arXiv 2111.06377): an encoder on the visible patches and a light decoder.

The state dict has the keys and shapes of the official release, so checkpoints travel both ways.

    model = build_mae("mae_vit_base_patch16", img_size=224)
    loss, pred, mask = model(images, mask_ratio=0.75)

Trained ones are loaded by `models_mae_weights.load_mae`.
"""

from functools import partial

import torch
from torch import nn

from models_cross import CrossBlock, FeatureMaps, Fill
from models_hardness import Hardness
from models_refine import Refinement, blended
from models_vit import (
    VIT_PATCHES,
    VIT_SIZES,
    Block,
    PatchEmbed,
    init_vit_weights,
    patch_grid,
    patchify,
    unpatchify,
)
from util.data.augment import IMAGENET_MEAN, IMAGENET_STD
from util.mae.losses import masked_pixel_loss, patch_errors, patch_statistics, ranking_loss
from util.mae.masking import by_chance, rank_patches, visible_count
from util.mae.ordered_dither import spread_first
from util.mae.pos_embed import resample_pos_embed, sincos_pos_embed
from util.run.errors import UserError


class MaskedAutoencoder(nn.Module):
    """Masked autoencoder with a ViT backbone.

    img_size: side in px or (height, width); it sets the grid that the position embeddings are stored for.
    Any other input whose sides divide by the patch works too: the embeddings are re-sampled to its grid.
    decoder: "self", the official one, or "cross", CrossMAE's (arXiv 2401.14391), which costs half as much.
    fill: give what a partial prediction leaves out to one light layer (PR-MIM, arXiv 2411.15746); "self" only.
    hard: learn beside it which patches are hard to predict, for `util.mae.masking`.
    refine: mend the borders of what was predicted by a few convolutions; not with norm_pix_loss.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        decoder: str = "self",
        fill: bool = False,
        hard: bool = False,
        refine: bool = False,
    ):
        super().__init__()
        self.patch_size = patch_size
        self.norm_pix_loss = norm_pix_loss
        self.decoder = decoder
        self.grid = self.grid_of(*((img_size, img_size) if isinstance(img_size, int) else img_size))

        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(sincos_pos_embed(embed_dim, self.grid), requires_grad=False)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_embed_dim))
        self.decoder_pos_embed = nn.Parameter(sincos_pos_embed(decoder_embed_dim, self.grid), requires_grad=False)
        if decoder == "cross":
            self.decoder_maps = FeatureMaps(embed_dim, depth, decoder_depth)
            build_block = partial(CrossBlock, decoder_embed_dim, embed_dim, decoder_num_heads, mlp_ratio)
        else:
            self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
            build_block = partial(Block, decoder_embed_dim, decoder_num_heads, mlp_ratio)
        self.decoder_blocks = nn.ModuleList(build_block() for _ in range(decoder_depth))
        self.decoder_fill = Fill(decoder_embed_dim, decoder_num_heads) if fill else None
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_embed_dim, patch_size**2 * 3)

        self.register_buffer("pixel_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1), persistent=False)
        self.apply(init_vit_weights)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)
        # last, so that with one seed all other weights start the same with and without it
        self.decoder_hardness = Hardness(patch_size).apply(init_vit_weights) if hard else None
        self.decoder_refine = Refinement(patch_size) if refine else None
        self.blend = False  # whether `reconstruct` averages over shifted patches (models_refine.blended)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The (rows, columns) of patches of an image; UserError if its sides do not divide by the patch."""
        return patch_grid(height, width, self.patch_size)

    def num_patches(self, images: torch.Tensor) -> int:
        """The number of patches L of one image of the batch."""
        rows, columns = self.grid_of(*images.shape[-2:])
        return rows * columns

    def encode(
        self, visible: torch.Tensor, keep_ids: torch.Tensor, grid: tuple[int, int]
    ) -> torch.Tensor | list[torch.Tensor]:
        """Visible patches (N, K, p*p*3) with their places (N, K) in the grid -> latent (N, 1 + K, D).

        For the cross-attention decoder, a memory (N, 1 + K, D) for each of its blocks.
        """
        pos_embed = resample_pos_embed(self.pos_embed, self.grid, grid)
        x = self.patch_embed(visible)
        x = x + pos_embed[0, 1:][keep_ids]  # under autocast this keeps the residual stream in float32
        cls = (self.cls_token + pos_embed[:, :1]).expand(len(x), -1, -1)
        x = torch.cat([cls, x], dim=1)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x)
        return self.decoder_maps([*outputs[:-1], self.norm(x)]) if self.decoder == "cross" else self.norm(x)

    def decode(self, latent: torch.Tensor, keep_ids: torch.Tensor, asked: torch.Tensor, left: torch.Tensor, grid):
        """Predict patches at the places `asked` (N, P) and, by `decoder_fill`, `left` (N, R): (N, P + R, p*p*3).

        latent: what `encode` returned for the patches at keep_ids (N, K).
        """
        pos_embed = resample_pos_embed(self.decoder_pos_embed, self.grid, grid)
        queries = self.mask_token + pos_embed[0, 1:][asked]
        if self.decoder == "cross":
            for block, memory in zip(self.decoder_blocks, latent, strict=True):
                queries = block(queries, memory)
            return self.decoder_pred(self.decoder_norm(queries))
        x = self.decoder_embed(latent)
        x = x + torch.cat([pos_embed[:, :1].expand(len(x), -1, -1), pos_embed[0, 1:][keep_ids]], dim=1)
        x = torch.cat([x, queries], dim=1)
        for block in self.decoder_blocks[:-1]:
            x = block(x)
        # nobody reads what the last block makes of the visible patches
        predicted = self.decoder_blocks[-1](x, last=asked.shape[1])
        if left.shape[1]:
            predicted = torch.cat([predicted, self.decoder_fill(self.mask_token + pos_embed[0, 1:][left], x)], dim=1)
        return self.decoder_pred(self.decoder_norm(predicted))

    def predict(
        self, patches: torch.Tensor, noise: torch.Tensor, keep: int, grid: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the `keep` patches of least noise, encode them and predict all L patches.

        patches: (N, L, p*p*3), normalised. noise: (N, L). Returns (pred (N, L, p*p*3), mask (N, L), 1 = removed).
        """
        ids_shuffle, ids_restore = rank_patches(noise)
        keep_ids = ids_shuffle[:, :keep]
        latent = self.encode(_take(patches, keep_ids), keep_ids, grid)
        pred = self.decode_all(latent, ids_restore, grid)
        if self.decoder_refine is not None:
            masked_ids = ids_shuffle[:, keep:]
            refined = self.decoder_refine.refine(_take(pred, masked_ids), patches, masked_ids, grid)
            pred = pred.to(refined.dtype).scatter(1, masked_ids[:, :, None].expand_as(refined), refined)
        return pred, (ids_restore >= keep).to(torch.float32)

    def decode_all(self, latent: torch.Tensor, ids_restore: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Latent and the place of each patch in the shuffled order (N, L) -> pred of every patch (N, L, p*p*3)."""
        if self.decoder == "cross":
            everywhere = torch.arange(ids_restore.shape[1], device=ids_restore.device).expand_as(ids_restore)
            return self.decode(latent, everywhere[:, :0], everywhere, everywhere[:, :0], grid)
        x = self.decoder_embed(latent)
        n, tokens, _ = x.shape
        mask_tokens = self.mask_token.expand(n, ids_restore.shape[1] + 1 - tokens, -1)
        patches = _take(torch.cat([x[:, 1:], mask_tokens], dim=1), ids_restore)
        x = torch.cat([x[:, :1], patches], dim=1)
        x = x + resample_pos_embed(self.decoder_pos_embed, self.grid, grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x)[:, 1:])

    def forward(
        self,
        images: torch.Tensor,
        mask_ratio: float = 0.75,
        noise: torch.Tensor | None = None,
        predict_ratio: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | torch.Tensor:
        """Mask, encode, decode and score.

        images: (N, 3, H, W), normalised. mask_ratio: fraction removed, 0 <= ratio < 1. noise: (N, L); the patches
        of least noise are kept, so a given noise makes the mask reproducible (default: fresh random numbers).
        Returns (loss, pred (N, L, p*p*3), mask (N, L) with 0 = kept and 1 = removed).
        predict_ratio: given, only the loss is computed, and from that fraction of the removed patches, 0 < ratio <= 1:
        at 1 it is the same loss for less work.
        """
        grid = self.grid_of(*images.shape[-2:])
        patches = patchify(images, self.patch_size)
        n, length, _ = patches.shape
        if noise is None:
            noise = torch.rand(n, length, device=images.device)
        keep = visible_count(length, mask_ratio)
        if predict_ratio is not None:
            return self.objective(patches, noise, keep, grid, predict_ratio)
        pred, mask = self.predict(patches, noise, keep, grid)
        loss = masked_pixel_loss(pred, patches, mask, self.norm_pix_loss).mean()
        if self.decoder_hardness is not None and self.training:
            masked_ids = rank_patches(noise)[0][:, keep:]
            errors = patch_errors(_take(pred, masked_ids), _take(patches, masked_ids), self.norm_pix_loss)
            loss = loss + self._learn_hardness(patches, masked_ids, errors, grid)
        return loss, pred, mask

    def objective(
        self, patches: torch.Tensor, noise: torch.Tensor, keep: int, grid: tuple[int, int], predict_ratio: float = 1.0
    ) -> torch.Tensor:
        """The training loss alone. Arguments as of `predict` and `forward`.

        Without `fill`, the patches to predict are a random part of the removed ones; with it, a part that is spread
        over the picture, and what lies between is predicted too, by one light layer.
        """
        ids_shuffle, _ = rank_patches(noise)
        keep_ids, masked_ids = ids_shuffle[:, :keep], ids_shuffle[:, keep:]
        count = max(1, round(masked_ids.shape[1] * predict_ratio))
        if self.decoder_fill is not None:
            masked_ids = spread_first(masked_ids, grid, noise)
        elif count < masked_ids.shape[1]:
            masked_ids = by_chance(masked_ids, noise)  # a strategy removes in an order that means something
        asked, left = masked_ids[:, :count], masked_ids[:, count:]
        if self.decoder_fill is None:
            left = left[:, :0]
        # the patches that will be masked are never embedded
        latent = self.encode(_take(patches, keep_ids), keep_ids, grid)
        pred = self.decode(latent, keep_ids, asked, left, grid)
        predicted_ids = masked_ids[:, : pred.shape[1]]
        if self.decoder_refine is not None:
            pred = self.decoder_refine.refine(pred, patches, predicted_ids, grid)
        errors = patch_errors(pred, _take(patches, predicted_ids), self.norm_pix_loss)
        if self.decoder_hardness is None:
            return errors.mean()
        return errors.mean() + self._learn_hardness(patches, predicted_ids, errors, grid)

    def _learn_hardness(self, patches: torch.Tensor, ids: torch.Tensor, errors: torch.Tensor, grid) -> torch.Tensor:
        """What to add to a loss so that the errors (N, M) of the patches at `ids` teach `decoder_hardness`.

        Its value is 0: the loss stays that of the prediction, and only gradients are added.
        """
        expected = self.decoder_hardness(patches, grid).gather(1, ids)
        # AdamW does not mind the scale; clipping does, and the norm of all gradients shall stay that of the prediction
        loss = 0.01 * ranking_loss(expected, errors.detach())
        return loss - loss.detach()

    @torch.no_grad()
    def hardness(self, images: torch.Tensor) -> torch.Tensor:
        """How hard each patch of pictures (N, 3, H, W) in [0, 1] is expected to be: (N, L). The model has `hard`."""
        patches = patchify((images - self.pixel_mean) / self.pixel_std, self.patch_size)
        return self.decoder_hardness(patches, self.grid_of(*images.shape[-2:]))

    @torch.no_grad()
    def reconstruct(self, images: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Fill in the masked patches of pictures. Every figure in the project goes through here.

        images: (N, 3, H, W) in [0, 1]. mask: (N, L), 1 = removed, the same number in every row.
        Returns "pred" (the prediction for every patch), "pasted" (the prediction where masked, the picture
        where visible), both (N, 3, H, W) in [0, 1], "mask" (N, 1, H, W), and "loss" (N,), the training
        objective of each picture (NaN where nothing is removed).
        A model trained with norm_pix_loss predicts normalised patches; its prediction is shown with the
        true mean and deviation of each patch (oracle statistics).
        """
        grid = self.grid_of(*images.shape[-2:])
        kept = (mask == 0).sum(dim=1)
        if mask.shape != (len(images), grid[0] * grid[1]) or (kept != kept[0]).any():
            raise ValueError("mask must be (N, L) with the same number of removed patches in every row")
        normalised = (images - self.pixel_mean) / self.pixel_std
        patches = patchify(normalised, self.patch_size)
        pred, _ = self.predict(patches, mask, int(kept[0]), grid)  # as noise, a mask puts the visible patches first
        loss = masked_pixel_loss(pred, patches, mask, self.norm_pix_loss)
        pred = pred.float()
        if self.norm_pix_loss:
            mean, std = patch_statistics(patches)
            pred = pred * std + mean
        picture = unpatchify(pred, self.patch_size, grid) * self.pixel_std + self.pixel_mean
        picture = picture.clamp(0, 1)
        pasted, area = paste(images, picture, mask, self.patch_size)
        if self.blend:
            picture = blended(self, picture, pasted, area)
            pasted, _ = paste(images, picture, mask, self.patch_size)
        return {"pred": picture, "pasted": pasted, "mask": area, "loss": loss}


def paste(
    images: torch.Tensor, picture: torch.Tensor, mask: torch.Tensor, patch_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a predicted picture where patches were removed, mask (N, L) = 1, and the images (N, 3, H, W) elsewhere.

    Returns (pasted (N, 3, H, W), area (N, 1, H, W), 1 = removed).
    """
    grid = patch_grid(*images.shape[-2:], patch_size)
    area = unpatchify(mask[:, :, None].expand(-1, -1, patch_size**2).float(), patch_size, grid)
    return torch.where(area > 0, picture, images), area


def _take(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Tokens (N, T, D) at the places ids (N, K): (N, K, D)."""
    return tokens.gather(1, ids[:, :, None].expand(-1, -1, tokens.shape[2]))


# size: (embed_dim, depth, num_heads) of the decoder
_DECODERS = {
    "nano": (128, 2, 4),
    "tiny": (128, 4, 4),
    "small": (256, 4, 8),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}


def _model_table() -> dict[str, partial]:
    table = {}
    for size, (dim, depth, heads) in VIT_SIZES.items():
        decoder_dim, decoder_depth, decoder_heads = _DECODERS[size]
        for patch in VIT_PATCHES[size]:
            build = partial(
                MaskedAutoencoder,
                patch_size=patch,
                embed_dim=dim,
                depth=depth,
                num_heads=heads,
                decoder_embed_dim=decoder_dim,
                decoder_depth=decoder_depth,
                decoder_num_heads=decoder_heads,
            )
            table[f"mae_vit_{size}_patch{patch}"] = build
            table[f"mae_vit_{size}_patch{patch}_dec{decoder_dim}d{decoder_depth}b"] = build
    return table


MAE_MODELS = _model_table()


def build_mae(
    name: str, img_size: int | tuple[int, int] = 224, norm_pix_loss: bool = False, **options
) -> MaskedAutoencoder:
    """A freshly initialised model by its official name or alias; UserError for an unknown name.

    options: decoder, fill, hard, refine, as of `MaskedAutoencoder`.
    """
    if name not in MAE_MODELS:
        raise UserError(f"unknown model {name!r}: choose from {', '.join(MAE_MODELS)}")
    return MAE_MODELS[name](img_size=img_size, norm_pix_loss=norm_pix_loss, **options)
