"""Image formats: which files are images, and how their bytes become pixels.

`FORMATS` is the only place that lists formats. A new format is one decoder and one entry in that table.

Files are not trusted. `open_image` is the only place where PIL opens one, and it names the formats. The
number of pixels that a header claims is compared with a budget before anything is decoded or allocated.
"""

import io
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor

from util.flags.groups import MAX_PIXELS

try:  # deprecated since torchvision 0.29; without it PIL decodes the same pixels, a third slower
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What PIL may open: the formats of our suffixes, all of them decoded in this process. Without a list PIL also
# takes PostScript, in files of any name, and runs Ghostscript, which executes it.
PIL_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
NPY_MAGIC = b"\x93NUMPY"
# Scans of a JPEG. Encoders write about ten. A file of a few kilobytes can have thousands, each of which costs
# as much time as the whole image.
MOST_SCANS = 100
STRIP_PIXELS = 1 << 22  # of larger images as many pixels are converted at a time
# Numbers of two fields of a TIFF.
TILE_WIDTH = 322
TILE_LENGTH = 323
# Pillow would print one above its own limit. `open_image` refuses such an image and says why.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, in_chans: int = 3, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Decode a file -> uint8 (in_chans, H, W).

    1, 3 and 4 channels (grey, RGB, RGBA) are read from every format of `PIL_FORMATS`; 16-bit grey is scaled
    to 8 bits. Of several frames the first is read. Any number of channels is read from `.npy` files with a
    uint8 array (H, W, in_chans), or (H, W) for one channel.

    Raises ValueError if the file cannot be decoded; this includes truncated files, and files whose header
    claims more than `max_pixels` pixels, which are refused before anything is allocated for them.
    """
    try:
        return format_of(data, in_chans).decode(data, in_chans, max_pixels)
    # Decoders raise many types for damaged files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError(
            f"not a readable image ({len(data)} bytes, starting with {data[:4]!r}): "
            f"{str(error) or type(error).__name__}"
        ) from error


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Raise ValueError if an image of that size has more than `max_pixels` pixels."""
    if height * width > max_pixels:
        raise ValueError(f"its {height} x {width} pixels are more than `max_pixels` {max_pixels}")


@dataclass(frozen=True)
class Format:
    """An image format.

    Attributes:
        suffixes: of its files, in lower case.
        matches: bytes, wanted number of channels -> whether `decode` can be used.
        decode: bytes, number of channels, largest number of pixels -> uint8 (in_chans, H, W); may raise any
            exception.
        read_by_pil: whether PIL opens these files as well. Repacking copies the others unchanged.
    """

    suffixes: tuple[str, ...]
    matches: Callable[[bytes, int], bool]
    decode: Callable[[bytes, int, int], torch.Tensor]
    read_by_pil: bool = True


def format_of(data: bytes, in_chans: int = 3) -> Format:
    """Return the first format that matches a file; the last one matches every file."""
    return next(kind for kind in FORMATS if kind.matches(data, in_chans))


# --- .npy: any number of channels ---


def _is_npy(data: bytes, in_chans: int) -> bool:
    return data.startswith(NPY_MAGIC)


def _decode_npy(data: bytes, in_chans: int, max_pixels: int) -> torch.Tensor:
    file = io.BytesIO(data)
    # Version 3 differs in the names of structured types only, which are no images.
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"version {version} of .npy")
    shape, fortran_order, dtype = readers[version](file)
    usable = dtype == np.uint8 and len(shape) in (2, 3) and min(shape) > 0
    if not usable or (*shape, 1)[2] != in_chans:
        raise ValueError(f"found {dtype} {shape}, expected uint8 (H, W, {in_chans})")
    height, width = shape[:2]
    check_pixels(height, width, max_pixels)
    size = height * width * in_chans
    left = len(data) - file.tell()
    if left < size:
        raise ValueError(f"{shape} needs {size} bytes, and {left} follow its header")
    order: Literal["C", "F"] = "C"
    if fortran_order:
        order = "F"
    # The bytes of the file, not a copy.
    array = np.frombuffer(data, np.uint8, size, file.tell()).reshape((height, width, in_chans), order=order)
    return torch.from_numpy(array.transpose(2, 0, 1).copy())  # (H, W, C) -> (C, H, W)


# --- JPEG, by torchvision or PIL ---


def _is_jpeg(data: bytes, in_chans: int) -> bool:
    return data[:2] == b"\xff\xd8"


def _decode_any_jpeg(data: bytes, in_chans: int, max_pixels: int) -> torch.Tensor:
    # In compressed data 0 follows 0xFF, so that this counts markers only. A thumbnail has few.
    scans = data.count(b"\xff\xda")
    if scans > MOST_SCANS:
        raise ValueError(f"a JPEG of {scans} scans, more than {MOST_SCANS}")
    size = None
    if decode_jpeg is not None and in_chans in (1, 3):
        size = plain_jpeg_size(data)
    if size is None:
        return _decode_by_pil(data, in_chans, max_pixels)
    check_pixels(*size, max_pixels)
    mode = {1: "GRAY", 3: "RGB"}[in_chans]
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


# --- everything that PIL reads ---


def _is_any(data: bytes, in_chans: int) -> bool:
    return True


def _decode_by_pil(data: bytes, in_chans: int, max_pixels: int) -> torch.Tensor:
    if in_chans not in PIL_MODES:
        raise ValueError(f"{in_chans} channels are read from .npy files of uint8 (H, W, {in_chans}) only")
    with open_image(data, max_pixels) as image:
        if in_chans == 1:
            # The luma that a JPEG stores, as torchvision returns it, instead of grey computed from RGB.
            image.draft("L", None)
        image.load()
        if image.width * image.height <= STRIP_PIXELS:
            return pil_to_tensor(to_8_bit(image).convert(PIL_MODES[in_chans]))
        return _converted_in_strips(image, in_chans)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Let PIL open a file in one of `PIL_FORMATS`; nothing is decoded yet.

    Raises ValueError for other files, and if the header claims more than `max_pixels` pixels. Damaged files
    raise many types, as in `decode`.
    """
    raise_pillows_limit(max_pixels)
    # PIL allocates for some formats when it opens them.
    for height, width in _claimed_sizes(data):
        check_pixels(height, width, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=PIL_FORMATS)
    except UnidentifiedImageError:
        # PIL's message has an address in memory.
        raise ValueError(f"it has no valid header of {', '.join(PIL_FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's limit is the budget or more.
        raise ValueError(f"it has more pixels than `max_pixels` {max_pixels}") from None
    check_pixels(image.height, image.width, max_pixels)
    _check_tiles(image, max_pixels)
    return image


def raise_pillows_limit(max_pixels: int) -> None:
    """Let Pillow handle images of up to `max_pixels` pixels without a warning.

    Pillow has one limit for a process: it warns above it, and refuses twice as many pixels. The limit is only
    raised, so data sets with other budgets, and threads, do not disturb each other.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and limit < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _claimed_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the sizes (height, width) that the first bytes of a GIF, WebP or PNG claim."""
    if data[:4] == b"GIF8":
        width, height = struct.unpack_from("<HH", data, 6)
        yield height, width
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        yield _webp_size(data)
    elif data[:4] == b"\x89PNG":
        yield from _png_sizes(data)


def _webp_size(data: bytes) -> tuple[int, int]:
    kind = data[12:16]
    if kind == b"VP8X":
        # Two numbers of 24 bits, less one.
        return int.from_bytes(data[27:30], "little") + 1, int.from_bytes(data[24:27], "little") + 1
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", data, 26)
    return height & 0x3FFF, width & 0x3FFF


def _png_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the sizes of all headers before the pixels; there should be one, and PIL takes the last."""
    at = 8
    while at + 16 <= len(data) and data[at + 4 : at + 8] != b"IDAT":
        length, kind, width, height = struct.unpack_from(">I4sII", data, at)
        if kind == b"IHDR":
            yield height, width
        at += 12 + length


def _check_tiles(image: Image.Image, max_pixels: int) -> None:
    """Refuse a TIFF whose tiles are larger than an image may be: one tile is decoded as a whole."""
    tags = getattr(image, "tag_v2", {})
    height, width = tags.get(TILE_LENGTH, 1), tags.get(TILE_WIDTH, 1)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ValueError("its tiles have no size")
    if height * width > max_pixels:
        raise ValueError(f"its tiles of {height} x {width} pixels are more than `max_pixels` {max_pixels}")


def _converted_in_strips(image: Image.Image, in_chans: int) -> torch.Tensor:
    """Convert a large image as a small one, with little memory beside the image and the result."""
    pixels = torch.empty(image.height, image.width, in_chans, dtype=torch.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = to_8_bit(image.crop((0, top, image.width, bottom))).convert(PIL_MODES[in_chans])
        pixels[top:bottom] = pil_to_tensor(strip).permute(1, 2, 0)  # (C, h, W) -> (h, W, C)
    return pixels.permute(2, 0, 1)  # the strides of `pil_to_tensor`


def to_8_bit(image: Image.Image) -> Image.Image:
    """Scale integer pixels of 16 bits to 8 bits; raise ValueError for pixels of unknown range."""
    if image.mode[0] == "I":  # PIL's own conversion clips at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"integer pixels from {values.min()} to {values.max()}: only 8 and 16 bits are supported"
            )
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range: store 8-bit images or uint8 .npy files")
    if image.mode == "P" and "transparency" in image.info:
        return image.convert("RGBA")  # the same colours, without PIL's warning
    return image


# The order counts: the first format that matches a file decodes it.
FORMATS = (
    Format((".npy",), _is_npy, _decode_npy, read_by_pil=False),
    Format((".jpg", ".jpeg"), _is_jpeg, _decode_any_jpeg),
    Format(
        (".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"),
        _is_any,
        _decode_by_pil,
    ),
)
# As bytes, because file names need not be valid UTF-8.
IMAGE_SUFFIXES = tuple(suffix.encode() for kind in FORMATS for suffix in kind.suffixes)
