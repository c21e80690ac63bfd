"""HEIC and HEIF files, by pi-heif or pillow-heif. Nothing is registered with PIL."""

import contextlib
import io
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from PIL import Image

from util.data.formats.arrays import as_tensor
from util.data.formats.pil import AVIF, brands_of, deep_channels, image_to_tensor
from util.data.formats.settings import Facts, ReadSettings, check_pixels, needs_package

BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
# The same library and functions. The second one can encode, too, for which its wheels bring x265 (GPL).
LIBRARIES = ("pi_heif", "pillow_heif")


def is_heif(data: bytes) -> bool:
    """Tell whether a file is HEIC or HEIF, and not AVIF, which PIL reads."""
    brands = brands_of(data)
    # AVIFs have a brand of HEIF as well.
    return not BRANDS.isdisjoint(brands) and AVIF.isdisjoint(brands)


def decode_heif(data: bytes, read: ReadSettings) -> torch.Tensor:
    """Decode the primary image; see `decode`. Libheif turns it as the file says."""
    image = _primary(_opened(data))
    check_pixels(image.size[1], image.size[0], read.max_pixels)
    values = np.asarray(image)
    if values.dtype == np.uint8:
        return image_to_tensor(Image.fromarray(values), read)
    if values.ndim == 2:
        values = values[..., None]
    # (H, W, bands) -> (bands, H, W)
    return deep_channels(as_tensor(np.moveaxis(values, 2, 0)), read, image.has_alpha)


def heif_facts(data: bytes, read: ReadSettings) -> Facts:
    """Read the header."""
    file = _opened(data)
    image = _primary(file)
    check_pixels(image.size[1], image.size[0], read.max_pixels)
    bands = Image.getmodebands(image.mode.partition(";")[0])
    depth = torch.uint8
    if ";" in image.mode:
        depth = torch.uint16
    return Facts(depth, bands, len(file), image.has_alpha)


@lru_cache(maxsize=1)
def _library() -> Any:
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            return import_module(name)
    raise needs_package("a HEIC or HEIF file", "pi-heif")


def _opened(data: bytes) -> Any:
    """Open a file without decoding it."""
    return _library().open_heif(io.BytesIO(data), convert_hdr_to_8bit=False)


def _primary(file: Any) -> Any:
    return file[file.primary_index]
