"""The plain Vision Transformer trunk that the masked autoencoder and the classifiers share."""

import torch
from torch import Tensor, nn

from layers.conv_embed import ConvTokenEmbed
from layers.pos_embed import resize_pos_embed, sincos_2d
from layers.transformer import Block, PatchEmbed, init_linear_and_norm, run_blocks

POS_EMBED_KINDS = ("none", "sincos", "learned")
PATCH_EMBEDS = {"linear": PatchEmbed, "conv": ConvTokenEmbed}


class ViTBackbone(nn.Module):
    """Patch embedding, class token, optional positional embedding, blocks, final norm; MAE's state-dict keys.

    `pos_embed` is "none" (no such parameter at all), "sincos" (MAE's frozen table) or "learned"; `patch_embed` is
    "linear" (MAE's) or "conv" (So-ViT's, for images of which nothing is masked).
    Attributes: `dim`, `grid` (h, w), `num_prefix` (class token: 1), `patch_size`, `img_size`, `in_chans`, `num_layers`.
    """

    prefix_names = ("cls_token",)  # learned tokens that go before the patches, in their order
    grad_checkpointing = False

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: tuple[int, int] = (16, 16),
        in_chans: int = 3,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        pos_embed: str = "none",
        drop_path: float = 0.0,
        patch_embed: str = "linear",
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        if patch_embed not in PATCH_EMBEDS:
            raise ValueError(f"--patch_embed takes one of {', '.join(PATCH_EMBEDS)}, found {patch_embed!r}")
        if pos_embed not in POS_EMBED_KINDS:
            raise ValueError(f"--pos_embed takes one of {', '.join(POS_EMBED_KINDS)}, found {pos_embed!r}")
        self.dim, self.num_prefix = dim, len(self.prefix_names)
        self.patch_embed = PATCH_EMBEDS[patch_embed](img_size, patch_size, in_chans, dim)
        self.grid, self.img_size, self.patch_size = self.patch_embed.grid, img_size, patch_size
        self.in_chans, self.pos_embed_kind = in_chans, pos_embed
        for name in self.prefix_names:
            self.register_parameter(name, nn.Parameter(nn.init.normal_(torch.empty(1, 1, dim), std=0.02)))
        self.register_parameter("pos_embed", self._make_pos_embed(pos_embed))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]  # stochastic depth grows with depth
        self.blocks = nn.ModuleList(
            Block(dim, num_heads, mlp_ratio, rate, qkv_bias, norm_eps) for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=norm_eps)
        self.blocks.apply(init_linear_and_norm)

    def _make_pos_embed(self, kind: str) -> nn.Parameter | None:
        if kind == "none":
            return None
        if kind == "sincos":
            return nn.Parameter(sincos_2d(self.dim, self.grid, self.num_prefix), requires_grad=False)
        table = torch.zeros(1, self.num_prefix + self.grid[0] * self.grid[1], self.dim)
        return nn.Parameter(nn.init.trunc_normal_(table, std=0.02))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> all tokens after the final norm (B, num_prefix + L, C)."""
        return self.norm(self.forward_blocks(self.patch_embed(x), self.grid))

    def forward_tokens(
        self, x: Tensor, mask: Tensor | None = None, mask_token: Tensor | None = None
    ) -> Tensor:
        """Images of any size that patches divide -> all tokens before the final norm (B, num_prefix + L, C).

        Where `mask` (B, L) is true, `mask_token` (1, 1, C) stands in for the patch. For the linear patch embedding.
        """
        grid = self.grid_of(x.shape[-2:])
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)  # (B, L, C)
        if mask is not None:
            x = torch.where(mask[..., None], mask_token.to(x.dtype), x)
        return self.forward_blocks(x, grid)

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of patches of an image of (H, W)."""
        return size[0] // self.patch_size[0], size[1] // self.patch_size[1]

    def forward_blocks(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Embedded patches (B, L, C) of a grid, to which a positional embedding is resized -> (B, num_prefix + L, C)."""
        prefix = [getattr(self, name).expand(x.shape[0], -1, -1) for name in self.prefix_names]
        x = torch.cat([*prefix, x], dim=1)  # (B, num_prefix + L, C)
        if self.pos_embed is not None:
            x = x + resize_pos_embed(self.pos_embed, self.grid, grid)
        return run_blocks(self.blocks, x, self.grad_checkpointing)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for backward and run each block again there: less memory, more time."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are never decayed (beside all one-dimensional ones)."""
        return {*self.prefix_names, "pos_embed"}

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return len(self.blocks) + 1

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 embedding, 1..depth blocks, depth+1 the heads.

        The final norm counts as a head, as in MAE and BEiT.
        """
        if name.startswith("blocks."):
            return int(name.split(".")[1]) + 1
        if name.startswith(("patch_embed.", "pos_embed", *self.prefix_names)):
            return 0
        return self.num_layers
