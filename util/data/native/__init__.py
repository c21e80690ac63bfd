"""The optional native library: from a JPEG's bytes to a cropped, resized and flipped uint8 image in one call.

    python -m util.data.native build     needs a C compiler and libjpeg-turbo's headers; see README.md

Plain C behind ctypes, so it depends on no version of Python or torch, and runs without the interpreter's lock. Where it
was not built, torchvision gives the same crops, with the same pixels up to rounding, in more time.
"""

import ctypes
import hashlib
import operator
import os
import shlex
import subprocess
from functools import lru_cache
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "libmaepl.so"
BUILD = "python -m util.data.native build"
FLIP_X, FLIP_Y, DCT_SCALING, PORTABLE, LIBJPEGS_ENTROPY = 1, 2, 4, 8, 16
NO_MEMORY = 2
LARGEST = 1 << 26  # pixels of a side, as in util/data/native/crop.c


def source_id() -> str:
    """Identifies the C files, so that a library which was built from others is not used."""
    files = sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")])
    return hashlib.sha256(b"\0".join(f.name.encode() + f.read_bytes() for f in files)).hexdigest()[:16]


def build(library: Path = LIBRARY, flags: tuple[str, ...] = ()) -> None:
    """Compile to `library` with $CC (default cc) and $CFLAGS. Raises ValueError with the compiler's own words."""
    temporary = library.with_suffix(
        f".{os.getpid()}.tmp"
    )  # replaced at once: running processes keep the old one
    command = [
        *shlex.split(os.environ.get("CC", "cc")),
        "-std=c11",
        "-D_DEFAULT_SOURCE",
        "-O3",
        "-fPIC",
        "-shared",
        f'-DSOURCE_ID="{source_id()}"',
        *flags,
        *shlex.split(os.environ.get("CFLAGS", "")),
        *map(str, sorted(FOLDER.glob("*.c"))),
        "-o",
        str(temporary),
        *shlex.split(os.environ.get("LDFLAGS", "")),
        "-ljpeg",
        "-lm",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise ValueError(
            f"no C compiler: {error}. Install one (apt-get install gcc) or name it by CC=..."
        ) from error
    if done.returncode:
        hint = (
            "libjpeg-turbo's headers are missing: apt-get install libjpeg62-turbo-dev (Debian), libjpeg-turbo8-dev "
            "(Ubuntu), dnf install libjpeg-turbo-devel, or conda install libjpeg-turbo with CFLAGS=-I$CONDA_PREFIX/include "
            "LDFLAGS='-L$CONDA_PREFIX/lib -Wl,-rpath,$CONDA_PREFIX/lib'\n"
            if "jpeglib.h" in done.stderr
            else ""
        )
        raise ValueError(f"{hint}{shlex.join(command)} failed:\n{done.stderr}")
    os.replace(temporary, library)


@lru_cache(maxsize=1)
def _load(path: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and a word on it."""
    if not path.exists():
        return None, f"JPEGs by torchvision; faster after `{BUILD}`"
    try:
        found = ctypes.CDLL(str(path))
        found.native_source_id.restype = ctypes.c_char_p
        if found.native_source_id().decode() != source_id():
            return None, f"JPEGs by torchvision; the native library is out of date: `{BUILD}`"
        if found.native_ready():
            return (
                None,
                f"JPEGs by torchvision; the native library meets another libjpeg than it was built for: `{BUILD}`",
            )
    except (OSError, AttributeError) as error:
        return None, f"JPEGs by torchvision; the native library cannot be loaded ({error}): `{BUILD}`"
    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    found.native_size.argtypes = [ctypes.c_char_p, size, pointer]
    found.native_crop.argtypes = [ctypes.c_char_p, size, pointer, pointer, number, number, number]
    found.native_crop_pixels.argtypes = [pointer, number, number, pointer, pointer, number, number, number]
    found.native_add_restarts.argtypes = [ctypes.c_char_p, size, pointer, size, pointer]
    return found, "JPEGs by the native library"


def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built from these sources; asked once per process."""
    return _load(LIBRARY)[0]


def forget() -> None:
    """Look at the file again at the next call, after a build."""
    _load.cache_clear()


def describe() -> str:
    """Who decodes JPEGs, and what to do about it."""
    return _load(LIBRARY)[1]


def jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a JPEG that `crop_jpeg` reads: 8 bit, grey or three components, baseline, complete; else None."""
    size = (ctypes.c_int32 * 2)()
    return (size[1], size[0]) if library().native_size(data, len(data), size) == 0 else None


def crop_jpeg(
    data: bytes, box: tuple[int, int, int, int], size: tuple[int, int], flags: int = 0
) -> torch.Tensor | None:
    """The crop of a JPEG, resized as PIL's bicubic does -> uint8 RGB (3, *size).

    Only what the crop needs is decoded; with restart markers that includes the entropy-coded data.

    Args:
        box: top, left, height, width, in pixels of the image.
        size: (H, W) of the result.
        flags: FLIP_X, FLIP_Y; DCT_SCALING decodes at 1/2, 1/4 or 1/8 where the crop is at least as many times larger
            than the result, which is faster and no longer exact; PORTABLE is for tests: no processor-specific code.

    None for a file that needs the general decoder: damaged, or neither grey nor YCbCr. None also where the
    box does not lie in the image. ValueError for a box or a size that no image can have.
    """
    (top, left, height, width), size = _sides(box, size)
    out = torch.empty((3, *size), dtype=torch.uint8)
    status = library().native_crop(
        data,
        len(data),
        (ctypes.c_int32 * 4)(left, top, width, height),
        out.data_ptr(),
        size[1],
        size[0],
        flags,
    )
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for a crop of {width} x {height} pixels")
    return None if status else out


def crop_pixels(
    image: torch.Tensor, box: tuple[int, int, int, int], size: tuple[int, int], flags: int = 0
) -> torch.Tensor:
    """The same of a decoded image, uint8 (3, H, W) -> uint8 (3, *size), with the bits that its file gives.

    `flags` are FLIP_X and FLIP_Y, and PORTABLE for tests. ValueError for another kind of tensor, and for a
    box that does not lie in the image.
    """
    if (
        image.device.type != "cpu"
        or image.layout != torch.strided
        or image.dtype != torch.uint8
        or image.dim() != 3
        or len(image) != 3
    ):
        raise ValueError(
            f"found {image.dtype} {tuple(image.shape)}, {image.layout}, on {image.device}; "
            "expected uint8 (3, H, W) on the CPU"
        )
    (top, left, height, width), size = _sides(box, size)
    if max(image.shape) > LARGEST or top + height > image.shape[1] or left + width > image.shape[2]:
        raise ValueError(
            f"the box {top, left, height, width} does not lie in an image of "
            f"{tuple(image.shape[1:])}, or a side of that has more than {LARGEST} pixels"
        )
    image = image.contiguous()  # C reads row after row
    out = torch.empty((3, *size), dtype=torch.uint8)
    ints = (ctypes.c_int32 * 4)(left, top, width, height)
    status = library().native_crop_pixels(
        image.data_ptr(), *image.shape[1:], ints, out.data_ptr(), size[1], size[0], flags
    )
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for a crop of {width} x {height} pixels")
    if status:
        raise ValueError(f"the library refuses the box {box} of an image of {tuple(image.shape)}")
    return out


def _sides(box, size):
    """The same as Python's integers. ValueError for impossible ones, of which ctypes would keep 32 bit."""
    (top, left, height, width), (h, w) = (tuple(map(operator.index, numbers)) for numbers in (box, size))
    if min(top, left) < 0 or min(height, width, h, w) < 1 or max(top, left, height, width, h, w) > LARGEST:
        raise ValueError(
            f"the box {top, left, height, width}, resized to {h, w}, is impossible: a side has "
            f"1 to {LARGEST} pixels, and the top left corner is not negative"
        )
    return (top, left, height, width), (h, w)


def add_restart_markers(data: bytes) -> bytes | None:
    """The same JPEG coefficients as a baseline file with restart markers, optimised tables and no metadata.

    None for what is no complete, undamaged JPEG of 8 bit with 1 or 3 components.
    """
    out = ctypes.create_string_buffer(2 * len(data) + 65536)
    used = ctypes.c_size_t()
    status = library().native_add_restarts(data, len(data), out, len(out), ctypes.byref(used))
    return None if status else ctypes.string_at(out, used.value)
