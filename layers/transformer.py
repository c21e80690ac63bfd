"""Pre-norm Transformer blocks and the patch embedding, with MAE's parameter names.

Shapes: B batch, N tokens, L patches, n visible patches, C channels of a token, (h, w) the grid of patches.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention (Vaswani et al. 2017, Eq. 1) -> (B, heads, N, d).

    Args:
        q, k, v: (B, heads, N, d) each.
        mask: boolean, broadcasts to (B, heads, N, N); a query may attend to a key where it is true.
    """
    # PyTorch's fused kernel has a slow backward in low precision on a CPU. Two plain matrix products are
    # several times faster there (benchmarks/README.md).
    low_precision = q.dtype in (torch.bfloat16, torch.float16)
    if q.device.type == "cpu" and low_precision and torch.is_grad_enabled():
        weights = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)  # (B, heads, N, N)
        if mask is not None:
            weights = weights.masked_fill(~mask, -torch.inf)
        return weights.softmax(dim=-1) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Multi-head self-attention with one fused query-key-value projection, (B, N, C) -> (B, N, C).

    Raises ValueError if `dim` is not a multiple of `num_heads`.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"`dim` {dim} is not a multiple of `num_heads` {num_heads}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C); `mask` as in `attention`."""
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)  # (B, N, 3, heads, C/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, C/heads) each
        x = attention(q, k, v, mask).transpose(1, 2).reshape(B, N, C)  # heads side by side again
        return self.proj(x)


class Mlp(nn.Module):
    """Linear, GELU, linear: (..., dim) -> (..., dim) through `hidden` channels."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth per sample (Huang et al. 2016), (B, ...) -> (B, ...).

    In training a sample's branch is zero with probability `rate`, and else scaled by 1 / (1 - rate).
    """

    # timm has this class and `Mlp` too. A pretraining run needs nothing else of timm, and importing it would
    # double the start-up time.

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        # One draw per sample, shape (B, 1, ...).
        keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class Block(nn.Module):
    """A pre-norm block: ``x + attn(norm1(x))``, then ``x + mlp(norm2(x))``, (B, N, C) -> (B, N, C).

    `drop_path` is the rate of stochastic depth on both branches.
    """

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
        # It has no parameters, so the state dict is the same with and without it.
        self.drop_path: nn.Module = nn.Identity()
        if drop_path > 0:
            self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, recompute: bool = False) -> Tensor:
    """Apply the blocks one after the other, (B, N, C) -> (B, N, C).

    With `recompute` autograd stores only the input of each block, and backward runs each block a second time.
    """
    recompute = recompute and torch.is_grad_enabled()
    for block in blocks:
        if recompute:
            # The second run draws the same random numbers (stochastic depth), so gradients have
            # the same bits.
            x = checkpoint(block, x, use_reentrant=False)
        else:
            x = block(x)
    return x


def patch_grid(img_size: tuple[int, int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Grid (h, w) of patches of an image, for sizes (H, W) in pixels.

    Raises ValueError if the patches do not fill the image.
    """
    for side, patch, name in zip(img_size, patch_size, ("height", "width")):
        if side % patch:
            # The nearest sizes that fit; the smaller one is at least one patch.
            smaller = max(side // patch, 1) * patch
            larger = (side // patch + 1) * patch
            raise ValueError(
                f"the image {name} {side} is not a multiple of the patch {name} {patch}: choose `img_size` "
                f"{smaller} or {larger}, or another `patch_size`"
            )
    return img_size[0] // patch_size[0], img_size[1] // patch_size[1]


def check_images(imgs: Tensor, in_chans: int, img_size: tuple[int, int]) -> None:
    """Raise ValueError if a batch (B, channels, H, W) has another shape than the model was built for."""
    if imgs.shape[1:] != (in_chans, *img_size):
        raise ValueError(
            f"the model takes images of (channels, height, width) {(in_chans, *img_size)}, "
            f"found {tuple(imgs.shape[1:])}: give the same `img_size` and `in_chans` to data and model"
        )


class PatchEmbed(nn.Module):
    """Linear embedding of non-overlapping patches, (B, in_chans, H, W) -> (B, L, dim), row by row.

    The weight has the shape of a convolution's, as in the state dicts of MAE and timm. `img_size` and
    `patch_size` are (H, W) in pixels. Raises ValueError if the patches do not fill the image.
    """

    def __init__(self, img_size: tuple[int, int], patch_size: tuple[int, int], in_chans: int, dim: int):
        super().__init__()
        self.img_size = img_size
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.grid = patch_grid(img_size, patch_size)
        self.num_patches = self.grid[0] * self.grid[1]
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)
        # MAE initialises it as the linear layer (C, in_chans*ph*pw) that it is.
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))

    def check(self, imgs: Tensor) -> None:
        """Raise ValueError if the images do not fit this embedding."""
        check_images(imgs, self.in_chans, self.img_size)

    def forward(self, imgs: Tensor) -> Tensor:
        """(B, in_chans, H, W) -> (B, L, C). Raises ValueError on images of another shape."""
        self.check(imgs)
        return self.embed(imgs)

    def embed(self, imgs: Tensor) -> Tensor:
        """The same for images of any size that the patches fill."""
        return self.proj(imgs).flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, L, C)

    def embed_patches(self, patches: Tensor) -> Tensor:
        """Embed some patches only, given as rows of `patchify`: (B, n, ph*pw*in_chans) -> (B, n, C)."""
        weight = self.proj.weight.permute(0, 2, 3, 1)  # (C, in_chans, ph, pw) -> (C, ph, pw, in_chans)
        weight = weight.flatten(1)  # (C, ph*pw*in_chans)
        return F.linear(patches, weight, self.proj.bias)


def patchify(imgs: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Cut images into patches, (B, c, h*ph, w*pw) -> (B, h*w, ph*pw*c).

    The values of a patch are in (row, column, channel) order, as in MAE.
    """
    B, c, H, W = imgs.shape
    ph, pw = patch_size
    x = imgs.reshape(B, c, H // ph, ph, W // pw, pw)  # (B, c, h, ph, w, pw)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(B, (H // ph) * (W // pw), ph * pw * c)


def unpatchify(patches: Tensor, patch_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Put patches together, the inverse of `patchify`: (B, h*w, ph*pw*c) -> (B, c, h*ph, w*pw)."""
    B, _, P = patches.shape
    ph, pw = patch_size
    h, w = grid
    x = patches.reshape(B, h, w, ph, pw, P // (ph * pw))  # (B, h, w, ph, pw, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(B, -1, h * ph, w * pw)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Select the tokens with indices `ids` (B, n) from x (B, N, C) -> (B, n, C)."""
    return x.gather(1, ids.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def init_linear_and_norm(module: nn.Module) -> None:
    """MAE's initialisation, for ``model.apply``: Xavier-uniform linear layers, zero biases, unit norms."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
