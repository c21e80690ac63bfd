"""The device of each process."""

import os
import socket

import torch

from util.dist.allocator import keep_freed_memory


def choose_device(name: str, local_rank: int, ranks: int) -> torch.device:
    """The device of this process: its own GPU for "cuda", else the device `name`.

    "auto" is a GPU if there is one, and else the CPU, with a printed line, but only in a run of one process:
    several must not end up on different kinds of device. Raises ValueError if a rank of several, or a process
    that is to run on a GPU, finds none, and for unknown names.
    """
    if (name == "auto" or name.startswith("cuda")) and not torch.cuda.is_available():
        _check_may_do_without(name, ranks)
        print("no CUDA device is visible: running on the CPU", flush=True)
        return torch.device("cpu")
    if name in ("auto", "cuda"):
        return _own_gpu(local_rank)
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ValueError(f"`device` {name}: {str(e).splitlines()[0]}") from e
    _check_exists(device)
    return device


def _check_exists(device: torch.device) -> None:
    """Raise ValueError for a device that this machine does not have."""
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("`device` mps: torch sees no Apple GPU here; leave `device` out")
    if device.type == "xpu" and not torch.xpu.is_available():
        raise ValueError("`device` xpu: torch sees no Intel GPU here; leave `device` out")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"`device` {device}: {torch.cuda.device_count()} GPUs are visible, numbered from 0; leave the "
            "number out to take the first one"
        )


def _check_may_do_without(name: str, ranks: int) -> None:
    """Raise ValueError if a process needs a GPU, and there is none."""
    if ranks > 1:
        raise ValueError(
            f"rank {os.environ['RANK']} sees no CUDA device on {socket.gethostname()}, and each of the "
            f"{ranks} processes needs a GPU: ask the scheduler for GPUs, or give `device` cpu to run on CPUs"
        )
    if name != "auto":
        why = "no GPU is visible to this process"
        if torch.version.cuda is None:
            why = f"torch {torch.__version__} is built without CUDA"
        raise ValueError(f"`device` {name}: {why}; leave `device` out to run on the CPU")


def _own_gpu(local_rank: int) -> torch.device:
    visible = torch.cuda.device_count()
    if visible == 1 and "SLURM_LOCALID" in os.environ:
        # srun has bound a GPU to each task, and a task sees only its own.
        local_rank = 0
    if local_rank >= visible:
        raise ValueError(
            f"process {local_rank + 1} on {socket.gethostname()} has no GPU: torch sees {visible}. "
            f"Start at most {visible} processes on this node"
        )
    return torch.device("cuda", local_rank)


def prepare_device(device: torch.device) -> None:
    """Make `device` the current one and set it up for training."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        # TF32 for the products that autocast leaves in float32.
        torch.set_float32_matmul_precision("high")
        # Patch embeddings and stems are convolutions of a few fixed shapes.
        torch.backends.cudnn.benchmark = True
    elif device.type == "cpu":
        keep_freed_memory()
