"""AdamW and LARS, parameter groups, layer-wise learning rates, and a moving average of the weights."""

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def param_groups(
    model: nn.Module,
    weight_decay: float,
    skip: Collection[str] = frozenset(),
    layer_decay: float = 1.0,
    layer_id: Callable[[str], int] | None = None,
    num_layers: int = 0,
    by_layer: bool = False,
) -> list[dict]:
    """Return groups for AdamW. Biases, norms and the names in `skip` are not decayed.

    With `layer_decay` below 1 each depth has its own groups. Their `lr_scale` is layer_decay **
    (num_layers - depth), so that the head learns at the full rate (BEiT; MAE appendix A.1). `layer_id`
    maps a parameter's name to its depth. Without layer decay there are two groups, in the order of MAE's
    pretraining: first the one without weight decay. MAE's fine-tuning has groups for each depth in any
    case; `by_layer` makes them.
    """
    by_layer = layer_id is not None and (by_layer or layer_decay < 1)
    groups: dict[tuple, dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        decay = weight_decay
        if p.ndim <= 1 or name in skip:
            decay = 0.0
        depth = num_layers
        if by_layer and layer_id is not None:
            depth = layer_id(name)
        scale = layer_decay ** (num_layers - depth)
        new = {"params": [], "weight_decay": decay, "lr_scale": scale}
        groups.setdefault((depth, decay > 0), new)["params"].append(p)
    found = list(groups.values())
    if not by_layer:
        # Optimizer states are loaded by position, and MAE's files have this order.
        found.sort(key=lambda group: group["weight_decay"])
    return found


class WeightAverage(AveragedModel):
    """Exponential moving average of parameters and batch statistics, over the same window; other buffers are
    copied.

    Batch statistics belong to the weights that they were taken with, so those of the live model do not fit
    the average. Integers (counters, index tables) must not be averaged: rounding would lower them.

    The state dict is that of torch's AveragedModel. The update differs: torch's copies its counter to the
    device each time and waits for the copy.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Set average = decay * average + (1 - decay) * model; the first update copies the model."""
        averages = [*self.module.parameters(), *self.module.buffers()]
        current = [*model.parameters(), *model.buffers()]
        first = int(self.n_averaged) == 0  # the counter lives on the CPU
        blended: tuple[list[Tensor], list[Tensor]] = ([], [])
        for average, value in zip(averages, current, strict=True):
            if first or not average.is_floating_point():
                average.copy_(value)
            else:
                blended[0].append(average)
                blended[1].append(value)
        if blended[0]:
            # One kernel for all tensors of a type instead of one for each.
            torch._foreach_lerp_(*blended, 1 - self.decay)
        self.n_averaged += 1


def adamw(groups: list[dict], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """Return AdamW, in its fused form on devices that have one: one kernel updates all parameters."""
    devices = {p.device.type for group in groups for p in group["params"]}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=devices <= {"cpu", "cuda"})


def lars(
    heads: Iterable[nn.Module], lr_grid: list[float], lr: float, weight_decay: float
) -> torch.optim.Optimizer:
    """Return LARS over heads that learn side by side, each at its factor of the rate, with two groups per
    head.

    As in MAE, `weight_decay` times a matrix is added to its gradient. The matrix then moves by 0.001 of its
    norm times the rate. Biases move by plain momentum, without decay. timm adds 1e-8 to the norm of the
    gradient, MAE adds nothing.
    """
    from timm.optim import Lars  # timm takes seconds to import

    groups = []
    for head, scale in zip(heads, lr_grid):
        matrices = [p for p in head.parameters() if p.ndim > 1]
        biases = [p for p in head.parameters() if p.ndim <= 1]
        # timm would not adapt the rate of parameters without weight decay, hence `always_adapt`.
        groups.append({"params": matrices, "lr_scale": scale, "decay": weight_decay, "always_adapt": True})
        groups.append({"params": biases, "lr_scale": scale, "decay": 0.0, "always_adapt": False})
    optimizer = Lars(groups, lr=lr, momentum=0.9, trust_coeff=0.001)
    if weight_decay > 0:
        optimizer.register_step_pre_hook(_add_decay)
    return optimizer


@torch.no_grad()
def _add_decay(optimizer: torch.optim.Optimizer, *call: Any) -> None:
    """Add the decay to the gradients before the step.

    timm's own `weight_decay` divides by |g| + decay |w|, where MAE's LARS divides by |g + decay w|.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["decay"] > 0 and p.grad is not None:
                p.grad.add_(p, alpha=group["decay"])


def clip_each(params: list[nn.Parameter], max_norm: float) -> None:
    """Shrink the gradient of every parameter to a norm of at most `max_norm`, each by itself (DINO).

    Nothing is read from the device.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))  # (number of parameters,)
    # The same small number as torch's clip_grad_norm_ has against a division by zero.
    factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(grads, factors.unbind())
