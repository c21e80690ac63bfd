"""JPEG files, by the first of torchcodec, torchvision and PIL that is installed; all give the same pixels."""

import io
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image

from util.data.formats.codestreams import FRAMES, jpeg_segments
from util.data.formats.pil import decode_by_pil
from util.data.formats.settings import ReadSettings, check_pixels

# The bytes of a file, settings with 1 (grey) or 3 (RGB) channels -> uint8 (channels, H, W).
Decode: TypeAlias = Callable[[bytes, ReadSettings], torch.Tensor]

# Scans of a JPEG. Encoders write about ten. A file of a few kilobytes can have thousands, each of which costs
# as much time as the whole image.
MOST_SCANS = 100
# Markers of segments of applications: EXIF, and one without a use.
APP1 = 0xE1
APP15 = 0xEF


def is_jpeg(data: bytes) -> bool:
    """Tell whether a file is a JPEG."""
    return data[:2] == b"\xff\xd8"


def starts_like_jpeg(head: bytes) -> bool:
    """Tell whether the first bytes of a file are those of a JPEG, and of its first segment."""
    return head[:3] == b"\xff\xd8\xff"


def decode_jpeg_file(data: bytes, read: ReadSettings) -> torch.Tensor:
    """Decode any JPEG; see `decode`."""
    # In compressed data 0 follows 0xFF, so that this counts markers only. A thumbnail has few.
    scans = data.count(b"\xff\xda")
    if scans > MOST_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, more than {MOST_SCANS}")
    size = None
    if read.in_chans in (1, 3) and read.plain:
        size = plain_jpeg_size(data)
    if size is None:
        return decode_by_pil(data, read)
    check_pixels(*size, read.max_pixels)
    return decoder().decode(data, read)


class Decoder(NamedTuple):
    """A decoder of ordinary JPEGs."""

    name: str
    decode: Decode


def _torchcodec() -> Decode:
    # Without its types, which name each mode: it may be absent where types are checked.
    decode_jpeg: Any = import_module("torchcodec.decoders").decode_jpeg
    modes = {1: "GRAY", 3: "RGB"}

    def decode(data: bytes, read: ReadSettings) -> torch.Tensor:
        upright = without_orientation(data)
        if upright is None:
            return decode_by_pil(data, read)
        return decode_jpeg(torch.frombuffer(upright, dtype=torch.uint8), mode=modes[read.in_chans])

    return decode


def _torchvision() -> Decode:
    import torchvision.io  # noqa: F401  registers the operator

    # `torchvision.io.decode_jpeg` is deprecated since 0.29 and warns at each call. This is the operator that
    # it calls, which does not warn. A mode has the number of its channels.
    operator = torch.ops.image.decode_jpeg

    def decode(data: bytes, read: ReadSettings) -> torch.Tensor:
        file = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return operator(file, read.in_chans, False)  # without turning it as EXIF says

    return decode


# The second is deprecated in favour of the first. Each function imports its library, and may raise anything.
LIBRARIES = {"torchcodec": _torchcodec, "torchvision": _torchvision}


# Asked for every image.
@lru_cache(maxsize=1)
def decoder() -> Decoder:
    """Return the first usable decoder. Each process looks for it once, when it first needs it."""
    for name in LIBRARIES:
        found = usable(name)
        if found is not None:
            return found
    return Decoder("PIL", decode_by_pil)


def usable(name: str) -> Decoder | None:
    """Return a decoder of `LIBRARIES`; None if it cannot be loaded, or differs from PIL in a trial."""
    # A library can be absent, older, or built for another torch or CUDA, each with errors of its own.
    try:
        decode = LIBRARIES[name]()
        if _agrees_with_pil(decode):
            return Decoder(name, decode)
    except Exception:
        return None
    return None


def _agrees_with_pil(decode: Decode) -> bool:
    """Tell whether a decoder gives PIL's pixels for a small file of each kind, and refuses half of it."""
    for data in _trial_files():
        for read in (ReadSettings(1), ReadSettings(3)):
            if not torch.equal(decode(data, read), decode_by_pil(data, read)):
                return False
            if _reads(decode, data[: len(data) // 2], read):
                return False
    return True


def _reads(decode: Decode, data: bytes, read: ReadSettings) -> bool:
    try:
        decode(data, read)
    except Exception:
        return False
    return True


def _trial_files() -> Iterator[bytes]:
    """Yield JPEGs of 32 x 32 pixels: grey, 4:4:4, 4:2:2, 4:4:0 and 4:2:0, which are upsampled differently."""
    values = np.arange(32 * 32 * 3, dtype=np.uint32)
    # Waves with noise from black to white, so that all coefficients occur, and values that are clipped.
    pixels = 108 + 170 * np.sin(values / 37) + (values * 2654435761 >> 16) % 40
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8).reshape(32, 32, 3))
    yield _encoded(image.convert("L"))
    for subsampling in ("4:4:4", "4:2:2", "4:2:0"):
        data = _encoded(image, subsampling=subsampling)
        yield data
        if subsampling == "4:2:2":
            # PIL does not write 4:4:0. It has as many blocks, so that the same data are an image of it, too:
            # component 1 with 1 x 2 instead of 2 x 1 samples, and table 0.
            yield data.replace(b"\x01\x21\x00", b"\x01\x12\x00", 1)


def _encoded(image: Image.Image, **options: str) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def without_orientation(data: bytes) -> bytearray | None:
    """Return a copy of a JPEG whose EXIF no decoder sees; None if that cannot be made.

    torchcodec turns an image as EXIF says, and pixels are read as stored here.
    """
    copy = bytearray(data)
    for marker, at in jpeg_segments(data):
        if marker == APP1:
            copy[at + 1] = APP15  # a segment that decoders skip
    # Between scans there may be another one, which torchcodec reads as well.
    if copy.find(bytes((0xFF, APP1))) >= 0:
        return None
    return copy


def is_plain_jpeg(data: bytes) -> bool:
    """Tell whether a file is an 8-bit grey or YCbCr JPEG.

    torchcodec and torchvision decode these files exactly as PIL does, and faster.
    """
    return plain_jpeg_size(data) is not None


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of an 8-bit grey or YCbCr JPEG, and None for other files."""
    for marker, at in jpeg_segments(data):
        if marker in FRAMES:
            return _plain_frame(data[at + 4 : at + 10])
    return None


def _plain_frame(header: bytes) -> tuple[int, int] | None:
    """Judge a frame header: precision (1 byte), height (2), width (2), number of components (1)."""
    if header[0] != 8 or header[5] not in (1, 3):
        return None
    return int.from_bytes(header[1:3]), int.from_bytes(header[3:5])
