"""Segmentation figures, and the way from images to predictions of the size of the masks.

Shapes: B images, C channels, K classes, (H, W) pixels, (h, w) cells of a map of logits, G heads.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from util import dist

# The value of ignored pixels in a mask.
_IGNORED = -1
# Bytes of the logits that `to_labels` brings to the size of a mask at a time.
_STRIP_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Figures:
    """Figures of all counted pixels, in percent.

    Attributes:
        ious: intersection over union of each class; nan for the classes in `absent`.
        miou: the mean over the classes that occur in the masks or in the predictions.
        miou_all: the mean over all classes, of which the absent ones count as 0 (ImageNet-S).
        pixel_accuracy: the share of the pixels that are classified correctly.
        mean_accuracy: the mean of the share of each class's pixels that are classified correctly, over the
            classes that occur in the masks.
        absent: the classes that are neither in the masks nor in the predictions.
        pixels: the number of pixels that are not ignored. Without any, the figures are nan.
        images: the number of images that were read, where it is known.
    """

    ious: list[float]
    miou: float
    miou_all: float
    pixel_accuracy: float
    mean_accuracy: float
    absent: list[int]
    pixels: int
    images: int = 0


class Confusion:
    """Counts of pixels by class in the mask and predicted class, for several heads.

    `counts` (heads, K, K) int64 [truth, prediction] stays on the device until all pixels are seen.
    """

    def __init__(self, classes: int, device: torch.device, heads: int = 1):
        self.counts = torch.zeros(heads, classes, classes, dtype=torch.int64, device=device)
        # Pixels whose class is out of range. They are reported at the end: asking earlier would wait for the
        # device.
        self._outside = torch.zeros(1, dtype=torch.int64, device=device)

    def add(self, prediction: Tensor, mask: Tensor, head: int = 0) -> None:
        """Count the pixels of `prediction` (...) and `mask` (...), both int, without those with mask -1.

        Raises ValueError if the shapes differ.
        """
        if prediction.shape != mask.shape:
            raise ValueError(
                f"the prediction has the shape {tuple(prediction.shape)}, and the mask {tuple(mask.shape)}: "
                "bring them to one size"
            )
        classes = self.counts.shape[1]
        device = self.counts.device
        truth = mask.to(device, torch.int64).flatten()
        guess = prediction.to(device, torch.int64).flatten()
        counted = truth != _IGNORED
        inside = (truth >= 0) & (truth < classes) & (guess >= 0) & (guess < classes)
        cell = truth.clamp(0, classes - 1) * classes + guess.clamp(0, classes - 1)
        # With zeros for pixels that do not count: selecting the others would wait for the device.
        self.counts[head].view(-1).scatter_add_(0, cell, (counted & inside).long())
        self._outside += (counted & ~inside).sum()

    def reduce(self) -> None:
        """Add the counts of all ranks, which must call this together, and once. Integers add exactly."""
        self.counts = dist.sum_over_ranks(self.counts)
        self._outside = dist.sum_over_ranks(self._outside)

    def figures(self, head: int = 0) -> Figures:
        """Return the figures of a head. Raises ValueError if pixels had classes that are out of range."""
        outside = int(self._outside)
        classes = self.counts.shape[1]
        if outside:
            raise ValueError(
                f"{outside} pixels have a class that is not one of 0 to {classes - 1} in the mask or in the "
                "prediction: check the number of classes, and which value of the masks is ignored"
            )
        # Counts of pixels are below 2**53, so they are exact in float64. Some devices have no float64.
        counts = self.counts[head].cpu().double()
        correct = counts.diagonal()  # (K,)
        truth = counts.sum(1)  # (K,)
        union = truth + counts.sum(0) - correct  # (K,)
        pixels = float(truth.sum())
        ious = 100 * correct / union  # (K,), 0/0 is nan
        miou_all = math.nan
        if pixels:
            miou_all = float(ious.nan_to_num(0).mean())
        return Figures(
            ious=ious.tolist(),
            miou=float(ious.nanmean()),
            miou_all=miou_all,
            pixel_accuracy=float(100 * correct.sum() / truth.sum()),
            mean_accuracy=float((100 * correct / truth).nanmean()),
            absent=(union == 0).nonzero().flatten().tolist(),
            pixels=int(pixels),
        )


@dataclass(frozen=True)
class Protocol:
    """How images and masks are prepared and compared. Figures of different protocols cannot be compared.

    Attributes:
        image: how an image is brought to the model, e.g. "resized to 224x224" or "shorter side 256".
        window: (h, w) of a sliding window in pixels; None for the whole image at once.
        stride: (h, w) from one window to the next.
        upsample: how logits are brought to the mask's size: "bilinear" or "nearest".
        ignore: the value of ignored pixels in the files of the masks; None or -1 if no pixel is ignored.
        classes: the number of classes in the mean.
        reduce_zero_label: the value 0 of the files is ignored, and class k has the value k + 1.
        max_res: the longer side to which logits of larger masks are brought, as in `to_labels`.
    """

    image: str
    window: tuple[int, int] | None
    stride: tuple[int, int] | None
    ignore: int | None
    classes: int
    reduce_zero_label: bool = False
    max_res: int | None = None
    upsample: str = "bilinear"

    def __str__(self) -> str:
        looks = "whole image at once"
        if self.window is not None:
            h, w = self.window
            rows, columns = self.stride or self.window
            looks = f"sliding window {h}x{w} (height x width), stride {rows}x{columns}, overlaps averaged"
        size = f"{self.upsample} to the mask's size"
        if self.max_res:
            size += (
                f", but masks above {self.max_res}x{self.max_res} pixels at a longer side of {self.max_res}, "
                "then nearest to the mask's size"
            )
        ignored = "no pixel ignored"
        if self.ignore not in (None, -1):
            ignored = f"mask value {self.ignore} ignored"
        if self.reduce_zero_label:
            ignored += ", mask value 0 ignored and the others lowered by 1"
        mean = (
            f"mIoU over those of the {self.classes} classes that occur in masks or predictions "
            "(miou_all: over all, absent ones count as 0)"
        )
        return f"protocol: image {self.image}; {looks}; logits {size}, argmax; {ignored}; {mean}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, to be stored with the figures."""
        found = dataclasses.asdict(self)
        # Tuples would come back from JSON as lists.
        pairs = {name: list(value) for name, value in found.items() if isinstance(value, tuple)}
        return found | pairs


def predict(
    logits_of: Callable[[Tensor], Tensor],
    images: Tensor,
    window: tuple[int, int] | None,
    stride: tuple[int, int] | None,
    patch: tuple[int, int],
    remainder: str = "cut",
) -> Tensor:
    """Return logits (B, K, h, w) of images (B, C, H, W); `logits_of` maps images to (B, K, ., .).

    Without a window the whole images are seen at once, and the logits keep the size in which they come.
    Sides that are no multiple of `patch` lose the rest at the bottom and at the right with `remainder` "cut",
    as in ImageNet-S's code; with "resize" the images are resized to the nearest multiple (bilinear).

    With a window the logits have the images' size (H, W) and are float32. Each window's logits are brought to
    pixels (bilinear) and averaged where windows overlap. The last window of an axis ends at the border.
    Images smaller than the window are padded with zeros at the bottom and at the right, and the logits of the
    padding are left out.

    Raises ValueError if an image is smaller than a patch, if the window is no multiple of the patch, and if
    the stride leaves gaps.
    """
    if window is None:
        return logits_of(_whole_patches(images, patch, remainder))
    stride = stride or window
    check_windows(window, stride, patch)
    H, W = images.shape[-2:]
    padding = (0, max(0, window[1] - W), 0, max(0, window[0] - H))
    padded = F.pad(images, padding)  # (B, C, >= window, >= window)
    total: Tensor | None = None
    size = (padded.shape[-2], padded.shape[-1])
    seen = torch.zeros(size, device=images.device)
    for rows, columns in _windows(size, window, stride):
        logits = logits_of(padded[..., rows, columns])
        logits = F.interpolate(logits.float(), size=window, mode="bilinear", align_corners=False)
        if total is None:
            total = logits.new_zeros(*logits.shape[:2], *size)
        total[..., rows, columns] += logits
        seen[rows, columns] += 1
    assert total is not None
    return total.div_(seen)[..., :H, :W]


def check_windows(window: tuple[int, int], stride: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise ValueError if a window is no multiple of the patch, and if the stride leaves gaps."""
    for side, step, cell in zip(window, stride, patch):
        if side < 1 or side % cell:
            raise ValueError(f"`window` {window} is no multiple of the patch {patch}: choose one that is")
        if not 1 <= step <= side:
            raise ValueError(f"`stride` {stride} must be from 1 to the window's {window}")


def _windows(
    size: tuple[int, int], window: tuple[int, int], stride: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of all windows of an image; its sides are at least those of the window."""
    starts = []
    for whole, side, step in zip(size, window, stride):
        count = -(-(whole - side) // step) + 1
        starts.append([min(i * step, whole - side) for i in range(count)])
    for top in starts[0]:
        for left in starts[1]:
            yield slice(top, top + window[0]), slice(left, left + window[1])


def _whole_patches(images: Tensor, patch: tuple[int, int], remainder: str) -> Tensor:
    """Images (B, C, H, W) whose sides are multiples of the patch's."""
    H, W = images.shape[-2:]
    if remainder not in ("cut", "resize"):
        raise ValueError(f"`remainder` is cut or resize, found {remainder!r}")
    if remainder == "resize":
        # Halves are rounded up.
        size = [max(1, (2 * side + cell) // (2 * cell)) * cell for side, cell in zip((H, W), patch)]
        if size == [H, W]:
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
    if min(H // patch[0], W // patch[1]) < 1:
        raise ValueError(
            f"an image of {H}x{W} pixels is smaller than a patch of {patch[0]}x{patch[1]}: resize the images"
        )
    return images[..., : H - H % patch[0], : W - W % patch[1]]


def to_labels(
    logits: Tensor, size: tuple[int, int], max_res: int | None = None, upsample: str = "bilinear"
) -> Tensor:
    """Return the predictions (H, W) int64 of one image's logits (1, K, h, w) at the `size` of its mask.

    With `upsample` "nearest" each pixel has the class of the nearest logits. Otherwise the logits are brought
    to that size (bilinear, align_corners false), and the largest one wins, of equal
    ones the first. Masks with more than max_res * max_res pixels get predictions whose longer side is
    max_res, and these are brought to the mask's size by the nearest pixel (ImageNet-S; 0 and None turn it
    off). Logits of the full size may take gigabytes, so some rows of them are made at a time.
    """
    H, W = size
    if upsample == "nearest":
        labels = logits.argmax(1, keepdim=True).float()  # exact up to 2**24 classes
        return F.interpolate(labels, size=size, mode="nearest-exact")[0, 0].long()
    limit = max_res or math.inf
    if limit * limit >= H * W:
        return _labels_in_strips(logits, size)
    # The shorter side is rounded down. That of a mask of extreme proportions is at least a pixel.
    longer = int(limit)
    smaller = (longer, max(1, longer * W // H))
    if H <= W:
        smaller = (max(1, longer * H // W), longer)
    labels = _labels_in_strips(logits, smaller)
    return F.interpolate(labels[None, None].float(), size=size, mode="nearest")[0, 0].long()


def _labels_in_strips(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Argmax (H, W) of logits (1, K, h, w) that are brought to `size` (H, W) in strips of rows."""
    H, W = size
    K, h, w = logits.shape[1:]
    # Where each row of the result lies between two rows of the logits, as for align_corners false.
    place = ((torch.arange(H, dtype=torch.float64) + 0.5) * h / H - 0.5).clamp(min=0)
    above = place.floor().long().clamp(max=h - 1)
    below = (above + 1).clamp(max=h - 1)
    share = (place - above).float().to(logits.device)
    rows = max(1, _STRIP_BYTES // (4 * K * max(W, 3 * w)))
    labels = torch.empty(H, W, dtype=torch.int64, device=logits.device)
    for start in range(0, H, rows):
        part = slice(start, start + rows)
        upper = logits[:, :, above[part].to(logits.device)].float()  # (1, K, rows, w)
        lower = logits[:, :, below[part].to(logits.device)].float()
        strip = torch.lerp(upper, lower, share[part, None])  # (1, K, rows, w)
        # With the classes of a pixel side by side, which makes both steps twice as fast on a CPU.
        strip = strip.contiguous(memory_format=torch.channels_last)
        strip = F.interpolate(strip, size=(strip.shape[2], W), mode="bilinear", align_corners=False)
        labels[part] = strip.argmax(1)[0]
    return labels
