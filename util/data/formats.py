"""Image formats: which files are images, and how their bytes become pixels.

`FORMATS` is the only place that lists formats. A new format is one decoder and one entry in that table.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

try:  # deprecated since torchvision 0.29; without it PIL decodes the same pixels, a third slower
    from torchvision.io import decode_jpeg
except ImportError:
    decode_jpeg = None

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
NPY_MAGIC = b"\x93NUMPY"


def decode(data: bytes, in_chans: int = 3) -> torch.Tensor:
    """Decode a file -> uint8 (in_chans, H, W).

    1, 3 and 4 channels (grey, RGB, RGBA) are read from every format that PIL reads; 16-bit grey is scaled to
    8 bits. Any number of channels is read from `.npy` files with a uint8 array (H, W, in_chans), or (H, W)
    for one channel. Raises ValueError if the file cannot be decoded; this includes truncated files.
    """
    try:
        return format_of(data, in_chans).decode(data, in_chans)
    # Decoders raise many types for damaged files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError(
            f"not a readable image ({len(data)} bytes, starting with {data[:4]!r}): {error}"
        ) from error


@dataclass(frozen=True)
class Format:
    """An image format.

    Attributes:
        suffixes: of its files, in lower case.
        matches: bytes, wanted number of channels -> whether `decode` can be used.
        decode: bytes, number of channels -> uint8 (in_chans, H, W); may raise any exception.
        read_by_pil: whether PIL opens these files as well. Repacking copies the others unchanged.
    """

    suffixes: tuple[str, ...]
    matches: Callable[[bytes, int], bool]
    decode: Callable[[bytes, int], torch.Tensor]
    read_by_pil: bool = True


def format_of(data: bytes, in_chans: int = 3) -> Format:
    """Return the first format that matches a file; the last one matches every file."""
    return next(kind for kind in FORMATS if kind.matches(data, in_chans))


# --- .npy: any number of channels ---


def _is_npy(data: bytes, in_chans: int) -> bool:
    return data.startswith(NPY_MAGIC)


def _decode_npy(data: bytes, in_chans: int) -> torch.Tensor:
    array = np.load(io.BytesIO(data), allow_pickle=False)
    if array.ndim == 2:
        array = array[..., None]  # (H, W) -> (H, W, 1)
    usable = array.dtype == np.uint8 and array.ndim == 3 and array.size > 0
    if not usable or array.shape[2] != in_chans:
        raise ValueError(f"found {array.dtype} {array.shape}, expected uint8 (H, W, {in_chans})")
    return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1)))  # (H, W, C) -> (C, H, W)


# --- JPEG, by torchvision ---


def _is_fast_jpeg(data: bytes, in_chans: int) -> bool:
    return decode_jpeg is not None and in_chans in (1, 3) and is_plain_jpeg(data)


def is_plain_jpeg(data: bytes) -> bool:
    """Tell whether a file is an 8-bit grey or YCbCr JPEG that PIL would accept.

    torchvision decodes these files exactly as PIL does, and faster.
    """
    if data[:2] != b"\xff\xd8":
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        # C4, C8 and CC lie among the start-of-frame markers and are not frames.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _is_plain_frame(data[at + 4 : at + 10])
        if marker == 0xFF:
            at += 1  # padding: 0xFF may be repeated before a marker
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4])  # a segment's length counts its own two bytes
    return False


def _is_plain_frame(header: bytes) -> bool:
    """Judge a frame header: precision (1 byte), height (2), width (2), number of components (1)."""
    height = int.from_bytes(header[1:3])
    width = int.from_bytes(header[3:5])
    return header[0] == 8 and header[5] in (1, 3) and height * width <= most_pixels()


def most_pixels() -> int:
    """Return the number of pixels above which PIL refuses an image as a decompression bomb."""
    return Image.MAX_IMAGE_PIXELS or 1 << 32


def _decode_fast_jpeg(data: bytes, in_chans: int) -> torch.Tensor:
    mode = {1: "GRAY", 3: "RGB"}[in_chans]
    return decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=mode)


# --- everything that PIL reads ---


def _is_any(data: bytes, in_chans: int) -> bool:
    return True


def _decode_by_pil(data: bytes, in_chans: int) -> torch.Tensor:
    if in_chans not in PIL_MODES:
        raise ValueError(f"{in_chans} channels are read from .npy files of uint8 (H, W, {in_chans}) only")
    with Image.open(io.BytesIO(data)) as image:
        if in_chans == 1:
            # The luma that a JPEG stores, as torchvision returns it, instead of grey computed from RGB.
            image.draft("L", None)
        return pil_to_tensor(_to_8_bit(image).convert(PIL_MODES[in_chans]))


def _to_8_bit(image: Image.Image) -> Image.Image:
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
    Format((".jpg", ".jpeg"), _is_fast_jpeg, _decode_fast_jpeg),
    Format(
        (".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"),
        _is_any,
        _decode_by_pil,
    ),
)
# As bytes, because file names need not be valid UTF-8.
IMAGE_SUFFIXES = tuple(suffix.encode() for kind in FORMATS for suffix in kind.suffixes)
