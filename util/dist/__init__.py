"""The processes of a run: their ranks and devices, what they exchange, and when they stop together."""

from util.dist.group import (
    barrier,
    check_folder,
    compute_on_main,
    data_parallel,
    from_main,
    gather_objects,
    init,
    is_initialized,
    is_main,
    mean_over_ranks,
    print_rank0,
    rank,
    share_buffers,
    shutdown,
    sum_over_ranks,
    world_size,
)
from util.dist.launchers import first_host, flag_ranks, openmpi_ranks, slurm_ranks
from util.dist.stop import StopSignal

__all__ = [
    "StopSignal",
    "barrier",
    "check_folder",
    "compute_on_main",
    "data_parallel",
    "first_host",
    "flag_ranks",
    "from_main",
    "gather_objects",
    "init",
    "is_initialized",
    "is_main",
    "mean_over_ranks",
    "openmpi_ranks",
    "print_rank0",
    "rank",
    "share_buffers",
    "shutdown",
    "slurm_ranks",
    "sum_over_ranks",
    "world_size",
]
