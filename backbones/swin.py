"""Swin Transformer (Liu et al. 2021) with the changes of the positional-label paper (arXiv 2206.04981, Sec. 3.4).

* The last stage works at 1/16 instead of 1/32 of the image: the third patch merging only widens the tokens, and the
  last stage attends globally. Labels then tell 196 positions apart instead of 49. `merge_last` gives the usual stage.
* A conditional positional encoding (Chu et al. 2021) opens every block and replaces the relative position bias.

Shapes: B batch, H W rows and columns of a stage's grid, h w those of a window, n windows of an image, C channels.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.classifier import Classifier
from layers.transformer import Attention, DropPath, Mlp, PatchEmbed, run_blocks


def window_partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B*n, h*w, C), windows of an image row by row; H, W are multiples of the window's."""
    B, H, W, C = x.shape
    h, w = window
    x = x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3)  # (B, H/h, W/w, h, w, C)
    return x.reshape(-1, h * w, C)


def window_merge(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Inverse of `window_partition`: (B*n, h*w, C) -> (B, H, W, C)."""
    (H, W), (h, w), C = size, window, windows.shape[-1]
    x = windows.reshape(-1, H // h, W // w, h, w, C).transpose(2, 3)  # (B, H/h, h, W/w, w, C)
    return x.reshape(-1, H, W, C)


def window_mask(
    grid: tuple[int, int], padded: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
):
    """Which tokens of a window may attend to which, (n, h*w, h*w) bool; None when all may.

    After a cyclic shift, a window can hold tokens from opposite borders of the image; they do not see each other.
    Padding is seen by nobody, except that each token sees itself: a row without a key would be undefined.
    """
    if not any(shift) and grid == padded:
        return None
    wrapped, real = [], []
    for size, whole, offset in zip(grid, padded, shift):
        source = torch.arange(whole) + offset  # where the token of each shifted row or column comes from
        wrapped.append(source >= whole)
        real.append(source % whole < size)
    region = 2 * wrapped[0][:, None] + 1 * wrapped[1][None, :]  # (H, W)
    region = window_partition(region[None, ..., None], window).squeeze(-1)  # (n, h*w)
    real = window_partition((real[0][:, None] & real[1][None, :])[None, ..., None], window).squeeze(-1)
    mask = (region[:, :, None] == region[:, None, :]) & real[:, None, :]  # (n, h*w, h*w)
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool)


class SwinBlock(nn.Module):
    """[x + cpe(x)], then x + attention in windows, then x + mlp; pre-norm.

    The window is cut to the grid where the grid is smaller, and is not shifted along such a side. A grid that the
    window does not divide is padded below and at the right.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        window: tuple[int, int],
        shifted: bool,
        cpe: bool,
        mlp_ratio: float,
        drop_path: float,
    ):
        super().__init__()
        self.grid = grid
        self.window = tuple(min(w, g) for w, g in zip(window, grid))
        self.shift = tuple(w // 2 if shifted and g > w else 0 for w, g in zip(self.window, grid))
        self.padded = tuple(-(-g // w) * w for w, g in zip(self.window, grid))
        self.cpe = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim) if cpe else None
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.register_buffer(
            "mask", window_mask(grid, self.padded, self.window, self.shift), persistent=False
        )

    def window_attention(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        if self.padded != self.grid:
            x = F.pad(x, (0, 0, 0, self.padded[1] - W, 0, self.padded[0] - H))
        if any(self.shift):
            x = x.roll((-self.shift[0], -self.shift[1]), dims=(1, 2))
        mask = self.mask
        if mask is not None:
            mask = mask.expand(B, *mask.shape).reshape(-1, 1, *mask.shape[1:])  # (B*n, 1, h*w, h*w)
        windows = self.attn(window_partition(x, self.window), mask)  # (B*n, h*w, C)
        x = window_merge(windows, self.window, self.padded)
        if any(self.shift):
            x = x.roll(self.shift, dims=(1, 2))
        return x[:, :H, :W]

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        if self.cpe is not None:
            x = x + self.cpe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        x = x + self.drop_path(self.window_attention(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class PatchMerging(nn.Module):
    """Norm and a linear layer without bias to twice the width: (B, H, W, C) -> (B, H/2, W/2, 2C), rounded up.

    The four tokens of each 2x2 cell are concatenated first, column offset before row offset, as in Swin. With
    `merge` false each token stays by itself, (B, H, W, C) -> (B, H, W, 2C): the paper's last transition.
    """

    def __init__(self, dim: int, merge: bool = True):
        super().__init__()
        self.merge = merge
        width = 4 * dim if merge else dim
        self.norm = nn.LayerNorm(width)
        self.reduction = nn.Linear(width, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.merge:
            B, H, W, C = x.shape
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
            x = x.reshape(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C)
            x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """The way down to a stage (nothing for the first), and its blocks."""

    def __init__(self, downsample: nn.Module, blocks: list[SwinBlock]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        return run_blocks(self.blocks, self.downsample(x), self.grad_checkpointing)


class NormedPatchEmbed(PatchEmbed):
    """Patch embedding with a norm behind it: (B, in_chans, H', W') -> (B, L, C)."""

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__(img_size, patch_size, in_chans, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, imgs: Tensor) -> Tensor:
        return self.norm(super().forward(imgs))


class SwinTransformer(Classifier, nn.Module):
    """The paper's Swin classifier; timm's Swin names its parameters alike (there the class head is `head.fc`).

    `pos_embed` 'none' leaves out the conditional positional encoding, anything else has it; there is no other
    positional parameter, but merging, shifting and zero padding still tell something about positions. `merge_last`
    gives the unmodified last stage at 1/32. `window_size` is 7 for images of 224; in the paper's last stage the
    window is the grid. There is no class token: `pool` is 'avg', over tokens after the final norm.
    `dim` and `grid` are those of the last stage. Raises ValueError as `Classifier.init_classifier` does, and on image
    sizes that the patches do not divide.
    """

    num_prefix = 0

    def __init__(
        self,
        img_size: tuple[int, int] = (224, 224),
        patch_size: tuple[int, int] = (4, 4),
        in_chans: int = 3,
        *,
        embed_dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        num_heads: tuple[int, ...] = (3, 6, 12, 24),
        window_size: int | tuple[int, int] = 7,
        mlp_ratio: float = 4.0,
        merge_last: bool = False,
        pos_embed: str = "learned",
        drop_path: float = 0.0,
        num_classes: int = 1000,
        pool: str = "avg",
        pos_label: str = "none",
        pos_tokens: str = "half",
        rpl_pairs: int = 0,
        head_init_std: float = 2e-5,
        second_order: dict | None = None,
    ):
        super().__init__()
        window = (window_size, window_size) if isinstance(window_size, int) else tuple(window_size)
        self.img_size, self.patch_size, self.in_chans, self.pos_embed_kind = (
            img_size,
            patch_size,
            in_chans,
            pos_embed,
        )
        self.depths = tuple(depths)
        self.patch_embed = NormedPatchEmbed(img_size, patch_size, in_chans, embed_dim)
        grid, dim, stages, last = self.patch_embed.grid, embed_dim, [], len(depths) - 1
        cpe = pos_embed != "none"
        rates = [drop_path * i / max(1, sum(depths) - 1) for i in range(sum(depths))]  # grows with depth
        for i, depth in enumerate(depths):
            downsample = nn.Identity()
            if i > 0:
                merge = i < last or merge_last
                downsample, dim = PatchMerging(dim, merge), 2 * dim
                grid = tuple(-(-g // 2) for g in grid) if merge else grid
            stage_window = grid if i == last and not merge_last else window
            blocks = [
                SwinBlock(dim, num_heads[i], grid, stage_window, j % 2 == 1, cpe, mlp_ratio, rates.pop(0))
                for j in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
        self.layers = nn.Sequential(*stages)
        self.dim, self.grid = dim, grid
        self.norm = nn.LayerNorm(dim)
        self.layers.apply(_init_linear)
        self.init_classifier(
            num_classes, pool, pos_label, pos_tokens, rpl_pairs, head_init_std, second_order=second_order
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H', W') -> tokens of the last stage after the final norm, (B, H*W, C)."""
        x = self.patch_embed(x).unflatten(1, self.patch_embed.grid)  # (B, H, W, C)
        return self.norm(self.layers(x)).flatten(1, 2)  # (B, H*W, C)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the inputs of the blocks for backward and run each block again there: less memory, more time."""
        for stage in self.layers:
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Nothing beside one-dimensional parameters: the positional encoding is decayed, as in the authors' code."""
        return set()

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return sum(self.depths) + 1

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 embedding, then the blocks, then the heads.

        The way down to a stage goes with the stage's first block.
        """
        if name.startswith("patch_embed."):
            return 0
        if name.startswith("layers."):
            _, stage, part, index, *_ = name.split(".")
            return sum(self.depths[: int(stage)]) + (int(index) if part == "blocks" else 0) + 1
        return self.num_layers


def _init_linear(module: nn.Module) -> None:
    """Swin's: truncated normal 0.02, zero biases; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _swin(**kwargs) -> SwinTransformer:
    return SwinTransformer(
        **{name: value for name, value in kwargs.items() if not (name == "pool" and value is None)}
    )


# name -> builder; keyword arguments of SwinTransformer override what the name says, pool=None is its default. Pico is for
# experiments on CPUs: two stages in windows and a global one, which at 64 px has 8x8 cells.
MODELS = {
    "swin_pico": partial(_swin, window_size=4, embed_dim=32, depths=(2, 2, 2), num_heads=(1, 2, 4)),
    "swin_tiny": partial(_swin, embed_dim=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24)),
    "swin_small": partial(_swin, embed_dim=96, depths=(2, 2, 18, 2), num_heads=(3, 6, 12, 24)),
    "swin_base": partial(_swin, embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
