"""Self-distillation with prototypes: the losses of DINO (Caron et al. 2021) and iBOT (Zhou et al. 2022, Sec.
3).

A student learns the distribution over K prototypes of a teacher, which is the student's moving average. The
teacher's distribution is centred and sharpened. Centring prevents that one prototype wins everywhere,
sharpening that all are equally likely.

Shapes: B batch, V views, M patches, C channels of a token, K prototypes.
"""

from typing import TypeVar

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn

Teacher = TypeVar("Teacher", bound=nn.Module)


class ProjectionHead(nn.Module):
    """Tokens (..., C) -> logits (..., K): three linear layers with GELU, then cosines to K prototypes.

    Each prototype has a learned scale. `norm_last_layer` fixes it at 1 (DINO, appendix C).
    """

    def __init__(
        self, dim: int, out_dim: int, hidden: int = 2048, bottleneck: int = 256, norm_last_layer: bool = True
    ):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(out_dim, bottleneck), a=5**0.5))
        self.scale = nn.Parameter(torch.ones(out_dim), requires_grad=not norm_last_layer)

    def project(self, x: Tensor) -> Tensor:
        """Tokens (..., C) -> unit vectors (..., bottleneck) in float32."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def logits(self, unit: Tensor) -> Tensor:
        """Unit vectors (..., bottleneck) -> logits (..., K)."""
        # The map is linear, so the mean of logits equals the logits of the mean. Callers rely on it.
        return F.linear(unit, F.normalize(self.prototypes, dim=-1) * self.scale[:, None])

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (..., C) -> logits (..., K)."""
        return self.logits(self.project(x))

    def last_layer(self) -> list[nn.Parameter]:
        """Parameters that are frozen at the start of training (`freeze_last_layer`)."""
        return [self.prototypes, self.scale]


class Centre(nn.Module):
    """Running mean (K,) of a teacher's logits over the batches of all ranks (DINO, Eq. 4)."""

    mean: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(out_dim))

    def target(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits (..., K) -> the distribution (..., K) that the student learns: centred, then sharpened."""
        return ((logits.float() - self.mean) / temperature).softmax(-1)

    @torch.no_grad()
    def update(self, batch_mean: Tensor) -> None:
        """Update the mean with the mean logits (K,) of this rank's batch. Every rank must call it."""
        batch_mean = batch_mean.detach().float()
        if td.is_available() and td.is_initialized():
            # The caller's tensor must not change.
            batch_mean = batch_mean.clone()
            td.all_reduce(batch_mean)
            batch_mean = batch_mean / td.get_world_size()
        self.mean.lerp_(batch_mean, 1 - self.momentum)


def view_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of every student view with every other teacher view, as a scalar.

    The first T of the V student views are also the teacher's views. A view is never compared with itself.

    Args:
        logits: (B, V, ..., K) of the student.
        target: distributions (B, T, ..., K) of the teacher, T <= V.
    """
    V = logits.shape[1]
    T = target.shape[1]
    log_p = logits.float().log_softmax(-1)
    # The sum of products over all T*V pairs is the product of the sums over views.
    every = (target.sum(1) * log_p.sum(1)).sum(-1)  # (B, ...)
    same = (target * log_p[:, :T]).sum((1, -1))  # (B, ...), the T pairs of a view with itself
    return (same - every).mean() / (T * V - T)


def class_loss(logits: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """Loss of the class tokens of all views, (B, V, K), against the teacher's, (B, T, K) (DINO, Eq. 3)."""
    return view_cross_entropy(logits.float() / temperature, target)


def patch_loss(logits: Tensor, target: Tensor, masked: Tensor, temperature: float = 0.1) -> Tensor:
    """Loss of masked patches against the teacher's patches of the same view (iBOT, Eq. 2).

    It is the mean over the masked patches of a view, then over views. A view without masked
    patches counts as 0.

    Args:
        logits: (B, M, K) of the student.
        target: distributions (B, M, K) of the teacher.
        masked: (B, M), true for a masked patch.
    """
    error = -(target * (logits.float() / temperature).log_softmax(-1)).sum(-1)  # (B, M)
    return ((error * masked).sum(1) / masked.sum(1).clamp(min=1)).mean()


class MomentumUpdate:
    """Moves a teacher towards its student.

    `update(momentum)` sets every teacher parameter to momentum * teacher + (1 - momentum) * student. The
    constructor pairs the parameters by name, so both modules must be on their device before.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module):
        source = dict(student.named_parameters())
        names, averages = zip(*teacher.named_parameters())
        self.averages: list[Tensor] = list(averages)
        self.sources: list[Tensor] = [source[name] for name in names]

    @torch.no_grad()
    def __call__(self, momentum: float) -> None:
        # One fused call for all parameters.
        torch._foreach_lerp_(self.averages, self.sources, 1 - momentum)


def copy_parameters(teacher: Teacher, student: nn.Module) -> Teacher:
    """Copy the student's parameters into the teacher, by name, and freeze them. Returns the teacher."""
    MomentumUpdate(teacher, student)(0.0)
    return teacher.requires_grad_(False)
