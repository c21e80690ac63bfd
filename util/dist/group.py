"""Processes: who am I, and the few collectives that the engine needs. Everything works with one plain process too."""

import atexit
import os
import re
import socket
import uuid
import zlib
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as td

from util.dist.allocator import keep_freed_memory


def is_initialized() -> bool:
    return td.is_available() and td.is_initialized()


def rank() -> int:
    return td.get_rank() if is_initialized() else 0


def world_size() -> int:
    return td.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def print_rank0(message: str) -> None:
    """Print on rank 0."""
    if is_main():
        print(message, flush=True)


def slurm_ranks(environ: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables from srun's, for a main that `srun` starts itself; {} where there is no such step.

    A batch script or an interactive shell within an allocation is no step of several tasks: it stays one process. The
    port is the job's, the step's and the restart's own: a rank that a lost network has kept alive cannot join the
    requeued job.
    """
    if "RANK" in environ or int(environ.get("SLURM_STEP_NUM_TASKS", 1)) < 2:
        return {}
    incarnation = ".".join(
        environ.get(f"SLURM_{name}", "0") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")
    )
    return {
        "RANK": environ["SLURM_PROCID"],
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "WORLD_SIZE": environ["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        # Below 32768, where systems hand out ports for outgoing connections.
        "MASTER_PORT": str(10000 + zlib.crc32(incarnation.encode()) % 20000),
    }


def first_host(nodelist: str) -> str:
    """The first name of a SLURM host list: node[03-07,9],gpu1 -> node03."""
    first = re.match(r"(?:[^,\[]|\[[^]]*\])+", nodelist)[0]
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first)


_timeout = timedelta(minutes=30)  # of groups that are made after `init`


def timeout() -> timedelta:
    """How long a collective may wait, as `init` was told."""
    return _timeout


def init(
    device: str = "cuda", backend: str | None = None, timeout_minutes: float = 30, local_rank: int = -1
) -> torch.device:
    """Join the process group that the environment describes, torchrun's or srun's; one process needs none.

    `local_rank` is what older launchers give as a flag; the environment's LOCAL_RANK comes first.

    Returns this rank's device, set as the current one. `device` "cuda" falls back to the CPU with a line that says so,
    but only in a run of one process: several must not end up on different kinds of device. Raises ValueError where a
    rank finds no device, and RuntimeError where the ranks do not meet within `timeout_minutes`.
    """
    global _timeout
    _timeout = timedelta(minutes=timeout_minutes)
    os.environ |= slurm_ranks(os.environ)
    host, ranks = socket.gethostname(), int(os.environ.get("WORLD_SIZE", 1))
    if device.startswith("cuda") and not torch.cuda.is_available():
        if ranks > 1:
            raise ValueError(
                f"rank {os.environ['RANK']} sees no CUDA device on {host}: ask the scheduler for GPUs, or give "
                "--device cpu to run on CPUs"
            )
        print("no CUDA device is visible: running on the CPU", flush=True)
        device = "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", max(0, local_rank)))
    if device == "cuda":
        visible = torch.cuda.device_count()
        if visible == 1 and "SLURM_LOCALID" in os.environ:
            local_rank = 0  # srun has bound a GPU to each task: it sees its own only
        where = torch.device("cuda", local_rank)
        if local_rank >= visible:
            raise ValueError(
                f"local rank {local_rank} has no GPU: {visible} are visible on {host}; start as many processes "
                "per node as GPUs"
            )
    else:
        try:
            where = torch.device(device)
        except RuntimeError as e:
            raise ValueError(f"--device {device}: {str(e).splitlines()[0]}") from e
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
        torch.backends.cudnn.benchmark = (
            True  # patch embeddings and stems are convolutions of a few fixed shapes
        )
    elif where.type == "cpu":
        keep_freed_memory()
    if ranks > 1:
        backend = backend or ("nccl" if where.type == "cuda" else "gloo")
        me = f"rank {os.environ['RANK']} of {ranks}: host {host}, device {where}, {backend}"
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        # Before, not after: when some rank is missing, it is the one without this line.
        print(f"{me}, meeting at {meeting}", flush=True)
        try:
            td.init_process_group(
                backend,
                timeout=_timeout,
                device_id=where if backend == "nccl" else None,
            )
        except td.DistError as e:
            raise RuntimeError(
                f"{me}: not all ranks met at {meeting} within {timeout_minutes:g} minutes; those without a line "
                f"like this have not started, or cannot reach that host ({str(e).splitlines()[0]})"
            ) from e
        atexit.register(shutdown)  # a rank that ends with an error would abort in the group's threads
    return where


def make_shared_folder(folder: str) -> None:
    """Make a run's folder; raises ValueError on all ranks if some host does not see what rank 0 writes there.

    Without this check each host would look for its own last checkpoint, and some would start from scratch.
    """
    if is_main():
        os.makedirs(folder, exist_ok=True)
    if world_size() == 1:
        return
    token = os.path.join(folder, f".shared-{gather_objects(uuid.uuid4().hex)[0]}")
    if is_main():
        with open(token, "w"):
            pass
    barrier()
    seen = os.path.isdir(folder) and os.path.basename(token) in os.listdir(folder)
    blind = sorted({host for host in gather_objects(None if seen else socket.gethostname()) if host})
    if is_main():
        os.remove(token)
    if blind:
        raise ValueError(
            f"{os.path.abspath(folder)} is not shared: {', '.join(blind)} cannot see what rank 0 writes there; "
            "choose a folder that all nodes mount"
        )


def shutdown() -> None:
    if is_initialized():
        td.destroy_process_group()


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Mean of `x` over all ranks, the same on every rank; nan anywhere is nan everywhere."""
    if world_size() > 1:
        td.all_reduce(x)
        x = x / world_size()
    return x


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    if world_size() > 1:
        td.all_reduce(x)
    return x


def gather_objects(obj) -> list:
    """The small picklable object of every rank, in rank order, on every rank."""
    if world_size() == 1:
        return [obj]
    out = [None] * world_size()
    td.all_gather_object(out, obj)
    return out


def from_main(value: bool) -> bool:
    """Rank 0's answer, on every rank."""
    return gather_objects(value)[0]


def share_buffers(module: torch.nn.Module) -> None:
    """Give every rank rank 0's batch statistics: each rank collects those of its own images."""
    if world_size() > 1:
        for buffer in module.buffers():
            if buffer.is_floating_point():
                td.broadcast(buffer, src=0)


def data_parallel(model: torch.nn.Module, device: torch.device) -> torch.nn.parallel.DistributedDataParallel:
    """The model with its gradients averaged over all ranks."""
    ids = [device.index] if device.type == "cuda" else None
    wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    _settle_buckets(wrapped)
    return wrapped


def _settle_buckets(wrapped: torch.nn.parallel.DistributedDataParallel) -> None:
    """Have DDP arrange its gradient buckets for good, before the first step.

    It does so anew after a process's first backward pass, by the order in which gradients came. From three ranks on the
    place of a number in its bucket decides in which order the ranks' values are added, and so its last bit: the first
    step after a resume would differ from the same step of a run that was not stopped. Two rehearsals on a loss that only
    adds all parameters up fix the order of registration, last first, which is almost that of a backward pass.
    """
    model = wrapped.module
    model.forward = lambda: sum(p.sum() for p in model.parameters() if p.requires_grad)
    for _ in range(2):
        wrapped().backward()
    del model.forward
    model.zero_grad(set_to_none=True)


def barrier() -> None:
    if world_size() > 1:
        td.barrier()
