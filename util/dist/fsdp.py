"""Fully sharded training (FSDP2): parameters, gradients and optimizer state are spread over the ranks.

Checkpoints do not depend on it: whole tensors are saved, and loaded ones are cut to this rank's shards, so
that a run may change its strategy and its number of ranks between two saves.
"""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from util import dist
from util.dist.optimizer_state import KEPT, as_step, check_optimizer

M = TypeVar("M", bound=nn.Module)

# torch.distributed.fsdp and .tensor take seconds to import: only the functions that need them import them.

# Sharded model -> a whole copy of it on the CPU, which `gathered` fills and lends. As an attribute the copy
# would become a part of the model.
_whole_copies: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def shard(model: nn.Module, device: torch.device, amp: str) -> nn.Module:
    """Spread the model's parameters over all ranks, in place.

    Each transformer block is gathered when it runs. Call it before the optimizer is made: parameters become
    new objects. Raises ValueError in a single process, and for `amp` fp16.
    """
    if not dist.is_initialized():
        raise ValueError(
            "`strategy` fsdp spreads a model over processes, but there is only one: start several "
            "(torchrun, srun), or leave `strategy` out"
        )
    if amp == "fp16":
        raise ValueError(
            "`strategy` fsdp needs `amp` bf16 or fp32: float16's loss scaling does not work across shards"
        )
    from torch.distributed.fsdp import fully_shard

    # Before `fully_shard`, which turns the parameters into shards.
    _whole_copies[model] = copy.deepcopy(model).cpu().requires_grad_(False)
    mesh = torch.distributed.init_device_mesh(device.type, (dist.world_size(),))
    # Reversed, because FSDP wants blocks within blocks sharded first.
    for module in reversed(list(model.modules())):
        if type(module).__name__.endswith("Block"):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has spread this model."""
    return model in _whole_copies


def set_gradient_sync(model: nn.Module, enabled: bool) -> None:
    """Choose whether the next backward passes of a sharded model average its gradients over all ranks."""
    # `fully_shard` has made the model an FSDPModule.
    sharded: Any = model
    sharded.set_requires_gradient_sync(enabled)


def full_tensor(x: Any) -> Tensor:
    """A sharded tensor gathered, on its device. All ranks must call it together."""
    return x.full_tensor()


def whole(state: Any, keep: bool = True) -> Any:
    """A state dict with every sharded tensor gathered, on the CPU. All ranks must call it together.

    A rank that does not `keep` the tensors gets None in their places: on a node of 8 ranks only one needs to
    hold a checkpoint.
    """
    if hasattr(state, "full_tensor"):
        # All ranks take part in the gathering, whether they keep the result or not.
        full = full_tensor(state)
        if not keep:
            return None
        return full.cpu()
    if isinstance(state, dict):
        return {k: whole(v, keep) for k, v in state.items()}
    if isinstance(state, list):
        return [whole(v, keep) for v in state]
    return state


def cut_like(x: Tensor, like: Any) -> Tensor:
    """This rank's part of a whole tensor, sharded as `like` is.

    It is `x` itself if `like` is not sharded or has another shape.
    """
    if not hasattr(like, "full_tensor") or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], origin: str = "the stored state"
) -> None:
    """Load a whole optimizer state, as `whole` or an unsharded optimizer returns it.

    Learning rates, decay and the like stay as they are in `optimizer`. Raises ValueError, which names
    `origin`, if the parameter groups differ, and as `check_optimizer` does.
    """
    check_optimizer(saved, optimizer, origin)
    _check_groups(saved["param_groups"], optimizer.param_groups, origin)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    counts_steps = type(optimizer) in KEPT
    state = {i: _cut_state(values, parameters[i], counts_steps) for i, values in saved["state"].items()}
    # The options are those of this run before the state is loaded: `fused` decides on which device `step` is
    # kept, and MAE's files were not made by fused AdamW.
    groups = [
        {k: v for k, v in new.items() if k != "params"} | {"params": old["params"]}
        for old, new in zip(saved["param_groups"], optimizer.param_groups)
    ]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _cut_state(values: dict[str, Any], parameter: Tensor, counts_steps: bool) -> dict[str, Any]:
    """This rank's part of the optimizer state of one parameter."""
    state = dict(values)
    for name, value in values.items():
        if name == "step" and counts_steps:
            state[name] = as_step(value)
        elif torch.is_tensor(value):
            state[name] = cut_like(value, parameter)
    return state


def _check_groups(saved: list[dict[str, Any]], now: list[dict[str, Any]], origin: str) -> None:
    """Raise ValueError unless the groups hold the same numbers of parameters in the same order."""
    old = [len(group["params"]) for group in saved]
    new = [len(group["params"]) for group in now]
    if old == new:
        return
    before = ", ".join(map(str, old)) or "no"
    after = ", ".join(map(str, new))
    if sorted(old) == sorted(new):
        raise ValueError(
            f"{origin}: the optimizer was saved with the same groups in another order ({before}; now "
            f"{after}), as MAE's own fine-tuning with global pooling has them: such a run can be evaluated, "
            "not continued"
        )
    raise ValueError(
        f"{origin}: the optimizer was saved with groups of {before} parameters, now there are {after}: set "
        "`layer_decay` and `partial` as they were, or start from the weights alone, with main_finetune.py "
        "`finetune` or main_pretrain.py `init_from`, and another `output_dir`"
    )


@contextlib.contextmanager
def gathered(model: M) -> Iterator[M]:
    """Lend a whole model with the current weights; every rank may run any part of it independently.

    This is the model itself if it is not sharded. A sharded model cannot be used so: each of its forward
    passes must run on all ranks together. All ranks must enter the context together.
    """
    if not is_sharded(model):
        yield model
        return
    copied: Any = _whole_copies[model]
    device = next(model.parameters()).device
    copied.load_state_dict(whole(model.state_dict()))
    copied.to(device)
    try:
        yield copied
    finally:
        # The memory of the device is needed for training.
        copied.to("cpu")
