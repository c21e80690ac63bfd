"""Whether a cache of images fits: memory of the host and of the device, on all ranks together."""

import contextlib
import math
import os
import socket
from typing import NamedTuple

import torch

from util import dist
from util.data.sources.image_index import ImageIndex

MB = 1e6  # bytes


class Need(NamedTuple):
    """What one rank needs and has, in bytes."""

    host: str
    memory: float
    memory_left: float
    gpu: float
    gpu_left: float


def check_room(
    index: ImageIndex,
    memory: float,
    padded: float,
    device: torch.device | None,
    largest: str = "the largest",
) -> None:
    """Raise ValueError on all ranks if the decoded images of an index do not fit on one of them.

    Args:
        memory: bytes that they still need in the memory of the host.
        padded: bytes that they need on the device, where all are as large as the largest.
        device: where the padded images go; None if they are not needed.
        largest: how the message names the largest image.
    """
    # Without a GPU the device is the host.
    need = Need(socket.gethostname(), memory + padded, available_memory(), gpu=0.0, gpu_left=0.0)
    if device is not None and device.type == "cuda":
        need = need._replace(memory=memory, gpu=padded, gpu_left=torch.cuda.mem_get_info(device)[0])
    ranks = dist.gather_objects(need)
    images = f"the {len(index)} decoded images of {index.path}"
    hosts = images
    instead = "none"
    if need.memory > memory:
        hosts = f"{images}, padded to {largest},"
        instead = "memory, or none"
    _check_hosts(ranks, hosts, instead)
    _check_gpus(ranks, f"{images}, padded to {largest},")


def _check_hosts(ranks: list[Need], images: str, instead: str) -> None:
    for host in {rank.host for rank in ranks}:
        # The ranks of a host share its memory.
        needed = sum(rank.memory for rank in ranks if rank.host == host)
        left = min(rank.memory_left for rank in ranks if rank.host == host)
        if needed > left:
            raise ValueError(
                f"{images} would take about {needed / MB:.0f} MB on {host}, by all its processes, and "
                f"{left / MB:.0f} MB are left: give `cache_data` {instead}, or smaller images "
                "(`python -m util.data repack` makes them)"
            )


def _check_gpus(ranks: list[Need], images: str) -> None:
    for rank in ranks:
        if rank.gpu > rank.gpu_left:
            raise ValueError(
                f"{images} would take about {rank.gpu / MB:.0f} MB on a GPU of {rank.host}, which has "
                f"{rank.gpu_left / MB:.0f} MB left: give `cache_data` memory, or none"
            )


def available_memory(proc: str = "/proc", groups: str = "/sys/fs/cgroup") -> float:
    """Return the bytes that this process can still take, on the machine and in its control groups.

    Control groups of version 2 are considered, others are not. If a machine does not say what is left, as
    macOS, all of its memory counts.

    Args:
        proc, groups: where the system shows its processes and its control groups.
    """
    left = [_machine_memory(proc)]
    # There may be no control groups of version 2.
    with contextlib.suppress(OSError, StopIteration):
        group = next(line[3:] for line in _lines(proc, "self/cgroup") if line.startswith("0::"))
        parts = group.strip("/").split("/")
        # The limits of all parents hold: SLURM sets one for the job, and the process is in one of its steps.
        for depth in range(len(parts) + 1):
            # The root has no limit.
            with contextlib.suppress(OSError, ValueError, StopIteration):
                left.append(_group_memory(os.path.join(groups, *parts[:depth])))
    return min(left)


def _machine_memory(proc: str) -> float:
    try:
        line = next(line for line in _lines(proc, "meminfo") if line.startswith("MemAvailable"))
        return 1024 * float(line.split()[1])  # in KiB
    except (OSError, StopIteration):
        # Windows says neither.
        if not hasattr(os, "sysconf"):
            return math.inf
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _group_memory(folder: str) -> float:
    """Return what a control group has left. Raises ValueError for "max", which means no limit."""
    limit = float(_lines(folder, "memory.max")[0])
    used = float(_lines(folder, "memory.current")[0])
    # Cached files count as used, and are dropped when memory is short.
    line = next(line for line in _lines(folder, "memory.stat") if line.startswith("inactive_file"))
    return limit - used + float(line.split()[1])


def _lines(folder: str, name: str) -> list[str]:
    with open(os.path.join(folder, name)) as file:
        return file.read().splitlines()
