"""What patch tokens know about their position: ridge regression, analysis of variance, and its removal.

All figures of a layer follow from sums over images, which do not grow with their number, and from one pass
over held-out images. Sums are float64, on the device of the tokens.

Shapes: B batch, L = h * w cells of the grid, row by row, C channels of a token, n images.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from util import dist

# The ridge, as a share of the mean diagonal of the features' scatter matrix. A share does not depend on the
# scale of the features or the number of images. It is fixed, so that the same reader compares all models.
RIDGE = 1e-3
# Every fourth image is held out.
HELD_OUT = 4
# The share of the between-cell variance whose directions `rank` counts.
RANK_SHARE = 0.95
# A direction of the cell means is real if its variance exceeds the largest one of noise by this factor.
MARGIN = 1.5
# Smaller eigenvalues, relative to the largest one, are rounding errors.
ROUNDING = 1e-10

# Images (B, channels, H, W) -> the patch tokens (B, L, C) of each layer.
Tokens = Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class PositionFigures:
    """What single tokens of one layer tell about their cell, by linear maps.

    Attributes:
        row_r2, column_r2: R^2 of ridge regression of the row and of the column on held-out images. Chance is
            0, and worse than chance is negative. nan for a grid with one row or one column.
        cell_accuracy: percent of held-out tokens whose cell has the largest output of ridge regression of all
            cells' indicators. Chance is 100 / L. Coordinates that are coded on two directions only give a
            large R^2 and a small accuracy: cells inside the grid are then never the largest output.
        explained: the share of the features' variance that the cell explains. It is corrected for the number
            of images, so that it is 0 on average without position information, and may be slightly negative.
        rank: the number of directions that hold 95 % of the corrected between-cell variance. 0 if `explained`
            is not positive. If it is close to 0, the rank is that of noise.
    """

    row_r2: float
    column_r2: float
    cell_accuracy: float
    explained: float
    rank: int


@dataclass(frozen=True)
class Audit:
    """The figures of each layer, the number of images that they are fitted to, and that of held-out ones."""

    layers: list[PositionFigures]
    images: int
    held_out: int


def is_held_out(number: int) -> bool:
    """Whether the image with this number, from 0, is held out: every fourth one."""
    return number % HELD_OUT == HELD_OUT - 1


# --- sums over images


class CellStatistics:
    """Sums over the tokens of one layer, from which its figures follow.

    Attributes:
        images: n.
        halves: (2, L, C) of each cell's tokens, of every other image and of the others.
        counts: the number of images of each half.
        gram: (C, C) of the outer products of all tokens.
        image_gram: (C, C) of the outer products of each image's mean token.
    """

    def __init__(self, cells: int, channels: int, device: torch.device | str = "cpu"):
        options: Any = {"dtype": torch.float64, "device": torch.device(device)}
        self.images = 0
        self.counts = [0, 0]
        self.halves = torch.zeros(2, cells, channels, **options)
        self.gram = torch.zeros(channels, channels, **options)
        self.image_gram = torch.zeros(channels, channels, **options)

    @property
    def cells(self) -> int:
        return self.halves.shape[1]

    @property
    def sums(self) -> Tensor:
        """The sums of each cell's tokens, (L, C)."""
        return self.halves.sum(0)

    def add(self, tokens: Tensor, numbers: Tensor | None = None) -> None:
        """Add a batch of tokens (B, L, C). Raises ValueError for another shape.

        `numbers` (B,) are those of the images, whose parity chooses the half; if not given they are counted.
        """
        expected = self.halves.shape[1:]
        if tokens.ndim != 3 or tokens.shape[1:] != expected:
            raise ValueError(
                f"tokens of shape {tuple(tokens.shape)} meet statistics of (L, C) {tuple(expected)}"
            )
        x = tokens.double()
        means = x.mean(1)  # (B, C)
        flat = x.flatten(0, 1)  # (B * L, C)
        if numbers is None:
            numbers = torch.arange(self.images, self.images + len(x))
        odd = (numbers % 2 == 1).to(x.device)
        for half, chosen in enumerate((~odd, odd)):
            part = x[chosen]
            self.halves[half] += part.sum(0)
            self.counts[half] += len(part)
        self.images += len(x)
        self.gram += flat.t() @ flat
        self.image_gram += means.t() @ means

    def reduce(self) -> None:
        """Add the sums of all ranks, which must call this together, and once."""
        everyone = dist.gather_objects((self.images, *self.counts))
        self.images, *self.counts = (sum(each) for each in zip(*everyone))
        for name in ("halves", "gram", "image_gram"):
            setattr(self, name, dist.sum_over_ranks(getattr(self, name)))

    def cell_means(self) -> Tensor:
        """The mean token of each cell, (L, C)."""
        return self.sums / self.images

    def mean(self) -> Tensor:
        """The mean token, (C,)."""
        return self.cell_means().mean(0)

    def scatter(self) -> Tensor:
        """The sum of the outer products of all centred tokens, (C, C)."""
        mean = self.mean()
        return self.gram - self.images * self.cells * torch.outer(mean, mean)

    def spread(self) -> Tensor:
        """The covariance of the observed cell means over the cells, (C, C): not corrected."""
        centred = self.cell_means() - self.mean()  # (L, C)
        return centred.t() @ centred / self.cells

    def noise(self) -> Tensor:
        """The part of `spread` that is there because n is finite, (C, C), on average.

        Images are independent, tokens of one image are not. So the noise is estimated as in an analysis of
        variance with repeated measures, from tokens relative to the mean token of their own image: what all
        tokens of an image share moves all cell means alike. It is unbiased for any dependence of the cells.
        """
        n = self.images
        relative = self.gram - self.cells * self.image_gram  # of tokens relative to their image
        return (relative - n * self.cells * self.spread()) / (n * self.cells * (n - 1))

    def noise_means(self) -> Tensor:
        """Cell means that are nothing but noise, (L, C), with the variance of that of the observed means.

        They are the difference of two halves of the images, which have the same true cell means.
        """
        first, second = (part / count for part, count in zip(self.halves, self.counts))
        difference = first - second
        scale = sum(1 / count for count in self.counts) * self.images
        return (difference - difference.mean(0)) / math.sqrt(scale)

    def between(self) -> Tensor:
        """An unbiased estimate of the covariance of the true cell means over the cells, (C, C).

        Its trace may be negative.
        """
        return self.spread() - self.noise()

    def explained(self) -> float:
        """The corrected between-cell variance as a share of the total variance; 0 for constant tokens."""
        means = self.cell_means()
        within = self.gram.trace() - self.images * means.square().sum()
        # Unbiased: the mean over the cells of the variance of a cell's tokens.
        variance = within / (self.cells * (self.images - 1))
        between = self.between().trace()
        total = between + variance
        if total <= ROUNDING * means.square().sum() / self.cells:
            return 0.0
        return float(between / total)

    def rank(self) -> int:
        """The number of directions that hold 95 % of the corrected between-cell variance."""
        if self.explained() <= 0:
            return 0
        between = self.between()
        values = torch.linalg.eigvalsh(between).flip(0)
        # The corrected matrix may have negative eigenvalues: the sum reaches its trace before them.
        reached = values.cumsum(0) >= RANK_SHARE * between.trace()
        return int(reached.int().argmax()) + 1


def gather(tokens: Tokens, batches: Iterable[Tensor]) -> list[CellStatistics]:
    """The statistics of each layer of `tokens` over batches of images (B, channels, H, W).

    Raises ValueError for fewer than 2 images, and for tokens that are not finite.
    """
    layers: list[CellStatistics] = []
    for images in batches:
        found = tokens(images)
        layers = layers or [CellStatistics(x.shape[1], x.shape[2], x.device) for x in found]
        for statistics, x in zip(layers, found, strict=True):
            statistics.add(x)
    if not layers or layers[0].images < 2:
        raise ValueError("an audit of positions needs at least 2 images that are not held out: give more")
    for number, statistics in enumerate(layers):
        if not math.isfinite(statistics.gram.trace()):
            raise ValueError(f"the tokens of layer {number} are not finite: the model has diverged")
    return layers


# --- ridge regression


def coordinates(grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Row and column of each cell, float64 (L, 2)."""
    h, w = grid
    cells = torch.arange(h * w, device=device)
    return torch.stack([cells // w, cells % w], 1).double()


def ridge(statistics: CellStatistics, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Ridge regression of targets (L, T), one row for each cell, on single tokens: weights (C, T), bias (T,).

    The bias is not penalised. The penalty is RIDGE times the mean diagonal of the scatter matrix.
    """
    targets = targets.to(statistics.sums)
    means = targets.mean(0)  # (T,)
    products = statistics.sums.t() @ (targets - means)  # (C, T)
    scatter = statistics.scatter()
    strength = RIDGE * scatter.diagonal().mean()
    # Constant tokens have rounding errors in the place of a scatter.
    if strength <= ROUNDING * RIDGE * statistics.gram.diagonal().mean():
        return torch.zeros_like(products), means
    scatter.diagonal().add_(strength)
    weight = torch.linalg.solve(scatter, products)
    return weight, means - statistics.mean() @ weight


class Reader:
    """The regression of row, column and cell from the tokens of one layer, and its errors."""

    def __init__(self, statistics: CellStatistics, grid: tuple[int, int]):
        device = statistics.sums.device
        self.targets = coordinates(grid, device)  # (L, 2)
        indicators = torch.eye(len(self.targets), dtype=torch.float64, device=device)
        self.weight, self.bias = ridge(statistics, torch.cat([self.targets, indicators], 1))
        self.errors = torch.zeros(2, dtype=torch.float64, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.images = 0

    def add(self, tokens: Tensor) -> None:
        """Add the errors of a batch of held-out tokens (B, L, C)."""
        predicted = tokens.double() @ self.weight + self.bias  # (B, L, 2 + L)
        self.errors += (predicted[..., :2] - self.targets).square().sum((0, 1))
        cells = predicted[..., 2:].argmax(-1)  # (B, L)
        self.hits += (cells == torch.arange(len(self.targets), device=cells.device)).sum()
        self.images += len(tokens)

    def r2(self) -> tuple[float, float]:
        """R^2 of row and column; nan for a coordinate with one value."""
        centred = self.targets - self.targets.mean(0)
        total = self.images * centred.square().sum(0)
        # 0 / 0 is nan.
        row, column = torch.where(total > 0, 1 - self.errors / total, torch.nan).tolist()
        return row, column

    def cell_accuracy(self) -> float:
        """Percent of right cells."""
        return 100 * int(self.hits) / (self.images * len(self.targets))


def audit(
    tokens: Tokens, train: Iterable[Tensor], held_out: Iterable[Tensor], grid: tuple[int, int]
) -> Audit:
    """The figures of each layer of `tokens`.

    Both `train` and `held_out` are batches of images (B, channels, H, W), each read once; `is_held_out` says
    which image belongs where. Raises ValueError as `gather` does, if no image is held out, and if the tokens
    do not fill the grid (h, w).
    """
    layers = gather(tokens, train)
    h, w = grid
    if layers[0].cells != h * w:
        raise ValueError(f"there are {layers[0].cells} tokens for an image, and the grid {h}x{w} has {h * w}")
    readers = [Reader(statistics, grid) for statistics in layers]
    for images in held_out:
        for reader, x in zip(readers, tokens(images), strict=True):
            reader.add(x)
    if not readers[0].images:
        raise ValueError(f"an audit of positions holds out every {HELD_OUT}th image: give {HELD_OUT} or more")
    figures = [
        PositionFigures(*reader.r2(), reader.cell_accuracy(), statistics.explained(), statistics.rank())
        for reader, statistics in zip(readers, layers)
    ]
    return Audit(figures, layers[0].images, readers[0].images)


# --- removal


@dataclass(frozen=True)
class PositionProjection:
    """Projects the directions in which cell means differ out of tokens.

    Attributes:
        mean: (C,), the mean token, to which these directions are set.
        basis: (C, r), orthonormal columns.
    """

    mean: Tensor
    basis: Tensor

    @classmethod
    def fit(cls, statistics: CellStatistics, share: float = 1.0) -> "PositionProjection":
        """The projection of one layer.

        It removes the directions in which the cell means differ by more than noise. Observed cell means also
        differ by noise, most of all in the directions in which the content varies most: to remove them all
        would remove content. So the means are compared in units of their noise with the difference of two
        halves of the images, which is noise alone. Of the real directions, `share` keeps the fewest that hold
        this share of their variance. Raises ValueError for a share that is not in (0, 1], for too few images,
        and if nothing would stay.
        """
        if not 0 < share <= 1:
            raise ValueError(f"`share` must lie in (0, 1], found {share}")
        mean = statistics.mean()
        n = statistics.images
        needed = 2 + len(mean) // max(1, statistics.cells - 1)
        if n < needed:
            raise ValueError(f"{len(mean)} channels need at least {needed} images of this grid, found {n}")
        real = _real_means(statistics)  # (C, r)
        vectors, sizes, _ = torch.linalg.svd(real, full_matrices=False)
        if len(sizes):
            reached = sizes.square().cumsum(0) >= share * sizes.square().sum() * (1 - ROUNDING)
            vectors = vectors[:, : int(reached.int().argmax()) + 1]
        if vectors.shape[1] == len(mean):
            raise ValueError(
                f"the cells differ in all {len(mean)} channels, so that nothing would stay: give a smaller "
                "`share` of their variance"
            )
        return cls(mean, vectors)

    def remove(self, tokens: Tensor) -> Tensor:
        """Tokens (..., C) with the mean's values in the directions of the basis; type and device stay.

        The products are float64: rounded to TF32 or by autocast they would leave a part of the position.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.double()
            mean, basis = self.mean.to(x), self.basis.to(x)
            return (x - (x - mean) @ basis @ basis.t()).to(tokens.dtype)


def _real_means(statistics: CellStatistics) -> Tensor:
    """Directions (C, r) that span the part of the cell means that is not noise, with its size."""
    means = statistics.cell_means() - statistics.mean()  # (L, C)
    # Rounding errors of constant tokens are no differences.
    if means.square().sum() <= ROUNDING * statistics.mean().square().sum():
        return means.new_zeros(means.shape[1], 0)
    values, axes = torch.linalg.eigh(statistics.noise())
    # Tokens may have no noise at all in some directions.
    least = ROUNDING * max(float(values[-1]), float(statistics.spread().trace()))
    deviations = values.clamp(min=least).sqrt()  # (C,)
    _, sizes, directions = torch.linalg.svd(means @ axes / deviations, full_matrices=False)
    noise = torch.linalg.svdvals(statistics.noise_means() @ axes / deviations)
    # There are only L - 1 differences, the next one is a rounding error.
    real = sizes[: statistics.cells - 1].square() > MARGIN * noise[0].square()
    count = int(real.sum())
    return (axes * deviations) @ (sizes[:count, None] * directions[:count]).t()


# --- controls for tables of dense predictions


def position_only(batch: int, grid: tuple[int, int], device: torch.device | None = None) -> Tensor:
    """Maps that hold nothing but the cell: (B, h * w, h, w), channel i is 1 in cell i and 0 elsewhere."""
    cells = grid[0] * grid[1]
    return torch.eye(cells, device=device).unflatten(1, grid).expand(batch, -1, -1, -1)


def add_position(features: Tensor) -> Tensor:
    """Features (B, C, h, w) with the maps of `position_only` as further channels: (B, C + h * w, h, w)."""
    batch, _, h, w = features.shape
    return torch.cat([features, position_only(batch, (h, w), features.device).to(features)], 1)


def pixel_patches(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """The pixels of each patch as its features: (B, C, H, W) -> (B, C * ph * pw, H / ph, W / pw).

    The values of a patch are in the order channel, row, column. Raises ValueError if the patches do not fill
    the image.
    """
    height, width = images.shape[-2:]
    if height % patch[0] or width % patch[1]:
        raise ValueError(f"patches of {patch[0]}x{patch[1]} do not fill images of {height}x{width}")
    grid = height // patch[0], width // patch[1]
    return F.unfold(images, patch, stride=patch).unflatten(2, grid)
