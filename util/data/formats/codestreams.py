"""Sizes that compressed pixels claim, before a decoder allocates for them.

TIFF and DICOM hold JPEG and JPEG 2000 streams, whose headers may claim another size than the file does.
"""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

from util.data.formats.settings import check_pixels

SIZ = b"\xff\x4f\xff\x51"  # the start of a JPEG 2000 codestream, and the marker of its size
# Markers of a JPEG's frames. C4, C8 and CC lie among them and are tables and a reserved marker.
FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
JPEG_LS = 0xF7  # the marker of the frame of JPEG-LS


class Stream(NamedTuple):
    """What the header of compressed pixels claims.

    Attributes:
        bits: of the deepest component.
    """

    height: int
    width: int
    components: int
    bits: int


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
    # A box before the codestream may hold a smaller one, which decoders pass over.
    found = [_siz(data, match.start()) for match in re.finditer(re.escape(SIZ), data)]
    sizes = [stream for stream in found if stream is not None]
    return max(sizes, key=lambda stream: stream.height * stream.width, default=None)


def _siz(data: bytes, at: int) -> Stream | None:
    # Length and capabilities, then the corners of the image, those of the first tile, and the components.
    if at + 42 > len(data):
        return None
    right, bottom, left, top, _, _, _, _, components = struct.unpack_from(">8IH", data, at + 8)
    if right <= left or bottom <= top:
        return None
    # Three bytes for each component, of which the first has its sign and one bit less than it has.
    depths = data[at + 42 : at + 42 + 3 * components : 3]
    bits = max(((depth & 0x7F) + 1 for depth in depths), default=0)
    return Stream(bottom - top, right - left, components, bits)


def jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield (marker, position of its 0xFF) of the segments before a JPEG's first scan, if in order.

    Decoders disagree on what is out of order, so that a header behind it could be another one than theirs.
    """
    if data[:2] != b"\xff\xd8":
        return
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1  # padding: 0xFF may be repeated before a marker
            continue
        length = int.from_bytes(data[at + 2 : at + 4])  # counts its own two bytes
        # Markers without a length, whose next bytes libjpeg reads as a marker. It must see the same frame.
        if marker < 0xC0 or 0xD0 <= marker <= 0xDA or length < 2:
            return
        yield marker, at
        at += 2 + length


def _jpeg_header(data: bytes) -> Stream | None:
    for marker, at in jpeg_segments(data):
        if marker in FRAMES or marker == JPEG_LS:
            bits, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            return Stream(height, width, components, bits)
    return None
