"""Fully sharded training (FSDP2): parameters, gradients and optimizer state are spread over the ranks.

Checkpoints do not know about it: what is saved is whole, and what is loaded is cut to this rank's shards, so that a run
may change its strategy and its number of ranks between two saves.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import nn

from util import dist

# torch.distributed.fsdp and .tensor take seconds to import: only runs that are sharded do.


def shard(model: nn.Module, device: torch.device, amp: str) -> nn.Module:
    """Spread the model's parameters over all ranks, in place; each transformer block is gathered when it runs.

    Call it before the optimizer is made: parameters become new objects. Raises ValueError where it cannot work.
    """
    if not dist.is_initialized():
        raise ValueError(
            "--strategy fsdp spreads a model over ranks, but there is one process only: start several "
            "(torchrun, srun), or leave --strategy at ddp"
        )
    if amp == "fp16":
        raise ValueError(
            "--strategy fsdp needs --amp bf16 or fp32: float16's loss scaling is not done across shards"
        )
    from torch.distributed.fsdp import fully_shard

    model.whole_copy = [
        copy.deepcopy(model).cpu().requires_grad_(False)
    ]  # in a list: no part of the model; see `gathered`
    mesh = torch.distributed.init_device_mesh(device.type, (dist.world_size(),))
    for module in reversed(list(model.modules())):  # blocks within blocks first
        if type(module).__name__.endswith("Block"):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    return hasattr(model, "whole_copy")


def whole(state, keep: bool = True):
    """A state dict with every sharded tensor gathered, on the CPU; all ranks must call it together.

    A rank that does not `keep` them gets None in their places: on a node of 8 ranks only one need hold a checkpoint.
    """
    if hasattr(state, "full_tensor"):
        full = state.full_tensor()
        return full.cpu() if keep else None
    if isinstance(state, dict):
        return {k: whole(v, keep) for k, v in state.items()}
    return [whole(v, keep) for v in state] if isinstance(state, list) else state


def cut_like(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This rank's part of a whole tensor, sharded as `like` is; `x` itself where `like` is not, or has another shape."""
    if not hasattr(like, "full_tensor") or x.shape != like.shape:
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: dict) -> None:
    """Load a whole optimizer state, as `whole` or an optimizer that is not sharded has given it.

    Rates, decay and the like stay as the flags of now say. Raises ValueError where the groups of parameters differ.
    """
    now = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    sizes = [[len(g["params"]) for g in groups] for groups in (saved["param_groups"], optimizer.param_groups)]
    if sizes[0] != sizes[1]:
        before, after = (", ".join(map(str, s)) for s in sizes)
        if sorted(sizes[0]) == sorted(sizes[1]):
            raise ValueError(
                f"the optimizer was saved with the same groups in another order ({before}; now {after}), as MAE's "
                "own fine-tuning with --global_pool has them: such a run can be evaluated, not continued"
            )
        raise ValueError(
            f"the optimizer was saved with groups of {before} parameters, now there are {after}: give "
            "--layer_decay and --partial as they were, or start from the weights alone, by --finetune or "
            "--init_from and another --output_dir"
        )
    params = dict(enumerate(p for g in optimizer.param_groups for p in g["params"]))
    state = {
        i: {k: cut_like(v, params[i]) if torch.is_tensor(v) else v for k, v in values.items()}
        for i, values in saved["state"].items()
    }
    # Now's flags before loading, which follows `fused` to where it keeps `step`: MAE's files were not made by fused AdamW.
    groups = [before | flags for before, flags in zip(saved["param_groups"], now)]
    optimizer.load_state_dict(saved | {"state": state, "param_groups": groups})


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[nn.Module]:
    """A whole model with the current weights, of which every rank may run any part, any number of times, by itself.

    That is the model itself if it is not sharded. A sharded one cannot be used so: each of its forward passes must run on
    all ranks together. All ranks must enter together.
    """
    if not is_sharded(model):
        yield model
        return
    copied, device = model.whole_copy[0], next(model.parameters()).device
    copied.load_state_dict(whole(model.state_dict()))
    copied.to(device)
    try:
        yield copied
    finally:
        copied.to("cpu")
