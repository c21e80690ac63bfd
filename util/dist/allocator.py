"""What the C library does with memory that tensors on a CPU give back.

By default glibc returns blocks of more than 32 MiB, and more than 64 MiB at the end of its heap, to the system at once. A
training step then takes the same memory anew every time, page by page: for ViT-B/16 at batch 16 that is 250,000 page
faults a step, 3 to 6 % of its time in float32 and 14 to 19 % in bfloat16 on a Xeon (benchmarks/README.md).
"""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4  # names of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Keep what tensors free for the next ones; False where the C library is not glibc, which changes nothing there.

    The process then stays as large as it ever was, which for a training is what it needs in every step. Its heap settles
    within the first few: an aligned block fits into a freed one of its size only once slivers between such blocks are used up.
    """
    return _set({MMAP_MAX: 0, TRIM_THRESHOLD: -1})


def return_freed_memory(*_) -> bool:
    """Give freed memory back again, as glibc does once it has seen large blocks; False where it is not glibc.

    For data workers, which inherit their parent's setting: one huge image must not stay in each of them. As a worker's
    `worker_init_fn` it is called with the worker's number.
    """
    return _set({MMAP_MAX: 65536, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20})


def _set(options: dict[int, int]) -> bool:
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(option, value) for option, value in options.items())
