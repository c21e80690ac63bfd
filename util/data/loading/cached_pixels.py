"""All images of an index, decoded once, in the memory of the host."""

import copy
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from util import dist
from util.data.formats import ReadSettings, decode
from util.data.loading.memory import MB, check_room
from util.data.sources.image_index import ImageIndex
from util.data.survey.headers import spread
from util.files.names import counted

SLAB = 1 << 28  # bytes of one of the tensors that hold decoded images
PROBED = 64  # images that are decoded to estimate the size of all


class CachedPixels:
    """All images of an index, decoded: `pixels[i]` is (C, H, W), a view that must not be changed.

    The images lie one after the other in a few large tensors. Nobody writes to these later, so forked workers
    share their pages. For spawned workers torch moves each tensor to shared memory, once for all workers.

    Args:
        threads: number of images that are decoded at a time.
        device: where the images go next; only the memory check needs it.
        read: how files become images; `read.depth` is the type of all of them, uint8 if it is None.

    Raises ValueError, on all ranks together, if the images would not fit.

    Attributes:
        place: int64 (n, 4): number of the tensor, first value, height, width.
        errors: why an image cannot be read, by its number.
    """

    def __init__(
        self,
        index: ImageIndex,
        read: ReadSettings,
        threads: int = 1,
        device: torch.device | None = None,
    ):
        begin = time.monotonic()
        self.in_chans = read.in_chans
        self.depth = read.depth or torch.uint8
        self.place = np.zeros((len(index), 4), np.int64)
        self.slabs: list[torch.Tensor] = []
        self.errors: dict[int, str] = {}
        images = Reader(index, replace(read, depth=self.depth))
        threads = max(1, threads)
        # Threads are enough: decoders and file systems work without the interpreter's lock.
        with ThreadPoolExecutor(threads) as pool:
            shapes = [shape for shape in pool.map(images.shape, spread(len(index), PROBED)) if shape]
            memory, padded = _estimate(shapes, len(index), self.depth.itemsize)
            if device is None:
                padded = 0.0
            # Before anything is kept: the system would end the process later.
            check_room(index, memory, padded, device)
            free = 0  # values at the end of the last slab
            for i, image in enumerate(in_order(pool, images, range(len(index)), 2 * threads)):
                free = self._keep(i, image, free)
        seconds = time.monotonic() - begin
        unreadable = ""
        if self.errors:
            unreadable = f"; {len(self.errors)} cannot be read"
        dist.print_rank0(
            f"{index.path}: {counted(len(index), 'image')} decoded in {seconds:.1f} s, "
            f"{self.nbytes / MB:.0f} MB in memory{unreadable}"
        )

    def _keep(self, i: int, image: torch.Tensor | Exception, free: int) -> int:
        """Store image i; return how many values are then free at the end of the last slab."""
        if isinstance(image, Exception):
            self.errors[i] = str(image)
            return free
        size = image.numel()
        if size > free:
            free = max(SLAB // self.depth.itemsize, size)
            # The system provides its pages when they are written to.
            self.slabs.append(torch.empty(free, dtype=self.depth))
        slab = self.slabs[-1]
        at = len(slab) - free
        slab[at : at + size] = image.flatten()  # (C, H, W) -> (C*H*W,)
        # A few numbers per image, not a tensor: a million tensors would take more memory than small images.
        self.place[i] = len(self.slabs) - 1, at, *image.shape[1:]
        return free - size

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Return image i. Raises ValueError if it cannot be read, as `decode` does."""
        if i in self.errors:
            raise ValueError(self.errors[i])
        slab, at, height, width = self.place[i].tolist()
        size = self.in_chans * height * width
        return self.slabs[slab][at : at + size].view(self.in_chans, height, width)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all readable images."""
        return self.depth.itemsize * self.in_chans * int((self.place[:, 2] * self.place[:, 3]).sum())


def _estimate(shapes: list[torch.Size], n: int, itemsize: int) -> tuple[float, float]:
    """Estimate the bytes of n images from the shapes (C, H, W) of some, whose values have `itemsize` bytes.

    Returns the bytes of the images as they are, and padded to the largest height and width.
    """
    if not shapes:
        return 0.0, 0.0
    # The probed images are spread over the data set, so their mean is near that of all.
    memory = itemsize * n * sum(shape.numel() for shape in shapes) / len(shapes)
    padded = itemsize * n * math.prod(map(max, zip(*shapes)))
    return memory, float(padded)


class Reader:
    """Decodes image i of an index, or returns the error if that fails; for use by several threads."""

    def __init__(self, index: ImageIndex, read: ReadSettings):
        self.index = index
        self.read = read
        self.thread = threading.local()

    def __call__(self, i: int) -> torch.Tensor | Exception:
        # Each thread has its own copy: an index closes a tar when too many are open.
        if not hasattr(self.thread, "index"):
            self.thread.index = copy.copy(self.index)
        try:
            return decode(self.thread.index.read(i), self.read)
        except (OSError, ValueError) as error:
            self.thread.index.check_unchanged(i)
            return error

    def shape(self, i: int) -> torch.Size | None:
        """Return the shape of image i, or None if it cannot be read."""
        image = self(i)
        if isinstance(image, Exception):
            return None
        return image.shape


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Iterable, ahead: int
) -> Iterator[Any]:
    """Yield `function` of each item, in order. The pool is up to `ahead` items ahead.

    The pool's own `map` would hold all results.
    """
    waiting: deque[Future] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        # The oldest result: waiting for it also bounds how many images wait.
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
