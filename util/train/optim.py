"""AdamW and LARS, parameter groups, layer-wise learning rates, and a moving average of the weights."""

from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def param_groups(
    model: nn.Module,
    weight_decay: float,
    skip: set[str] = frozenset(),
    layer_decay: float = 1.0,
    layer_id: Callable[[str], int] | None = None,
    num_layers: int = 0,
) -> list[dict]:
    """Groups for AdamW: biases, norms and the names in `skip` are not decayed, everything else is.

    With `layer_decay` below 1 each depth has its own groups, whose `lr_scale` is layer_decay ** (num_layers - depth),
    so that the head learns at the full rate (BEiT, MAE appendix A.1); depths come from `layer_id(parameter name)`.
    Without it there are two groups, in MAE's order: first what is not decayed.
    """
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = 0.0 if p.ndim <= 1 or name in skip else weight_decay
        scale = layer_decay ** (num_layers - layer_id(name)) if layer_decay < 1 and layer_id else 1.0
        group = groups.setdefault(
            (scale, decay > 0), {"params": [], "weight_decay": decay, "lr_scale": scale}
        )
        group["params"].append(p)
    return (
        sorted(groups.values(), key=lambda g: g["weight_decay"])
        if layer_decay == 1
        else list(groups.values())
    )


class WeightAverage(AveragedModel):
    """Exponential moving average of parameters and of batch statistics, over the same window; other buffers are copied.

    Statistics belong to the weights that they were taken with: the live model's are not those of the average. Integers
    (counters, index tables) must not be averaged: rounding would lower them.

    The state dict is torch's AveragedModel's. Its own update copies the counter of updates to the device each time, and
    waits for that.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """average = decay * average + (1 - decay) * model; the first update copies the model."""
        averages = [*self.module.parameters(), *self.module.buffers()]
        current = [*model.parameters(), *model.buffers()]
        pairs = list(zip(averages, current, strict=True))
        first = int(self.n_averaged) == 0  # a counter on the CPU
        blended = [] if first else [pair for pair in pairs if pair[0].is_floating_point()]
        copied = pairs if first else [pair for pair in pairs if not pair[0].is_floating_point()]
        for average, value in copied:
            average.copy_(value)
        if blended:
            torch._foreach_lerp_(*map(list, zip(*blended)), 1 - self.decay)
        self.n_averaged += 1


def adamw(groups: list[dict], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW in its fused form (one kernel over all parameters; CPU and CUDA have it), else PyTorch's default."""
    devices = {p.device.type for g in groups for p in g["params"]}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=devices <= {"cpu", "cuda"})


def lars(
    heads: Iterable[nn.Module], lr_grid: list[float], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """LARS over heads that learn side by side, each at its factor of the rate; two groups a head.

    As MAE has it: matrices move by 0.001 of their norm times the rate, biases by plain momentum.
    """
    from timm.optim import Lars  # timm takes seconds to import

    groups = []
    for head, scale in zip(heads, lr_grid):
        for matrix in (True, False):
            groups.append(
                {
                    "params": [p for p in head.parameters() if (p.ndim > 1) == matrix],
                    "lr_scale": scale,
                    "weight_decay": weight_decay if matrix else 0.0,
                    "always_adapt": matrix,  # timm leaves the adaptation out where nothing is decayed
                }
            )
    return Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)


def clip_each(params: list[nn.Parameter], max_norm: float) -> None:
    """Shrink every parameter's gradient to a norm of at most `max_norm`, each by itself (DINO), without host sync."""
    grads = [p.grad for p in params if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))  # (number of parameters,)
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factors.unbind())
