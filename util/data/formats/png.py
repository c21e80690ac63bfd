"""PNGs of 16 bits in colour or with transparency, which PIL cuts to 8 bits: by torchcodec or torchvision."""

import struct
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from util.data.formats.arrays import as_tensor
from util.data.formats.pil import ORIENTATION, deep_channels, png_sizes, turned
from util.data.formats.settings import Facts, ReadSettings, check_pixels, needs_package

MAGIC = b"\x89PNG\r\n\x1a\n"
# Types of colours: RGB, grey with alpha, RGB with alpha. Their bands.
BANDS = {2: 3, 4: 2, 6: 4}
RGB = 2
OPAQUE = 65535
# The bytes of a file, and whether transparent colours become a band -> uint16 (bands, H, W).
Decode: TypeAlias = Callable[[torch.Tensor, bool], torch.Tensor]


def is_deep_png(data: bytes) -> bool:
    """Tell whether a file is a PNG of 16 bits, and not of one band, which PIL reads."""
    if data[:8] != MAGIC or data[12:16] != b"IHDR" or len(data) < 26:
        return False
    return data[24] == 16 and data[25] in BANDS


def decode_deep_png(data: bytes, read: ReadSettings) -> torch.Tensor:
    """Decode a PNG that `is_deep_png`; see `decode`."""
    facts = deep_png_facts(data, read)
    for start, end in _chunks(data, b"eXIf"):
        data = data[:start] + data[end:]  # torchcodec turns an image as EXIF says
    image = decoder()(torch.frombuffer(bytearray(data), dtype=torch.uint8), _transparent_colour(data))
    width, height = struct.unpack_from(">II", data, 16)
    if image.dtype != torch.uint16 or image.shape != (facts.bands, height, width):
        raise ValueError(f"it is decoded to {image.dtype} {tuple(image.shape)}")
    if read.exif == "apply" and facts.orientation != 1:
        image = as_tensor(turned(image.numpy(), facts.orientation))
    if len(image) == 3 and read.in_chans == 4 and not read.channels:
        # As those of 8 bits.
        return torch.cat([image, torch.full_like(image[:1], OPAQUE)])
    return deep_channels(image, read, facts.alpha)


def deep_png_facts(data: bytes, read: ReadSettings) -> Facts:
    """Read the header."""
    # One header is usual, and decoders differ in which of several they believe.
    for height, width in png_sizes(data):
        check_pixels(height, width, read.max_pixels)
    bands = BANDS[data[25]] + _transparent_colour(data)
    return Facts(torch.uint16, bands, alpha=bands in (2, 4), orientation=_orientation(data))


def _transparent_colour(data: bytes) -> bool:
    """Tell whether a colour of an RGB image stands for transparency."""
    return data[25] == RGB and any(_chunks(data, b"tRNS"))


def _orientation(data: bytes) -> int:
    """Return the EXIF orientation, from 1 (upright) to 8."""
    for start, end in _chunks(data, b"eXIf"):
        exif = Image.Exif()
        exif.load(data[start + 8 : end - 4])
        value = exif.get(ORIENTATION, 1)
        if value in range(1, 9):
            return int(value)
    return 1


def _chunks(data: bytes, wanted: bytes) -> Iterator[tuple[int, int]]:
    """Yield (first byte, end) of the chunks of a kind, from the last to the first."""
    found = []
    at = len(MAGIC)
    while at + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == wanted:
            found.append((at, at + 12 + length))
        at += 12 + length
    return reversed(found)


def _torchcodec() -> Decode:
    decode = import_module("torchcodec.decoders").decode_png
    modes = ("UNCHANGED", "RGB_ALPHA")
    return lambda file, transparent: decode(file, mode=modes[transparent], output_dtype="auto")


def _torchvision() -> Decode:
    import_module("torchvision.io")  # registers the operator
    # `torchvision.io.decode_png` is deprecated since 0.29 and warns at each call. This operator, which it
    # calls, does not warn. 0 leaves the bands as they are, and 4 gives RGBA.
    operator = torch.ops.image.decode_png
    modes = (0, 4)
    return lambda file, transparent: operator(file, modes[transparent], False)


# The first that is usable decodes. Each function imports its library, and may raise anything.
LIBRARIES = {"torchcodec": _torchcodec, "torchvision": _torchvision}


@lru_cache(maxsize=1)
def decoder() -> Decode:
    """Return the first usable decoder. Raises ValueError if there is none."""
    values = np.arange(2 * 2 * 3, dtype=np.uint16).reshape(2, 2, 3) * 5001
    file = torch.frombuffer(bytearray(_trial(values)), dtype=torch.uint8)
    for name in LIBRARIES:
        # A library can be absent, older, or built for another torch or CUDA, each with errors of its own.
        try:
            decode = LIBRARIES[name]()
            if np.array_equal(decode(file, False).numpy(), np.moveaxis(values, 2, 0)):
                return decode
        except Exception:
            continue
    raise needs_package("a PNG of 16 bits in colour or with transparency", "torchcodec")


def _trial(values: np.ndarray) -> bytes:
    """Return a PNG of (H, W, 3) values."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, RGB, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return MAGIC + b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in parts
    )
