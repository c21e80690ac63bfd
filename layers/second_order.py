"""So-ViT's second-order classification head (Xie et al. 2021, arXiv 2104.10935): covariances of patch tokens.

Shapes: B batch, N patch tokens, C channels of a token, F channels of the first-order feature, H heads, d1 and
d2 the widths of the two projections, K classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSIONS = ("sum", "concat", "visual")
# Smallest singular value that is raised to a power. Without this bound an image without contrast has no
# finite gradient.
SMALLEST = 1e-6


@dataclass(frozen=True)
class SecondOrder:
    """Options of `SecondOrderHead`. Raises ValueError if one of them is out of range.

    Attributes:
        dims: widths (d1, d2) of the two projections. heads: number of cross-covariances of that size. fusion:
        how the first-order feature enters. 'sum' adds the logits of two linear layers, 'concat' has one
            layer on both features (the same functions with one bias less), 'visual' leaves the feature out.
        alpha: power of the largest singular value, in (0, 1]; 1 does not normalise.
        iters: power iterations that estimate this value.
        dropout: rate of the dropout on the second-order feature.
    """

    dims: tuple[int, int] = (48, 24)
    heads: int = 1
    fusion: str = "sum"
    alpha: float = 0.5
    iters: int = 1
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ValueError(f"`fusion` takes one of {', '.join(FUSIONS)}, found {self.fusion!r}")
        if not 0 < self.alpha <= 1:
            raise ValueError(
                f"`alpha` takes a power above 0 and up to 1 (no normalisation), found {self.alpha}"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` takes a share from 0 to below 1, found {self.dropout}")


def cross_covariance(p: Tensor, q: Tensor) -> Tensor:
    """Mean over tokens of (p - mean p)(q - mean q)^T: (..., N, d1), (..., N, d2) -> (..., d1, d2)."""
    # It suffices to centre the narrower side: its deviations sum to zero over the tokens, and so does their
    # product with the mean of the other side.
    if p.shape[-1] < q.shape[-1]:
        p = p - p.mean(dim=-2, keepdim=True)
    else:
        q = q - q.mean(dim=-2, keepdim=True)
    return p.transpose(-2, -1) @ q / p.shape[-2]


def largest_singular_value(a: Tensor, start: Tensor, iters: int) -> Tensor:
    """Estimate the largest singular value by power iteration from `start` (d1,): (..., d1, d2) -> (..., 1,
    1).

    The estimate is never above the true value. One iteration gives about 0.7 of it, five give 0.9 or more.
    Gradients flow through the iteration.
    """
    v = start.unsqueeze(-1).to(a.dtype)  # (d1, 1)
    for _ in range(iters):
        u = F.normalize(a.transpose(-2, -1) @ v, dim=-2)  # (..., d2, 1)
        v = a @ u  # (..., d1, 1)
        s = torch.linalg.vector_norm(v, dim=-2, keepdim=True)  # (..., 1, 1)
        v = v / s.clamp(min=SMALLEST)
    return s


def singular_value_power(a: Tensor, start: Tensor, alpha: float = 0.5, iters: int = 1) -> Tensor:
    """So-ViT's fast singular-value power normalisation, (..., d1, d2) -> (..., d1, d2).

    The paper raises the largest singular value s to the power alpha and divides the others by s^(1 - alpha).
    With one singular triplet, the paper's setting in every model, this equals `a * s ** (alpha - 1)`. Hence
    Y(c A) = c^alpha Y(A).
    """
    return a * largest_singular_value(a, start, iters).clamp(min=SMALLEST) ** (alpha - 1)


class SecondOrderPooling(nn.Module):
    """Patch tokens (B, N, C) -> normalised cross-covariances of two projections (B, H * d1 * d2), in float32.

    A projection is a linear layer without bias, batch normalisation over images and tokens, and ReLU. Several
    heads split the projected channels and share `start`, as in So-ViT's successor SoT (which has neither
    normalisation nor ReLU here). Raises ValueError if a width, `heads` or `iters` is below 1.
    """

    def __init__(
        self, dim: int, dims: tuple[int, int] = (48, 24), heads: int = 1, alpha: float = 0.5, iters: int = 1
    ):
        super().__init__()
        if len(dims) != 2 or min(*dims, heads, iters) < 1:
            raise ValueError(
                "the second-order head needs two widths, heads and iterations of at least 1, found "
                f"`dims` {' '.join(map(str, dims))}, `heads` {heads}, `iters` {iters}"
            )
        self.dims = tuple(dims)
        self.heads = heads
        self.alpha = alpha
        self.iters = iters
        # Both projections in one layer. Each keeps the initialisation that it would have as a layer
        # of its own.
        self.project = nn.Linear(dim, heads * sum(dims), bias=False)
        for rows in self.project.weight.data.split([heads * d for d in dims]):
            nn.init.kaiming_normal_(rows, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm1d(heads * sum(dims))
        self.start = nn.Parameter(torch.randn(dims[0]))

    @property
    def width(self) -> int:
        """Channels of the pooled feature, H * d1 * d2."""
        return self.heads * self.dims[0] * self.dims[1]

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) -> (B, H * d1 * d2) in float32, or in float64 for tokens in float64."""
        B, N, _ = tokens.shape
        # Autocast is off: covariances of centred tokens are small differences.
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).flatten(0, 1)  # (B*N, C)
            x = self.norm(self.project(x)).relu()  # (B*N, H*(d1 + d2))
            p, q = (
                part.unflatten(1, (self.heads, -1)).unflatten(0, (B, N)).transpose(1, 2)  # (B, H, N, d) each
                for part in x.split([self.heads * d for d in self.dims], dim=1)
            )
            covariance = cross_covariance(p, q)  # (B, H, d1, d2)
            return singular_value_power(covariance, self.start, self.alpha, self.iters).flatten(1)


class SecondOrderHead(nn.Module):
    """Class logits (B, K) from second-order statistics of patch tokens and a first-order feature (So-ViT).

    `feature_dim` is F, and `std` the standard deviation of the linear layers' truncated normal
    initialisation. Raises ValueError if a width, the heads or the iterations in `options` are below 1.
    """

    def __init__(self, dim: int, feature_dim: int, num_classes: int, std: float, options: SecondOrder):
        super().__init__()
        self.fusion = options.fusion
        self.pool = SecondOrderPooling(dim, options.dims, options.heads, options.alpha, options.iters)
        self.dropout = nn.Dropout(options.dropout)
        # The order of the layers fixes the order of the random draws of their initialisation.
        if self.fusion == "concat":
            self.fc = nn.Linear(feature_dim + self.pool.width, num_classes)
        else:
            self.fc_visual = nn.Linear(self.pool.width, num_classes)
        if self.fusion == "sum":
            self.fc_class = nn.Linear(feature_dim, num_classes)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, feature: Tensor) -> Tensor:
        """Patch tokens after the final norm (B, N, C), class token or pooled feature (B, F) -> (B, K)."""
        y = self.dropout(self.pool(tokens))  # (B, H*d1*d2)
        if self.fusion == "concat":
            return self.fc(torch.cat([feature, y.to(feature.dtype)], dim=1))
        logits = self.fc_visual(y)  # (B, K)
        if self.fusion == "sum":
            logits = logits + self.fc_class(feature)
        return logits
