"""Swin Transformer (Liu et al. 2021) as the positional-label paper changes it (arXiv 2206.04981, Sec. 3.4).

* The last stage works at 1/16 instead of 1/32 of the image: the third patch merging only widens the tokens,
  and the last stage attends globally. Labels then distinguish 196 positions instead of 49. `merge_last`
  restores the usual stage.
* A conditional positional encoding (Chu et al. 2021) opens every block and replaces the relative position
  bias.

Shapes: B batch, H W rows and columns of a stage's grid, h w those of a window, n windows of an image, C
    channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from layers.classifier import Classifier
from layers.contract import Entry, Heads
from layers.transformer import Attention, DropPath, Mlp, PatchEmbed, run_blocks
from layers.vit import drop_rates


def window_partition(x: Tensor, window: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B*n, h*w, C), windows of an image row by row; H, W are multiples of the window's."""
    B, H, W, C = x.shape
    h, w = window
    x = x.reshape(B, H // h, h, W // w, w, C).transpose(2, 3)  # (B, H/h, W/w, h, w, C)
    return x.reshape(-1, h * w, C)


def window_merge(windows: Tensor, window: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Inverse of `window_partition`: (B*n, h*w, C) -> (B, H, W, C)."""
    H, W = size
    h, w = window
    C = windows.shape[-1]
    x = windows.reshape(-1, H // h, W // w, h, w, C).transpose(2, 3)  # (B, H/h, h, W/w, w, C)
    return x.reshape(-1, H, W, C)


def window_mask(
    grid: tuple[int, int], padded: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]
) -> Tensor | None:
    """Which tokens of a window may attend to which, (n, h*w, h*w) bool; None if all may.

    After a cyclic shift, a window can hold tokens from opposite borders of the image; they do not attend to
    each other. No token attends to padding, except that each attends to itself: the softmax of a row without
    keys is undefined.
    """
    if not any(shift) and grid == padded:
        return None
    wrapped = []
    not_padded = []
    for size, whole, offset in zip(grid, padded, shift):
        # The row or column that each shifted one comes from.
        source = torch.arange(whole) + offset
        wrapped.append(source >= whole)
        not_padded.append(source % whole < size)
    region = 2 * wrapped[0][:, None] + 1 * wrapped[1][None, :]  # (H, W)
    region = window_partition(region[None, ..., None], window).squeeze(-1)  # (n, h*w)
    real = not_padded[0][:, None] & not_padded[1][None, :]  # (H, W)
    real = window_partition(real[None, ..., None], window).squeeze(-1)  # (n, h*w)
    mask = (region[:, :, None] == region[:, None, :]) & real[:, None, :]  # (n, h*w, h*w)
    return mask | torch.eye(mask.shape[-1], dtype=torch.bool)


class SwinBlock(nn.Module):
    """[x + cpe(x)], then x + attention in windows, then x + mlp; pre-norm.

    On a side where the grid is smaller than the window, the window is cut to the grid and not shifted. A grid
    that the window does not divide is padded below and at the right.
    """

    mask: Tensor | None

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
        self.window = min(window[0], grid[0]), min(window[1], grid[1])
        self.shift = self._shift(0, shifted), self._shift(1, shifted)
        self.padded = self._padded(0), self._padded(1)
        self.cpe = None
        if cpe:
            self.cpe = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path: nn.Module = nn.Identity()
        if drop_path > 0:
            self.drop_path = DropPath(drop_path)
        # Not in the state dict: the sizes determine it.
        mask = window_mask(grid, self.padded, self.window, self.shift)
        self.register_buffer("mask", mask, persistent=False)

    def _shift(self, axis: int, shifted: bool) -> int:
        """Half of the window, 0 where a window spans the whole grid."""
        if shifted and self.grid[axis] > self.window[axis]:
            return self.window[axis] // 2
        return 0

    def _padded(self, axis: int) -> int:
        """The grid's side, rounded up to a multiple of the window's."""
        window = self.window[axis]
        return -(-self.grid[axis] // window) * window

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
    `merge` False no tokens are merged, (B, H, W, C) -> (B, H, W, 2C): the paper's last transition.
    """

    def __init__(self, dim: int, merge: bool = True):
        super().__init__()
        self.merge = merge
        width = dim
        if merge:
            width = 4 * dim
        self.norm = nn.LayerNorm(width)
        self.reduction = nn.Linear(width, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H/2, W/2, 2C), or (B, H, W, 2C) without merging."""
        if self.merge:
            B, H, W, C = x.shape
            x = F.pad(x, (0, 0, 0, W % 2, 0, H % 2))
            x = x.reshape(B, (H + 1) // 2, 2, (W + 1) // 2, 2, C)  # (B, H/2, 2, W/2, 2, C)
            x = x.permute(0, 1, 3, 4, 2, 5).flatten(3)  # (B, H/2, W/2, 4C)
        return self.reduction(self.norm(x))


class Stage(nn.Module):
    """The downsampling to a stage (the identity for the first), and its blocks."""

    grad_checkpointing: bool

    def __init__(self, downsample: nn.Module, blocks: list[SwinBlock]):
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) of the previous stage -> (B, H', W', C') of this one."""
        return run_blocks(self.blocks, self.downsample(x), self.grad_checkpointing)


class NormedPatchEmbed(PatchEmbed):
    """Patch embedding, then a norm: (B, in_chans, H', W') -> (B, L, C)."""

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__(img_size, patch_size, in_chans, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, in_chans, H', W') -> (B, L, C)."""
        return self.norm(super().forward(imgs))


@dataclass(frozen=True)
class SwinTrunk:
    """Sizes of a Swin Transformer; (H, W) where a pair is taken.

    Attributes:
        embed_dim: channels of the first stage; each further stage has twice the channels.
        depths: number of blocks of each stage.
        num_heads: attention heads of each stage.
        window_size: side or (H, W) of a window in tokens, 7 for images of 224.
        merge_last: the unmodified last stage at 1/32 of the image.
        pos_embed: "none" leaves out the conditional positional encoding; every other value keeps it.
        drop_path: stochastic depth of the last block; it grows linearly from 0 in the first.
    """

    img_size: tuple[int, int] = (224, 224)
    patch_size: tuple[int, int] = (4, 4)
    in_chans: int = 3
    embed_dim: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int | tuple[int, int] = 7
    mlp_ratio: float = 4.0
    merge_last: bool = False
    pos_embed: str = "learned"
    drop_path: float = 0.0


class SwinTransformer(Classifier):
    """The paper's Swin classifier, with timm's parameter names but for the class head (`head.fc` in timm).

    The conditional encoding is the only positional parameter; merging, shifting and zero padding still
    reveal something about positions. In the paper's last stage the window is the whole grid. There is no
    class token: `pool` is "avg", over tokens after the final norm. `dim` and `grid` are those of the last
    stage. Raises ValueError as `Classifier.init_classifier` does, and if the patches do not fill the image.
    """

    trunk: SwinTrunk
    num_prefix = 0

    def __init__(self, trunk: SwinTrunk, heads: Heads):
        super().__init__()
        self.trunk = trunk
        self.img_size = trunk.img_size
        self.patch_size = trunk.patch_size
        self.in_chans = trunk.in_chans
        self.depths = tuple(trunk.depths)
        self.patch_embed = NormedPatchEmbed(trunk.img_size, trunk.patch_size, trunk.in_chans, trunk.embed_dim)
        self.grid = self.patch_embed.grid
        self.dim = trunk.embed_dim
        rates = iter(drop_rates(trunk.drop_path, sum(self.depths)))
        # Each stage updates `dim` and `grid`.
        self.layers = nn.Sequential(*(self._make_stage(i, rates) for i in range(len(self.depths))))
        self.norm = nn.LayerNorm(self.dim)
        self.layers.apply(_init_linear)
        self.init_classifier(heads)

    def _make_stage(self, i: int, rates: Iterator[float]) -> "Stage":
        """Stage `i`: the downsampling from the previous stage, and its blocks."""
        trunk = self.trunk
        last = i == len(self.depths) - 1
        downsample: nn.Module = nn.Identity()
        if i > 0:
            merge = not last or trunk.merge_last
            downsample = PatchMerging(self.dim, merge)
            self.dim *= 2
            if merge:
                # An odd side is padded by one before it is halved.
                self.grid = -(-self.grid[0] // 2), -(-self.grid[1] // 2)
        window = self._window(global_attention=last and not trunk.merge_last)
        cpe = trunk.pos_embed != "none"
        # Every second block shifts its windows.
        blocks = [
            SwinBlock(
                self.dim, trunk.num_heads[i], self.grid, window, j % 2 == 1, cpe, trunk.mlp_ratio, next(rates)
            )
            for j in range(self.depths[i])
        ]
        return Stage(downsample, blocks)

    def _window(self, global_attention: bool) -> tuple[int, int]:
        if global_attention:
            return self.grid
        size = self.trunk.window_size
        if isinstance(size, int):
            return size, size
        return size

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H', W') -> tokens of the last stage after the final norm, (B, H*W, C)."""
        x = self.patch_embed(x).unflatten(1, self.patch_embed.grid)  # (B, H, W, C)
        return self.norm(self.layers(x)).flatten(1, 2)  # (B, H*W, C)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the blocks' inputs and run each block again in backward: less memory, more time."""
        for stage in self.layers:
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Only one-dimensional parameters: the positional encoding is decayed, as in the authors' code."""
        return set()

    @property
    def num_layers(self) -> int:
        """The largest `layer_id`."""
        return sum(self.depths) + 1

    def layer_id(self, name: str) -> int:
        """Depth of a parameter for layer-wise learning rates: 0 embedding, then the blocks, then the heads.

        The downsampling to a stage has the depth of the stage's first block.
        """
        if name.startswith("patch_embed."):
            return 0
        if name.startswith("layers."):
            _, stage, part, index, *_ = name.split(".")
            before = sum(self.depths[: int(stage)])
            if part != "blocks":
                return before + 1
            return before + int(index) + 1
        return self.num_layers


def _init_linear(module: nn.Module) -> None:
    """Swin's initialisation: truncated normal 0.02, zero biases; convolutions keep PyTorch's."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


SWIN = Entry(SwinTransformer, {"trunk": SwinTrunk(), "heads": Heads()}, own_positions=True)

# Pico is for experiments on CPUs: two stages in windows and a global one, which has 8x8 cells at 64 pixels.
MODELS: dict[str, Entry[Classifier]] = {
    "swin_pico": SWIN.override(window_size=4, embed_dim=32, depths=(2, 2, 2), num_heads=(1, 2, 4)),
    "swin_tiny": SWIN,
    "swin_small": SWIN.override(depths=(2, 2, 18, 2)),
    "swin_base": SWIN.override(embed_dim=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32)),
}
