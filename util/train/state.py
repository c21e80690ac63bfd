"""What a run carries from step to step: model, optimizer, scaler, counters; its randomness, and one update of it."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from util import dist
from util.dist import fsdp
from util.weights.checkpoint import Checkpoint, load_strict


@dataclass
class TrainState:
    """Everything a checkpoint stores. `extras` are named objects with state_dict (a teacher, an average)."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: float | None = None  # the best figure that `after_epoch` noted, and the epoch that gave it
    best_epoch: int | None = None
    meters: dict[str, float] = field(default_factory=dict)
    extras: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        return fsdp.is_sharded(self.model)

    def to_dict(self, epoch: int, updates: int, args: dict) -> dict:
        """The checkpoint; all ranks must call it together where the model is sharded, and rank 0 gets it."""
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        if self.sharded:
            model, optimizer = (fsdp.whole(x, keep=dist.is_main()) for x in (model, optimizer))
        return {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": self.step,
            "updates_per_epoch": updates,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "meters": self.meters,
            "args": args,
        } | {name: x.state_dict() for name, x in self.extras.items()}

    def load_checkpoint(self, checkpoint: Checkpoint, updates: int, exact: bool = True) -> None:
        """Continue from a checkpoint; MAE's own files, other batch sizes and streams (not `exact`) at an epoch's start."""
        load_strict(self.model, checkpoint)
        saved = checkpoint.entries
        if "optimizer" not in saved:
            raise ValueError(
                f"{checkpoint.path} has weights only, no optimizer: start from it with --init_from, not --resume"
            )
        fsdp.load_optimizer(self.optimizer, saved["optimizer"])
        if saved.get("scaler"):
            self.scaler.load_state_dict(saved["scaler"])
        for name, x in self.extras.items():
            if name in saved:
                x.load_state_dict(saved[name])
        self.best, self.best_epoch = saved.get("best"), saved.get("best_epoch")
        self.step, self.meters = (int(saved.get("epoch", -1)) + 1) * updates, {}
        if saved.get("updates_per_epoch") == updates:
            self.step, self.meters = saved["step"], saved.get("meters", {})
        elif saved.get("step", 0) % saved.get("updates_per_epoch", 1):
            dist.print_rank0("the number of steps per epoch has changed: the unfinished epoch starts again")
        if not exact and self.step % updates:
            dist.print_rank0("the data are a stream: the unfinished epoch starts again")
            self.step, self.meters = self.step - self.step % updates, {}


def seed_step(seed: int, micro_step: int) -> None:
    """Seed all model-side randomness (drop path, mixup, sampled pairs) for one micro-step on this rank."""
    value = np.random.SeedSequence([seed, micro_step, dist.rank()]).generate_state(2, np.uint64)
    torch.manual_seed(int(value[0] >> np.uint64(1)))
    random.seed(int(value[1]))
    np.random.seed(int(value[1] & np.uint64(0xFFFFFFFF)))


def apply_gradients(
    state: TrainState, clip_grad: float | None, before_step: Callable[[], None] | None = None
) -> Tensor:
    """Unscale, clip, `before_step`, step, clear. Returns the gradient norm before clipping, on the device."""
    state.scaler.unscale_(state.optimizer)
    params = [p for g in state.optimizer.param_groups for p in g["params"] if p.grad is not None]
    if clip_grad:
        norm = torch.nn.utils.clip_grad_norm_(params, clip_grad)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if state.sharded:
        norm = norm.full_tensor()
    if state.scaler.is_enabled():
        norm = norm.nan_to_num(
            0.0, 0.0, 0.0
        )  # an overflow is no accident in float16: the scaler skips the step
    if before_step is not None:
        before_step()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return norm
