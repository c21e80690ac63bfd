"""Load the native library and call its functions."""

import ctypes
import operator
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import torch

from util.data.formats import jpeg
from util.data.native import compiler
from util.data.native.compiler import BUILD

LIBRARY = compiler.LIBRARY
# Flags of a crop, as in native.h.
FLIP_X = 1
FLIP_Y = 2
DCT_SCALING = 4
PORTABLE = 8
# Return values of the C functions, as in native.h; every other value means a file for the general decoder.
DONE = 0
NO_MEMORY = 2
LARGEST_SIDE = 1 << 26  # pixels; LARGEST in crop.c

# top, left, height, width
Box = tuple[int, int, int, int]
# height, width
Size = tuple[int, int]


# Asked for every image, and the answer changes with a build only.
@lru_cache(maxsize=1)
def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """Return the library at `path` or None, and how to get one."""
    if not path.exists():
        return None, f"faster after `{BUILD}`"
    try:
        native = ctypes.CDLL(str(path))
        native.native_source_id.restype = ctypes.c_char_p
        # A library of other sources could have other functions, or other bits.
        if native.native_source_id().decode() != compiler.source_id():
            return None, f"the native library is out of date: `{BUILD}`"
        # A trial run: libjpeg's structures differ between versions, and a wrong one would corrupt memory.
        if native.native_ready() != DONE:
            return None, (
                f"the native library was built for another libjpeg than the one installed: `{BUILD}`"
            )
    except (OSError, AttributeError) as error:
        return None, f"the native library cannot be loaded ({error}): `{BUILD}`"
    _declare_arguments(native)
    return native, ""


def _declare_arguments(native: ctypes.CDLL) -> None:
    """Tell ctypes the argument types; it would pass pointers as 32-bit integers otherwise."""
    data = ctypes.c_char_p
    pointer = ctypes.c_void_p
    size = ctypes.c_size_t
    number = ctypes.c_int
    native.native_size.argtypes = [data, size, pointer]
    native.native_crop.argtypes = [data, size, pointer, pointer, number, number, number]
    native.native_crop_pixels.argtypes = [pointer, number, number, pointer, pointer, number, number, number]
    native.native_add_restarts.argtypes = [data, size, pointer, size, pointer]


def library() -> ctypes.CDLL | None:
    """Return the library, or None if it is absent or out of date. Each process looks for it once."""
    return _load(LIBRARY)[0]


def forget() -> None:
    """Make the next call load the file again, after a build."""
    _load.cache_clear()


def describe() -> str:
    """Say who decodes JPEGs, and how to make that faster."""
    native, advice = _load(LIBRARY)
    if native is not None:
        return "JPEGs by the native library"
    return f"JPEGs by {jpeg.decoder().name}; {advice}"


def _loaded() -> ctypes.CDLL:
    native = library()
    assert native is not None, "callers ask `library` first"
    return native


def jpeg_size(data: bytes) -> Size | None:
    """Return (height, width) of a JPEG that `crop_jpeg` can read, and None for other files.

    It reads complete baseline JPEGs of 8 bits with one or three components.
    """
    size = (ctypes.c_int32 * 2)()  # width, height
    if _loaded().native_size(data, len(data), size) != DONE:
        return None
    return size[1], size[0]


def crop_jpeg(data: bytes, box: Box, size: Size, flags: int = 0) -> torch.Tensor | None:
    """Crop a JPEG and resize the crop as PIL's bicubic filter does -> uint8 RGB (3, *size).

    Only what the crop needs is decoded. In a file with restart markers, this holds for the entropy-coded data
    as well.

    Args:
        box: top, left, height and width in pixels of the image.
        size: (H, W) of the result.
        flags: FLIP_X and FLIP_Y. DCT_SCALING decodes at 1/2, 1/4 or 1/8 of the size if the crop is at least
            that many times larger than the result; this is faster, and the pixels are no longer exact.
            PORTABLE avoids processor-specific code, for tests.

    Returns None for a file that needs the general decoder (damaged, or neither grey nor YCbCr), and for a box
    that does not lie in the image. Raises ValueError for a box or a size that no image can have.
    """
    (top, left, height, width), (out_height, out_width) = _checked_sides(box, size)
    out = torch.empty(3, out_height, out_width, dtype=torch.uint8)
    corners = (ctypes.c_int32 * 4)(left, top, width, height)  # x before y
    status = _loaded().native_crop(data, len(data), corners, out.data_ptr(), out_width, out_height, flags)
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for a crop of {width} x {height} pixels")
    # The general decoder then reads the file after all, or says what is wrong with it.
    if status != DONE:
        return None
    return out


def crop_pixels(image: torch.Tensor, box: Box, size: Size, flags: int = 0) -> torch.Tensor:
    """Crop and resize a decoded image, uint8 (3, H, W) -> uint8 (3, *size), with the bits of `crop_jpeg`.

    `flags` are FLIP_X and FLIP_Y, and PORTABLE for tests. Raises ValueError for another kind of tensor, and
    for a box that does not lie in the image.
    """
    _check_image(image)
    (top, left, height, width), (out_height, out_width) = _checked_sides(box, size)
    inside = top + height <= image.shape[1] and left + width <= image.shape[2]
    if not inside or max(image.shape) > LARGEST_SIDE:
        raise ValueError(
            f"the box {top, left, height, width} does not lie in an image of {tuple(image.shape[1:])}, or a "
            f"side of the image has more than {LARGEST_SIDE} pixels"
        )
    # The C code reads row after row. Decoders return other layouts, of which only the box is copied.
    if not image.is_contiguous():
        image = image[:, top : top + height, left : left + width].contiguous()
        top = left = 0
    out = torch.empty(3, out_height, out_width, dtype=torch.uint8)
    corners = (ctypes.c_int32 * 4)(left, top, width, height)
    status = _loaded().native_crop_pixels(
        image.data_ptr(), *image.shape[1:], corners, out.data_ptr(), out_width, out_height, flags
    )
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for a crop of {width} x {height} pixels")
    if status != DONE:
        raise ValueError(f"the native library refuses the box {box} of an image of {tuple(image.shape)}")
    return out


def _check_image(image: torch.Tensor) -> None:
    kind = image.device.type, image.layout, image.dtype, image.dim()
    if kind != ("cpu", torch.strided, torch.uint8, 3) or len(image) != 3:
        raise ValueError(
            f"found {image.dtype} {tuple(image.shape)}, {image.layout}, on {image.device}; "
            "expected uint8 (3, H, W) on the CPU"
        )


def _checked_sides(box: Iterable, size: Iterable) -> tuple[Box, Size]:
    """Return the box and the size as Python integers; raise ValueError for impossible ones.

    ctypes would silently keep the lowest 32 bits of a larger number.
    """
    top, left, height, width = map(operator.index, box)
    out_height, out_width = map(operator.index, size)
    smallest = min(height, width, out_height, out_width)
    largest = max(top, left, height, width, out_height, out_width)
    if min(top, left) < 0 or smallest < 1 or largest > LARGEST_SIDE:
        raise ValueError(
            f"the box {top, left, height, width}, resized to {out_height, out_width}, is impossible: a side "
            f"has 1 to {LARGEST_SIDE} pixels, and the top left corner is not negative"
        )
    return (top, left, height, width), (out_height, out_width)


def add_restart_markers(data: bytes) -> bytes | None:
    """Rewrite a JPEG as a baseline file with the same coefficients, restart markers and no metadata.

    The Huffman tables are optimised, which pays for most of the markers. Returns None for a file that is not
    a complete, undamaged JPEG of 8 bits with one or three components.
    """
    # A baseline file can be larger than a progressive one; the output is refused if it does not fit.
    out = ctypes.create_string_buffer(2 * len(data) + 65536)
    used = ctypes.c_size_t()
    status = _loaded().native_add_restarts(data, len(data), out, len(out), ctypes.byref(used))
    if status != DONE:
        return None
    return ctypes.string_at(out, used.value)
