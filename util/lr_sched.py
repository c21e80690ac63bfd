"""Re-export under the module name of MAE, which users of MAE import. It stays."""

from util.train.lr_sched import cosine, effective_lr, ramp, set_lr, warmup_cosine

__all__ = ["cosine", "effective_lr", "ramp", "set_lr", "warmup_cosine"]
