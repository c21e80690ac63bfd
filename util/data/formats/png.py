"""PNGs of 16 bits in colour or with transparency.

PIL cuts them to 8 bits. Here PIL unpacks the same data twice: once as the high bytes of its values, and once
as the low ones. torchvision reads these files as well, and damaged ones crash its process.
"""

import struct
import zlib
from typing import Any

import numpy as np
import torch

from util.data.formats.arrays import as_tensor
from util.data.formats.pil import deep_channels, open_image, orientation_of, turned
from util.data.formats.settings import Facts, ReadSettings

MAGIC = b"\x89PNG\r\n\x1a\n"
# Types of colours.
RGB = 2
GREY_ALPHA = 4
RGBA = 6
BANDS = {RGB: 3, GREY_ALPHA: 2, RGBA: 4}
MODES = {RGB: "RGB", RGBA: "RGBA"}
OPAQUE = 65535


def starts_like_png(head: bytes) -> bool:
    """Tell whether the first bytes of a file are those of a PNG of any depth."""
    return head[:8] == MAGIC


def is_deep_png(data: bytes) -> bool:
    """Tell whether a file is a PNG of 16 bits, and not of one band, which PIL reads."""
    if not starts_like_png(data) or data[12:16] != b"IHDR" or len(data) < 33:
        return False
    return data[24] == 16 and data[25] in BANDS


def decode_deep_png(data: bytes, read: ReadSettings) -> torch.Tensor:
    """Decode a PNG that `is_deep_png`; see `decode`."""
    facts = deep_png_facts(data, read)
    if data[25] == GREY_ALPHA:
        # Two values of 16 bits are stored as four of 8 bits are.
        values: np.ndarray = (
            _unpacked(_with_header(data, 8, RGBA), "RGBA", read).view(">u2").astype(np.uint16)
        )
    else:
        mode = MODES[data[25]]
        # The values are big-endian: what PIL takes for the high bytes of little-endian ones are the low ones.
        high = _unpacked(data, f"{mode};16B", read)
        values = high.astype(np.uint16) << 8
        values |= _unpacked(data, f"{mode};16L", read)
        if facts.bands > values.shape[2]:
            values = _with_alpha(values, data, read)
    # (H, W, bands) -> (bands, H, W)
    array = np.moveaxis(values, 2, 0)
    if read.exif == "apply":
        array = turned(array, facts.orientation)
    image = as_tensor(array)
    if len(image) == 3 and read.in_chans == 4 and not read.channels:
        # As those of 8 bits.
        return torch.cat([image, torch.full_like(image[:1], OPAQUE)])
    return deep_channels(image, read, facts.alpha)


def deep_png_facts(data: bytes, read: ReadSettings) -> Facts:
    """Read the header."""
    with open_image(data, read.max_pixels) as image:
        bands = BANDS[data[25]] + ("transparency" in image.info)
        return Facts(torch.uint16, bands, alpha=bands in (2, 4), orientation=orientation_of(image))


def _unpacked(data: bytes, raw_mode: str, read: ReadSettings) -> np.ndarray:
    """Unpack a PNG as values of 8 bits, (H, W, bands)."""
    opened: Any = open_image(data, read.max_pixels)
    with opened as image:
        # A later header may say something else.
        if len(image.tile) != 1 or image.mode != raw_mode.partition(";")[0]:
            raise ValueError(f"its first header is not that of the {image.mode} that PIL finds")
        tile: Any = (*image.tile[0][:3], raw_mode)  # older Pillows have tuples
        image.tile = [tile]
        image.load()
        return np.asarray(image)


def _with_header(data: bytes, bits: int, colours: int) -> bytes:
    """Return a PNG with other bits and colours in its header."""
    if zlib.crc32(data[12:29]) != int.from_bytes(data[29:33]):
        raise ValueError("the checksum of its header is wrong")
    header = data[12:24] + bytes((bits, colours)) + data[26:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _with_alpha(values: np.ndarray, data: bytes, read: ReadSettings) -> np.ndarray:
    """Add a band for the colour that stands for transparency."""
    with open_image(data, read.max_pixels) as image:
        clear = (values == np.array(image.info["transparency"], np.uint16)).all(2, keepdims=True)
    return np.concatenate([values, np.where(clear, 0, OPAQUE).astype(np.uint16)], axis=2)
