"""The processor cores that this process may use."""

import contextlib
import math
import os


def own_cores(limit: str = "/sys/fs/cgroup/cpu.max") -> int:
    """Return the number of cores that this process may use, which may be fewer than the machine has.

    `limit` is the file of the control group (version 2) that holds a container's share, such as that of
    `docker run --cpus 2`. Part of a core counts as one. Without the file there is no such limit.
    """
    cores = os.cpu_count() or 1
    # A job may run on some of the cores. macOS has no affinity.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError, ZeroDivisionError), open(limit) as file:
        # Microseconds of all cores together, or "max", and the period to which they belong.
        quota, period = file.read().split()
        cores = min(cores, math.ceil(int(quota) / int(period)))
    return max(1, cores)
