"""Image formats: which files are images, and how their bytes become pixels.

`FORMATS` is the only place that lists formats. A new format is one file with a decoder, and one entry in that
table, which also tells its files from others. What PIL reads is one entry: another format of PIL needs its
name, its suffixes and its first bytes in `pil`.

Files are not trusted. `open_image` is the only place where PIL opens one, and it names the formats. The
number of pixels that a header claims is compared with a budget before anything is decoded or allocated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from util.data.formats import arrays, dicom, heic, jpeg, pil, png, tiff
from util.data.formats.jpeg import is_plain_jpeg, plain_jpeg_size
from util.data.formats.pil import PIL_FORMATS, PIL_MODES, image_to_tensor, open_image, raise_pillows_limit
from util.data.formats.settings import (
    DEPTHS,
    Facts,
    ReadSettings,
    check_pixels,
    depth_name,
    to_depth,
    widest,
    with_depth,
)

__all__ = [
    "DEFAULT",
    "DEPTHS",
    "FORMATS",
    "HEAD",
    "IMAGE_SUFFIXES",
    "PIL_FORMATS",
    "PIL_MODES",
    "Facts",
    "Format",
    "ReadSettings",
    "check_pixels",
    "decode",
    "depth_name",
    "describe",
    "format_of",
    "image_to_tensor",
    "is_plain_jpeg",
    "open_image",
    "plain_jpeg_size",
    "raise_pillows_limit",
    "to_depth",
    "widest",
    "with_depth",
]


@dataclass(frozen=True)
class Format:
    """An image format.

    Attributes:
        suffixes: of its files, in lower case.
        matches: bytes or a memoryview -> whether `decode` can be used.
        decode: bytes (a memoryview, too, if PIL does not read them), settings -> (in_chans, H, W) in one of
            `DEPTHS`; may raise any exception.
        describe: bytes, settings -> what the header tells; may raise any exception.
        starts: the first `HEAD` bytes of a file, or fewer -> whether it is an image of this format. Files
            without a suffix are judged by it. It must be strict: folders of images hold other files as well.
        read_by_pil: whether PIL opens these files as well. Repacking copies the others unchanged.
    """

    suffixes: tuple[str, ...]
    matches: Callable[[Any], bool]
    decode: Callable[[Any, ReadSettings], torch.Tensor]
    describe: Callable[[bytes, ReadSettings], Facts]
    starts: Callable[[bytes], bool]
    read_by_pil: bool = True


def _is_any(data: Any) -> bool:
    return True


def _never(head: bytes) -> bool:
    """Archives of arrays begin as other ZIP files do."""
    return False


# The order counts: the first format that matches a file decodes it.
FORMATS = (
    Format((".npy",), arrays.is_npy, arrays.decode_npy, arrays.npy_facts, arrays.is_npy, read_by_pil=False),
    Format((".npz",), arrays.is_npz, arrays.decode_npz, arrays.npz_facts, _never, read_by_pil=False),
    Format(
        (".jpg", ".jpeg", ".jpe", ".jfif"),
        jpeg.is_jpeg,
        jpeg.decode_jpeg_file,
        pil.facts,
        jpeg.starts_like_jpeg,
    ),
    Format(
        (".png",),
        png.is_deep_png,
        png.decode_deep_png,
        png.deep_png_facts,
        png.starts_like_png,
        read_by_pil=False,
    ),
    Format(
        (".tif", ".tiff"),
        tiff.is_beyond_pil,
        tiff.decode_tiff,
        tiff.tiff_facts,
        tiff.starts_like_tiff,
        read_by_pil=False,
    ),
    Format(
        (".heic", ".heif", ".hif"),
        heic.is_heif,
        heic.decode_heif,
        heic.heif_facts,
        heic.is_heif,
        read_by_pil=False,
    ),
    Format(
        (".dcm", ".dicom"),
        dicom.is_dicom,
        dicom.decode_dicom,
        dicom.dicom_facts,
        dicom.is_dicom,
        read_by_pil=False,
    ),
    Format(pil.SUFFIXES, _is_any, pil.decode_by_pil, pil.facts, pil.starts_like_pils),
)
LONGEST_REASON = 300  # characters
# As bytes, because file names need not be valid UTF-8.
IMAGE_SUFFIXES = tuple(dict.fromkeys(suffix.encode() for kind in FORMATS for suffix in kind.suffixes))
HEAD = 132  # bytes that tell what a file is: DICOM has its mark at 128
DEFAULT = ReadSettings()
# float32 values that bicubic resizing still adds up to finite ones.
LARGEST = 1e37


def format_of(data: bytes | memoryview) -> Format:
    """Return the first format that matches a file; the last one matches every file."""
    return next(kind for kind in FORMATS if kind.matches(data))


def decode(data: bytes | memoryview, read: ReadSettings = DEFAULT) -> torch.Tensor:
    """Decode a file -> (in_chans, H, W) in its own depth: uint8, uint16, int16 or float32.

    1, 3 and 4 channels (grey, RGB, RGBA) are read from every format of `PIL_FORMATS`, and grey of 16 bits and
    of float32 as 1 or 3 channels. Any number of bands is read from TIFFs, and from `.npy` and `.npz` files
    with an array (H, W, C) or (C, H, W), or (H, W) for one band. Of several pages the first is read.

    Raises ValueError if the file cannot be decoded; this includes truncated files, files whose header
    claims more pixels than `read.max_pixels`, which are refused before anything is allocated for them, and
    values that are not finite.

    The result may share the memory of a memoryview, which must be writable; bytes are copied.
    """
    # Decoders look into bytes in ways that a memoryview does not have.
    if isinstance(data, memoryview) and not arrays.is_npy(data):
        data = bytes(data)
    try:
        kind = format_of(data)
        image = kind.decode(data, read)
        _check_finite(image)
        if read.depth is not None:
            image = with_depth(image, read.depth)
    # Decoders raise many types for damaged files: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise _unreadable(data, error) from error
    return image


def describe(data: bytes, read: ReadSettings = DEFAULT) -> Facts:
    """Return what the header of a file tells. Raises ValueError if that cannot be read."""
    try:
        return format_of(data).describe(data, read)
    except Exception as error:
        raise _unreadable(data, error) from error


def _unreadable(data: bytes | memoryview, error: Exception) -> ValueError:
    # In one line. Some libraries repeat a damaged header in full.
    reason = " ".join(str(error).split()) or type(error).__name__
    if len(reason) > LONGEST_REASON:
        reason = f"{reason[: LONGEST_REASON - 3]}..."
    return ValueError(
        f"not a readable image ({len(data)} bytes, starting with {bytes(data[:4])!r}): {reason}"
    )


def _check_finite(image: torch.Tensor) -> None:
    """Raise ValueError for float32 values that are not finite, or too large to be resized."""
    if image.dtype != torch.float32 or not image.numel():
        return
    values = image.reshape(-1)
    # A finite sum of squares leaves nothing to look for, and takes a third of the time of the other tests.
    if math.isfinite(torch.dot(values, values)):
        return
    count = image.numel() - int(torch.isfinite(image).sum())
    if count:
        raise ValueError(f"{count} of its {image.numel()} values are not finite (NaN or infinite)")
    count = int((image.abs() > LARGEST).sum())
    if count:
        raise ValueError(
            f"{count} of its {image.numel()} values are beyond {LARGEST:g}: if they mark missing data "
            "(nodata), replace them by a usual value"
        )
