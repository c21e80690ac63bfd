"""The process group of a run and its few collectives, which also work in a single process without a group."""

import atexit
import contextlib
import os
import socket
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from util.dist.device import choose_device, prepare_device
from util.dist.launchers import slurm_ranks
from util.files.names import printable_lines
from util.flags import ending

T = TypeVar("T")


def is_initialized() -> bool:
    """Whether this process is one of a group."""
    return td.is_available() and td.is_initialized()


def rank() -> int:
    """The number of this process in the group, from 0."""
    if not is_initialized():
        return 0
    return td.get_rank()


def world_size() -> int:
    """The number of processes in the group."""
    if not is_initialized():
        return 1
    return td.get_world_size()


def is_main() -> bool:
    """Whether this is rank 0, which writes files and prints."""
    return rank() == 0


def print_rank0(message: str) -> None:
    """Print on rank 0 only, without buffering; names of strangers in it cannot command the terminal."""
    if is_main():
        print(printable_lines(message), flush=True)


# For groups that are made after `init`.
_timeout = timedelta(minutes=30)


def timeout() -> timedelta:
    """How long a collective may wait, as set by `init`."""
    return _timeout


def init(
    device: str = "auto", backend: str | None = None, timeout_minutes: float = 30, local_rank: int = -1
) -> torch.device:
    """Join the process group that torchrun's or srun's environment describes; a single process needs none.

    `local_rank` is for launchers that pass it as a flag; the environment's LOCAL_RANK takes precedence.
    Returns the device of this rank (see `choose_device`), set as the current one. Raises ValueError if a rank
    finds no device or no address of rank 0, and RuntimeError if the ranks do not meet within
    `timeout_minutes`.
    """
    global _timeout
    _timeout = timedelta(minutes=timeout_minutes)
    os.environ |= slurm_ranks(os.environ)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and "RANK" not in os.environ:
        raise ValueError(
            f"the environment has WORLD_SIZE {ranks} and no RANK: start the processes by torchrun or srun, "
            "or unset WORLD_SIZE to run in one process"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", max(0, local_rank)))
    chosen = choose_device(device, local_rank, ranks)
    prepare_device(chosen)
    if ranks > 1:
        _meet(chosen, backend)
    return chosen


def _meet(device: torch.device, backend: str | None) -> None:
    """Wait for all ranks and make them a group."""
    if backend is None:
        backend = "nccl" if device.type == "cuda" else "gloo"
    process = (
        f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']}: host {socket.gethostname()}, "
        f"device {device}, {backend}"
    )
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(
            f"{process}: there is no {' and no '.join(missing)}, rank 0's host and a free port there: set "
            "both, or give `dist_url` tcp://HOST:PORT"
        )
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    # Print before the ranks meet: if one is missing, it is the one without this line.
    print(f"{process}, meeting at {address}", flush=True)
    options: dict[str, Any] = {}
    if backend == "nccl":
        options["device_id"] = device
    try:
        td.init_process_group(backend, timeout=_timeout, **options)
    except td.DistError as e:
        minutes = _timeout.total_seconds() / 60
        raise RuntimeError(
            f"{process}: not all processes met at {address} within {minutes:g} minutes; those without a line "
            f"like this have not started, or cannot reach that host ({str(e).splitlines()[0]})"
        ) from e
    # A rank that ends with an error would abort in the threads of the group.
    atexit.register(shutdown)


def check_folder(folder: str) -> None:
    """Check that rank 0 can write a run's folder, and that all hosts see it there; leave nothing behind.

    The folder itself is made when the run starts to write, so that a run that is refused leaves none. Its
    nearest existing parent is checked if it does not exist. Raises ValueError on all ranks if rank 0 cannot
    write there, or if some host does not see what it writes. Without this check each host would look for its
    own last checkpoint, and some would start from scratch.
    """
    # The name is random: a token that an earlier run left behind proves nothing.
    token = ""
    problem = ""
    if is_main():
        token = os.path.join(_existing(folder), f".shared-{uuid.uuid4().hex}")
        problem = _write_token(token)
    token, problem = gather_objects((token, problem))[0]
    if problem:
        raise ValueError(f"the folder {folder} cannot be written ({problem}): choose another `output_dir`")
    host = socket.gethostname()
    place = os.path.dirname(token)
    sees_token = os.path.isdir(place) and os.path.basename(token) in os.listdir(place)
    # This also makes rank 0 wait until all ranks have looked.
    answers = gather_objects((host, sees_token))
    if is_main():
        # Whoever cleans the folder meanwhile may take it.
        with contextlib.suppress(FileNotFoundError):
            os.remove(token)
    blind = sorted({name for name, sees in answers if not sees})
    if blind:
        raise ValueError(
            f"{os.path.abspath(folder)} is not shared: {', '.join(blind)} cannot see what rank 0 writes "
            "there; choose a folder that all nodes mount"
        )


def _existing(folder: str) -> str:
    """Return the absolute path of a folder, or of its nearest parent that exists."""
    path = os.path.abspath(folder)
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def _write_token(path: str) -> str:
    """Write a small file, and return why this fails, or ''; after a failure there is no file."""
    try:
        with open(path, "wb") as f:
            # A full disk still takes empty files.
            f.write(bytes(4096))
            f.flush()
            os.fsync(f.fileno())
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(path)
        place = os.path.dirname(path)
        if not os.path.isdir(place):
            return f"{place} is a file"
        return f"{error.strerror} in {place}"
    return ""


def shutdown() -> None:
    """Leave the process group. Mains call it when their work is done; see `ending.done`."""
    ending.done()
    if is_initialized():
        td.destroy_process_group()


def mean_over_ranks(x: Tensor) -> Tensor:
    """Mean of `x`, which is overwritten, over all ranks, the same on every rank; nan on one is nan on all."""
    if world_size() > 1:
        td.all_reduce(x)
        x = x / world_size()
    return x


def sum_over_ranks(x: Tensor) -> Tensor:
    """Sum of `x` over all ranks, in place, the same on every rank."""
    if world_size() > 1:
        td.all_reduce(x)
    return x


def gather_objects(obj: Any) -> list[Any]:
    """The small picklable objects of all ranks, in rank order, on every rank."""
    if world_size() == 1:
        return [obj]
    out = [None] * world_size()
    td.all_gather_object(out, obj)
    return out


def from_main(value: bool) -> bool:
    """Rank 0's value, on every rank."""
    return gather_objects(value)[0]


def compute_on_main(function: Callable[[], T]) -> T:
    """Call a function on rank 0 only, and return its small picklable result on every rank.

    It serves for what takes long, such as reading many files. Raises ValueError on all ranks, with the
    message of the error, if the function fails: no rank waits for another.
    """
    answer: tuple[T | None, str] = (None, "")
    if is_main():
        try:
            answer = (function(), "")
        # Of any type: the other ranks wait.
        except Exception as error:
            answer = (None, str(error) or type(error).__name__)
    result, problem = gather_objects(answer)[0]
    if problem:
        raise ValueError(problem)
    return result


def share_buffers(module: nn.Module) -> None:
    """Replace every rank's batch statistics by rank 0's: each rank collects those of its own images."""
    if world_size() > 1:
        for buffer in module.buffers():
            # Statistics only: the counters of batches are equal on all ranks.
            if buffer.is_floating_point():
                td.broadcast(buffer, src=0)


def data_parallel(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """The model with its gradients averaged over all ranks."""
    # DDP takes no ids for devices other than GPUs.
    ids = None
    if device.type == "cuda":
        ids = [device.index]
    wrapped = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    _settle_buckets(wrapped)
    return wrapped


def _settle_buckets(wrapped: DistributedDataParallel) -> None:
    """Make DDP arrange its gradient buckets for good, before the first step.

    DDP rearranges them after a process's first backward pass, in the order in which the gradients came. With
    three or more ranks, the place of a value in its bucket decides the order in which the ranks' values are
    added, and so its last bit: the first step after a resume would differ from the same step of a run that
    was not stopped. Two backward passes of a loss that only sums all parameters fix the order of
    registration, last first, which is close to that of a real backward pass.
    """
    model = wrapped.module
    model.forward = lambda: sum(p.sum() for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        wrapped().backward()
    # This uncovers the method of the class again.
    del model.forward
    model.zero_grad(set_to_none=True)


def barrier() -> None:
    """Wait for all ranks."""
    if world_size() > 1:
        td.barrier()
