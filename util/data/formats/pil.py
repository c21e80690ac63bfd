"""Everything that PIL reads, and its images as tensors."""

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Iterator
from enum import IntEnum

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError, features
from torchvision.transforms.v2.functional import pil_to_tensor

from util.data.formats.arrays import as_tensor
from util.data.formats.codestreams import SIZ, stream_header
from util.data.formats.settings import Facts, ReadSettings, check_pixels, depth_name, picked, to_depth
from util.files.names import counted
from util.flags.groups import MAX_PIXELS

PIL_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
# What PIL may open: the formats of our suffixes, all of them decoded in this process. Without a list PIL also
# takes PostScript, in files of any name, and runs Ghostscript, which executes it.
PIL_FORMATS: tuple[str, ...] = ("JPEG", "PNG", "GIF", "BMP", "PPM", "WEBP", "TIFF")
# Builds of Pillow may lack these.
if "jpg_2000" in features.get_supported_codecs():
    PIL_FORMATS += ("JPEG2000",)
if "avif" in features.get_supported_modules():
    PIL_FORMATS += ("AVIF",)
SUFFIXES: tuple[str, ...] = (".png", ".apng", ".webp", ".bmp", ".tif", ".tiff", ".gif")
SUFFIXES += (
    ".ppm",
    ".pgm",
    ".pbm",
    ".pnm",
    ".pfm",
    ".jp2",
    ".j2k",
    ".jpc",
    ".jpf",
    ".jpx",
    ".j2c",
    ".avif",
    ".avifs",
)
SIGNATURES = (b"GIF87a", b"GIF89a", b"\0\0\0\x0cjP  \r\n\x87\n", SIZ)  # JPEG 2000 in a file, and bare
BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)  # sizes in bytes
# Two letters could begin a text: the width must follow, then the height or a comment.
PNM = re.compile(rb"P[1-6f][ \t\r\n]+(?:#|\d+[ \t\r\n]+[\d#])")
AVIF = frozenset({b"avif", b"avis"})
MOST_PAGES = 100  # that are counted
STRIP_PIXELS = 1 << 22  # of larger images as many pixels are converted at a time
# The weights of ITU-R 601, as PIL's, for grey from RGB.
LUMA = (0.299, 0.587, 0.114)
BACKGROUNDS = {"white": 255, "black": 0}
# Pillow would print one above its own limit. `open_image` refuses such an image and says why.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Tag(IntEnum):
    """Numbers of the fields of a TIFF. EXIF has the same."""

    WIDTH = 256
    HEIGHT = 257
    BITS = 258
    COMPRESSION = 259
    PHOTOMETRIC = 262
    FILL_ORDER = 266
    STRIP_OFFSETS = 273
    ORIENTATION = 274
    SAMPLES = 277
    ROWS = 278
    STRIP_COUNTS = 279
    PLANAR = 284
    PREDICTOR = 317
    COLOURS = 320
    TILE_WIDTH = 322
    TILE_HEIGHT = 323
    TILE_OFFSETS = 324
    TILE_COUNTS = 325
    EXTRA = 338
    FORMAT = 339
    JPEG_TABLES = 347
    SUBSAMPLING = 530
    DEPTH = 32997


class NoHeader(ValueError):
    """PIL knows no such files, or no such images in them."""


def starts_like_pils(head: bytes) -> bool:
    """Tell whether the first bytes of a file are those of a format that no other reader names."""
    if head[:4] == b"RIFF":
        return head[8:12] == b"WEBP"
    if head[:2] == b"BM":
        return int.from_bytes(head[14:18], "little") in BMP_HEADERS
    if head.startswith(SIGNATURES) or PNM.match(head):
        return True
    return not AVIF.isdisjoint(brands_of(head))


def brands_of(data: bytes) -> set[bytes]:
    """Return the brands of an ISO base media file, which say what it holds; none for other files."""
    if data[4:8] != b"ftyp":
        return set()
    end = min(int.from_bytes(data[:4]), 256)
    return {bytes(data[at : at + 4]) for at in (8, *range(16, end, 4))}


def decode_by_pil(data: bytes, read: ReadSettings) -> torch.Tensor:
    """Decode a file that PIL reads; see `decode`."""
    if not read.channels and read.in_chans not in PIL_MODES:
        raise ValueError(
            f"it is read with 1, 3 or 4 channels, not {read.in_chans}: use .npy or .npz files of "
            f"(H, W, {read.in_chans}), or multi-band TIFFs"
        )
    with open_image(data, read.max_pixels) as image:
        if read.in_chans == 1 and read.plain:
            # The luma that a JPEG stores, as torchvision returns it, instead of grey computed from RGB.
            image.draft("L", None)
        image.load()
        return image_to_tensor(image, read)


def facts(data: bytes, read: ReadSettings) -> Facts:
    """Read the header of a file that PIL reads."""
    with open_image(data, read.max_pixels) as image:
        return facts_of(image, _pages(image))


def _pages(image: Image.Image) -> int:
    """Count the pages of an image, up to MOST_PAGES: PIL takes quadratic time to find many."""
    if not getattr(image, "is_animated", False):
        return 1
    pages = 1
    # Damage in a later page does not concern the first one.
    with contextlib.suppress(Exception):
        while pages < MOST_PAGES:
            image.seek(pages)
            pages += 1
    return pages


def facts_of(image: Image.Image, pages: int = 1) -> Facts:
    """Return the facts of an image that PIL has opened."""
    alpha = "A" in image.getbands() or "transparency" in image.info
    bands = len(image.getbands())
    if image.mode == "P":
        bands = 3 + alpha  # those of its colours
    return Facts(_depth(image), bands, pages, alpha, orientation_of(image))


def image_to_tensor(image: Image.Image, read: ReadSettings) -> torch.Tensor:
    """Convert a PIL image -> (in_chans, H, W) in its own depth; the image of every reader comes through here.

    Raises ValueError for bands that it does not have.
    """
    if read.exif == "apply":
        image = ImageOps.exif_transpose(image)
    if image.mode == "P" and ("transparency" in image.info or read.channels):
        image = _without_palette(image)
    if image.mode[0] in "IF":
        return _deep(image, read)
    if read.transparency in BACKGROUNDS and read.in_chans != 4 and _has_clear_pixels(image):
        image = _on_background(image, BACKGROUNDS[read.transparency])
    if read.channels:
        return picked(_all_bands(image, read.bands), read)
    if read.in_chans not in PIL_MODES:
        raise ValueError(f"{len(image.getbands())} bands do not give {read.in_chans} channels")
    mode = PIL_MODES[read.in_chans]
    if image.width * image.height <= STRIP_PIXELS:
        return pil_to_tensor(image.convert(mode))
    return _converted_in_strips(image, mode)


def _has_clear_pixels(image: Image.Image) -> bool:
    return image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info


def _all_bands(image: Image.Image, bands: int | None) -> torch.Tensor:
    """Return the bands of an image of 8 bits, or those of the mode with `bands` bands."""
    own = len(image.getbands())
    if image.mode == "LA" and bands is None:
        return pil_to_tensor(image)
    mode = PIL_MODES.get(bands or own, "RGB")
    return pil_to_tensor(image.convert(mode))


def _without_palette(image: Image.Image) -> Image.Image:
    if "transparency" in image.info:
        return image.convert("RGBA")  # the same colours, without PIL's warning
    return image.convert("RGB")


def _on_background(image: Image.Image, value: int) -> Image.Image:
    """Lay an image with transparency on a background of one grey value, 0 to 255."""
    background = Image.new("RGBA", image.size, (value, value, value, 255))
    return Image.alpha_composite(background, image.convert("RGBA"))


def _depth(image: Image.Image) -> torch.dtype:
    if image.mode == "F":
        return torch.float32
    if image.mode[0] != "I":
        return torch.uint8
    return _integers(image)


def _integers(image: Image.Image) -> torch.dtype:
    """Return the depth of the file of an image of integers: PIL's mode may be a wider one."""
    if image.mode != "I" or image.format in ("PNG", "PPM"):
        return torch.uint16
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(Tag.BITS, (32,))
    signed = tags.get(Tag.FORMAT, (1,))
    if bits[0] == 16 and signed[0] == 2:
        return torch.int16
    if bits[0] == 16:
        return torch.uint16
    return torch.float32


def _deep(image: Image.Image, read: ReadSettings) -> torch.Tensor:
    """Return the values of a grey image of more than 8 bits, (in_chans, H, W)."""
    values = np.asarray(image)
    depth = _depth(image)
    if depth == torch.uint16 and image.mode == "I":
        values = values.astype(np.uint16)
    elif depth == torch.int16:
        values = values.astype(np.int16)
    elif image.mode == "I" and getattr(image, "tag_v2", {}).get(Tag.FORMAT, (1,))[0] == 1:
        values = values.view(np.uint32)  # PIL's integers have a sign
    clear = image.info.get("transparency")
    # A PNG names one value that is clear.
    if depth == torch.uint16 and isinstance(clear, int) and read.transparency in BACKGROUNDS:
        values = np.where(values == clear, BACKGROUNDS[read.transparency] * 257, values).astype(np.uint16)
    return deep_channels(as_tensor(values[None]), read)  # (H, W) -> (1, H, W)


def deep_channels(image: torch.Tensor, read: ReadSettings, alpha: bool = False) -> torch.Tensor:
    """Turn the bands of an image of more than 8 bits, (bands, H, W), into the channels that are wanted.

    Grey becomes three equal channels, and RGB becomes grey. If the last band is transparency (`alpha`), it is
    kept for as many channels as bands, and for 4 channels; otherwise `transparency` says what becomes of it.
    Raises ValueError for any other change.
    """
    if read.channels:
        return picked(image, read)
    if len(image) == read.in_chans:
        return image
    if alpha and len(image) == 2 and read.in_chans == 4:
        return image[[0, 0, 0, 1]]
    if alpha:
        return deep_channels(_opaque(image, read.transparency), read)
    if len(image) == 1 and read.in_chans == 3:
        return image.expand(3, -1, -1).contiguous()
    if len(image) == 3 and read.in_chans == 1:
        weights = torch.tensor(LUMA)[:, None, None]
        return to_depth((image.float() * weights).sum(0, keepdim=True), image.dtype)
    raise ValueError(f"{len(image)} bands do not give {read.in_chans} channels: give `in_chans` {len(image)}")


def _opaque(image: torch.Tensor, transparency: str) -> torch.Tensor:
    """Drop the last band of (bands, H, W), the transparency, or lay the others on a background."""
    if transparency not in BACKGROUNDS or not image.numel():
        return image[:-1].clone()
    if image.dtype not in (torch.uint8, torch.uint16):
        raise ValueError(f"transparency of {depth_name(image.dtype)} is only dropped: give `alpha` drop")
    most = torch.iinfo(image.dtype).max
    background = most * BACKGROUNDS[transparency] // 255
    result = torch.empty_like(image[:-1])
    rows = max(1, STRIP_PIXELS // max(1, image.shape[-1]))
    # In strips: integers that hold the products take four times the memory.
    for top in range(0, image.shape[1], rows):
        strip = image[:, top : top + rows].long()
        mixed = strip[:-1] * strip[-1:] + background * (most - strip[-1:])
        result[:, top : top + rows] = ((mixed + most // 2) // most).to(image.dtype)
    return result


def turned(array: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror (bands, H, W) as an orientation of EXIF or TIFF says, as PIL does."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(1, 2)
    # What is left are mirrored rows and columns.
    if orientation in (3, 4, 7, 8):
        array = array[:, ::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, :, ::-1]
    return array


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation that is not yet applied, from 1 (upright) to 8."""
    # PIL turns a TIFF itself.
    if image.format == "TIFF":
        return 1
    value = image.getexif().get(Tag.ORIENTATION, 1)
    if not isinstance(value, int) or not 1 <= value <= 8:
        return 1
    return value


def orientation(data: bytes) -> int:
    """Return the EXIF orientation of a JPEG's bytes, from 1 (upright) to 8; 1 if there is none."""
    # Nearly all JPEGs end here. EXIF has the first segments of a file.
    if b"Exif\0" not in data[: 1 << 16]:
        return 1
    with contextlib.suppress(Exception), open_image(data) as image:
        return orientation_of(image)
    return 1


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
        raise NoHeader(f"it has no valid header of {', '.join(PIL_FORMATS)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        # Pillow's limit is the budget or more.
        raise ValueError(f"it has more pixels than `max_pixels` {max_pixels}") from None
    check_pixels(image.height, image.width, max_pixels)
    _check_tiles(image, max_pixels)
    _check_depth(image, data)
    return image


def _check_depth(image: Image.Image, data: bytes) -> None:
    """Raise ValueError for a JPEG 2000 of which PIL would keep the 8 upper bits only."""
    if image.format != "JPEG2000" or image.mode[0] == "I":
        return
    stream = stream_header(data)
    if stream is not None and stream.bits > 8:
        raise ValueError(
            f"a JPEG 2000 of {counted(stream.components, 'component')} of {stream.bits} bits, which is read "
            "with one component only: convert it to TIFF"
        )


def raise_pillows_limit(max_pixels: int) -> None:
    """Let Pillow handle images of up to `max_pixels` pixels without a warning.

    Pillow has one limit for a process: it warns above it, and refuses twice as many pixels. The limit is only
    raised, so data sets with other budgets, and threads, do not disturb each other.
    """
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and limit < max_pixels:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _claimed_sizes(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield the sizes (height, width) that the first bytes of a GIF, WebP, PNG or JPEG 2000 claim."""
    if data[:4] == b"GIF8":
        width, height = struct.unpack_from("<HH", data, 6)
        yield height, width
    elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        yield _webp_size(data)
    elif data[:4] == b"\x89PNG":
        yield from _png_sizes(data)
    elif data[:4] == SIZ[:4] or data[4:8] == b"jP  ":
        # PIL believes the box of a JPEG 2000, and the decoder its codestream.
        stream = stream_header(data)
        if stream is not None:
            yield stream.height, stream.width


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
    height, width = tags.get(Tag.TILE_HEIGHT, 1), tags.get(Tag.TILE_WIDTH, 1)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ValueError("its tiles have no size")
    if height * width > max_pixels:
        raise ValueError(f"its tiles of {height} x {width} pixels are more than `max_pixels` {max_pixels}")


def _converted_in_strips(image: Image.Image, mode: str) -> torch.Tensor:
    """Convert a large image as a small one, with little memory beside the image and the result."""
    pixels = torch.empty(image.height, image.width, len(mode), dtype=torch.uint8)
    rows = max(1, STRIP_PIXELS // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        strip = image.crop((0, top, image.width, bottom)).convert(mode)
        pixels[top:bottom] = pil_to_tensor(strip).permute(1, 2, 0)  # (C, h, W) -> (h, W, C)
    return pixels.permute(2, 0, 1)  # the strides of `pil_to_tensor`
