"""JPEG files, by torchvision or PIL."""

import torch

from util.data.formats.pil import decode_by_pil
from util.data.formats.settings import ReadSettings, check_pixels

try:  # deprecated since torchvision 0.29; without it PIL decodes the same pixels, a third slower
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

# Scans of a JPEG. Encoders write about ten. A file of a few kilobytes can have thousands, each of which costs
# as much time as the whole image.
MOST_SCANS = 100


def is_jpeg(data: bytes) -> bool:
    """Tell whether a file is a JPEG."""
    return data[:2] == b"\xff\xd8"


def decode_jpeg_file(data: bytes, read: ReadSettings) -> torch.Tensor:
    """Decode any JPEG; see `decode`."""
    # In compressed data 0 follows 0xFF, so that this counts markers only. A thumbnail has few.
    scans = data.count(b"\xff\xda")
    if scans > MOST_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, more than {MOST_SCANS}")
    size = None
    if decode_jpeg is not None and read.in_chans in (1, 3) and read.plain:
        size = plain_jpeg_size(data)
    if size is None:
        return decode_by_pil(data, read)
    check_pixels(*size, read.max_pixels)
    mode = {1: "GRAY", 3: "RGB"}[read.in_chans]
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)


def is_plain_jpeg(data: bytes) -> bool:
    """Tell whether a file is an 8-bit grey or YCbCr JPEG.

    torchvision decodes these files exactly as PIL does, and faster.
    """
    return plain_jpeg_size(data) is not None


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) of an 8-bit grey or YCbCr JPEG, and None for other files."""
    if data[:2] != b"\xff\xd8":
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1  # padding: 0xFF may be repeated before a marker
            continue
        # C4, C8 and CC lie among the start-of-frame markers and are not frames.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _plain_frame(data[at + 4 : at + 10])
        length = int.from_bytes(data[at + 2 : at + 4])  # counts its own two bytes
        # Markers without a length, whose next bytes libjpeg reads as a marker. It must see the same frame.
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2:
            return None
        at += 2 + length
    return None


def _plain_frame(header: bytes) -> tuple[int, int] | None:
    """Judge a frame header: precision (1 byte), height (2), width (2), number of components (1)."""
    if header[0] != 8 or header[5] not in (1, 3):
        return None
    return int.from_bytes(header[1:3]), int.from_bytes(header[3:5])
