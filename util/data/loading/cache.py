"""Small data sets that are decoded once and kept, in the memory of the host or on the device.

`cached` is what mains call. From memory, samples have the bits that they have without a cache. On the device,
`resample` also cuts the crops.
"""

import contextlib
import copy
import math
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from util import dist
from util.data.datasets import ImageDataset
from util.data.loading.loader import build_loader
from util.data.sources.image_index import ImageIndex
from util.data.transforms import decode

SLAB = 1 << 28  # bytes of one of the tensors that hold decoded images
PROBED = 64  # images that are decoded to estimate the size of all
COPIED = 1 << 26  # bytes that go to the device at a time, or those of one padded image
# Floats (256 MiB) that `resample` holds at most while it makes a part of its result, or those of one image.
CHUNK = 1 << 26
HELD = 16  # floats that `Axis.weights` holds for each of its exact weights
MB = 1e6


def cached(loader, where: str, device: torch.device):
    """A loader with the batches of `loader`, from images that are decoded once. Every rank keeps all images.

    Args:
        loader: what build_loader made of an ImageDataset, before its first use.
        where: "none" returns `loader` itself. "memory": its workers cut crops from the host's memory.
            "device": see `DeviceLoader`.

    Raises ValueError where the data set or its transform cannot be cached; on all ranks where one of them
    lacks the memory.
    """
    if where == "none":
        return loader
    dataset = loader.dataset
    if not isinstance(dataset, ImageDataset):
        raise ValueError(
            f"{dataset.summary()}: --cache_data {where} keeps images from folders, tars and "
            "lists of files, not from timm's readers: give --cache_data none"
        )
    if getattr(dataset.transform, "dct_scaling", False):
        raise ValueError(
            f"--dct_scaling decodes a file anew for each crop, and --cache_data {where} only "
            "once: leave one of them out"
        )
    if where == "device":
        return DeviceLoader(loader, device)
    assert where == "memory", where
    dataset.pixels = CachedPixels(dataset.index, dataset.in_chans, threads=loader.num_workers)
    return loader


# --- in the host's memory ---


class CachedPixels:
    """All images of an index, decoded: `pixels[i]` is uint8 (C, H, W), a view that must not be changed.

    The images lie one after the other in a few large tensors. Nobody writes to these later, so forked workers
    share their pages. Where workers are spawned, torch moves each tensor to shared memory, once for all
    workers.

    Args:
        threads: how many images are decoded at a time.
        device: where the images go next; only the memory check needs it.

    Raises ValueError, on all ranks together, where the images would not fit.

    Attributes:
        place: int64 (n, 4): number of the tensor, first byte, height, width.
        errors: why an image cannot be read, by its number.
    """

    def __init__(
        self, index: ImageIndex, in_chans: int, threads: int = 1, device: torch.device | None = None
    ):
        begin = time.monotonic()
        self.in_chans = in_chans
        self.place = np.zeros((len(index), 4), np.int64)
        self.slabs: list[torch.Tensor] = []
        self.errors: dict[int, str] = {}
        read = Reader(index, in_chans)
        # Threads are enough: decoders and file systems work without the interpreter's lock.
        with ThreadPoolExecutor(max(1, threads)) as pool:
            probed = [shape for shape in pool.map(read.shape, spread(len(index), PROBED)) if shape]
            memory = len(index) * sum(shape.numel() for shape in probed) / max(1, len(probed))
            padded = len(index) * math.prod(map(max, zip(*probed))) if device is not None and probed else 0
            check_room(index, memory, padded, device)
            free = 0  # bytes at the end of the last slab
            for i, image in enumerate(in_order(pool, read, range(len(index)), 2 * max(1, threads))):
                free = self._keep(i, image, free)
        seconds = time.monotonic() - begin
        unreadable = f"; {len(self.errors)} cannot be read" if self.errors else ""
        dist.print_rank0(
            f"{index.path}: {len(index)} images decoded in {seconds:.1f} s, {self.nbytes / MB:.0f} MB "
            f"in memory{unreadable}"
        )

    def _keep(self, i, image, free):
        if isinstance(image, Exception):
            self.errors[i] = str(image)
            return free
        size = image.numel()
        if size > free:
            free = max(SLAB, size)
            self.slabs.append(torch.empty(free, dtype=torch.uint8))  # pages count when they are written to
        slab = self.slabs[-1]
        at = len(slab) - free
        slab[at : at + size] = image.flatten()
        self.place[i] = len(self.slabs) - 1, at, *image.shape[1:]
        return free - size

    def __len__(self) -> int:
        return len(self.place)

    def __getitem__(self, i: int) -> torch.Tensor:
        """Image i; ValueError where it cannot be read, as `decode` raises it."""
        if i in self.errors:
            raise ValueError(self.errors[i])
        slab, at, height, width = self.place[i].tolist()
        size = self.in_chans * height * width
        return self.slabs[slab][at : at + size].view(self.in_chans, height, width)

    @property
    def nbytes(self) -> int:
        return self.in_chans * int((self.place[:, 2] * self.place[:, 3]).sum())


class Reader:
    """Image i of an index, decoded, or the error that says why not; for use by several threads."""

    def __init__(self, index: ImageIndex, in_chans: int):
        self.index = index
        self.in_chans = in_chans
        self.own = threading.local()

    def __call__(self, i: int) -> torch.Tensor | Exception:
        if not hasattr(self.own, "index"):
            # Each thread has its own: an index closes files where many are open.
            self.own.index = copy.copy(self.index)
        try:
            return decode(self.own.index.read(i), self.in_chans)
        except (OSError, ValueError) as error:
            return error

    def shape(self, i: int) -> torch.Size | None:
        """Of image i; None where it cannot be read."""
        image = self(i)
        return None if isinstance(image, Exception) else image.shape


def in_order(pool: ThreadPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """`function` of each item. The pool is up to `ahead` items ahead; its own `map` holds all results."""
    waiting = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) > ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def spread(n: int, most: int) -> list[int]:
    """Up to `most` numbers below n, at equal distances."""
    return sorted({k * n // most for k in range(most)})


class Need(NamedTuple):
    """What one rank wants and has, in bytes."""

    host: str
    memory: float
    memory_left: float
    gpu: float
    gpu_left: float


def check_room(
    index: ImageIndex, memory: float, padded: float, device: torch.device | None, largest: str = "the largest"
) -> None:
    """ValueError on all ranks where the images of an index do not fit somewhere.

    Args:
        memory: bytes that they still take in the memory of the host.
        padded: bytes that they take on the device, where all have the size of the largest.
        largest: what the message calls that one.
    """
    need = Need(socket.gethostname(), memory + padded, available_memory(), 0.0, 0.0)
    if device is not None and device.type == "cuda":
        need = need._replace(memory=memory, gpu=padded, gpu_left=torch.cuda.mem_get_info(device)[0])
    ranks = dist.gather_objects(need)
    images = f"the {len(index)} decoded images of {index.path}"
    for host in {rank.host for rank in ranks}:
        wanted = sum(rank.memory for rank in ranks if rank.host == host)
        left = min(rank.memory_left for rank in ranks if rank.host == host)
        if wanted > left:
            extra, instead = "", "none"
            if need.memory > memory:
                extra, instead = f", padded to {largest},", "memory, or none"
            raise ValueError(
                f"{images}{extra} would take about {wanted / MB:.0f} MB on {host}, by all its ranks, and "
                f"{left / MB:.0f} MB are left: give --cache_data {instead}, or smaller images "
                "(python -m util.data repack PATH TARGET --long_side N)"
            )
    for rank in ranks:
        if rank.gpu > rank.gpu_left:
            raise ValueError(
                f"{images}, padded to {largest}, would take about {rank.gpu / MB:.0f} MB on a GPU of "
                f"{rank.host}, which has {rank.gpu_left / MB:.0f} MB left: give --cache_data memory, or none"
            )


def available_memory(proc: str = "/proc", groups: str = "/sys/fs/cgroup") -> float:
    """Bytes that this process can still take: what the machine has left, or a control group that it is in.

    Control groups count in their version 2 only. A machine that does not say what is left, as macOS, counts
    with all of its memory.

    Args:
        proc, groups: where the system shows its processes, and its control groups.
    """
    left = [_machine_memory(proc)]
    with contextlib.suppress(OSError, StopIteration):  # no control groups of version 2
        group = next(line[3:] for line in _lines(proc, "self/cgroup") if line.startswith("0::"))
        parts = group.strip("/").split("/")
        # Limits of all parents hold: SLURM sets one for the job, and the process is in one of its steps.
        for depth in range(len(parts) + 1):
            with contextlib.suppress(OSError, ValueError, StopIteration):  # the root has no limit
                left.append(_group_memory(os.path.join(groups, *parts[:depth])))
    return min(left)


def _machine_memory(proc):
    try:
        return next(
            1024 * float(line.split()[1])
            for line in _lines(proc, "meminfo")
            if line.startswith("MemAvailable")
        )
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _group_memory(folder):
    """What a control group has left. ValueError for "max", which is no limit."""
    limit, used = (float(_lines(folder, name)[0]) for name in ("memory.max", "memory.current"))
    # Cached files count as used, and are dropped when memory is short.
    dropped = next(
        float(line.split()[1]) for line in _lines(folder, "memory.stat") if line.startswith("inactive_file")
    )
    return limit - used + dropped


def _lines(folder, name):
    with open(os.path.join(folder, name)) as file:
        return file.read().splitlines()


# --- on the device ---


class DeviceLoader:
    """Batches as a Loader's, of images that stay on the device and are cropped, resized and flipped there.

    The workers of `loader` draw which part of an image is shown, from the sample's own key, as they do
    without a cache. Images of several sizes are padded to the largest height and width.
    """

    def __init__(self, loader, device: torch.device):
        dataset = loader.dataset
        if not hasattr(dataset.transform, "window"):
            raise ValueError(
                "--cache_data device cuts one crop of an image and flips it, and these augmentations do "
                "more: give --cache_data memory, or leave out what is more (in fine-tuning --aa '' and no "
                "--color_jitter, in pretraining --sr_views same)"
            )
        cover = getattr(dataset.transform, "cover", dataset.transform.size)
        if min(a - b for a, b in zip(cover, dataset.transform.size)) < 0:
            raise ValueError(
                "--cache_data device does not pad images, as a centre crop of more than an image "
                "needs: give --crop_pct 1 or less, or --cache_data memory"
            )
        self.dataset = dataset
        self.sampler = loader.sampler
        self.batch_size = loader.batch_size
        pixels = CachedPixels(dataset.index, dataset.in_chans, loader.num_workers, device)
        self.images = padded_images(pixels, dataset.index, device)
        dist.print_rank0(f"{dataset.index.path}: {self.images.nbytes / MB:.0f} MB on {device}")
        windows = Windows(dataset, pixels.place[:, 2:].copy(), pixels.errors)
        self.windows = build_loader(
            windows,
            loader.sampler,
            batch_size=loader.batch_size,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
        )

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[dict]:
        size = self.dataset.transform.size
        for batch in self.windows:
            windows = batch.pop("window")
            yield {"image": resample(self.images, batch["index"], windows, size)} | batch


def padded_images(pixels: CachedPixels, index: ImageIndex, device: torch.device) -> torch.Tensor:
    """uint8 (n, C, H, W) on the device; zero beyond an image's own size, and where it cannot be read.

    Raises ValueError, on all ranks together, where that does not fit. `index` names the images.
    """
    sizes = pixels.place[:, 2:]
    shape = pixels.in_chans, *sizes.max(axis=0).clip(min=1).tolist()
    # What was probed to estimate the size need not have been the largest, and one large image enlarges all.
    largest = " and ".join(
        f"{index.name(i)} ({sizes[i, 0]} x {sizes[i, 1]} pixels)"
        for i in sorted(set(sizes.argmax(axis=0).tolist()))
    )
    check_room(index, 0.0, float(len(pixels) * math.prod(shape)), device, largest)
    images = torch.zeros(len(pixels), *shape, dtype=torch.uint8, device=device)
    count = max(1, COPIED // math.prod(shape))
    for first in range(0, len(pixels), count):  # a copy for many images
        part = torch.zeros(images[first : first + count].shape, dtype=torch.uint8)
        for i, room in enumerate(part, first):
            if i not in pixels.errors:
                image = pixels[i]
                room[:, : image.shape[1], : image.shape[2]] = image
        images[first : first + count] = part.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # batches are made on another stream than this one
    return images


class Windows(Dataset):
    """The samples of a data set, with `window` int64 (10,), the values of a `Window`, instead of `image`.

    `index` is the image to look at. In evaluation the window of an image that cannot be read is all zero.
    """

    exact_resume = True

    def __init__(self, dataset: ImageDataset, sizes: np.ndarray, errors: dict[int, str]):
        self.dataset = dataset
        self.sizes = sizes  # (n, 2), heights and widths
        self.errors = errors

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item) -> dict:
        window, sample = self.dataset.resolve(item, self._draw)
        return dict(window=torch.tensor(window or (0,) * 10)) | sample

    def _draw(self, i, key):
        if i in self.errors:
            raise ValueError(self.errors[i])
        return self.dataset.transform.window(*self.sizes[i].tolist(), key)


@torch.no_grad()
def resample(
    images: torch.Tensor, rows: torch.Tensor, windows: torch.Tensor, size: tuple[int, int]
) -> torch.Tensor:
    """What `windows` show of `images[rows]`, by PIL's antialiased bicubic filter -> uint8 (B, C, h, w).

    The steps are those of torchvision and of the native library: along the rows first, then along the
    columns, by integer weights, rounded to 8 bit each time. The sums here are float32. They are exact where a
    crop grows or shrinks little, and the result then has the same bits. Where an image shrinks to less than
    about three quarters, about one value in a million differs, by one grey level.

    Args:
        images: uint8 (n, C, H, W).
        rows: int64 (B,), which images. They lie on the host, as `windows` do: nothing here waits for the
            device.
        windows: int64 (B, 10), the values of `util.data.transforms.Window`. All zero gives a black image.
        size: (h, w), the size of the transform that the windows are from.
    """
    channels, height, width = images.shape[1:]
    h, w = size
    values = height * width + height * w + height * h + h * w  # of one channel, on the way
    dense = height * h + width * w  # weights
    exact = HELD * (h * taps(h, height) + w * taps(w, width))  # what they are made of
    chunk = max(1, CHUNK // (2 * channels * values + dense + exact))
    most = windows[:, 4:6].amax(0).tolist()  # 0 where no image of the batch can be read
    rows = rows.to(images.device, non_blocking=True)
    windows = windows.to(images.device, non_blocking=True)
    done = []
    with _exact_products(images.device):
        for part, window in zip(rows.split(chunk), windows.split(chunk)):
            done.append(_resample(images[part], window, size, most))
    return torch.cat(done)


@contextlib.contextmanager
def _exact_products(device):
    """Products of float32 matrices without autocast and TF32, whose 11 bits do not hold the weights."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _resample(images, windows, size, most):
    top, left, height, width, full_height, full_width, row, column, flip_x, flip_y = windows.unbind(1)
    x_axis = Axis(left, width, full_width, column, flip_x, most[1])
    y_axis = Axis(top, height, full_height, row, flip_y, most[0])
    along_x, x_unit = x_axis.weights(size[1], images.shape[3])  # (B, w, W), (B, 1, 1)
    along_y, y_unit = y_axis.weights(size[0], images.shape[2])  # (B, h, H), (B, 1, 1)
    x = images.flatten(1, 2).float() @ along_x.mT  # (B, C, H, W) -> (B, C*H, W) -> (B, C*H, w)
    x = _to_8_bit(x, x_unit).unflatten(1, images.shape[1:3])  # (B, C*H, w) -> (B, C, H, w)
    x = along_y[:, None] @ x  # (B, 1, h, H) @ (B, C, H, w) -> (B, C, h, w)
    return _to_8_bit(x, y_unit[:, None]).to(torch.uint8)


def _to_8_bit(sums, unit):
    return sums.mul_(unit).add_(0.5).floor_().clamp_(0, 255)


class Axis(NamedTuple):
    """One axis of B windows; all but `most` are int64 (B,).

    The source positions from `start` to `start + length` are stretched to `full` positions. The result is
    what follows from position `first` on, and its mirror image where `flip` is 1. `most` is the largest
    `full`.
    """

    start: torch.Tensor
    length: torch.Tensor
    full: torch.Tensor
    first: torch.Tensor
    flip: torch.Tensor
    most: int

    def weights(self, out: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """How much each of `size` source positions counts in each of `out` results.

        Returns integers as float32 (B, out, size), and the value of one unit of them, float32 (B, 1, 1).
        """
        device = self.start.device
        count = taps(out, size)
        i = torch.arange(out, device=device)[None]
        i = torch.where(self.flip[:, None] > 0, out - 1 - i, i) + self.first[:, None]  # (B, out)
        w, j = self._exact(i, count)
        largest = w.amax((1, 2), keepdim=True)
        if self.most > out:
            # Positions that are not shown count, too. A long image has many: as many as are shown at a time.
            for first in range(0, self.most, out):
                i = torch.arange(first, min(first + out, self.most), device=device)[None]
                largest = largest.maximum(self._exact(i, count)[0].amax((1, 2), keepdim=True))
        # As many bits as let the largest weight of all positions fit into an int16. Halves go away from 0.
        bits = ((2**15 - 0.5) / largest.clamp_(min=1e-6)).log2_().floor_().clamp_(max=22)
        steps = torch.bitwise_left_shift(1, bits.long()).to(w.dtype)  # exp2 need not be exact on every device
        w = (w * steps).abs().add_(0.5).floor_().copysign_(w).float()
        j += self.start[:, None, None]
        # Positions outside of the box have weight 0, so it does not matter where that is added.
        dense = torch.zeros(len(j), out, size, device=device).scatter_add_(2, j.clamp_(0, size - 1), w)
        return dense, steps.reciprocal_().float()

    def _exact(self, i, count):
        """Weights of the positions i, (1 or B, n), before they are integers, and what they are weights of.

        Both are (B, n, count). The sources are relative to `start`.
        """
        # float64 gives the same integers as torchvision's kernel, which also rounds float64.
        kind = torch.float32 if i.device.type == "mps" else torch.float64
        scale = (self.length.to(kind) / self.full.clamp(min=1))[:, None]  # (B, 1)
        stretch = scale.clamp(min=1)  # the filter is wider where the image shrinks
        centre = (i + 0.5) * scale  # (B, n), relative to `start`
        begin = (centre - 2 * stretch + 0.5).floor_().long()
        j = begin[..., None] + torch.arange(count, device=i.device)  # (B, n, count)
        # Keys' cubic with a = -0.5. It is 0 from a distance of 2 on.
        d = ((j - centre[..., None] + 0.5) / stretch[..., None]).abs_().clamp_(max=2)
        w = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
        w *= (j >= 0) & (j < self.length[:, None, None]) & (i < self.full[:, None])[..., None]
        w /= w.sum(-1, keepdim=True).clamp_(min=1e-6)
        return w, j


def taps(out: int, size: int) -> int:
    """The most of `size` source positions that count in one of `out` results, as `full` is at least `out`."""
    return 2 * math.ceil(2 * max(1.0, size / out)) + 1
