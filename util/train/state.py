"""The state of a run: model, optimizer, scaler and counters; its random seeds; and the end of an update."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from util import dist
from util.dist import fsdp
from util.weights.checkpoint import load_part, load_strict
from util.weights.types import Checkpoint
from util.weights.validate import REMEDY


@dataclass
class TrainState:
    """Everything that a checkpoint stores.

    `best` and `best_epoch` are the best figure that `after_epoch` noted, and its epoch. `meters` are the
    log's sums of the unfinished epoch. `extras` are modules saved by name (a teacher, an average).
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0
    best: float | None = None
    best_epoch: int | None = None
    meters: dict[str, float] = field(default_factory=dict)
    extras: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        return fsdp.is_sharded(self.model)

    def to_dict(self, epoch: int, updates: int, flags: dict) -> dict:
        """Return the checkpoint. If the model is sharded, all ranks must call this together, and rank 0 gets
        it.
        """
        model = self.model.state_dict()
        optimizer = self.optimizer.state_dict()
        if self.sharded:
            model = fsdp.whole(model, keep=dist.is_main())
            optimizer = fsdp.whole(optimizer, keep=dist.is_main())
        state = {
            "model": model,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "epoch": epoch,
            "step": self.step,
            "updates_per_epoch": updates,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "meters": self.meters,
            "args": flags,
        }
        return state | {name: module.state_dict() for name, module in self.extras.items()}

    def load_checkpoint(self, checkpoint: Checkpoint, updates: int, exact: bool = True) -> None:
        """Continue from a checkpoint at its step, or at the start of its unfinished epoch.

        The latter holds for MAE's own files, for another number of updates per epoch, and for data streams
        (not `exact`). Raises ValueError, which names the file and the field, if the checkpoint has no
        optimizer, or if anything in it does not fit this run; the state is then of no use.
        """
        load_strict(self.model, checkpoint)
        saved = checkpoint.entries
        if saved.get("optimizer") is None:
            raise ValueError(
                f"{checkpoint.path} has weights but no optimizer: start from it by "
                "main_pretrain.py `init_from` or main_finetune.py `finetune`, not `resume`"
            )
        fsdp.load_optimizer(self.optimizer, saved["optimizer"], checkpoint.path)
        self._load_scaler(checkpoint)
        for name, module in self.extras.items():
            if saved.get(name) is not None:
                load_part(module, checkpoint, name)
        self.best = saved.get("best")
        self.best_epoch = saved.get("best_epoch")
        self._load_position(saved, updates, exact)

    def _load_scaler(self, checkpoint: Checkpoint) -> None:
        """Continue the loss scale of float16, if this run and the file's have one."""
        saved = checkpoint.entries.get("scaler")
        if not saved or not self.scaler.is_enabled():
            return
        missing = [name for name in self.scaler.state_dict() if name not in saved]
        if missing or saved["scale"] <= 0:
            found = f"missing {', '.join(missing)}"
            if not missing:
                found = f"a scale of {saved['scale']}"
            raise ValueError(
                f"{checkpoint.path}: its entry 'scaler' is {found}, expected the state of a gradient scaler: "
                f"{REMEDY}"
            )
        self.scaler.load_state_dict(saved)

    def _load_position(self, saved: dict, updates: int, exact: bool) -> None:
        # MAE's files store the last finished epoch and no step.
        epoch = saved.get("epoch")
        if epoch is None:
            epoch = -1
        self.step = (epoch + 1) * updates
        self.meters = {}
        step = saved.get("step") or 0
        if saved.get("updates_per_epoch") == updates and saved.get("step") is not None:
            self.step = step
            self.meters = saved.get("meters") or {}
        elif step % (saved.get("updates_per_epoch") or 1):
            dist.print_rank0("the number of steps per epoch has changed: the unfinished epoch starts again")
        unfinished = self.step % updates
        if not exact and unfinished:
            dist.print_rank0("the data are a stream: the unfinished epoch starts again")
            self.step -= unfinished
            self.meters = {}


def seed_step(seed: int, micro_step: int) -> None:
    """Seed all randomness of the model (drop path, mixup, sampled pairs) for one micro-step of this rank."""
    value = np.random.SeedSequence([seed, micro_step, dist.rank()]).generate_state(2, np.uint64)
    # torch takes 63 bits, numpy's old generator 32.
    torch.manual_seed(int(value[0] >> np.uint64(1)))
    random.seed(int(value[1]))
    np.random.seed(int(value[1] & np.uint64(0xFFFFFFFF)))


def apply_gradients(
    state: TrainState, clip_grad: float | None, before_step: Callable[[], None] | None = None
) -> Tensor:
    """Unscale and clip the gradients, call `before_step`, update, and clear them.

    Returns the gradient norm before clipping, a scalar on the device.
    """
    state.scaler.unscale_(state.optimizer)
    params = [p for group in state.optimizer.param_groups for p in group["params"] if p.grad is not None]
    if clip_grad:
        norm = torch.nn.utils.clip_grad_norm_(params, clip_grad)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
    if state.sharded:
        norm = fsdp.full_tensor(norm)
    if state.scaler.is_enabled():
        # An overflow in float16 is expected: the scaler skips the step. It must not count as
        # a non-finite loss.
        norm = norm.nan_to_num(0.0, 0.0, 0.0)
    if before_step is not None:
        before_step()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    return norm
