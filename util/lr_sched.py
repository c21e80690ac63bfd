"""The name under which MAE's users import this; it stays."""

from util.train.lr_sched import cosine, effective_lr, ramp, set_lr, warmup_cosine

__all__ = ["cosine", "effective_lr", "ramp", "set_lr", "warmup_cosine"]
