"""The plain Vision Transformer trunk that the masked autoencoder and the classifiers share.

Shapes: B batch, L patches, C channels of a token, h w the grid of patches.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from layers.contract import Backbone, Trunk
from layers.conv_embed import ConvTokenEmbed
from layers.pos_embed import resize_pos_embed, sincos_2d
from layers.transformer import Block, PatchEmbed, init_linear_and_norm, patch_grid, run_blocks

POS_EMBED_KINDS = ("none", "sincos", "learned")
PATCH_EMBEDS = {"linear": PatchEmbed, "conv": ConvTokenEmbed}


class ViTBackbone(Backbone):
    """Patch embedding, class token, optional positional embedding, blocks, final norm; MAE's state-dict keys.

    It also has `patch_size` and `img_size`. Raises ValueError if `trunk` names an unknown embedding, or if
    the patches do not fill the image.
    """

    trunk: Trunk
    cls_token: nn.Parameter
    pos_embed: nn.Parameter | None
    # Learned tokens that precede the patches, in their order.
    prefix_names: tuple[str, ...] = ("cls_token",)
    grad_checkpointing = False

    def __init__(self, trunk: Trunk):
        super().__init__()
        if trunk.patch_embed not in PATCH_EMBEDS:
            raise ValueError(
                f"`patch_embed` takes one of {', '.join(PATCH_EMBEDS)}, found {trunk.patch_embed!r}"
            )
        if trunk.pos_embed not in POS_EMBED_KINDS:
            raise ValueError(
                f"`pos_embed` takes one of {', '.join(POS_EMBED_KINDS)}, found {trunk.pos_embed!r}"
            )
        self.trunk = trunk
        self.dim = trunk.dim
        self.img_size = trunk.img_size
        self.patch_size = trunk.patch_size
        self.in_chans = trunk.in_chans
        self.num_prefix = len(self.prefix_names)
        embed: Any = PATCH_EMBEDS[trunk.patch_embed]
        # The order in which parameters are made fixes the random numbers that they start from.
        self.patch_embed: Any = embed(trunk.img_size, trunk.patch_size, trunk.in_chans, trunk.dim)
        self.grid = self.patch_embed.grid
        for name in self.prefix_names:
            token = torch.empty(1, 1, trunk.dim)
            self.register_parameter(name, nn.Parameter(nn.init.normal_(token, std=0.02)))
        self.register_parameter("pos_embed", self._make_pos_embed(trunk.pos_embed))
        self.blocks = nn.ModuleList(
            Block(trunk.dim, trunk.num_heads, trunk.mlp_ratio, rate, trunk.qkv_bias, trunk.norm_eps)
            for rate in drop_rates(trunk.drop_path, trunk.depth)
        )
        self.norm: nn.Module = nn.LayerNorm(trunk.dim, eps=trunk.norm_eps)
        self.blocks.apply(init_linear_and_norm)

    def _make_pos_embed(self, kind: str) -> nn.Parameter | None:
        if kind == "none":
            return None
        if kind == "sincos":
            return nn.Parameter(sincos_2d(self.dim, self.grid, self.num_prefix), requires_grad=False)
        # Learned: ViT's initialisation.
        table = torch.zeros(1, self.num_prefix + self.grid[0] * self.grid[1], self.dim)
        return nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> all tokens after the final norm (B, num_prefix + L, C)."""
        x = self.patch_embed(x)  # (B, L, C)
        return self.norm(self.forward_blocks(x, self.grid))

    def forward_any_size(self, x: Tensor) -> Tensor:
        """`forward_features` for images of any size that the patches fill; else raises ValueError."""
        grid = self.grid_of((x.shape[-2], x.shape[-1]))
        return self.norm(self.forward_blocks(self.patch_embed.embed(x), grid))

    @property
    def num_blocks(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    def block_tokens(self, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Images of any size that the patches fill -> tokens (B, num_prefix + L, C) after each of the blocks.

        The final norm is applied to the tokens of each block.
        """
        grid = self.grid_of((x.shape[-2], x.shape[-1]))
        x = self.with_prefix(self.patch_embed.embed(x), grid)  # (B, num_prefix + L, C)
        found: dict[int, Tensor] = {}
        for i, block in enumerate(self.blocks[: max(blocks) + 1]):
            x = run_blocks([block], x, self.grad_checkpointing)
            if i in blocks:
                found[i] = self.norm(x)
        return [found[i] for i in blocks]

    def forward_tokens(
        self, x: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Images of any size that the patches fill -> tokens before the final norm (B, num_prefix + L, C).

        `mask_token` (1, 1, C) replaces each patch for which `mask` (B, L) is true. Only for
        the linear patch embedding.
        """
        grid = self.grid_of((x.shape[-2], x.shape[-1]))
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (B, L, C)
        if mask is not None:
            assert mask_token is not None
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        return self.forward_blocks(x, grid)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of patches of an image of `size` (H, W).

        Raises ValueError if the patches do not fill it.
        """
        return patch_grid(size, self.patch_size)

    def forward_blocks(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embedded patches (B, L, C) of a `grid` -> tokens before the final norm (B, num_prefix + L, C).

        The positional embedding is resized to `grid`.
        """
        return run_blocks(self.blocks, self.with_prefix(x, grid), self.grad_checkpointing)

    def with_prefix(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embedded patches (B, L, C) of a `grid` -> the input of the blocks (B, num_prefix + L, C)."""
        prefix = [getattr(self, name).expand(x.shape[0], -1, -1) for name in self.prefix_names]
        x = torch.cat([*prefix, x], dim=1)  # (B, num_prefix + L, C)
        if self.pos_embed is not None:
            x = x + self.resized_pos_embed(self.pos_embed, grid)
        return x

    def resized_pos_embed(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """The positional embedding (1, num_prefix + L, C) of this model, resized to a `grid`."""
        return resize_pos_embed(table, self.grid, grid)

    def set_norm_eps(self, eps: float) -> None:
        """Set the epsilon of all layer norms, as of a file that was trained with another one."""
        self.trunk = dataclasses.replace(self.trunk, norm_eps=eps)
        for module in self.modules():
            if isinstance(module, nn.LayerNorm):
                module.eps = eps

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs and run each block again in backward: less memory, more time."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, in addition to all one-dimensional ones."""
        return {*self.prefix_names, "pos_embed"}

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return len(self.blocks) + 1

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 embedding, 1..depth blocks, depth + 1 heads.

        The final norm counts as a head, as in MAE and BEiT.
        """
        # E.g. blocks.3.attn.qkv.weight
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        if name.startswith(("patch_embed.", "pos_embed", *self.prefix_names)):
            return 0
        return self.num_layers


def drop_rates(last: float, depth: int) -> list[float]:
    """Stochastic depth of each block, growing linearly from 0 to `last`."""
    return [last * i / max(1, depth - 1) for i in range(depth)]
