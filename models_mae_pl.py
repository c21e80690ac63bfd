"""Masked autoencoder (He et al. 2022, arXiv 2111.06377) whose visible tokens also learn their position.

By default the encoder has no positional embedding: its visible tokens go to the pixel decoder and to a
classifier over the patch positions (positional labels, Zhang et al. 2023, Sec. 3.3). `pos_embed` "sincos"
with `pos_label` "none" is the plain MAE. With `sr_spatial` or `sr_channel` the visible tokens also learn
their self-relations (SERE, Li et al. 2022) from a moving average of the encoder that sees the whole image.

Shapes: B batch, L patches, n visible, C encoder width, D decoder width, P = ph*pw*in_chans pixel values of a
    patch.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from layers.contract import Entry, Labels, Relations, Trunk, option, relation_head
from layers.pos_embed import sincos_2d
from layers.positional.draws import Draws
from layers.positional.draws import sample_noise as sample_noise
from layers.positional.head import PositionalHead
from layers.self_relation import (
    cells_elsewhere,
    channel_loss,
    sample_tokens,
    spatial_loss,
    valid_mean,
)
from layers.sizes import MAE_ALIASES, SIZES, named_sizes
from layers.transformer import Block, gather_tokens, init_linear_and_norm, patchify, run_blocks, unpatchify
from layers.vit import ViTBackbone


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Number of visible patches at a mask ratio, with MAE's rounding.

    Raises ValueError if the ratio is not in [0, 1), and if no patch is visible.
    """
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"`mask_ratio` must lie in [0, 1), found {mask_ratio}")
    # Rounded down, as in MAE.
    n = int(num_patches * (1 - mask_ratio))
    if n < 1:
        raise ValueError(_nothing_visible(num_patches, mask_ratio))
    return n


def _nothing_visible(num_patches: int, mask_ratio: float) -> str:
    if num_patches == 1:
        return "an image is one patch, and masking leaves none visible: give a larger `img_size`"
    most = math.floor(10_000 * (1 - 1 / num_patches)) / 10_000
    # Products of floats may fall short of 1.
    if int(num_patches * (1 - most)) < 1:
        most = round(most - 0.0001, 4)
    return f"`mask_ratio` {mask_ratio} leaves none of {num_patches} patches visible: give {most} or less"


def total(losses: Mapping[str, Tensor], pos_weight: float = 0.5) -> Tensor:
    """The loss of masked autoencoding with labels, of what the model returns: pixel + pos_weight * position.

    (MAE Eq. 1; positional labels Sec. 3.3, Eq. 6.) Without labels it is the pixel loss.
    """
    if "position" not in losses:
        return losses["pixel"]
    return losses["pixel"] + pos_weight * losses["position"]


def random_masking(noise: Tensor, mask_ratio: float) -> Tensor:
    """Uniform noise (B, L) -> visible cells (B, n): those with the smallest noise, as in MAE."""
    return noise.argsort(dim=1)[:, : num_visible(noise.shape[1], mask_ratio)]


def removed_cells(ids_keep: Tensor, num_patches: int) -> tuple[Tensor, Tensor]:
    """Visible cells (B, n) -> mask (B, L) with 1 = removed, removed cells (B, L-n) in ascending order."""
    B, n = ids_keep.shape
    mask = torch.ones(B, num_patches, device=ids_keep.device).scatter_(1, ids_keep, 0.0)
    return mask, mask.argsort(dim=1, descending=True, stable=True)[:, : num_patches - n]


def in_grid_order(tokens: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
    """Tokens (B, L, P) in the order visible, removed -> in the order of the grid."""
    back = torch.cat([ids_keep, ids_masked], dim=1).argsort(dim=1)  # (B, L)
    return gather_tokens(tokens, back)


@dataclass(frozen=True)
class Decoder:
    """Sizes of the pixel decoder, and its target.

    Attributes:
        dim: channels D of a token.
        depth: number of blocks.
        num_heads: attention heads of a block.
        norm_pix_loss: the target of a patch is normalised by the patch's own mean and variance.
    """

    dim: int = option("decoder_dim", 512)
    depth: int = option("decoder_depth", 8)
    num_heads: int = option("decoder_heads", 16)
    norm_pix_loss: bool = False


class MaskedAutoencoderViT(ViTBackbone):
    """MAE with MAE's parameter names; label heads add `pos_head.*`, relation heads `sr_*`.

    Raises ValueError as `ViTBackbone` and `PositionalHead` do, and if the patch embedding is not linear.
    """

    def __init__(self, trunk: Trunk, decoder: Decoder, labels: Labels, relations: Relations):
        if trunk.patch_embed != "linear":
            raise ValueError(
                f"masking needs the linear `patch_embed`, found {trunk.patch_embed!r}: other embeddings see "
                "masked pixels"
            )
        super().__init__(trunk)
        self.decoder = decoder
        self.relations = relations
        self.norm_pix_loss = decoder.norm_pix_loss
        self._init_decoder()
        # The label heads follow the decoder, so that all parameters above start alike with
        # and without labels.
        self.pos_head: PositionalHead | None = None
        if labels.pos_label != "none":
            self.pos_head = PositionalHead(trunk.dim, self.grid, labels)
        self.sr_spatial = relation_head(relations.spatial, trunk.dim, predictor=True)
        self.sr_channel = relation_head(relations.channel, trunk.dim, predictor=True)

    def _init_decoder(self) -> None:
        dim = self.decoder.dim
        self.decoder_embed = nn.Linear(self.dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=0.02)
        # The decoder always has its fixed embedding: without it all mask tokens would be equal.
        table = torch.empty(1, 1 + self.patch_embed.num_patches, dim)
        self.decoder_pos_embed = nn.Parameter(table, requires_grad=False)
        self.decoder_pos_embed.data.copy_(sincos_2d(dim, self.grid))
        self.decoder_blocks = nn.ModuleList(
            Block(dim, self.decoder.num_heads, self.trunk.mlp_ratio, norm_eps=self.trunk.norm_eps)
            for _ in range(self.decoder.depth)
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=self.trunk.norm_eps)
        pixels = self.patch_size[0] * self.patch_size[1] * self.in_chans
        self.decoder_pred = nn.Linear(dim, pixels)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_linear_and_norm)

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, L, P)."""
        return patchify(imgs, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, L, P) -> (B, in_chans, H, W)."""
        return unpatchify(patches, self.patch_size, self.grid)

    def forward_encoder(self, imgs: Tensor, ids_keep: Tensor, draws: Draws | None = None) -> Tensor:
        """Images and the cells to see, (B, n) -> tokens after the final norm (B, 1+n, C).

        Masked patches are never computed: only visible patches are embedded.
        """
        self.patch_embed.check(imgs)
        return self.norm(self._encode(self.patchify(imgs), ids_keep, draws))

    def _encode(self, patches: Tensor, ids_keep: Tensor, draws: Draws | None = None) -> Tensor:
        """All patches (B, L, P) -> tokens of the visible ones before the final norm (B, 1+n, C)."""
        x = self.patch_embed.embed_patches(gather_tokens(patches, ids_keep))  # (B, n, C)
        cls: Tensor = self.cls_token
        if self.pos_embed is not None:
            x = x + gather_tokens(self.pos_embed[:, 1:].expand(len(x), -1, -1), ids_keep)
            cls = cls + self.pos_embed[:, :1]
        if self.pos_head is not None:
            x = self.pos_head.before(x, ids_keep, draws)
        # Under autocast the embedded patches are bf16. The class token is float32, so the joined tokens are
        # float32: ViT encoders have a float32 residual stream, with and without a positional embedding.
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1+n, C)
        return run_blocks(self.blocks, x, self.grad_checkpointing)

    def forward_decoder(self, latent: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Tokens (B, 1+n, C), visible cells (B, n), masked cells (B, L-n) -> decoded tokens (B, L, D).

        The tokens keep the order visible, masked. Attention does not depend on the order, so the positional
        embedding is gathered in that order, and no token is moved back to its place in the grid.
        """
        B = len(latent)
        x = self.decoder_embed(latent)  # (B, 1+n, D)
        masked = self.mask_token.to(x.dtype).expand(B, ids_masked.shape[1], -1)
        x = torch.cat([x, masked], dim=1)  # (B, 1+L, D)
        order = torch.cat([ids_keep, ids_masked], dim=1)  # (B, L)
        table = self.decoder_pos_embed
        cells = gather_tokens(table[:, 1:].expand(B, -1, -1), order)  # (B, L, D)
        x = x + torch.cat([table[:, :1].expand(B, -1, -1), cells], dim=1)
        return self.decoder_norm(run_blocks(self.decoder_blocks, x, self.grad_checkpointing))[:, 1:]

    def target(self, patches: Tensor) -> Tensor:
        """Patches (B, k, P) -> the target of their prediction: pixels, normalised with `norm_pix_loss`."""
        patches = patches.float()
        if not self.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)  # (B, k, 1)
        return (patches - mean) / (var + 1.0e-6) ** 0.5

    def relation_losses(
        self, tokens: Tensor, ids_keep: Tensor, targets: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Losses of the self-relations of visible patch tokens (B, n, C), taken before the final norm.

        `targets` is the output of `RelationTeacher`.
        """
        losses = {}
        if self.sr_channel is not None:
            student = self.sr_channel(tokens)  # (B, n, C)
            losses["sr_channel"] = channel_loss(
                student, targets["channel"], self.relations.temp_channel
            ).mean()
        if self.sr_spatial is not None:
            student = self.sr_spatial(tokens)  # (B, n, C)
            losses["sr_spatial"] = self._spatial_loss(student, ids_keep, targets)
        return losses

    def _spatial_loss(self, student: Tensor, ids_keep: Tensor, targets: dict[str, Tensor]) -> Tensor:
        """The teacher's tokens are taken at the visible cells.

        If both see the same image, that is by the cells' numbers. If the teacher sees another crop, `targets`
        has the `boxes` of both, and the tokens are read at the same places; cells outside of the teacher's
        crop do not count.
        """
        heads = self.trunk.num_heads
        temperature = self.relations.temp_spatial
        teacher = targets["spatial"]  # (B, L, C)
        if "boxes" not in targets:
            teacher = gather_tokens(teacher, ids_keep)  # (B, n, C)
            return spatial_loss(student, teacher, heads, temperature).mean()
        points, inside = cells_elsewhere(ids_keep, self.grid, *targets["boxes"].unbind(1))
        teacher = sample_tokens(teacher, self.grid, points)  # (B, n, C)
        losses = spatial_loss(student, teacher, heads, temperature, inside)  # (B,)
        # A single cell has no relations.
        return valid_mean(losses, inside.sum(1) > 1)

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        ids_keep: Tensor | None = None,
        want_pred: bool = True,
        relation_targets: dict[str, Tensor] | None = None,
        draws: Draws | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        """Images (B, in_chans, H, W) -> losses, pred (B, L, P), mask (B, L) with 1 = removed: MAE's triple.

        Args:
            imgs: (B, in_chans, H, W).
            mask_ratio: share of removed patches, chosen at random; for `ids_keep` None.
            ids_keep: (B, n) the visible cells.
            want_pred: False predicts removed patches only and returns None as pred, which is enough for
                training.
            relation_targets: the output of `RelationTeacher`; adds the losses `sr_spatial` and `sr_channel`.
            draws: the images' own draws, for label kinds that draw.

        Returns:
            losses: `pixel` (mean squared error over removed patches), and with labels `position`,
                `position_acc`, ...
        """
        self.patch_embed.check(imgs)
        patches = self.patchify(imgs)  # (B, L, P)
        B, L = patches.shape[:2]
        if ids_keep is None:
            ids_keep = random_masking(torch.rand(B, L, device=imgs.device), mask_ratio)
        n = ids_keep.shape[1]
        mask, ids_masked = removed_cells(ids_keep, L)
        tokens = self._encode(patches, ids_keep, draws)
        latent = self.norm(tokens)  # (B, 1+n, C)
        decoded = self.forward_decoder(latent, ids_keep, ids_masked)  # (B, L, D), visible first
        pred_masked = self.decoder_pred(decoded[:, n:])  # (B, L-n, P)
        losses = {"pixel": self._pixel_loss(pred_masked, gather_tokens(patches, ids_masked))}
        if self.pos_head is not None:
            losses |= self.pos_head(latent[:, 1:], ids_keep, draws)
        if relation_targets is not None:
            losses |= self.relation_losses(tokens[:, 1:], ids_keep, relation_targets)
        if not want_pred:
            return losses, None, mask
        pred = torch.cat([self.decoder_pred(decoded[:, :n]), pred_masked], dim=1)  # (B, L, P), visible first
        return losses, in_grid_order(pred, ids_keep, ids_masked), mask

    def predict(self, imgs: Tensor, ids_keep: Tensor, draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Images and visible cells (B, n) -> pred (B, L, P) and mask (B, L) without losses, for pictures."""
        self.patch_embed.check(imgs)
        patches = self.patchify(imgs)  # (B, L, P)
        mask, ids_masked = removed_cells(ids_keep, patches.shape[1])
        latent = self.norm(self._encode(patches, ids_keep, draws))  # (B, 1+n, C)
        pred = self.decoder_pred(self.forward_decoder(latent, ids_keep, ids_masked))  # (B, L, P)
        return in_grid_order(pred, ids_keep, ids_masked), mask

    def _pixel_loss(self, pred: Tensor, patches: Tensor) -> Tensor:
        """Mean squared error of predicted removed patches (B, L-n, P)."""
        error = pred.float() - self.target(patches)
        # At mask ratio 0 there is nothing to reconstruct, and the mean of nothing would be nan.
        if not pred.shape[1]:
            return pred.float().sum()
        return error.square().mean()

    def chance(self, mask_ratio: float) -> dict[str, float]:
        """Chance levels of `forward`'s losses by their names; empty without labels and relations.

        For labels they are the loss and the accuracy of guessed positions, for relations the loss of uniform
        ones. Raises ValueError as `num_visible` does.
        """
        n = num_visible(self.patch_embed.num_patches, mask_ratio)
        levels = {}
        if self.sr_spatial is not None:
            levels["sr_spatial"] = math.log(n)
        if self.sr_channel is not None:
            levels["sr_channel"] = math.log(self.dim)
        if self.pos_head is not None:
            levels |= self.pos_head.chance(n)
        return levels

    def no_weight_decay(self) -> set[str]:
        """The encoder's list, the decoder's table and the mask token."""
        return super().no_weight_decay() | {"decoder_pos_embed", "mask_token"}


class RelationTeacher(ViTBackbone):
    """The moving average of a model that teaches self-relations: its encoder and relation heads."""

    def __init__(self, model: MaskedAutoencoderViT):
        super().__init__(dataclasses.replace(model.trunk, drop_path=0.0))
        self.sr_spatial = relation_head(model.relations.spatial, model.dim, predictor=False)
        self.sr_channel = relation_head(model.relations.channel, model.dim, predictor=False)

    @torch.no_grad()
    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        """Whole images -> the tokens (B, L, C) that form the relations `spatial` and `channel`."""
        tokens = self.forward_tokens(imgs)[:, 1:]  # (B, L, C)
        heads = {"spatial": self.sr_spatial, "channel": self.sr_channel}
        return {name: head(tokens) for name, head in heads.items() if head is not None}


# Decoders by the size of the encoder. Base, large and huge are MAE's.
DECODERS: dict[str, Decoder] = {
    "tiny": Decoder(192, 4, 3),
    "small": Decoder(256, 4, 8),
    "base": Decoder(512, 8, 16),
    "large": Decoder(512, 8, 16),
    "huge": Decoder(512, 8, 16),
}
# Decoders for patches up to 8 pixels. On 8x8 cells MAE's 8 blocks of width 512 would be most of the network.
SMALL_DECODERS: dict[str, Decoder] = {
    "pico": Decoder(64, 1, 2),
    "nano": Decoder(96, 2, 3),
    "tiny": Decoder(128, 2, 4),
    "small": Decoder(192, 4, 6),
    "base": Decoder(256, 4, 8),
}


def decoder_of(size: str, patch: int) -> Decoder | None:
    """The decoder that goes with an encoder of a named size; None for an unknown size."""
    if patch > 8:
        return DECODERS.get(size)
    return SMALL_DECODERS.get(size)


def name_and_heads(dim: int, depth: int, decoder_dim: int, patch: int) -> tuple[str, int, int]:
    """(size, heads, decoder heads) for an encoder without a stored name.

    For an unknown size, the name is empty, and the heads have the usual 64 channels (32 in the decoder).
    """
    size = next((s for s, e in SIZES.items() if (e["dim"], e["depth"]) == (dim, depth)), "")
    heads = max(1, dim // 64)
    if size:
        heads = SIZES[size]["num_heads"]
    decoder = decoder_of(size, patch)
    if decoder is not None and decoder.dim == decoder_dim:
        return size, heads, decoder.num_heads
    return size, heads, max(1, decoder_dim // 32)


MAE_VIT = Entry(
    MaskedAutoencoderViT,
    {"trunk": Trunk(), "decoder": Decoder(), "labels": Labels(pos_label="apl"), "relations": Relations()},
)


def _named(size: str, patch: int) -> Entry[MaskedAutoencoderViT]:
    decoder = decoder_of(size, patch)
    entry = MAE_VIT.override(**SIZES[size], patch_size=(patch, patch))
    return dataclasses.replace(entry, defaults={**entry.defaults, "decoder": decoder})


MODELS: dict[str, Entry[MaskedAutoencoderViT]] = {
    f"mae_vit_{size}_patch{patch}": _named(size, patch) for size, patch in named_sizes()
}
# MAE's full names.
for _full, _name in MAE_ALIASES.items():
    MODELS[_full] = MODELS[_name]
