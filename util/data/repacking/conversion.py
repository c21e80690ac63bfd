"""What a repacked shard stores for one image.

A JPEG keeps its coefficients and gets restart markers, or it is shrunk and encoded anew. An image of more
than 8 bits, or of more than four bands, becomes a NumPy array of the same values, which needs no decoding.
"""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image

from util.data import native
from util.data.formats import Facts, ReadSettings, decode, describe, format_of, open_image, to_depth
from util.data.formats.arrays import is_npy, is_npz, npy_in
from util.data.formats.jpeg import is_jpeg
from util.flags.groups import MAX_PIXELS

# What was done with an image, as `convert` returns it.
MARKED = "given restart markers"
ENCODED = "encoded anew"
ARRAY = "stored as arrays"
COPIED = "copied unchanged"
UNREADABLE = "unreadable, copied unchanged"

MAX_BANDS = 4  # of an image that is no array
MAX_ARRAY_BYTES = 1 << 30  # as an index reads
# A shape such as (30, 500, 40) does not tell which axis has the bands. An array is shrunk if its height and
# its width are at least this many times their number.
FEWER = 2


def convert(
    data: bytes, long_side: int | None = None, quality: int = 90, max_pixels: int = MAX_PIXELS
) -> tuple[bytes, str]:
    """Return what to store for a file, and what was done with it: MARKED, ENCODED, ARRAY, COPIED, UNREADABLE.

    Images of more than 8 bits, or more than four bands, become `.npy` files with the values and the depth
    that training reads: (H, W) of grey, (C, H, W) of several bands. They are copied if that would lose
    something: transparency, an EXIF orientation or further pages. Archives (`.npz`) of one array are
    unpacked.

    Args:
        long_side: shrink larger images to it and encode all JPEGs anew; None keeps their coefficients. The
            values of more than 8 bits are resized as float32 and rounded to their type, with the same filter
            (Lanczos). Arrays of 8 bits are not shrunk.
        quality: of images that are encoded anew.
        max_pixels: an image with more pixels counts as unreadable.
    """
    if is_npy(data):
        return _convert_npy(data, long_side, max_pixels)
    if is_npz(data):
        return _convert_npz(data, long_side, max_pixels)
    if not is_jpeg(data):
        stored = _convert_deep(data, long_side, max_pixels)
        if stored is not None:
            return stored
    try:
        pixels = decode(data, ReadSettings(max_pixels=max_pixels))
    except ValueError:
        return data, UNREADABLE
    # Only JPEGs can have restart markers; for other formats this is None.
    marked = _with_markers(data, pixels, max_pixels)
    del pixels  # before the next copies are made
    if not long_side:
        if marked is None:
            return data, COPIED
        return marked, MARKED
    image = _open_plain(data, max_pixels)
    if image is None:
        return data, COPIED
    encoded = _encode(_shrink(image, long_side), quality)
    was_small = max(image.size) <= long_side
    if was_small and marked is not None and len(marked) <= len(encoded):
        return marked, MARKED  # encoding it anew would gain nothing
    return encoded, ENCODED


# --- arrays ---


def _convert_npy(data: bytes, long_side: int | None, max_pixels: int) -> tuple[bytes, str]:
    """Copy an array as it is; shrink one of more than 8 bits if its shape tells which axis has the bands."""
    try:
        shape = _shape(data)
        bands = 1
        if len(shape) == 3:
            bands = min(shape[0], shape[2])
        image = decode(data, ReadSettings(bands, max_pixels=max_pixels))
    # Damaged headers raise many types.
    except Exception:
        return data, UNREADABLE
    height, width = image.shape[1:]
    is_clear = bands == 1 or FEWER * bands <= min(height, width)
    if not long_side or max(height, width) <= long_side or image.dtype == torch.uint8 or not is_clear:
        return data, COPIED
    return _stored(_shrink_deep(image, long_side)) or (data, COPIED)


def _convert_npz(data: bytes, long_side: int | None, max_pixels: int) -> tuple[bytes, str]:
    """Unpack an archive of one array; one of several is copied."""
    try:
        npy, arrays = npy_in(data, MAX_ARRAY_BYTES)
    # As above.
    except Exception:
        return data, UNREADABLE
    stored, outcome = _convert_npy(npy, long_side, max_pixels)
    if outcome == UNREADABLE:
        return data, UNREADABLE
    if arrays > 1:
        return data, COPIED
    return stored, ARRAY


def _convert_deep(data: bytes, long_side: int | None, max_pixels: int) -> tuple[bytes, str] | None:
    """Make an array of an image of more than 8 bits or many bands; None for a usual one, which PIL reads."""
    read_by_pil = format_of(data).read_by_pil
    try:
        # With `channels` the header may have any number of bands.
        facts = describe(data, ReadSettings(channels=(0,), max_pixels=max_pixels))
        is_usual = facts.depth == torch.uint8 and facts.bands <= MAX_BANDS
        if is_usual and read_by_pil:
            return None
        every = tuple(range(facts.bands))
        image = decode(data, ReadSettings(facts.bands, channels=every, max_pixels=max_pixels))
    except ValueError:
        return data, UNREADABLE
    if is_usual or not _is_kept_by_an_array(facts):
        return data, COPIED
    if long_side:
        image = _shrink_deep(image, long_side)
    return _stored(image) or (data, COPIED)


def _is_kept_by_an_array(facts: Facts) -> bool:
    return not facts.alpha and facts.pages == 1 and facts.orientation == 1


def _shape(data: bytes) -> tuple[int, ...]:
    file = io.BytesIO(data)
    np.lib.format.read_magic(file)
    # The second version has a longer field for the header's length.
    read: Any = np.lib.format.read_array_header_1_0
    if data[6] == 2:
        read = np.lib.format.read_array_header_2_0
    return read(file)[0]


def _stored(image: torch.Tensor) -> tuple[bytes, str] | None:
    """Return an image (C, H, W) as a .npy file; None if its shape would not tell which axis has the bands."""
    bands, height, width = image.shape
    if bands == height == width and bands > 1:
        return None
    array = image.numpy()
    if bands == 1:
        array = array[0]  # (1, H, W) -> (H, W)
    elif width == bands:
        array = np.moveaxis(array, 0, 2)  # (C, H, W) -> (H, W, C)
    file = io.BytesIO()
    np.save(file, np.ascontiguousarray(array))
    made = decode(file.getvalue(), ReadSettings(bands, max_pixels=height * width))
    assert made.dtype == image.dtype and torch.equal(made, image), "the array is read otherwise"
    return file.getvalue(), ARRAY


def _shrink_deep(image: torch.Tensor, long_side: int) -> torch.Tensor:
    """Shrink an image (C, H, W) as `_shrink` does, band by band, in its depth."""
    bands = [_shrink(Image.fromarray(band.numpy()), long_side) for band in image.float()]
    shrunk = np.stack([np.asarray(band) for band in bands])  # (C, h, w)
    return to_depth(torch.from_numpy(shrunk), image.dtype)


# --- images of 8 bits ---


def _with_markers(data: bytes, pixels: torch.Tensor, max_pixels: int) -> bytes | None:
    """Add restart markers to a JPEG; None if that is impossible or changes a pixel."""
    marked = native.add_restart_markers(data)
    # The pixels must be the same, not only the coefficients.
    if marked is None or not torch.equal(decode(marked, ReadSettings(max_pixels=max_pixels)), pixels):
        return None
    return marked


def _open_plain(data: bytes, max_pixels: int) -> Image.Image | None:
    """Decode an 8-bit grey, RGB or CMYK image to grey or RGB.

    Returns None for alpha, palettes and more than 8 bits, which a JPEG cannot store.
    """
    with open_image(data, max_pixels) as image:
        if image.mode == "CMYK":
            return image.convert("RGB")
        if image.mode in ("L", "RGB"):
            return image.copy()
    return None


def _shrink(image: Image.Image, long_side: int) -> Image.Image:
    scale = long_side / max(image.size)
    # Enlarging would add bytes and no detail.
    if scale >= 1:
        return image
    width, height = image.size
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _encode(image: Image.Image, quality: int) -> bytes:
    """Encode a JPEG with restart markers, and check that it can be read."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    encoded = native.add_restart_markers(file.getvalue())
    assert encoded is not None, "the new JPEG cannot be read"
    # PIL's sizes are (W, H).
    pixels = decode(encoded, ReadSettings(max_pixels=image.width * image.height))
    assert pixels.shape[1:] == image.size[::-1], "the new JPEG has another size"
    return encoded
