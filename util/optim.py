"""AdamW and its parameter groups."""
import torch
from torch import nn


def param_groups(model: nn.Module, weight_decay: float, skip: set[str] = frozenset()) -> list[dict]:
    """Two groups: decayed weights; and biases, norms and the names in `skip`, which are not decayed."""
    decay, plain = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if p.ndim <= 1 or name in skip else decay).append(p)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decay, "weight_decay": weight_decay}]


def adamw(groups: list[dict], lr: float, betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW in its fused form (one kernel over all parameters; CPU and CUDA have it), else PyTorch's default."""
    devices = {p.device.type for g in groups for p in g["params"]}
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=devices <= {"cpu", "cuda"})
