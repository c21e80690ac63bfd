"""Positional embeddings: MAE's fixed 2-D sine-cosine table, and resizing a table to another grid.

Shapes: L positions, (h, w) the grid of patches, C channels of a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def sincos_1d(dim: int, positions: Tensor) -> Tensor:
    """Positions (L,) -> (L, dim) in float64: the sines of all frequencies, then their cosines.

    `dim` is even. The frequencies are those of Vaswani et al. 2017, Sec. 3.5.
    """
    assert dim % 2 == 0
    omega = 10000.0 ** -(torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angle = positions.double()[:, None] * omega[None]  # (L, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def sincos_2d(dim: int, grid: tuple[int, int], num_prefix: int = 1) -> Tensor:
    """MAE's frozen table for a grid (h, w): (1, num_prefix + h*w, dim) in float32, with zeros for prefix
    tokens.

    Raises ValueError if `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"a 2-D sine-cosine embedding needs a `dim` that is a multiple of 4, found {dim}")
    h, w = grid
    rows = torch.arange(h).repeat_interleave(w)  # (h*w,)
    cols = torch.arange(w).repeat(h)  # (h*w,)
    # Columns come first, then rows: MAE's meshgrid puts the width first, and released weights depend on it.
    table = torch.cat([sincos_1d(dim // 2, cols), sincos_1d(dim // 2, rows)], dim=1)  # (h*w, dim)
    return torch.cat([torch.zeros(num_prefix, dim), table.float()])[None]


def resize_pos_embed(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resize a table (1, prefix + h*w, C) from one grid (h, w) to another by bicubic interpolation.

    The rows of prefix tokens do not change.
    """
    if tuple(old_grid) == tuple(new_grid):
        return table
    num_prefix = table.shape[1] - old_grid[0] * old_grid[1]
    assert num_prefix >= 0, (table.shape, old_grid)
    prefix = table[:, :num_prefix]
    cells = table[:, num_prefix:]
    cells = cells.reshape(1, *old_grid, -1).permute(0, 3, 1, 2).float()  # (1, C, h, w)
    # The size is given, not a scale factor: a factor is rounded, and the size can then be off by one.
    cells = F.interpolate(cells, size=tuple(new_grid), mode="bicubic", align_corners=False)
    cells = cells.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)  # (1, h*w, C) of the new grid
    return torch.cat([prefix, cells], dim=1)
