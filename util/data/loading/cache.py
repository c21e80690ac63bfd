"""Small data sets that are decoded once and kept, in the memory of the host or on the device."""

import torch

from util.data.contract import Samples
from util.data.datasets import ImageDataset
from util.data.loading.cached_pixels import CachedPixels
from util.data.loading.device_loader import DeviceLoader
from util.data.loading.loader import Loader, S


def cached(loader: Loader[S], cache_data: str, device: torch.device) -> Loader[S] | DeviceLoader:
    """Return a loader with the batches of `loader`, made from images that are decoded once.

    Every rank keeps all images. From memory, samples have the same bits as without a cache; for the device
    see `resample`.

    Args:
        loader: what `build_loader` made of an ImageDataset, before its first use.
        cache_data: "none" returns `loader` itself. With "memory" its workers cut crops from the host's
            memory. For "device" see `DeviceLoader`.

    Raises ValueError if the data set or its transform cannot be cached, and on all ranks if one of them lacks
    the memory.
    """
    if cache_data == "none":
        return loader
    dataset: Samples = loader.dataset
    if not isinstance(dataset, ImageDataset):
        raise ValueError(
            f"{dataset.summary()}: `cache_data` {cache_data} keeps images from folders, tars and lists of "
            "files, not from timm's readers: give `cache_data` none"
        )
    # The cache would lose what the switch is for: fewer coefficients to decode.
    if getattr(dataset.transform, "dct_scaling", False):
        raise ValueError(
            f"`dct_scaling` decodes a file anew for each crop, and `cache_data` {cache_data} decodes it "
            "once: leave one of them out"
        )
    if cache_data == "device":
        return DeviceLoader(loader, device)
    assert cache_data == "memory", cache_data
    # The workers start at the loader's first use and get this as well.
    dataset.pixels = CachedPixels(dataset.index, dataset.read, threads=loader.num_workers)
    return loader
