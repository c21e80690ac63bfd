"""TIFF files that PIL does not read, or cuts to 8 bits: many bands, and deep colours, by tifffile.

tifffile gets a copy of the file in which one directory has the fields that describe the pixels of the first
page, all of them checked. It sees no other directory, text or field of a vendor.
"""

import contextlib
import io
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch

from util.data.formats.arrays import as_tensor
from util.data.formats.codestreams import check_stream
from util.data.formats.pil import NoHeader, Tag, decode_by_pil, deep_channels, turned
from util.data.formats.settings import (
    Facts,
    ReadSettings,
    check_pixels,
    check_values,
    depth_name,
    needs_package,
)

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PIL_MAGICS = (*MAGICS, b"MM*\0", b"II\0*")  # it takes swapped ones as well
# tifffile gets the others.
KEPT_BACK = (Tag.ORIENTATION, Tag.COLOURS, Tag.DEPTH)
DESCRIBED = frozenset(Tag)
# Types of fields: letter of `struct`. Fractions describe no pixels.
TYPES = {1: "B", 2: "B", 3: "H", 4: "I", 6: "b", 7: "B", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}
# Type -> bytes of a value, of all types that PIL reads.
SIZES = {kind: struct.calcsize(f"={letter}") for kind, letter in TYPES.items()} | {5: 8, 10: 8, 11: 4, 12: 8}
JPEG = 7
JPEG_2000 = 34712
# What tifffile may decode. Each unpacks to no more than a strip or tile, or has a size that is checked.
COMPRESSIONS = {
    1: "none",
    5: "LZW",
    JPEG: "JPEG",
    8: "deflate",
    32773: "PackBits",
    32946: "deflate",
    34925: "LZMA",
    JPEG_2000: "JPEG 2000",
    50000: "Zstandard",
}
# PIL decodes them by libtiff, and images of two colours among them.
PIL_COMPRESSIONS = {*COMPRESSIONS, 2, 3, 4, 6, 32771, 34677, 50001} - {JPEG_2000}
MOST_SEGMENTS = 1 << 18  # strips and tiles: each costs some microseconds
MOST_PAGES = 1 << 16  # that are counted
MOST_TAGS = 4096
# Of a field that describes pixels. No image has so many bands, and few have so many rows. Each value takes
# about 40 bytes when it is unpacked, by PIL as well.
MOST_VALUES = 1 << 20
# Format of samples and their bits -> what PIL reads without a loss in grey.
GREY = {(1, 12), (1, 16), (2, 16), (1, 32), (2, 32), (3, 32)}
# Photometric interpretations.
RGB = 2
PALETTE = 3
CMYK = 5
YCBCR = 6
LAB = 8
# Formats of samples.
INTEGERS = 1
SIGNED = 2
FLOATS = 3
UNDEFINED = 4


class TooMuch(ValueError):
    """Fields that would take much more memory than the file, here and in PIL."""


class Field(NamedTuple):
    """A field of a directory: type, number of values, where these are, and its own bytes."""

    kind: int
    number: int
    at: int
    entry: bytes


@dataclass(frozen=True)
class Layout:
    """How the pixels of the first page are stored."""

    height: int
    width: int
    samples: int
    bits: int
    format: int
    compression: int
    photometric: int
    planar: bool
    extra: tuple[int, ...]
    orientation: int
    big_endian: bool
    big: bool

    @property
    def alpha(self) -> bool:
        """Tell whether the last band is transparency."""
        return self.extra[-1:] in ((1,), (2,))

    @property
    def depth(self) -> torch.dtype:
        """Return the type of the pixels."""
        if self.format == FLOATS or self.bits > 16:
            return torch.float32
        if self.format == SIGNED:
            return torch.int16
        if self.bits > 8:
            return torch.uint16
        return torch.uint8

    @property
    def _swapped(self) -> bool:
        """Tell whether PIL does not read these values of big-endian files, or swaps their bytes twice."""
        if self.bits == 32 and self.format == INTEGERS:
            return True
        wide = self.bits == 32 or (self.bits, self.format) == (16, SIGNED)
        return wide and self.compression != 1

    @property
    def by_pil(self) -> bool:
        """Tell whether PIL reads all that the page has."""
        # PIL knows no BigTIFFs of this order.
        if (self.big_endian and (self.big or self._swapped)) or self.compression not in PIL_COMPRESSIONS:
            return False
        if self.samples == 1 and (self.format, self.bits) in GREY:
            return True
        return self.bits <= 8 and self.format in (INTEGERS, UNDEFINED) and self._colours_of_pil

    @property
    def _colours_of_pil(self) -> bool:
        """Tell whether PIL has a mode for all bands of an image of 8 bits."""
        if self.samples == 3:
            return self.photometric in (RGB, YCBCR, LAB)
        if self.samples == 4:
            # A fourth band that is neither ink nor transparency would be lost.
            return self.photometric == CMYK or (self.photometric == RGB and self.extra != (0,))
        return self.samples == 1


class Directory:
    """The first directory of a TIFF, of which nothing is believed."""

    def __init__(self, data: bytes):
        self.data = data
        self.order = {b"II": "<", b"MM": ">"}[data[:2]]
        self.big = 43 in data[2:4]
        # Letters of the number of fields, and of a count or an offset.
        self.number, self.offset = ("Q", "Q") if self.big else ("H", "I")
        self.first = self._unpack(self.offset, 8 if self.big else 4)[0]
        found = list(self._fields(self.first))
        self._check_sizes(found)
        self.fields = {tag: field for tag, field in found if field.kind in TYPES}

    def _check_sizes(self, found: list[tuple[int, Field]]) -> None:
        """Raise TooMuch for fields that are too long, or share bytes so that their copies fill the memory."""
        for tag, field in found:
            if tag in DESCRIBED and field.number > MOST_VALUES:
                raise TooMuch(f"its field {tag} has {field.number} values, more than {MOST_VALUES}")
        size = len(self.data)
        sizes = [(field.at, field.number * SIZES[field.kind]) for _, field in found]
        # Nobody can copy what lies outside of the file.
        total = sum(count for at, count in sizes if at + count <= size)
        if total > 2 * size + (1 << 20):
            raise TooMuch(f"its fields have {total} bytes, more than the file")

    def _unpack(self, letters: str, at: int) -> tuple[Any, ...]:
        return struct.unpack_from(self.order + letters, self.data, at)

    def _entries(self, at: int) -> tuple[int, int]:
        """Return the number of fields in a directory, and where they begin."""
        count = self._unpack(self.number, at)[0]
        if count > MOST_TAGS:
            raise TooMuch(f"a directory of {count} fields, more than {MOST_TAGS}")
        return count, at + struct.calcsize(self.order + self.number)

    def _fields(self, at: int) -> Iterator[tuple[int, Field]]:
        count, start = self._entries(at)
        letters = f"HH{self.offset}"
        inline = struct.calcsize(f"{self.order}{self.offset}")
        size = struct.calcsize(self.order + letters) + inline
        for place in range(start, start + count * size, size):
            tag, kind, number = self._unpack(letters, place)
            if kind not in SIZES:
                continue
            where = place + size - inline
            if number * SIZES[kind] > inline:
                where = self._unpack(self.offset, where)[0]
            yield tag, Field(kind, number, where, self.data[place : place + size])

    def values(self, tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """Return the values of a field. Raises ValueError if they lie outside of the file."""
        if tag not in self.fields:
            return default
        kind, number, at, _ = self.fields[tag]
        if at + number * SIZES[kind] > len(self.data):
            raise ValueError(f"its field {int(tag)} of {number} values lies outside of the file")
        return self._unpack(f"{number}{TYPES[kind]}", at)

    def value(self, tag: int, default: int) -> int:
        """Return the first value of a field."""
        return self.values(tag, (default,))[0]

    def pages(self) -> int:
        """Count the directories that follow each other, up to damage, a circle or `MOST_PAGES`."""
        seen: set[int] = set()
        at = self.first
        size = 20 if self.big else 12
        with contextlib.suppress(Exception):
            while at and at not in seen and len(seen) < MOST_PAGES:
                count, start = self._entries(at)
                following = self._unpack(self.offset, start + count * size)[0]
                seen.add(at)
                at = following
        return max(1, len(seen))

    def layout(self) -> Layout:
        """Return how the first page is stored. Raises ValueError for what is no image."""
        samples = self.value(Tag.SAMPLES, 1)
        bits = set(self.values(Tag.BITS, (1,))[: max(1, samples)])
        formats = set(self.values(Tag.FORMAT, (1,))[: max(1, samples)])
        if len(bits) != 1 or len(formats) != 1:
            raise ValueError(f"its bands differ in bits or type: {sorted(bits)}, {sorted(formats)}")
        return Layout(
            self.value(Tag.HEIGHT, 0),
            self.value(Tag.WIDTH, 0),
            samples,
            bits.pop(),
            formats.pop(),
            self.value(Tag.COMPRESSION, 1),
            self.value(Tag.PHOTOMETRIC, 1),
            self.value(Tag.PLANAR, 1) == 2,
            self.values(Tag.EXTRA),
            self.value(Tag.ORIENTATION, 1),
            self.order == ">",
            self.big,
        )

    def first_page(self) -> bytes:
        """Return the file with a directory of its own for the checked fields."""
        wanted = sorted(set(Tag) - set(KEPT_BACK))
        kept = [
            self.fields[tag].entry for tag in wanted if tag in self.fields and self.fields[tag].kind in TYPES
        ]
        start = len(self.data) + len(self.data) % 2
        header = self.data[: 8 if self.big else 4] + struct.pack(self.order + self.offset, start)
        number = struct.pack(self.order + self.number, len(kept))
        body = self.data[len(header) :].ljust(start - len(header), b"\0")
        return b"".join([header, body, number, *kept, struct.pack(self.order + self.offset, 0)])


def is_beyond_pil(data: bytes) -> bool:
    """Tell whether a file is a TIFF of which PIL reads less than it has, or nothing."""
    if data[:4] not in PIL_MAGICS:
        return False
    try:
        layout = Directory(data).layout()
        return data[:4] in MAGICS and not layout.by_pil
    except TooMuch:
        return True  # PIL must not see it, and `decode_tiff` says why
    # PIL says what is wrong with a damaged one.
    except Exception:
        return False


def starts_like_tiff(head: bytes) -> bool:
    """Tell whether the first bytes of a file are those of a TIFF."""
    return head[:4] in MAGICS


def decode_tiff(data: bytes, read: ReadSettings) -> torch.Tensor:
    """Decode the first page of a TIFF that `is_beyond_pil`; see `decode`."""
    directory = Directory(data)
    layout = directory.layout()
    if _colours_are_enough(layout, read):
        with contextlib.suppress(NoHeader):
            return decode_by_pil(data, read)
    _check(directory, layout, read)
    array = _by_tifffile(directory, layout)
    # PIL, too, turns the TIFFs that it reads.
    return deep_channels(as_tensor(turned(array, layout.orientation)), read, layout.alpha)


def tiff_facts(data: bytes, read: ReadSettings) -> Facts:
    """Read the header of a TIFF that `is_beyond_pil`."""
    directory = Directory(data)
    layout = directory.layout()
    check_pixels(layout.height, layout.width, read.max_pixels)
    return Facts(layout.depth, layout.samples, directory.pages(), layout.alpha)


def _colours_are_enough(layout: Layout, read: ReadSettings) -> bool:
    """Tell whether grey, RGB or RGBA are asked for of 8 bits with further bands, which PIL leaves out."""
    if layout.depth != torch.uint8 or read.channels or layout.compression not in PIL_COMPRESSIONS:
        return False
    return read.in_chans in (1, 3, 4) and read.in_chans != layout.samples


def _check(directory: Directory, layout: Layout, read: ReadSettings) -> None:
    """Raise ValueError for what cannot be read, before anything is allocated for it."""
    if min(layout.height, layout.width, layout.samples, layout.bits) < 1:
        raise ValueError(f"it has {layout.height} x {layout.width} pixels and {layout.samples} bands")
    check_pixels(layout.height, layout.width, read.max_pixels)
    # This raises for numbers of bands that do not give the channels.
    deep_channels(torch.empty(layout.samples, 0, 0), read, layout.alpha)
    check_values(layout.height * layout.width * layout.samples, read)
    if layout.photometric == PALETTE or layout.format not in (INTEGERS, SIGNED, FLOATS, UNDEFINED):
        kind = "a palette" if layout.photometric == PALETTE else f"samples of format {layout.format}"
        raise ValueError(f"a TIFF with {kind} and {layout.bits} bits is not read: convert it")
    if directory.value(Tag.DEPTH, 1) != 1:
        raise ValueError(f"a TIFF of volumes, {directory.value(Tag.DEPTH, 1)} slices deep: store pages")
    if layout.compression not in COMPRESSIONS:
        names = ", ".join(dict.fromkeys(COMPRESSIONS.values()))
        raise ValueError(f"its compression {layout.compression} is not read: use one of {names}")
    _check_segments(directory, layout, read)


def _check_segments(directory: Directory, layout: Layout, read: ReadSettings) -> None:
    """Check strips or tiles: their size, their number, and that the file has their bytes."""
    if Tag.TILE_WIDTH in directory.fields or Tag.TILE_OFFSETS in directory.fields:
        height, width = directory.value(Tag.TILE_HEIGHT, 0), directory.value(Tag.TILE_WIDTH, 0)
        offsets, counts = directory.values(Tag.TILE_OFFSETS), directory.values(Tag.TILE_COUNTS)
    else:
        height, width = min(directory.value(Tag.ROWS, layout.height), layout.height), layout.width
        offsets, counts = directory.values(Tag.STRIP_OFFSETS), directory.values(Tag.STRIP_COUNTS)
    if min(height, width) < 1:
        raise ValueError(f"its strips or tiles have {height} x {width} pixels")
    bands = 1 if layout.planar else layout.samples
    if height * width > read.max_pixels:
        size = f"{height} x {width} pixels are more than `max_pixels` {read.max_pixels}"
        raise ValueError(f"its strips or tiles of {size}")
    check_values(height * width * bands, read)
    number = ceil(layout.height / height) * ceil(layout.width / width) * (layout.samples // bands)
    if number > MOST_SEGMENTS or len(offsets) < number or len(counts) < number:
        found = min(len(offsets), len(counts))
        raise ValueError(f"it has {found} of {number} strips or tiles; {MOST_SEGMENTS} may be read")
    places = list(zip(offsets, counts))[:number]
    _check_bytes(directory, layout, places, ceil(width * bands * layout.bits / 8) * height)


def _check_bytes(directory: Directory, layout: Layout, places: list[tuple[int, int]], segment: int) -> None:
    """Check that the file has the bytes of all strips or tiles, of `segment` bytes when unpacked."""
    size = len(directory.data)
    # Tiles without bytes are legal, and stand for zeros.
    used = [(at, count) for at, count in places if count]
    if any(at + count > size for at, count in used):
        raise ValueError("some of its strips or tiles lie outside of the file")
    # Tiles may share bytes. Millions of strips with the same megabyte would take hours.
    if sum(count for _, count in used) > max(4 * size, 1 << 20):
        raise ValueError("its strips or tiles have more bytes than the file")
    needed = ceil(layout.height * layout.width * layout.samples * layout.bits / 8)
    if layout.compression == 1 and len(used) == len(places) and sum(n for _, n in used) < needed:
        raise ValueError(f"its strips or tiles have fewer bytes than the {needed} that its pixels need")
    if layout.compression in (JPEG, JPEG_2000):
        for at, count in used:
            check_stream(directory.data[at : at + count], max(1, segment), max(4, layout.samples))


def _by_tifffile(directory: Directory, layout: Layout) -> np.ndarray:
    """Decode the first page -> (bands, H, W)."""
    tifffile = _tifffile(layout)
    try:
        with tifffile.TiffFile(io.BytesIO(directory.first_page())) as file:
            page = file.pages[0]
            if page.shaped[1] != 1 or _size(page.shaped) != (layout.samples, layout.height, layout.width):
                raise ValueError(f"tifffile finds {page.shape}")
            found = page.asarray(squeeze=False, maxworkers=1)
    except ValueError as error:
        if "imagecodecs" in str(error):
            name = COMPRESSIONS[layout.compression]
            raise needs_package(f"its compression ({name}, or its predictor)", "imagecodecs") from None
        raise
    # (separate bands, 1, H, W, bands of a pixel), of which one number of bands is 1
    planes, _, height, width, bands = found.shape
    return found.reshape(planes, height, width, bands).transpose(0, 3, 1, 2).reshape(-1, height, width)


def _size(shaped: tuple[int, ...]) -> tuple[int, int, int]:
    return shaped[0] * shaped[4], shaped[2], shaped[3]


@lru_cache(maxsize=1)
def _imported() -> Any:
    logging.getLogger("tifffile").addHandler(logging.NullHandler())  # damage is in our error
    return import_module("tifffile")


def _tifffile(layout: Layout) -> Any:
    try:
        return _imported()
    except ImportError:
        found = f"a TIFF of {layout.samples} bands of {layout.bits} bits ({depth_name(layout.depth)})"
        raise needs_package(found, "tifffile") from None
