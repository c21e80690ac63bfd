"""Pre-norm Transformer blocks and the patch embedding, with MAE's parameter names.

Shapes: B batch, N tokens, L patches, n visible patches, C channels of a token, h w the grid of patches.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention, (B, heads, N, d) each; `mask` broadcasts to (B, heads, N, N), true = may attend.

    PyTorch's fused kernel everywhere but in low-precision training on a CPU: there its backward is several times
    slower than two plain matrix products (``benchmarks/README.md``).
    """
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        return weights.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"the width {dim} is not a multiple of the number of heads {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, C/heads) each
        x = attention(q, k, v, mask).transpose(1, 2).reshape(B, N, C)
        return self.proj(x)


class Mlp(nn.Module):
    """Linear, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al. 2016): a branch is dropped with probability `rate`, else scaled up.

    `Mlp` and this are timm's; they stand here because importing timm doubles the start-up time of a pretraining run
    that needs nothing else of it.
    """

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``; stochastic depth on both branches."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool = False) -> Tensor:
    """One block after the other; with `recompute` only their inputs are kept, and backward runs each a second time.

    The second run draws the same random numbers (stochastic depth), so that gradients are the same numbers.
    """
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False) if recompute and torch.is_grad_enabled() else block(x)
    return x


def patch_grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Cells (h, w) of an image; ValueError where patches do not fill it."""
    for side, patch, name in zip(img_size, patch_size, ("height", "width")):
        if side % patch:
            raise ValueError(
                f"the image {name} {side} is not a multiple of the patch {name} {patch}: choose --input_size "
                f"{side // patch * patch or patch} or {side // patch * patch + patch}, or another --patch_size"
            )
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def check_images(imgs: Tensor, in_chans: int, img_size: tuple[int, int]) -> None:
    """ValueError where a batch has another shape than the model was built for."""
    if imgs.shape[1:] != (in_chans, *img_size):
        raise ValueError(
            f"the model takes images of (channels, height, width) {(in_chans, *img_size)}, "
            f"found {tuple(imgs.shape[1:])}: give the same --input_size and --in_chans to data and model"
        )


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens. The weight is a convolution's, as in MAE's and timm's state dicts.

    ``img_size`` and ``patch_size`` are (H, W); tokens come out row by row.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.grid = patch_grid(img_size, patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        # MAE initialises it like a linear layer: it is one.
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))

    def check(self, imgs: Tensor) -> None:
        check_images(imgs, self.in_chans, self.img_size)

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, L, C)."""
        self.check(imgs)
        return self.proj(imgs).flatten(2).transpose(1, 2)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """(B, n, ph*pw*in_chans) from `patchify` -> (B, n, C): the same product as `forward`, for some patches only."""
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(
            1
        )  # (C, in_chans, ph, pw) -> (C, ph*pw*in_chans)
        return F.linear(patches, weight, self.proj.bias)


def patchify(imgs: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """(B, c, h*ph, w*pw) -> (B, h*w, ph*pw*c), pixels of a patch in (row, column, channel) order as in MAE."""
    B, c, H, W = imgs.shape
    ph, pw = patch_size
    x = imgs.reshape(B, c, H // ph, ph, W // pw, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // ph) * (W // pw), ph * pw * c)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Inverse of `patchify`: (B, h*w, ph*pw*c) -> (B, c, h*ph, w*pw)."""
    B, L, P = patches.shape
    (ph, pw), (h, w) = patch_size, grid
    x = patches.reshape(B, h, w, ph, pw, P // (ph * pw))
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * ph, w * pw)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Rows `ids` (B, n) of the tokens x (B, N, C) -> (B, n, C)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def init_linear_and_norm(module: nn.Module) -> None:
    """MAE's initialisation, for ``model.apply``: xavier-uniform linears, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
