"""Processes: who am I, and the few collectives that the engine needs. Everything works with one plain process too."""
import os
import signal
import socket
from datetime import timedelta

import torch
import torch.distributed as td


def is_initialized() -> bool:
    return td.is_available() and td.is_initialized()


def rank() -> int:
    return td.get_rank() if is_initialized() else 0


def world_size() -> int:
    return td.get_world_size() if is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def say(message: str) -> None:
    """Print on rank 0."""
    if is_main():
        print(message, flush=True)


def init(device: str = "cuda", backend: str | None = None, timeout_minutes: float = 30,
         local_rank: int = -1) -> torch.device:
    """Join the process group that the environment describes (torchrun's variables); one process needs none.

    `local_rank` is what older launchers give as a flag; the environment's LOCAL_RANK comes first.

    Returns this rank's device, set as the current one. `device` "cuda" falls back to the CPU with a line that says so.
    """
    if device.startswith("cuda") and not torch.cuda.is_available():
        print("no CUDA device is visible: running on the CPU", flush=True)
        device = "cpu"
    local_rank = int(os.environ.get("LOCAL_RANK", max(0, local_rank)))
    if device == "cuda":
        where = torch.device("cuda", local_rank)
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} are visible on "
                             f"{socket.gethostname()}; start as many processes per node as GPUs")
    else:
        where = torch.device(device)
    if where.type == "cuda":
        torch.cuda.set_device(where)
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = backend or ("nccl" if where.type == "cuda" else "gloo")
        td.init_process_group(
            backend, timeout=timedelta(minutes=timeout_minutes),
            device_id=where if backend == "nccl" else None,
        )
        print(f"rank {rank()} of {world_size()}: host {socket.gethostname()}, device {where}, {backend}", flush=True)
    return where


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


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """The rows of all ranks, (n_r, ...) each with its own n_r, one after the other, on every rank."""
    if world_size() == 1:
        return x
    counts = gather_objects(len(x))
    padded = torch.zeros(max(counts), *x.shape[1:], dtype=x.dtype, device=x.device)
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in counts]
    td.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, counts)])


def barrier() -> None:
    if world_size() > 1:
        td.barrier()


class StopSignal:
    """SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask for a stop; handlers only set a flag.

    `agreed()` is called once per step on every rank and is True on all of them at the same step once any was asked.
    The flag travels by an asynchronous all-reduce between hosts that is read one step later, so that neither the
    device nor the step waits for it. A second SIGINT interrupts at once, for people at a terminal.
    """

    def __init__(self):
        self.received: str | None = None
        self._group = td.new_group(backend="gloo") if world_size() > 1 else None
        self._pending: tuple | None = None
        self._previous = {}

    def __enter__(self):
        for s in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
            try:
                self._previous[s] = signal.signal(s, self._handle)
            except ValueError:  # not in the main thread: the caller handles signals
                return self
        return self

    def __exit__(self, *exc):
        for s, handler in self._previous.items():
            signal.signal(s, handler)

    def _handle(self, number, frame):
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def agreed(self) -> bool:
        if self._group is None:
            return self.received is not None
        asked = False
        if self._pending is not None:
            flag, work = self._pending
            work.wait()
            asked = bool(flag.item())
        flag = torch.tensor([int(self.received is not None)])
        self._pending = (flag, td.all_reduce(flag, op=td.ReduceOp.MAX, group=self._group, async_op=True))
        return asked
