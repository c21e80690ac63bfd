"""So-ViT's second-order classification head (Xie et al. 2021, arXiv 2104.10935): what patch tokens do together.

Shapes: B batch, N patch tokens, C channels of a token, F those of the first-order feature, H heads, d1 d2 the two
projections' widths, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FUSIONS = ("sum", "concat", "visual")
SMALLEST = (
    1e-6  # of a singular value: below it the power is held, so that an image without contrast has gradients
)


def cross_covariance(p: Tensor, q: Tensor) -> Tensor:
    """Mean over tokens of (p - mean p)(q - mean q)^T: (..., N, d1), (..., N, d2) -> (..., d1, d2).

    Centring the narrower side is enough: what the other's mean adds is multiplied by a sum of zeros.
    """
    if p.shape[-1] < q.shape[-1]:
        p = p - p.mean(dim=-2, keepdim=True)
    else:
        q = q - q.mean(dim=-2, keepdim=True)
    return p.transpose(-2, -1) @ q / p.shape[-2]


def largest_singular_value(a: Tensor, start: Tensor, iters: int) -> Tensor:
    """Estimate by power iteration from `start` (d1,): (..., d1, d2) -> (..., 1, 1), never above the true value.

    One iteration finds some 0.7 of it, five 0.9 or more. Gradients flow through the iteration.
    """
    v = start.unsqueeze(-1).to(a.dtype)  # (d1, 1)
    for _ in range(iters):
        u = F.normalize(a.transpose(-2, -1) @ v, dim=-2)  # (..., d2, 1)
        v = a @ u
        s = torch.linalg.vector_norm(v, dim=-2, keepdim=True)  # (..., 1, 1)
        v = v / s.clamp(min=SMALLEST)
    return s


def singular_value_power(a: Tensor, start: Tensor, alpha: float = 0.5, iters: int = 1) -> Tensor:
    """So-ViT's fast singular-value power normalisation, (..., d1, d2) -> (..., d1, d2).

    The paper takes the largest singular value to the power alpha and divides the rest by the constant s^(1 - alpha);
    with one triplet, its setting in every model, that is `a * s ** (alpha - 1)` exactly. Y(c A) = c^alpha Y(A).
    """
    return a * largest_singular_value(a, start, iters).clamp(min=SMALLEST) ** (alpha - 1)


class SecondOrderPooling(nn.Module):
    """Patch tokens (B, N, C) -> normalised cross-covariances of two projections (B, H * d1 * d2), always in float32.

    A projection is a linear layer without bias, batch normalisation over images and tokens, ReLU; both are one layer
    here. Autocast is off inside: covariances of centred tokens are small differences. Several heads split the
    projected channels, as in So-ViT's successor SoT (there without normalisation and ReLU), and share `start`.
    """

    def __init__(
        self, dim: int, dims: tuple[int, int] = (48, 24), heads: int = 1, alpha: float = 0.5, iters: int = 1
    ):
        super().__init__()
        if len(dims) != 2 or min(*dims, heads, iters) < 1:
            raise ValueError(
                f"the second-order head needs two widths, heads and iterations of at least 1, found "
                f"--so_dims {' '.join(map(str, dims))} --so_heads {heads} --so_iters {iters}"
            )
        self.dims, self.heads, self.alpha, self.iters = tuple(dims), heads, alpha, iters
        self.project = nn.Linear(dim, heads * sum(dims), bias=False)
        for rows in self.project.weight.data.split([heads * d for d in dims]):  # each as a layer of its own
            nn.init.kaiming_normal_(rows, mode="fan_out", nonlinearity="relu")
        self.norm = nn.BatchNorm1d(heads * sum(dims))
        self.start = nn.Parameter(torch.randn(dims[0]))

    @property
    def width(self) -> int:
        return self.heads * self.dims[0] * self.dims[1]

    def forward(self, tokens: Tensor) -> Tensor:
        B, N, _ = tokens.shape
        with torch.autocast(tokens.device.type, enabled=False):
            x = tokens.to(torch.promote_types(tokens.dtype, torch.float32)).flatten(0, 1)  # (B*N, C)
            x = self.norm(self.project(x)).relu()  # (B*N, H*(d1 + d2))
            p, q = (
                part.unflatten(1, (self.heads, -1)).unflatten(0, (B, N)).transpose(1, 2)  # (B, H, N, d) each
                for part in x.split([self.heads * d for d in self.dims], dim=1)
            )
            y = singular_value_power(
                cross_covariance(p, q), self.start, self.alpha, self.iters
            )  # (B, H, d1, d2)
            return y.flatten(1)


class SecondOrderHead(nn.Module):
    """Class logits from patch tokens' second-order statistics and a first-order feature (So-ViT).

    `fusion`: 'sum' adds the logits of two linear layers, 'concat' has one layer on both features (the same functions
    with one bias less), 'visual' leaves the first-order feature out. `dropout` falls on the second-order feature.
    `feature_dim` is F; `std` that of the linear layers' truncated normal. Raises ValueError on an unknown fusion and
    on widths, heads, iterations or powers that cannot be.
    """

    def __init__(
        self,
        dim: int,
        feature_dim: int,
        num_classes: int,
        std: float,
        *,
        dims: tuple[int, int] = (48, 24),
        heads: int = 1,
        fusion: str = "sum",
        alpha: float = 0.5,
        iters: int = 1,
        dropout: float = 0.0,
    ):
        super().__init__()
        if fusion not in FUSIONS:
            raise ValueError(f"--so_fusion takes one of {', '.join(FUSIONS)}, found {fusion!r}")
        if not 0 < alpha <= 1:
            raise ValueError(
                f"--so_alpha takes a power above 0 and up to 1 (no normalisation), found {alpha}"
            )
        if not 0 <= dropout < 1:
            raise ValueError(f"--so_dropout takes a share from 0 to below 1, found {dropout}")
        self.fusion = fusion
        self.pool = SecondOrderPooling(dim, dims, heads, alpha, iters)
        self.dropout = nn.Dropout(dropout)
        if fusion == "concat":
            self.fc = nn.Linear(feature_dim + self.pool.width, num_classes)
        else:
            self.fc_visual = nn.Linear(self.pool.width, num_classes)
        if fusion == "sum":
            self.fc_class = nn.Linear(feature_dim, num_classes)
        for layer in self.children():
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=std)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor, feature: Tensor) -> Tensor:
        """Patch tokens after the final norm (B, N, C), class token or pooled feature (B, F) -> logits (B, K)."""
        y = self.dropout(self.pool(tokens))
        if self.fusion == "concat":
            return self.fc(torch.cat([feature, y.to(feature.dtype)], dim=1))
        logits = self.fc_visual(y)
        return logits + self.fc_class(feature) if self.fusion == "sum" else logits
