"""Batches of images that stay on the device."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from util import dist
from util.data.contract import Samples
from util.data.datasets import ImageDataset
from util.data.loading.cached_pixels import CachedPixels
from util.data.loading.loader import Loader, build_loader
from util.data.loading.memory import MB, check_room
from util.data.loading.resample import resample
from util.data.sources.image_index import ImageIndex
from util.data.transforms import Unreadable, Window

COPIED = 1 << 26  # bytes that go to the device at a time, or those of one padded image
NO_WINDOW = Window(0, 0, 0, 0, 0, 0)  # of an image that cannot be read; it shows black


class DeviceLoader:
    """Batches as a Loader's, of images that stay on the device and are cropped, resized and flipped there.

    The workers of `loader` draw which part of an image is shown, from the sample's own key, as they do
    without a cache. Images of several sizes are padded to the largest height and width.

    Raises ValueError for a transform that does more than that, and if the images do not fit.
    """

    def __init__(self, loader: Loader[Any], device: torch.device):
        dataset: ImageDataset = loader.dataset
        _check_transform(dataset.transform)
        self.dataset = dataset
        self.sampler = loader.sampler
        self.batch_size = loader.batch_size
        pixels = CachedPixels(dataset.index, dataset.read, loader.num_workers, device)
        self.images = padded_images(pixels, dataset.index, device)
        dist.print_rank0(f"{dataset.index.path}: {self.images.nbytes / MB:.0f} MB on {device}")
        # A copy of the sizes, so that the workers do not keep the pixels.
        windows = Windows(dataset, pixels.place[:, 2:].copy(), pixels.errors)
        self.windows = build_loader(
            windows,
            loader.sampler,
            batch_size=loader.batch_size,
            num_workers=loader.num_workers,
            pin_memory=loader.pin_memory,
            data_timeout=loader.data_timeout,
        )

    def __len__(self) -> int:
        return len(self.windows)

    def __iter__(self) -> Iterator[dict]:
        size = self.dataset.transform.size
        for batch in self.windows:
            windows = batch.pop("window")
            # (n, C, H, W) -> (B, C, h, w)
            yield {"image": resample(self.images, batch["index"], windows, size)} | batch


def _check_transform(transform: Any) -> None:
    if not hasattr(transform, "window"):
        raise ValueError(
            "`cache_data` device cuts one crop of an image and flips it, and these augmentations do more: "
            "give `cache_data` memory, or turn the others off (main_finetune.py `auto_augment` '' without "
            "`color_jitter`, main_pretrain.py `sr_views` same)"
        )
    if getattr(transform, "settings", None) is not None and transform.settings.rot90:
        raise ValueError(
            "`cache_data` device cuts and flips crops and does not turn them: give `cache_data` memory, or "
            "`rot90` 0"
        )
    # Random crops never leave the image, and have no `cover`.
    cover = getattr(transform, "cover", transform.size)
    if cover[0] < transform.size[0] or cover[1] < transform.size[1]:
        raise ValueError(
            "`cache_data` device does not pad images, as a centre crop that is larger than the image needs: "
            "give `crop_pct` 1 or less, or `cache_data` memory"
        )


def padded_images(pixels: CachedPixels, index: ImageIndex, device: torch.device) -> torch.Tensor:
    """Copy all images to the device, padded with zeros to the largest height and width -> (n, C, H, W).

    An unreadable image is all zero. Raises ValueError, on all ranks together, if the images do not fit.
    `index` names the images.
    """
    sizes = pixels.place[:, 2:]  # (n, 2), heights and widths
    shape = pixels.in_chans, *sizes.max(axis=0).clip(min=1).tolist()
    # The images that were probed need not include the largest, and one large image enlarges all.
    numbers = sorted(set(sizes.argmax(axis=0).tolist()))
    largest = " and ".join(f"{index.name(i)} ({sizes[i, 0]} x {sizes[i, 1]} pixels)" for i in numbers)
    size = pixels.depth.itemsize * math.prod(shape)
    check_room(index, 0.0, float(len(pixels) * size), device, largest)
    images = torch.zeros(len(pixels), *shape, dtype=pixels.depth, device=device)
    count = max(1, COPIED // size)
    # Few large copies are faster than one for each image.
    for first in range(0, len(pixels), count):
        part = torch.zeros(images[first : first + count].shape, dtype=pixels.depth)
        for i, padded in enumerate(part, first):
            if i not in pixels.errors:
                image = pixels[i]
                padded[:, : image.shape[1], : image.shape[2]] = image
        images[first : first + count] = part.to(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # batches are made on another stream than this one
    return images


class Windows(Samples):
    """The samples of a data set with `window`, int64 (10,), the values of a `Window`, instead of `image`.

    `index` is the image to show. In evaluation the window of an unreadable image is all zero.
    """

    def __init__(self, dataset: ImageDataset, sizes: np.ndarray, errors: dict[int, str]):
        self.dataset = dataset
        self.sizes = sizes  # (n, 2), heights and widths
        self.errors = errors

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, item: int | tuple[int, int]) -> dict:
        window, sample = self.dataset.resolve(item, self._draw)
        # `resolve` returns None for an unreadable image.
        return dict(window=torch.tensor(window or NO_WINDOW)) | sample

    def _draw(self, i: int, key: int) -> Window:
        if i in self.errors:
            raise Unreadable(self.errors[i])
        return self.dataset.transform.window(*self.sizes[i].tolist(), key)
