"""Self-relations of token features (SERE, Li et al. 2022, arXiv 2206.05184), which a student learns from a
teacher.

A token map has two relations with itself. The spatial relation holds the similarities of all positions, the
channel relation those of all channels. A softmax over each row turns both into distributions, and the
student's are fitted to the teacher's.

A box (x, y, width, height, flipped) is a crop in pixels of the source image. A point (x, y) lies in a crop's
own [-1, 1], as in `grid_sample` without aligned corners.

Shapes: B batch, N tokens of a map (h, w), S sampled points, C channels, d channels of a head.
"""

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn


def world_size() -> int:
    """Number of ranks, 1 without `torch.distributed`."""
    if td.is_available() and td.is_initialized():
        return td.get_world_size()
    return 1


class SumOverRanks(torch.autograd.Function):
    """The sum of a tensor over all ranks, with gradients: they are summed over the ranks, too."""

    # `td.all_reduce` passes no gradients, and torch.distributed.nn, which does, is deprecated.

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """Any shape, the same on every rank -> the sum, of that shape."""
        out = x.clone(memory_format=torch.contiguous_format)
        td.all_reduce(out)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        """The gradient of the sum on this rank -> that of this rank's tensor."""
        out = grad.clone(memory_format=torch.contiguous_format)
        td.all_reduce(out)
        return out


class TokenNorm(nn.Module):
    """Batch normalisation of tokens (B, N, C) by the statistics of the current batch on all ranks.

    Training and evaluation mode are alike. All ranks must hold the same number of tokens.
    """

    # There are no running averages: relations are formed in training only, and the student and the teacher
    # are each normalised by their own batch. `nn.SyncBatchNorm` would do, but it supports CUDA only.

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C) in float32."""
        rows = x.float().flatten(0, -2)  # (B*N, C)
        if world_size() == 1:
            out = F.batch_norm(rows, None, None, self.weight, self.bias, training=True, eps=self.eps)
        else:
            centred = rows - SumOverRanks.apply(rows.mean(0)) / world_size()
            variance = SumOverRanks.apply(centred.square().mean(0)) / world_size()
            out = centred * ((variance + self.eps).rsqrt() * self.weight) + self.bias
        return out.view(x.shape)


class RelationHead(nn.Module):
    """Features (B, N, C) for relations, from tokens (B, N, C): normalisation and ReLU.

    With `predictor`, as the student has it, a linear map, normalisation and ReLU follow. Parameters have the
    same names in both cases, so that a teacher's head can average a student's.
    """

    def __init__(self, dim: int, predictor: bool):
        super().__init__()
        self.norm = TokenNorm(dim)
        self.predictor: nn.Linear | None = None
        self.predictor_norm: TokenNorm | None = None
        if predictor:
            self.predictor = nn.Linear(dim, dim, bias=False)
            self.predictor_norm = TokenNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C) in float32, not negative."""
        x = self.norm(x).relu()
        if self.predictor is None or self.predictor_norm is None:
            return x
        return self.predictor_norm(self.predictor(x)).relu()


def spatial_relation(x: Tensor, heads: int) -> Tensor:
    """Similarities of all positions, for each of `heads` groups of channels (SERE, Sec. 3).

    (..., N, C) -> (..., heads, N, N) in float32, scaled by d ** -0.5.
    """
    # Autocast is off: a softmax with a low temperature would amplify rounding errors.
    with torch.autocast(x.device.type, enabled=False):
        x = x.float().unflatten(-1, (heads, -1)).transpose(-2, -3)  # (..., heads, N, d)
        return (x * x.shape[-1] ** -0.5) @ x.transpose(-1, -2)


def channel_relation(x: Tensor) -> Tensor:
    """Products of all pairs of channels, averaged over positions: (..., N, C) -> (..., C, C) in float32."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        # Divided before the product, so that no sum over many positions becomes large.
        return (x.transpose(-1, -2) / x.shape[-2]) @ x


def spatial_loss(
    student: Tensor, teacher: Tensor, heads: int, temperature: float = 0.5, valid: Tensor | None = None
) -> Tensor:
    """Cross-entropy of the spatial relations of student and teacher, mean over heads and positions -> (B,).

    Args:
        student, teacher: features (B, S, C) at the same points. The teacher gets no gradient. temperature:
        sharpens the teacher's distribution. valid: (B, S), true for points that count. Other points are
        neither queries nor keys. An image without any
            valid point has loss 0.
    """
    logits = spatial_relation(student, heads)  # (B, heads, S, S)
    target = spatial_relation(teacher.detach(), heads) / temperature
    if valid is not None:
        outside = ~valid[:, None, None, :]  # (B, 1, 1, S): keys
        # Finite instead of -inf, so that an image without any valid point has no nan in its gradient.
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(outside, lowest)
        target = target.masked_fill(outside, lowest)
    rows = -(target.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean(1)  # (B, S)
    if valid is None:
        return rows.mean(1)
    return (rows * valid).sum(1) / valid.sum(1).clamp(min=1)


def channel_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of the channel relations of student and teacher, mean over channels -> (B,).

    `student` is (B, n, C) and `teacher` (B, N, C): the numbers of tokens may differ. The
    teacher gets no gradient.
    """
    target = (channel_relation(teacher.detach()) / temperature).softmax(-1)  # (B, C, C)
    return -(target * channel_relation(student).log_softmax(-1)).sum(-1).mean(1)


def valid_mean(losses: Tensor, valid: Tensor) -> Tensor:
    """Mean of the valid losses (n,) over all ranks, as a scalar; 0 where no loss is valid."""
    # The gradients of all ranks are averaged later. So this rank's sum is divided by the mean count
    # of a rank.
    count = valid.sum().to(losses.dtype)
    if world_size() > 1:
        td.all_reduce(count)
        count = count / world_size()
    return torch.where(valid, losses, 0.0).sum() / count.clamp(min=1 / world_size())


def to_source(points: Tensor, box: Tensor) -> Tensor:
    """Points (..., S, 2) of crops with boxes (..., 5) -> pixels (..., S, 2) of the source image."""
    box = box[..., None, :]  # (..., 1, 5)
    x, y = points.unbind(-1)  # (..., S) each
    # A flipped crop was mirrored from left to right after it was cut out.
    x = torch.where(box[..., 4] > 0, -x, x)
    source_x = box[..., 0] + box[..., 2] * (x + 1) / 2
    source_y = box[..., 1] + box[..., 3] * (y + 1) / 2
    return torch.stack([source_x, source_y], -1)


def to_crop(source: Tensor, box: Tensor) -> Tensor:
    """The inverse of `to_source`; points outside of the crop lie outside of [-1, 1]."""
    box = box[..., None, :]  # (..., 1, 5)
    x = 2 * (source[..., 0] - box[..., 0]) / box[..., 2] - 1
    y = 2 * (source[..., 1] - box[..., 1]) / box[..., 3] - 1
    return torch.stack([torch.where(box[..., 4] > 0, -x, x), y], -1)


def cell_centres(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Centres of the cells of a grid (h, w), row by row, as points (h*w, 2)."""
    h, w = grid
    y = (torch.arange(h, device=device) * 2 + 1) / h - 1
    x = (torch.arange(w, device=device) * 2 + 1) / w - 1
    return torch.stack([x.repeat(h), y.repeat_interleave(w)], -1)


def overlap_points(a: Tensor, b: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Corresponding points in the overlap of two crops with boxes (..., 5).

    The overlap is divided into `size` (rows, columns) equal cells; the points are the centres of these cells.

    Returns:
        The points (..., S, 2) in crop `a`, the same points in crop `b`, and the overlap's share (...) of the
        smaller crop. Without overlap the share is 0 and the points have no meaning.
    """
    # Centres, not corners: `sample_tokens` then reads no further than half a token beyond
    # the outermost centres.
    low, extent, share = _overlap(a, b)
    cells = (cell_centres(size, a.device) + 1) / 2  # (S, 2) in [0, 1]
    source = low[..., None, :] + cells * extent[..., None, :]  # (..., S, 2)
    return to_crop(source, a), to_crop(source, b), share


def edge_points(a: Tensor, b: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Corresponding points from edge to edge of the overlap of two crops, as in the code that SERE published.

    The first and the last of the `size` (rows, columns) points lie on the edges of the overlap. Without
    overlap, all points are -2, which is outside of any crop.

    Returns:
        As `overlap_points`: the points (..., S, 2) in crop `a`, those in crop `b`, and the overlap's share
        (...) of the smaller crop.
    """
    low, extent, share = _overlap(a, b)
    h, w = size
    y = torch.linspace(0, 1, h, device=a.device)
    x = torch.linspace(0, 1, w, device=a.device)
    steps = torch.stack([x.repeat(h), y.repeat_interleave(w)], -1)  # (S, 2) in [0, 1]
    source = low[..., None, :] + steps * extent[..., None, :]  # (..., S, 2)
    empty = (share <= 0)[..., None, None]
    return (
        torch.where(empty, -2.0, to_crop(source, a)),
        torch.where(empty, -2.0, to_crop(source, b)),
        share,
    )


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The overlap of two crops: its top left corner (..., 2), its extent (..., 2), and its share (...) of the
    smaller crop."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., :2] + a[..., 2:4], b[..., :2] + b[..., 2:4])
    extent = (high - low).clamp(min=0)
    return low, extent, extent.prod(-1) / torch.minimum(a[..., 2:4].prod(-1), b[..., 2:4].prod(-1))


def cells_elsewhere(ids: Tensor, grid: tuple[int, int], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Centres of the cells `ids` (B, n) of crop `a`, in crop `b`.

    Returns the points (B, n, 2) of crop `b`, and a mask (B, n) that is true where a point lies inside of it.
    """
    points = to_crop(to_source(cell_centres(grid, ids.device)[ids], a), b)
    return points, (points.abs() <= 1).all(-1)


def sample_tokens(tokens: Tensor, grid: tuple[int, int], points: Tensor, outside: str = "border") -> Tensor:
    """Interpolate tokens (B, h*w, C) on a grid bilinearly at points (B, S, 2) -> (B, S, C) in float32.

    `outside` is what points beyond the outermost tokens are interpolated with: the value at the edge
    ("border") or zeros ("zeros").
    """
    # The paper samples the relation. Sampling is linear, S (Z Z^T) S^T = (S Z) (S Z)^T, so sampling the
    # features gives the same relation, without an (N, N) tensor.
    maps = tokens.float().transpose(1, 2).unflatten(2, grid)  # (B, C, h, w)
    grid_points = points[:, :, None].to(maps.dtype)  # (B, S, 1, 2)
    out = F.grid_sample(maps, grid_points, padding_mode=outside, align_corners=False)  # (B, C, S, 1)
    return out[..., 0].transpose(1, 2)  # (B, S, C)
