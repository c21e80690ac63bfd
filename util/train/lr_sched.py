"""Schedules as pure functions of progress: nothing to save, nothing to resume."""

import math


def warmup_cosine(progress: float, *, lr: float, min_lr: float, warmup: float, total: float) -> float:
    """MAE's schedule: linear from 0 to `lr` over `warmup`, then a half cosine to `min_lr` at `total`.

    `progress`, `warmup` and `total` are in the same unit, epochs as a rule; `progress` may be fractional.
    """
    if progress < warmup:
        return lr * progress / warmup
    if total <= warmup:
        return lr
    done = min(1.0, (progress - warmup) / (total - warmup))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def cosine(progress: float, *, start: float, end: float, total: float) -> float:
    """Half a cosine from `start` to `end`, which it reaches at `total`: DINO's momentum and weight decay."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress / total)))


def ramp(progress: float, *, start: float, end: float, length: float) -> float:
    """A straight line from `start` to `end` over `length`, then constant: DINO's teacher temperature."""
    return start + (end - start) * min(1.0, progress / length) if length > 0 else end


def effective_lr(lr: float | None, blr: float, effective_batch: int) -> float:
    """An absolute `lr` if given, else the base rate scaled by the batch: blr * effective_batch / 256."""
    return lr if lr is not None else blr * effective_batch / 256


def set_lr(optimizer, lr: float) -> None:
    """Give every group `lr` times its `lr_scale` (layer-wise decay), 1 where a group has none."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
