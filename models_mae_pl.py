"""Masked autoencoder (He et al. 2022, arXiv 2111.06377) whose visible tokens also learn their position.

The encoder has no positional embedding unless asked: its visible tokens go to the pixel decoder and to a classifier
over the patch positions (positional labels, Zhang et al. 2023, Sec. 3.3). ``pos_embed="sincos", pos_label="none"`` is
the plain MAE. With `sr_spatial` or `sr_channel` the visible tokens learn their self-relations (SERE, Li et al. 2022) from a
moving average of the encoder that sees the whole image.

Shapes: B batch, L patches, n visible, C encoder width, D decoder width, P = ph*pw*in_chans pixel values of a patch.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from layers.pos_embed import sincos_2d
from layers.positional import PositionalHead
from layers.self_relation import (
    RelationHead,
    cells_elsewhere,
    channel_loss,
    sample_tokens,
    spatial_loss,
    valid_mean,
)
from layers.transformer import Block, gather_tokens, init_linear_and_norm, patchify, run_blocks, unpatchify
from layers.vit import ViTBackbone


def num_visible(num_patches: int, mask_ratio: float) -> int:
    """Visible patches at a mask ratio, MAE's rounding; ValueError when the ratio is not in [0, 1) or none is left."""
    if not 0 <= mask_ratio < 1:
        raise ValueError(f"--mask_ratio must lie in [0, 1), found {mask_ratio}")
    n = int(num_patches * (1 - mask_ratio))
    if n < 1:
        raise ValueError(f"--mask_ratio {mask_ratio} leaves none of {num_patches} patches visible: lower it")
    return n


def random_masking(noise: Tensor, mask_ratio: float) -> Tensor:
    """Uniform noise (B, L) -> cells of the visible patches, (B, n): those with the smallest noise, as in MAE."""
    return noise.argsort(dim=1)[:, : num_visible(noise.shape[1], mask_ratio)]


def sample_noise(keys: Tensor, num_patches: int) -> Tensor:
    """One int64 key per image (B,) -> noise (B, L) in [0, 1), a pure function of the key.

    A counter-based hash (splitmix64's finaliser) instead of a generator: an image's mask then depends neither on the
    rank, nor on the batch that it is in, nor on what was drawn before.
    """
    if keys.device.type == "mps":  # has no float64
        return sample_noise(keys.cpu(), num_patches).float().to(keys.device)
    x = keys[:, None] + torch.arange(1, num_patches + 1, device=keys.device) * -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * factor  # masked: >> is arithmetic on int64
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    return ((x >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


class MaskedAutoencoderViT(ViTBackbone):
    """MAE with MAE's parameter names; the label head adds `pos_head.*`.

    `pos_label` is none, apl, rpl or apl+rpl; see `layers.positional.PositionalHead` for the other `pos_*` and
    `rpl_pairs` arguments. `norm_pix_loss` normalises the target by each patch's mean and variance.
    """

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        *,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_pix_loss: bool = False,
        pos_embed: str = "none",
        pos_label: str = "apl",
        pos_tokens: str = "half",
        rpl_pairs: int = 0,
        sr_spatial: bool = False,
        sr_channel: bool = False,
        sr_temp_spatial: float = 0.5,
        sr_temp_channel: float = 0.1,
    ):
        super().__init__(img_size, patch_size, in_chans, dim, depth, num_heads, mlp_ratio, pos_embed)
        L = self.patch_embed.num_patches
        self.norm_pix_loss = norm_pix_loss
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder_dim))
        nn.init.normal_(self.mask_token, std=0.02)
        # The decoder keeps its fixed embedding in every mode: mask tokens are equal but for it.
        self.decoder_pos_embed = nn.Parameter(torch.empty(1, 1 + L, decoder_dim), requires_grad=False)
        self.decoder_pos_embed.data.copy_(sincos_2d(decoder_dim, self.grid))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_dim, decoder_heads, mlp_ratio) for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(decoder_dim, patch_size[0] * patch_size[1] * in_chans)
        for part in (self.decoder_embed, self.decoder_blocks, self.decoder_pred):
            part.apply(init_linear_and_norm)
        # Last, so that everything above starts from the same numbers with and without labels.
        self.pos_head = None
        if pos_label != "none":
            self.pos_head = PositionalHead(dim, self.grid, pos_label, pos_tokens, rpl_pairs)
        self.num_heads, self.temp_spatial, self.temp_channel = num_heads, sr_temp_spatial, sr_temp_channel
        self.sr_spatial = RelationHead(dim, predictor=True) if sr_spatial else None
        self.sr_channel = RelationHead(dim, predictor=True) if sr_channel else None

    def patchify(self, imgs: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, L, P)."""
        return patchify(imgs, self.patch_size)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(B, L, P) -> (B, in_chans, H, W)."""
        return unpatchify(patches, self.patch_size, self.grid)

    def forward_encoder(self, imgs: Tensor, ids_keep: Tensor) -> Tensor:
        """Images and the cells to see, (B, n) -> tokens after the final norm (B, 1+n, C).

        Masked patches are never computed: the embedding sees what the encoder sees.
        """
        self.patch_embed.check(imgs)
        return self.norm(self._encode(self.patchify(imgs), ids_keep))

    def _encode(self, patches: Tensor, ids_keep: Tensor) -> Tensor:
        """All patches (B, L, P) -> tokens of the visible ones before the final norm (B, 1+n, C)."""
        x = self.patch_embed.embed_patches(gather_tokens(patches, ids_keep))  # (B, n, C)
        cls = self.cls_token
        if self.pos_embed is not None:
            x = x + gather_tokens(self.pos_embed[:, 1:].expand(len(x), -1, -1), ids_keep)
            cls = cls + self.pos_embed[:, :1]
        # Under autocast the product above is bf16. The class token is float32, and so becomes what they are joined to:
        # ViT encoders have a float32 residual stream, with and without a positional embedding.
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1+n, C)
        return run_blocks(self.blocks, x, self.grad_checkpointing)

    def forward_decoder(self, latent: Tensor, ids_keep: Tensor, ids_masked: Tensor) -> Tensor:
        """Tokens (B, 1+n, C), visible cells (B, n), masked cells (B, L-n) -> decoded tokens (B, L, D).

        Tokens stay in the order visible, masked: attention does not care, so that the positional embedding is
        gathered in that order and nothing is moved back to the grid.
        """
        B = len(latent)
        x = self.decoder_embed(latent)  # (B, 1+n, D)
        masked = self.mask_token.to(x.dtype).expand(B, ids_masked.shape[1], -1)
        x = torch.cat([x, masked], dim=1)  # (B, 1+L, D)
        order = torch.cat([ids_keep, ids_masked], dim=1)  # (B, L)
        pos = self.decoder_pos_embed
        x = x + torch.cat(
            [pos[:, :1].expand(B, -1, -1), gather_tokens(pos[:, 1:].expand(B, -1, -1), order)], dim=1
        )
        return self.decoder_norm(run_blocks(self.decoder_blocks, x, self.grad_checkpointing))[:, 1:]

    def target(self, patches: Tensor) -> Tensor:
        """What is predicted for each patch, (B, k, P): its pixels, or with `norm_pix_loss` the normalised ones."""
        patches = patches.float()
        if not self.norm_pix_loss:
            return patches
        var, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        return (patches - mean) / (var + 1.0e-6) ** 0.5

    def relation_losses(
        self, tokens: Tensor, ids_keep: Tensor, targets: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Self-relations of the visible patch tokens (B, n, C), before the final norm, against `RelationTeacher`'s.

        The teacher's tokens are taken at the visible cells: of the same image by their number, of another crop of it, for
        which `targets` has the `boxes` of both, by their place, and cells outside of that crop do not count.
        """
        losses = {}
        if self.sr_channel is not None:
            losses["sr_channel"] = channel_loss(
                self.sr_channel(tokens), targets["channel"], self.temp_channel
            ).mean()
        if self.sr_spatial is not None:
            own, theirs = self.sr_spatial(tokens), targets["spatial"]
            if "boxes" in targets:
                points, inside = cells_elsewhere(ids_keep, self.grid, *targets["boxes"].unbind(1))
                theirs = sample_tokens(theirs, self.grid, points)
                spatial = spatial_loss(own, theirs, self.num_heads, self.temp_spatial, inside)
                losses["sr_spatial"] = valid_mean(
                    spatial, inside.sum(1) > 1
                )  # one cell alone has no relations
            else:
                theirs = gather_tokens(theirs, ids_keep)
                losses["sr_spatial"] = spatial_loss(own, theirs, self.num_heads, self.temp_spatial).mean()
        return losses

    def forward(
        self,
        imgs: Tensor,
        mask_ratio: float = 0.75,
        ids_keep: Tensor | None = None,
        want_pred: bool = True,
        relation_targets: dict[str, Tensor] | None = None,
    ) -> tuple[dict[str, Tensor], Tensor | None, Tensor]:
        """Images (B, in_chans, H, W) -> losses, pred (B, L, P), mask (B, L) with 1 = removed: MAE's triple.

        losses: `pixel` (mean squared error over removed patches), and with labels `position`, `position_acc`, ...
        `ids_keep` (B, n) are the visible cells, random ones at `mask_ratio` if not given. Without `want_pred` only
        removed patches are predicted and pred is None, which is all that training needs. `relation_targets` add
        `sr_spatial` and `sr_channel`, see `relation_losses`.
        """
        self.patch_embed.check(imgs)
        patches = self.patchify(imgs)  # (B, L, P)
        B, L = patches.shape[:2]
        if ids_keep is None:
            ids_keep = random_masking(torch.rand(B, L, device=imgs.device), mask_ratio)
        n = ids_keep.shape[1]
        mask = torch.ones(B, L, device=imgs.device).scatter_(1, ids_keep, 0.0)
        ids_masked = mask.argsort(dim=1, descending=True, stable=True)[:, : L - n]  # (B, L-n)

        tokens = self._encode(patches, ids_keep)
        latent = self.norm(tokens)  # (B, 1+n, C)
        decoded = self.forward_decoder(latent, ids_keep, ids_masked)  # (B, L, D), visible first

        pred_masked = self.decoder_pred(decoded[:, n:])  # (B, L-n, P)
        error = pred_masked.float() - self.target(gather_tokens(patches, ids_masked))
        # An empty mean is nan: at mask ratio 0 there is nothing to reconstruct.
        losses = {"pixel": error.square().mean() if n < L else pred_masked.float().sum()}
        if self.pos_head is not None:
            losses |= self.pos_head(latent[:, 1:], ids_keep)
        if relation_targets is not None:
            losses |= self.relation_losses(tokens[:, 1:], ids_keep, relation_targets)
        if not want_pred:
            return losses, None, mask
        pred = torch.cat([self.decoder_pred(decoded[:, :n]), pred_masked], dim=1)  # (B, L, P), visible first
        back = torch.cat([ids_keep, ids_masked], dim=1).argsort(dim=1)
        return losses, gather_tokens(pred, back), mask

    def chance(self, mask_ratio: float) -> dict[str, float]:
        """Loss and accuracy of guessing positions, and the loss of uniform relations of all visible cells, by the names in
        `forward`'s losses; empty without labels and relations."""
        n = num_visible(self.patch_embed.num_patches, mask_ratio)
        levels = {"sr_spatial": math.log(n)} if self.sr_spatial is not None else {}
        levels |= {"sr_channel": math.log(self.dim)} if self.sr_channel is not None else {}
        return levels | (self.pos_head.chance(n) if self.pos_head is not None else {})

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"decoder_pos_embed", "mask_token"}


class RelationTeacher(ViTBackbone):
    """The part of a `MaskedAutoencoderViT` whose moving average teaches self-relations: encoder and relation heads."""

    def __init__(self, model: MaskedAutoencoderViT):
        block = model.blocks[0]
        super().__init__(
            model.img_size,
            model.patch_size,
            model.in_chans,
            model.dim,
            len(model.blocks),
            model.num_heads,
            block.mlp.fc1.out_features / model.dim,
            model.pos_embed_kind,
        )
        self.sr_spatial = RelationHead(model.dim, predictor=False) if model.sr_spatial is not None else None
        self.sr_channel = RelationHead(model.dim, predictor=False) if model.sr_channel is not None else None

    @torch.no_grad()
    def forward(self, imgs: Tensor) -> dict[str, Tensor]:
        """Whole images -> tokens (B, L, C) of which `spatial` and `channel` relations are formed."""
        tokens = self.forward_tokens(imgs)[:, 1:]
        heads = {"spatial": self.sr_spatial, "channel": self.sr_channel}
        return {name: head(tokens) for name, head in heads.items() if head is not None}


# Width, depth and heads of the encoder, then of the decoder. Base, large and huge are MAE's. Small patches are for
# small images and get a small decoder: on 8x8 cells MAE's 512x8 would be most of the network. Pico and nano are for CPUs.
_ENCODERS = {
    "pico": (96, 4, 3),
    "nano": (128, 6, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
_DECODERS = {
    "tiny": (192, 4, 3),
    "small": (256, 4, 8),
    "base": (512, 8, 16),
    "large": (512, 8, 16),
    "huge": (512, 8, 16),
}
_SMALL_DECODERS = {
    "pico": (64, 1, 2),
    "nano": (96, 2, 3),
    "tiny": (128, 2, 4),
    "small": (192, 4, 6),
    "base": (256, 4, 8),
}


def _mae(size: str, patch: int, **kwargs) -> MaskedAutoencoderViT:
    encoder, decoder = _ENCODERS[size], (_DECODERS if patch > 8 else _SMALL_DECODERS)[size]
    names = ("dim", "depth", "num_heads", "decoder_dim", "decoder_depth", "decoder_heads")
    return MaskedAutoencoderViT(
        **dict(zip(names, encoder + decoder)) | {"patch_size": (patch, patch)} | kwargs
    )


def name_and_heads(dim: int, depth: int, decoder_dim: int, patch: int) -> tuple[str, int, int]:
    """(size, heads, decoder heads) of an encoder that came without a name; '' and the usual 64 and 32 channels a head
    where it is none of ours."""
    size = next((size for size, (d, layers, _) in _ENCODERS.items() if (d, layers) == (dim, depth)), "")
    decoders = _DECODERS if patch > 8 else _SMALL_DECODERS
    decoder = decoders.get(size, (0, 0, 0))
    heads = _ENCODERS[size][2] if size else max(1, dim // 64)
    return size, heads, decoder[2] if decoder[0] == decoder_dim else max(1, decoder_dim // 32)


_PATCHES = {
    "pico": (8, 4),
    "nano": (8, 4),
    "tiny": (16, 8, 4),
    "small": (16, 8, 4),
    "base": (16, 8, 4),
    "large": (16,),
    "huge": (14,),
}

# name -> builder; keyword arguments of MaskedAutoencoderViT override what the name says.
MODELS = {
    f"mae_vit_{size}_patch{patch}": partial(_mae, size, patch)
    for size, patches in _PATCHES.items()
    for patch in patches
}
MODELS |= {
    f"{name}_dec512d8b": MODELS[name]  # MAE's full names
    for name in ("mae_vit_base_patch16", "mae_vit_large_patch16", "mae_vit_huge_patch14")
}
