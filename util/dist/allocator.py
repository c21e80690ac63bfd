"""Sets what the C library does with the memory that CPU tensors free.

By default glibc returns blocks of more than 32 MiB, and more than 64 MiB at the end of its heap, to the
system at once. A training step then takes the same memory anew every time, page by page: for ViT-B/16 at
batch 16 that is 250,000 page faults a step, 3 to 6 % of its time in float32 and 14 to 19 % in bfloat16 on a
Xeon (benchmarks/README.md).
"""

import ctypes
import os

# Options of mallopt(3), numbered as in glibc's malloc.h.
TRIM_THRESHOLD = -1
MMAP_THRESHOLD = -3
MMAP_MAX = -4


def keep_freed_memory() -> bool:
    """Keep the memory that tensors free for the next ones; returns False where that is impossible.

    It is possible with glibc only. The process then stays as large as it ever was, which a training needs in
    every step anyway. The heap settles within the first few steps: an aligned block fits into a freed one of
    its size only once the gaps between such blocks are used up.
    """
    return _set({MMAP_MAX: 0, TRIM_THRESHOLD: -1})


def return_freed_memory(*_) -> bool:
    """Return freed memory to the system, as glibc does by default; returns False if that is impossible.

    Data workers call it, as their `worker_init_fn`, with the worker's number: they inherit their parent's
    setting, and the memory of one huge image must not stay in each of them.
    """
    # glibc raises its thresholds to these once it has seen large blocks.
    return _set({MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20})


def _set(options: dict[int, int]) -> bool:
    # Windows has no handle of all loaded libraries.
    if os.name == "nt":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(option, value) for option, value in options.items())
