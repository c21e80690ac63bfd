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

    Each prototype has a learned scale. `norm_last_layer` fixes it at 1 (DINO, appendix C). Patches have
    `patch_out_dim` prototypes of their own; with 0 they share those of the class tokens.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        norm_last_layer: bool = True,
        patch_out_dim: int = 0,
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
        self.patch_prototypes: nn.Parameter | None = None
        self.patch_scale: nn.Parameter | None = None
        if patch_out_dim:
            table = nn.init.kaiming_uniform_(torch.empty(patch_out_dim, bottleneck), a=5**0.5)
            self.patch_prototypes = nn.Parameter(table)
            self.patch_scale = nn.Parameter(torch.ones(patch_out_dim), requires_grad=not norm_last_layer)

    def project(self, x: Tensor) -> Tensor:
        """Tokens (..., C) -> unit vectors (..., bottleneck) in float32."""
        return F.normalize(self.mlp(x).float(), dim=-1)

    def logits(self, unit: Tensor, patches: bool = False) -> Tensor:
        """Unit vectors (..., bottleneck) of class tokens, or of `patches` -> logits (..., K)."""
        prototypes = self.prototypes
        scale = self.scale
        if patches and self.patch_prototypes is not None and self.patch_scale is not None:
            prototypes = self.patch_prototypes
            scale = self.patch_scale
        # The map is linear, so the mean of logits equals the logits of the mean. Callers rely on it.
        return F.linear(unit, F.normalize(prototypes, dim=-1) * scale[:, None])

    def forward(self, x: Tensor, patches: bool = False) -> Tensor:
        """Class tokens or `patches` (..., C) -> logits (..., K)."""
        return self.logits(self.project(x), patches)

    def last_layer(self) -> list[nn.Parameter]:
        """Parameters that are frozen at the start of training (`freeze_last_layer`)."""
        every = [self.prototypes, self.scale, self.patch_prototypes, self.patch_scale]
        return [p for p in every if p is not None]


class Centre(nn.Module):
    """Running mean (K,) of a teacher's logits over the batches of all ranks (DINO, Eq. 4).

    It moves with each batch. With `once_per_step` it moves in `step`, by the mean of all batches since the
    last one: the micro-batches of an optimizer step then have the same centre.
    """

    mean: Tensor
    collected: Tensor
    batches: Tensor

    def __init__(self, out_dim: int, momentum: float = 0.9, once_per_step: bool = False):
        super().__init__()
        self.momentum = momentum
        self.once_per_step = once_per_step
        self.register_buffer("mean", torch.zeros(out_dim))
        # Not stored: they are zero between steps. They are buffers, so that an unfinished step is undone.
        self.register_buffer("collected", torch.zeros(out_dim), persistent=False)
        self.register_buffer("batches", torch.zeros(()), persistent=False)

    def target(self, logits: Tensor, temperature: float) -> Tensor:
        """Logits (..., K) -> the distribution (..., K) that the student learns: centred, then sharpened."""
        return ((logits.float() - self.mean) / temperature).softmax(-1)

    @torch.no_grad()
    def update(self, batch_mean: Tensor) -> None:
        """Take in the mean logits (K,) of this rank's batch. Every rank must call it."""
        batch_mean = batch_mean.detach().float()
        if self.once_per_step:
            self.collected += batch_mean
            self.batches += 1
        else:
            self._move(batch_mean)

    @torch.no_grad()
    def step(self) -> None:
        """End an optimizer step. Every rank must call it."""
        if self.once_per_step:
            self._move(self.collected / self.batches)
            self.collected.zero_()
            self.batches.zero_()

    def _move(self, batch_mean: Tensor) -> None:
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
