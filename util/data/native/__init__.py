"""The optional native library: from a JPEG's bytes to a cropped, resized and flipped uint8 image in one call.

    python -m util.data.native build     needs a C compiler and libjpeg-turbo's headers; see docs/install.md

It is plain C behind ctypes. It therefore works with every version of Python and torch, and it runs without
the interpreter's lock. Without the library, images are decoded as a whole (by torchcodec, torchvision or PIL)
and torchvision makes the same crops more slowly; their pixels differ by rounding at most.
"""

from util.data.native.bindings import (
    DCT_SCALING,
    FLIP_X,
    FLIP_Y,
    PORTABLE,
    add_restart_markers,
    crop_jpeg,
    crop_pixels,
    describe,
    forget,
    jpeg_size,
    library,
)
from util.data.native.compiler import BUILD, build

__all__ = [
    "BUILD",
    "DCT_SCALING",
    "FLIP_X",
    "FLIP_Y",
    "PORTABLE",
    "add_restart_markers",
    "build",
    "crop_jpeg",
    "crop_pixels",
    "describe",
    "forget",
    "jpeg_size",
    "library",
]
