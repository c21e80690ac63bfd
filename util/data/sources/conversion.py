"""What a repacked shard stores for one image.

A JPEG keeps its coefficients and gets restart markers, or it is shrunk and encoded anew.
"""

import io

import torch
from PIL import Image

from util.data import native
from util.data.formats import ALL_BANDS, ReadSettings, decode, format_of, open_image
from util.flags.groups import MAX_PIXELS

# What was done with an image, as `convert` returns it.
MARKED = "given restart markers"
ENCODED = "encoded anew"
COPIED = "copied unchanged"
UNREADABLE = "unreadable, copied unchanged"


def convert(
    data: bytes, long_side: int | None = None, quality: int = 90, max_pixels: int = MAX_PIXELS
) -> tuple[bytes, str]:
    """Return what to store for a file, and what was done with it: MARKED, ENCODED, COPIED or UNREADABLE.

    Args:
        long_side: shrink larger images to it and encode all JPEGs anew; None keeps their coefficients.
        quality: of images that are encoded anew.
        max_pixels: an image with more pixels counts as unreadable.
    """
    kind = format_of(data)
    if not kind.read_by_pil:
        return data, COPIED if _is_readable(data, max_pixels) else UNREADABLE
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


def _is_readable(data: bytes, max_pixels: int) -> bool:
    """Tell whether a file of a format that PIL does not open can be decoded with all its bands."""
    try:
        decode(data, ReadSettings(in_chans=ALL_BANDS, max_pixels=max_pixels))
    except ValueError:
        return False
    return True


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
