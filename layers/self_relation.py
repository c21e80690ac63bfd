"""Self-relations of token features (SERE, Li et al. 2022, arXiv 2206.05184): what a student learns from a teacher.

A token map has two relations with itself: spatial, the similarities of all positions, and channel, those of all
channels. Both become distributions by a softmax over each row, and the student's are fitted to the teacher's.

Boxes are (x, y, width, height, flipped) of a crop in pixels of the source image; points are (x, y) in a crop's own
[-1, 1], as `grid_sample` has them without aligned corners.

Shapes: B batch, N tokens of a map (h w), S sampled points, C channels, d channels of a head.
"""

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    return td.get_world_size() if td.is_available() and td.is_initialized() else 1


class TokenNorm(nn.Module):
    """Batch normalisation of tokens (B, N, C) by the statistics of this batch on all ranks, in training and evaluation.

    There are no running averages: relations are formed during training only, where the student and the teacher are
    normalised by their own batch. Every rank must hold as many tokens. `nn.SyncBatchNorm` knows CUDA only.
    """

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.float().flatten(0, -2)  # (B*N, C)
        if world_size() == 1:
            out = F.batch_norm(rows, None, None, self.weight, self.bias, training=True, eps=self.eps)
        else:
            from torch.distributed.nn.functional import all_reduce  # gradients cross the ranks, too

            centred = rows - all_reduce(rows.mean(0)) / world_size()
            variance = all_reduce(centred.square().mean(0)) / world_size()
            out = centred * ((variance + self.eps).rsqrt() * self.weight) + self.bias
        return out.view(x.shape)


class RelationHead(nn.Module):
    """Tokens (B, N, C) -> what relations are formed of: norm and ReLU; on the student then a predictor,
    which is a linear map, norm and ReLU. Names agree, so that a teacher's head averages a student's."""

    def __init__(self, dim: int, predictor: bool):
        super().__init__()
        self.norm = TokenNorm(dim)
        self.predictor = nn.Linear(dim, dim, bias=False) if predictor else None
        self.predictor_norm = TokenNorm(dim) if predictor else None

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x).relu()
        return x if self.predictor is None else self.predictor_norm(self.predictor(x)).relu()


def spatial_relation(x: Tensor, heads: int) -> Tensor:
    """(..., N, C) -> similarities of all positions in each of `heads` groups of channels, (..., heads, N, N) float32."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float().unflatten(-1, (heads, -1)).transpose(-2, -3)  # (..., heads, N, d)
        return (x * x.shape[-1] ** -0.5) @ x.transpose(-1, -2)


def channel_relation(x: Tensor) -> Tensor:
    """(..., N, C) -> mean products of all channels over the positions, (..., C, C) float32."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        return (x.transpose(-1, -2) / x.shape[-2]) @ x


def spatial_loss(
    student: Tensor, teacher: Tensor, heads: int, temperature: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """Cross-entropy of spatial relations (B, S, C) at the same points, mean over heads and positions -> (B,).

    `valid` (B, S) are the points that count: the others are neither queries nor keys; an image without any gives 0.
    `temperature` sharpens the teacher, which gets no gradient.
    """
    logits, target = spatial_relation(student, heads), spatial_relation(teacher.detach(), heads) / temperature
    if valid is not None:
        # Finite, so that an image without any valid point has no nan in its gradient.
        outside, lowest = ~valid[:, None, None, :], torch.finfo(logits.dtype).min
        logits, target = logits.masked_fill(outside, lowest), target.masked_fill(outside, lowest)
    rows = -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(1)  # (B, S)
    if valid is None:
        return rows.mean(1)
    return (rows * valid).sum(1) / valid.sum(1).clamp(min=1)


def channel_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of channel relations of (B, n, C) and (B, N, C), mean over channels -> (B,)."""
    target = (channel_relation(teacher.detach()) / temperature).softmax(-1)  # (B, C, C)
    return -(target * channel_relation(student).log_softmax(-1)).sum(-1).mean(1)


def valid_mean(losses: Tensor, valid: Tensor) -> Tensor:
    """Mean of the losses (n,) that are valid, over all ranks: those that are not are neither added nor counted.

    The gradients of all ranks are averaged later, so that this rank's sum is divided by the mean count of a rank.
    """
    count = valid.sum().to(losses.dtype)
    if world_size() > 1:
        td.all_reduce(count)
        count = count / world_size()
    return torch.where(valid, losses, 0.0).sum() / count.clamp(min=1 / world_size())


def to_source(points: Tensor, box: Tensor) -> Tensor:
    """Points (..., S, 2) of a crop -> pixels of the source image; boxes (..., 5)."""
    box = box[..., None, :]  # (..., 1, 5)
    x, y = points.unbind(-1)
    x = torch.where(box[..., 4] > 0, -x, x)
    return torch.stack([box[..., 0] + box[..., 2] * (x + 1) / 2, box[..., 1] + box[..., 3] * (y + 1) / 2], -1)


def to_crop(source: Tensor, box: Tensor) -> Tensor:
    """The inverse of `to_source`; points outside of the crop lie outside of [-1, 1]."""
    box = box[..., None, :]
    x = 2 * (source[..., 0] - box[..., 0]) / box[..., 2] - 1
    y = 2 * (source[..., 1] - box[..., 1]) / box[..., 3] - 1
    return torch.stack([torch.where(box[..., 4] > 0, -x, x), y], -1)


def cell_centres(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Centres of the cells of a grid (h, w), row by row: (h*w, 2) points."""
    h, w = grid
    y = (torch.arange(h, device=device) * 2 + 1) / h - 1
    x = (torch.arange(w, device=device) * 2 + 1) / w - 1
    return torch.stack([x.repeat(h), y.repeat_interleave(w)], -1)


def overlap_points(a: Tensor, b: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (..., 5) of two crops -> the same `size` points of their overlap in each, (..., S, 2), and (...) the
    overlap's share of the smaller crop.

    The overlap is divided into rows and columns of equal cells, and the points are the cells' centres: `sample_tokens`
    then stays within half a token of the crop's edge. Without overlap the share is 0 and the points mean nothing.
    """
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., :2] + a[..., 2:4], b[..., :2] + b[..., 2:4])
    extent = (high - low).clamp(min=0)
    cells = (cell_centres(size, a.device) + 1) / 2  # (S, 2) in [0, 1]
    source = low[..., None, :] + cells * extent[..., None, :]  # (..., S, 2)
    share = extent.prod(-1) / torch.minimum(a[..., 2:4].prod(-1), b[..., 2:4].prod(-1))
    return to_crop(source, a), to_crop(source, b), share


def cells_elsewhere(ids: Tensor, grid: tuple[int, int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Cells ids (B, n) of crop `a` -> their centres as points of crop `b` (B, n, 2), and which lie inside of it (B, n)."""
    points = to_crop(to_source(cell_centres(grid, ids.device)[ids], a), b)
    return points, (points.abs() <= 1).all(-1)


def sample_tokens(tokens: Tensor, grid: tuple[int, int], points: Tensor) -> Tensor:
    """Tokens (B, h*w, C) on a grid, read bilinearly at points (B, S, 2) -> (B, S, C); beyond the edge the edge counts.

    A relation of samples is the sample of the relation, since sampling is linear: S (Z Z^T) S^T = (S Z) (S Z)^T. So
    the features are sampled, C values a point, and no (N, N) relation is made, kept or sampled.
    """
    maps = tokens.float().transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
    out = F.grid_sample(maps, points[:, :, None].to(maps.dtype), padding_mode="border", align_corners=False)
    return out[..., 0].transpose(1, 2)
