"""Sizes that compressed pixels claim, before a decoder allocates for them.

TIFF and DICOM hold JPEG and JPEG 2000 streams, whose headers may claim another size than the file does.
"""

import struct
from typing import NamedTuple

from util.data.formats.settings import check_pixels

SIZ = b"\xff\x4f\xff\x51"  # the start of a JPEG 2000 codestream, and the marker of its size
# Markers of a JPEG without a length: TEM, RST0 to RST7, and SOI.
ALONE = {0x01, *range(0xD0, 0xD9)}
# Markers of a JPEG after which come compressed data.
LAST = (0xD9, 0xDA)
# Markers between C0 and CF are frames, with these exceptions. F7 is the frame of JPEG-LS.
NO_FRAMES = (0xC4, 0xC8, 0xCC)


class Stream(NamedTuple):
    """What the header of compressed pixels claims."""

    height: int
    width: int
    components: int


def check_stream(data: bytes, max_pixels: int, components: int = 4) -> None:
    """Raise ValueError if a JPEG, JPEG-LS or JPEG 2000 stream claims more pixels or components."""
    found = stream_header(data)
    if found is None:
        raise ValueError("its compressed pixels have no valid header")
    check_pixels(found.height, found.width, max_pixels)
    if found.components > components:
        raise ValueError(f"its compressed pixels have {found.components} components, not {components}")


def stream_header(data: bytes) -> Stream | None:
    """Return the size of a JPEG, JPEG-LS or JPEG 2000 stream; None if none is found."""
    if data[:2] == b"\xff\xd8":
        return _jpeg_header(data)
    at = data.find(SIZ)
    if at < 0 or at + 42 > len(data):
        return None
    return _siz(data, at)


def _siz(data: bytes, at: int) -> Stream | None:
    # Length and capabilities, then the corners of the image, those of the first tile, and the components.
    right, bottom, left, top, _, _, _, _, components = struct.unpack_from(">8IH", data, at + 8)
    if right <= left or bottom <= top:
        return None
    return Stream(bottom - top, right - left, components)


def _jpeg_header(data: bytes) -> Stream | None:
    at = 2
    while at + 10 <= len(data):
        marker = data[at + 1]
        if data[at] != 0xFF or marker in LAST:
            return None
        if marker == 0xFF:
            at += 1  # padding: 0xFF may be repeated before a marker
        elif marker in ALONE:
            at += 2
        elif marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in NO_FRAMES):
            height, width, components = struct.unpack_from(">HHB", data, at + 5)
            return Stream(height, width, components)
        else:
            at += 2 + max(2, int.from_bytes(data[at + 2 : at + 4]))
    return None
