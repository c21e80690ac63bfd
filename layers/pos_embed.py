"""Positional embeddings: the fixed 2-D sine-cosine table of MAE, and resizing one table to another grid."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """(L,) positions -> (L, dim): sines of all frequencies, then cosines (float64)."""
    assert dim % 2 == 0
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = positions.double()[:, None] * omega[None]  # (L, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(dim: int, grid: tuple[int, int], num_prefix: int = 1) -> Tensor:
    """MAE's frozen table for a grid (h, w): (1, num_prefix + h*w, dim) float32, zeros for the prefix tokens.

    The first half of the channels encodes the column, the second half the row: MAE's meshgrid puts the width first,
    and released weights depend on it.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a width that is a multiple of 4, found {dim}")
    h, w = grid
    rows = torch.arange(h).repeat_interleave(w)
    cols = torch.arange(w).repeat(h)
    table = torch.cat([sincos_1d(dim // 2, cols), sincos_1d(dim // 2, rows)], dim=1)  # (h*w, dim)
    return torch.cat([torch.zeros(num_prefix, dim), table.float()])[None]


def resize_pos_embed(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Bicubic resize of (1, prefix + h*w, C) from one grid (h, w) to another; prefix rows are kept as they are.

    The size is given, never a scale factor: a factor is rounded and can be off by one.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    num_prefix = table.shape[1] - old_grid[0] * old_grid[1]
    assert num_prefix >= 0, (table.shape, old_grid)
    prefix, cells = table[:, :num_prefix], table[:, num_prefix:]
    cells = cells.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()  # (1, C, h, w)
    cells = F.interpolate(cells, size=tuple(new_grid), mode="bicubic", align_corners=False)
    cells = cells.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([prefix, cells], dim=1)
