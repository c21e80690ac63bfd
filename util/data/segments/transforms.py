"""Joint transforms of an image and its segmentation mask.

They are called as `transform(image, mask, key) -> (image, mask)` with an image (C, H, W) of any depth and a
mask int16 (H, W), and draw from generators that `key` seeds. Images are resized bicubic and antialiased. Of a
mask the pixel that covers the centre of each new one is taken, so that classes are not mixed.
"""

import random
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from util.data import native
from util.data.formats import depth_name
from util.data.multicrop import gaussian_blur
from util.data.seeding import sample_seed, seeded
from util.data.segments.masks import IGNORED
from util.data.transforms import (
    IMAGE_FAULTS,
    RESIZED_PIXELS,
    Box,
    CropSettings,
    Size,
    TorchvisionCrop,
    Unreadable,
    black_image,
    resized_crop,
)

Joint = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

BLUR = 0.5  # chance of a blur in ImageNet-S's augmentation


def apply_jointly(transform: Joint, image: Tensor, mask: Tensor, key: int) -> tuple[Tensor, Tensor]:
    """Return what a joint transform makes of an image and its mask with the draws of `key`.

    Raises Unreadable if the image is at fault: the transform works on an ordinary one. An error of the
    transform itself is raised as it is.
    """
    try:
        return transform(image, mask, key)
    except IMAGE_FAULTS as error:
        black = black_image(len(image), image.dtype)
        try:
            transform(black, ignored_mask(black), key)
        except Exception:
            raise error from None
        height, width = image.shape[-2:]
        reason = str(error) or type(error).__name__
        raise Unreadable(f"its {height} x {width} pixels cannot be transformed: {reason}") from error


def ignored_mask(image: Tensor) -> Tensor:
    """Return a mask without classes for an image (C, H, W)."""
    return torch.full(image.shape[-2:], IGNORED, dtype=torch.int16)


# --- masks ---


def nearest(length: int, size: int) -> np.ndarray:
    """Return the positions, below `length`, of the centres of `size` equal parts: int64 (size,)."""
    return (2 * np.arange(size) + 1) * length // (2 * size)


def mask_crop(mask: Tensor, box: Box, size: Size) -> Tensor:
    """Cut a box from a mask and resize it, (H, W) -> (h, w); see the module."""
    top, left, height, width = box
    return _picked(mask, top + nearest(height, size[0]), left + nearest(width, size[1]))


def _picked(mask: Tensor, rows: np.ndarray, columns: np.ndarray) -> Tensor:
    # numpy takes an eighth of the time of torch's indexing.
    return torch.from_numpy(mask.numpy().take(rows, 0).take(columns, 1))


# --- training ---


class SegmentCrop:
    """A random crop with flips and turns, of the image and the mask alike.

    Without `scale_jitter` it is the crop of `util.data.transforms.pretrain_transform` for the same key and
    settings. With it the crop's scale and ratio are not used: the image is resized with its aspect ratio
    kept, by a random factor in that range times the one with which it just fits into `size`. A random part is
    shown of what is larger than `size`. What is smaller lies at a random place; around it the image is 0, and
    the mask is IGNORED.

    Args:
        size: (h, w) of the result.
        settings: what crop, flips and turns are drawn from.
        scale_jitter: range of the factor.
        photo: changes the colours of 8-bit RGB images as the published code of ImageNet-S does: jitter with
            chance 0.8 (brightness, contrast and saturation 0.8, hue 0.2), grey with 0.2, and a blur of 0.1 to
            2 pixels with 0.5.

    Raises ValueError for a range that makes no sense, and when it is called, for `photo` and other images.
    """

    def __init__(
        self,
        size: Size,
        settings: CropSettings,
        scale_jitter: tuple[float, float] | None = None,
        photo: bool = False,
    ):
        if scale_jitter is not None and not 0 < scale_jitter[0] <= scale_jitter[1]:
            raise ValueError(f"`scale_jitter` takes a low and a high positive factor, found {scale_jitter}")
        self.crop = TorchvisionCrop(size, settings)
        self.size = self.crop.size
        self.scale_jitter = scale_jitter
        self.photo = photo
        self.colours = v2.Compose(
            [v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8), v2.RandomGrayscale(p=0.2)]
        )
        self._generator = torch.Generator()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_generator": None}  # a generator cannot be sent to a spawned worker

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _generator=torch.Generator())

    def check(self, channels: int, depth: torch.dtype) -> None:
        """Raise ValueError for images that `photo` does not work on."""
        if self.photo and (channels != 3 or depth != torch.uint8):
            raise ValueError(
                f"`photo` changes the colours of 8-bit RGB images, and these have {channels} channels of "
                f"{depth_name(depth)}: turn `photo` off"
            )

    def __call__(self, image: Tensor, mask: Tensor, key: int) -> tuple[Tensor, Tensor]:
        self.check(len(image), image.dtype)
        height, width = image.shape[-2:]
        crop = self.crop.draw(height, width, key)
        size = crop.size_before_turns(self.size)
        if self.scale_jitter is None:
            image = self.crop.cut(image, crop)  # (C, H, W) -> (C, *self.size)
            mask = mask_crop(mask, crop.box, size)
        else:
            image, mask = self._window(image, mask, size, key)
            image = crop.moved(image)  # (C, *size) -> (C, *self.size)
        mask = crop.moved(mask)  # size -> self.size
        if self.photo:
            image = self._changed(image, key)
        return image, mask

    def crop_jpeg(self, data: bytes, mask: Tensor, key: int, max_pixels: int) -> tuple[Tensor, Tensor] | None:
        """Make the result from a JPEG's bytes, as RGB, and decode only what the crop shows.

        Returns None where that is not possible: see `RandomCrop.crop_jpeg`; also with `scale_jitter`, and for
        a mask of another size. `__call__` gives the same, up to rounding.
        """
        if self.scale_jitter is not None or not native.library():
            return None
        size = native.jpeg_size(data)
        if size is None or size != tuple(mask.shape):
            return None
        image = self.crop.crop_jpeg(data, key, max_pixels)
        if image is None:
            return None
        crop = self.crop.draw(*size, key)
        mask = crop.moved(mask_crop(mask, crop.box, crop.size_before_turns(self.size)))
        if self.photo:
            image = self._changed(image, key)
        return image, mask

    def _window(self, image: Tensor, mask: Tensor, size: Size, key: int) -> tuple[Tensor, Tensor]:
        """Return the image and mask in a window of that size, (C, *size) and size."""
        height, width = image.shape[-2:]
        # Draws of their own: those of the crop would go along with these.
        draws = self._generator.manual_seed(sample_seed(key, 0, 1))
        assert self.scale_jitter is not None
        low, high = self.scale_jitter
        factor = low + (high - low) * torch.rand(1, generator=draws).item()
        factor *= min(size[0] / height, size[1] / width)
        full = max(1, round(height * factor)), max(1, round(width * factor))
        y = _Span.drawn(full[0], size[0], draws)
        x = _Span.drawn(full[1], size[1], draws)
        resized = resized_crop(image, (0, 0, height, width), full)  # (C, H, W) -> (C, *full)
        shown = image.new_zeros(len(image), *size)
        shown[:, y.window, x.window] = resized[:, y.source, x.source]
        classes = torch.full(size, IGNORED, dtype=mask.dtype)
        rows = nearest(height, full[0])[y.source]
        columns = nearest(width, full[1])[x.source]
        classes[y.window, x.window] = _picked(mask, rows, columns)
        return shown, classes

    def _changed(self, image: Tensor, key: int) -> Tensor:
        with seeded(sample_seed(key, 0, 2)):
            image = self.colours(image)
            if random.random() < BLUR:
                image = gaussian_blur(image, in_proportion=False)
        return image


class _Span(NamedTuple):
    """Which positions of a resized axis are shown, and where in the window."""

    source: slice
    window: slice

    @classmethod
    def drawn(cls, full: int, size: int, draws: torch.Generator) -> "_Span":
        """Draw the place of an axis of `full` positions in a window of `size`; the shorter lies within."""
        room = abs(full - size)
        first = int(torch.randint(room + 1, (1,), generator=draws))
        count = min(full, size)
        inner = slice(first, first + count)
        if full > size:
            return cls(inner, slice(0, count))
        return cls(slice(0, count), inner)


# --- evaluation ---


class SegmentEval:
    """Resize the image for evaluation; the mask keeps its resolution.

    Args:
        size: (h, w) of the image.
        short_side: of the image, whose aspect ratio is kept. With neither the image stays as it is.

    Raises ValueError for both.
    """

    def __init__(self, size: Size | None = None, short_side: int | None = None):
        if size is not None and short_side is not None:
            raise ValueError("`size` and `short_side` exclude each other: leave one out")
        self.size = size
        self.short_side = short_side

    def __call__(self, image: Tensor, mask: Tensor, key: int) -> tuple[Tensor, Tensor]:
        height, width = image.shape[-2:]
        size = self.size
        if self.short_side is not None:
            size = _with_short_side(height, width, self.short_side)
        if size is not None and size != (height, width):
            image = resized_crop(image, (0, 0, height, width), size)  # (C, H, W) -> (C, *size)
        return image, mask


def _with_short_side(height: int, width: int, short_side: int) -> Size:
    """Return the size with that shorter side and the aspect ratio kept, rounded down as torchvision does."""
    shorter = min(height, width)
    size = height * short_side // shorter, width * short_side // shorter
    if size[0] * size[1] > max(RESIZED_PIXELS, height * width):
        raise ValueError(f"with a shorter side of {short_side} it would have {size[0]} x {size[1]} pixels")
    return size


class SegmentResize:
    """Resize image and mask to one size (h, w), for features of a frozen model."""

    def __init__(self, size: Size):
        self.size = size

    def __call__(self, image: Tensor, mask: Tensor, key: int) -> tuple[Tensor, Tensor]:
        box = (0, 0, *image.shape[-2:])
        return resized_crop(image, box, self.size), mask_crop(mask, box, self.size)
