"""Self-distillation with prototypes: the losses of DINO (Caron et al. 2021) and iBOT (Zhou et al. 2022, Sec. 3).

A student's distribution over K prototypes is fitted to that of its own moving average, the teacher, which is centred and
sharpened so that neither one prototype nor all of them alike win.

Shapes: B batch, V views, M patches, C channels of a token, K prototypes.
"""

import torch
import torch.distributed as td
import torch.nn.functional as F
from torch import Tensor, nn


class ProjectionHead(nn.Module):
    """Tokens (..., C) -> logits (..., K): three linear layers with GELU, unit length, cosines to K prototypes.

    Each prototype has a learned scale unless `norm_last_layer` fixes it at 1 (DINO, appendix C).
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
        for layer in self.mlp[::2]:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.prototypes = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(out_dim, bottleneck), a=5**0.5))
        self.scale = nn.Parameter(torch.ones(out_dim), requires_grad=not norm_last_layer)

    def project(self, x: Tensor) -> Tensor:
        """(..., C) -> unit vectors (..., bottleneck)."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def logits(self, unit: Tensor) -> Tensor:
        """A linear map: the mean of logits is the logits of the mean."""
        return F.linear(unit, F.normalize(self.prototypes, dim=-1) * self.scale[:, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.project(x))

    def last_layer(self) -> list[nn.Parameter]:
        """What is frozen at the start of training (`freeze_last_layer`)."""
        return [self.prototypes, self.scale]


class Centre(nn.Module):
    """Running mean of a teacher's logits, (K,), over the batches of all ranks; subtracted before the softmax."""

    def __init__(self, out_dim: int, momentum: float = 0.9):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(out_dim))

    def target(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits (..., K) -> the distribution that the student learns."""
        return ((logits.float() - self.mean) / temperature).softmax(-1)

    @torch.no_grad()
    def update(self, batch_mean: Tensor) -> None:
        """Take in the mean logits (K,) of this rank's batch; every rank must call it."""
        batch_mean = batch_mean.detach().float()
        if td.is_available() and td.is_initialized():
            batch_mean = batch_mean.clone()
            td.all_reduce(batch_mean)
            batch_mean = batch_mean / td.get_world_size()
        self.mean.lerp_(batch_mean, 1 - self.momentum)


def view_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Every student view against every other teacher view: logits (B, V, ..., K), target (B, T, ..., K), T <= V.

    The first T student views are the teacher's own ones; a view is never compared with itself. Returns the mean over
    pairs and all dimensions between. Sums over views stand for the T*V - T pairs: the sum of products is the product
    of sums.
    """
    V, T = logits.shape[1], target.shape[1]
    log_p = logits.float().log_softmax(-1)
    every = (target.sum(1) * log_p.sum(1)).sum(-1)
    same = (target * log_p[:, :T]).sum((1, -1))
    return (same - every).mean() / (T * V - T)


def class_loss(logits: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """Class tokens of all views, (B, V, K), against the teacher's, (B, T, K) (DINO, Eq. 3)."""
    return view_cross_entropy(logits.float() / temperature, target)


def patch_loss(logits: Tensor, target: Tensor, masked: Tensor, temperature: float = 0.1) -> Tensor:
    """Patches of the same view, (B, M, K) both: mean over the masked ones (B, M) of a view, then over views, those
    without any counting 0 (iBOT, Eq. 2)."""
    error = -(target * (logits.float() / temperature).log_softmax(-1)).sum(-1)  # (B, M)
    return ((error * masked).sum(1) / masked.sum(1).clamp(min=1)).mean()


class MomentumUpdate:
    """Moves a teacher towards its student: `update(momentum)` sets every parameter of the teacher to
    momentum * teacher + (1 - momentum) * student.

    The parameters are paired by name, once: make it when both modules are on their device.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module):
        source = dict(student.named_parameters())
        names, averages = zip(*teacher.named_parameters())
        self.averages, self.sources = list(averages), [source[name] for name in names]

    @torch.no_grad()
    def __call__(self, momentum: float) -> None:
        torch._foreach_lerp_(self.averages, self.sources, 1 - momentum)


def copy_parameters(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """The teacher with the student's parameters, by name, none of which it trains."""
    MomentumUpdate(teacher, student)(0.0)
    return teacher.requires_grad_(False)
