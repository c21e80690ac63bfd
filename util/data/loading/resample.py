"""PIL's antialiased bicubic resizing as products of matrices, for images on the device."""

import contextlib
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from util.data.formats import to_depth

# Floats (256 MiB) that `resample` holds at most while it makes a part of its result, or those of one image.
CHUNK = 1 << 26
HELD = 16  # floats that `Axis.weights` holds for each of its exact weights
WEIGHT_BITS = 15  # of a positive int16
LONG = 1 << 13  # positions of a resized axis; of a longer one the weights at its ends stand for all


@torch.no_grad()
def resample(images: Tensor, rows: Tensor, windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Resample what `windows` show of `images[rows]` -> (B, C, h, w) of the depth of the images.

    The filter is PIL's antialiased bicubic one.

    The steps are those of torchvision and of the native library: along the rows first, then along the
    columns, by integer weights, rounded to 8 bits each time. The sums here are float32. They are exact if a
    crop grows or shrinks little, and the result then has the same bits. If an image shrinks to less than
    about three quarters, about one value in a million differs, by one grey level.

    Args:
        images: (n, C, H, W). Of uint8 images each step is rounded to 8 bits. Of other depths only the result
            is rounded, and of float32 not even that.
        rows: int64 (B,), which images. They lie on the host, as `windows` do: nothing here waits for the
            device.
        windows: int64 (B, 10), the values of `util.data.transforms.Window`. All zero gives a black image.
        size: (h, w), the size of the transform that the windows are from.
    """
    most = windows[:, 4:6].amax(0).tolist()  # full sizes; 0 if no image of the batch can be read
    rows = rows.to(images.device, non_blocking=True)
    windows = windows.to(images.device, non_blocking=True)
    count = _images_at_a_time(images, size)
    parts = []
    with _exact_products(images.device):
        for part, window in zip(rows.split(count), windows.split(count)):
            parts.append(_resample(_chosen(images, part), window, size, most))
    return torch.cat(parts)


def _chosen(images: Tensor, rows: Tensor) -> Tensor:
    # Not every device indexes uint16, and the bits are the same.
    if images.dtype == torch.uint16:
        return images.view(torch.int16)[rows].view(torch.uint16)
    return images[rows]


def _images_at_a_time(images: Tensor, size: tuple[int, int]) -> int:
    """Return how many images of a batch `CHUNK` floats suffice for."""
    channels, height, width = images.shape[1:]
    h, w = size
    values = height * width + height * w + height * h + h * w  # intermediate values of one channel
    dense = height * h + width * w  # weights
    exact = HELD * (h * taps(h, height) + w * taps(w, width))  # what the weights are computed from
    return max(1, CHUNK // (2 * channels * values + dense + exact))


@contextlib.contextmanager
def _exact_products(device: torch.device) -> Iterator[None]:
    """Multiply float32 matrices without autocast and TF32, whose 11 bits do not hold the weights."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _resample(images: Tensor, windows: Tensor, size: tuple[int, int], most: list[int]) -> Tensor:
    top, left, height, width, full_height, full_width, row, column, flip_x, flip_y = windows.unbind(1)
    x_axis = Axis(left, width, full_width, column, flip_x, most[1])
    y_axis = Axis(top, height, full_height, row, flip_y, most[0])
    whole = images.dtype == torch.uint8
    along_x, x_unit = x_axis.weights(size[1], images.shape[3], whole)  # (B, w, W), (B, 1, 1)
    along_y, y_unit = y_axis.weights(size[0], images.shape[2], whole)  # (B, h, H), (B, 1, 1)
    finish = _to_8_bit
    if not whole:
        finish = _in_units
    x = images.flatten(1, 2).float() @ along_x.mT  # (B, C, H, W) -> (B, C*H, W) -> (B, C*H, w)
    x = finish(x, x_unit).unflatten(1, images.shape[1:3])  # (B, C*H, w) -> (B, C, H, w)
    x = along_y[:, None] @ x  # (B, 1, h, H) @ (B, C, H, w) -> (B, C, h, w)
    return to_depth(finish(x, y_unit[:, None]), images.dtype)


def _in_units(sums: Tensor, unit: Tensor) -> Tensor:
    return sums.mul_(unit)


def _to_8_bit(sums: Tensor, unit: Tensor) -> Tensor:
    return sums.mul_(unit).add_(0.5).floor_().clamp_(0, 255)


class Axis(NamedTuple):
    """One axis of B windows. All fields but `most` are int64 (B,).

    The source positions from `start` to `start + length` are stretched to `full` positions. The result shows
    these from position `first` on, mirrored if `flip` is 1. `most` is the largest `full`.
    """

    start: Tensor
    length: Tensor
    full: Tensor
    first: Tensor
    flip: Tensor
    most: int

    def weights(self, out: int, size: int, whole: bool = True) -> tuple[Tensor, Tensor]:
        """Return how much each of `size` source positions contributes to each of `out` results.

        The weights (B, out, size) are in units of the second result (B, 1, 1), both float32. `whole` makes
        them integers, whose sum is 1 up to a few units; without it the unit is 1, and so is their sum.
        """
        device = self.start.device
        count = taps(out, size)
        i = torch.arange(out, device=device)[None]  # (1, out)
        i = torch.where(self.flip[:, None] > 0, out - 1 - i, i) + self.first[:, None]  # (B, out)
        w, j = self._exact(i, count)  # (B, out, count) each
        j += self.start[:, None, None]
        if not whole:
            return _dense(w.float(), j, size), torch.ones(len(j), 1, 1, device=device)
        largest = self._largest(w, out, count)
        # As many bits as let the largest weight of all positions fit into an int16. Halves round away from 0.
        bits = ((2**WEIGHT_BITS - 0.5) / largest.clamp_(min=1e-6)).log2_().floor_().clamp_(max=22)
        steps = torch.bitwise_left_shift(1, bits.long()).to(w.dtype)  # exp2 need not be exact on every device
        w = (w * steps).abs().add_(0.5).floor_().copysign_(w).float()
        return _dense(w, j, size), steps.reciprocal_().float()

    def _largest(self, shown: Tensor, out: int, count: int) -> Tensor:
        """Return the largest weight of all `full` positions, (B, 1, 1).

        `shown` are the weights of the positions that are shown, (B, out, count).
        """
        largest = shown.amax((1, 2), keepdim=True)  # (B, out, count) -> (B, 1, 1)
        for i in self._positions(out):
            largest = largest.maximum(self._exact(i, count)[0].amax((1, 2), keepdim=True))
        return largest

    def _positions(self, out: int) -> Iterator[Tensor]:
        """Yield positions, (1 or B, up to out): all of them, or the first and the last ones of a long axis.

        Nothing is yielded if all are shown.
        """
        steps = torch.arange(out, device=self.start.device)[None]  # (1, out)
        if self.most > out:
            last = min(self.most, LONG)
            # As many at a time as are shown.
            for first in range(0, last, out):
                yield steps[:, : last - first] + first
        # The weights are largest at the ends, where the filter is cut off.
        if self.most > LONG:
            yield (self.full[:, None] - out).clamp(min=0) + steps  # (B, out)

    def _exact(self, i: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the weights of the positions i, (1 or B, n), and the sources that they apply to.

        Both are (B, n, count). The weights are not yet rounded to integers. The sources are positions
        relative to `start`.
        """
        # float64 gives the same integers as torchvision's kernel, which also rounds float64.
        dtype = torch.float64
        if i.device.type == "mps":
            dtype = torch.float32  # the only one there
        scale = (self.length.to(dtype) / self.full.clamp(min=1))[:, None]  # (B, 1)
        stretch = scale.clamp(min=1)  # the filter is wider if the image shrinks
        centre = (i + 0.5) * scale  # (B, n), relative to `start`
        begin = (centre - 2 * stretch + 0.5).floor_().long()
        j = begin[..., None] + torch.arange(count, device=i.device)  # (B, n, count)
        # Keys' cubic with a = -0.5. It is 0 from a distance of 2 on.
        d = ((j - centre[..., None] + 0.5) / stretch[..., None]).abs_().clamp_(max=2)
        w = torch.where(d < 1, (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2)
        w *= (j >= 0) & (j < self.length[:, None, None]) & (i < self.full[:, None])[..., None]
        w /= w.sum(-1, keepdim=True).clamp_(min=1e-6)
        return w, j


def _dense(w: Tensor, j: Tensor, size: int) -> Tensor:
    """Return weights of the positions j, (B, out, count) each, as (B, out, size)."""
    # Positions outside of the box have weight 0, so it does not matter where that is added.
    dense = torch.zeros(*w.shape[:2], size, device=w.device)
    return dense.scatter_add_(2, j.clamp_(0, size - 1), w)


def taps(out: int, size: int) -> int:
    """Return how many of `size` source positions one of `out` results depends on at most.

    `full` is `out` or more.
    """
    return 2 * math.ceil(2 * max(1.0, size / out)) + 1
