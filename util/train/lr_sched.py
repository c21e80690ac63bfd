"""Schedules as pure functions of progress, so that a resumed run needs no stored state for them."""

import math

import torch


def warmup_cosine(progress: float, *, lr: float, min_lr: float, warmup: float, total: float) -> float:
    """Return MAE's learning rate: linear from 0 to `lr` over `warmup`, then half a cosine to `min_lr` at
    `total`.

    `progress`, `warmup` and `total` have the same unit, usually epochs; `progress` may be fractional.
    """
    if progress < warmup:
        return lr * progress / warmup
    # A run that is all warm-up has no cosine.
    if total <= warmup:
        return lr
    done = min(1.0, (progress - warmup) / (total - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def cosine(progress: float, *, start: float, end: float, total: float) -> float:
    """Return half a cosine from `start` to `end`, reached at `total`: DINO's momentum and weight decay."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress / total)))


def ramp(progress: float, *, start: float, end: float, length: float) -> float:
    """Return a straight line from `start` to `end` over `length`, then `end`: DINO's teacher temperature."""
    if length <= 0:
        return end
    return start + (end - start) * min(1.0, progress / length)


def effective_lr(lr: float | None, blr: float, effective_batch: int) -> float:
    """Return the absolute `lr` if it is given, otherwise the base rate scaled by the batch (MAE's linear
    rule).
    """
    if lr is not None:
        return lr
    return blr * effective_batch / 256


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group `lr` times its `lr_scale` (layer-wise decay; 1 if it is not set)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
