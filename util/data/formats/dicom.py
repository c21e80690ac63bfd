"""DICOM files, by pydicom: the first frame, with its modality rescale."""

import io
import struct
import warnings
import zlib
from functools import lru_cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from util.data.formats.arrays import as_tensor
from util.data.formats.codestreams import check_stream
from util.data.formats.pil import deep_channels, image_to_tensor
from util.data.formats.settings import (
    DEPTHS,
    Facts,
    ReadSettings,
    check_pixels,
    check_values,
    needs_package,
)

MAGIC = b"DICM"
MAGIC_AT = 128
SYNTAX = (2, 0x10)  # the element with the transfer syntax
DEFLATED = "1.2.840.10008.1.2.1.99"
RLE = "1.2.840.10008.1.2.5"
RLE_SLACK = 1 << 26  # bytes that a segment may unpack to, whatever its pixels
# VRs whose length has four bytes, behind two empty ones.
LONG = (b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV")
JPEG = "pylibjpeg pylibjpeg-libjpeg"
JPEG_2000 = "pylibjpeg pylibjpeg-openjpeg"
EXTENDED = "1.2.840.10008.1.2.4.51"  # JPEG of 8 bits, which Pillow reads, or 12
# What pydicom needs for compressed pixels, unless Pillow decodes them.
PACKAGES = {
    "1.2.840.10008.1.2.4.50": JPEG,
    EXTENDED: JPEG,
    "1.2.840.10008.1.2.4.57": JPEG,
    "1.2.840.10008.1.2.4.70": JPEG,
    "1.2.840.10008.1.2.4.80": "pyjpegls",
    "1.2.840.10008.1.2.4.81": "pyjpegls",
    "1.2.840.10008.1.2.4.90": JPEG_2000,
    "1.2.840.10008.1.2.4.91": JPEG_2000,
    "1.2.840.10008.1.2.4.201": JPEG_2000,
    "1.2.840.10008.1.2.4.202": JPEG_2000,
    "1.2.840.10008.1.2.4.203": JPEG_2000,
}
FLOATS = ("FloatPixelData", "DoubleFloatPixelData")
INVERTED = "MONOCHROME1"
PALETTE = "PALETTE COLOR"


class Layout(NamedTuple):
    """What the header says about the pixels.

    Attributes:
        samples: numbers of a stored pixel: 1 or 3.
        low: the smallest number that can be stored; None for floating-point numbers.
        high: the largest one.
        slope: of the rescale to the values of the modality.
        intercept: of the same.
    """

    height: int
    width: int
    samples: int
    allocated: int
    stored: int
    low: int | None
    high: int | None
    slope: float
    intercept: float
    photometric: str
    frames: int

    @property
    def is_integer(self) -> bool:
        """Tell whether all values are whole numbers."""
        return self.low is not None and self.slope.is_integer() and self.intercept.is_integer()

    @property
    def depth(self) -> torch.dtype:
        """Return the narrowest type that holds all values that can be stored, after the rescale."""
        if self.low is None or self.high is None or not self.is_integer:
            return torch.float32
        ends = sorted(int(self.slope) * end + int(self.intercept) for end in (self.low, self.high))
        for depth in DEPTHS[:-1]:
            limits = torch.iinfo(depth)
            if limits.min <= ends[0] and ends[1] <= limits.max:
                return depth
        return torch.float32


def is_dicom(data: bytes) -> bool:
    """Tell whether a file is DICOM, whatever its name."""
    return data[MAGIC_AT : MAGIC_AT + 4] == MAGIC


def decode_dicom(data: bytes, read: ReadSettings) -> torch.Tensor:
    """Decode the first frame; see `decode`.

    Grey has the values of its modality: the rescale or the table is applied. MONOCHROME1 is inverted over the
    range that can be stored. Colours become RGB.
    """
    dataset = _dataset(data, read, pixels=True)
    layout = _layout(dataset, read)
    depth = _depth(dataset, layout)
    _check_decoder(dataset, layout, read)
    found = _pydicom().pixels.pixel_array(dataset, index=0)
    if found.shape[:2] != (layout.height, layout.width):
        raise ValueError(f"its frame has {found.shape[0]} x {found.shape[1]} pixels")
    if layout.photometric == PALETTE:
        values = _pydicom().pixels.apply_color_lut(found, dataset)
    elif layout.samples == 3:
        values = found
    else:
        values = _of_modality(found, dataset, layout)
    return _channels(values, depth, read)


def dicom_facts(data: bytes, read: ReadSettings) -> Facts:
    """Read the header."""
    dataset = _dataset(data, read, pixels=False)
    layout = _layout(dataset, read)
    bands = layout.samples
    if layout.photometric == PALETTE:
        bands = 3 + ("AlphaPaletteColorLookupTableData" in dataset)
    return Facts(_depth(dataset, layout), bands, layout.frames, bands == 4)


def _channels(values: np.ndarray, depth: torch.dtype, read: ReadSettings) -> torch.Tensor:
    """Turn (H, W) or (H, W, bands) into the wanted channels."""
    if depth == torch.uint8:
        # As images of 8 bits of other formats.
        return image_to_tensor(Image.fromarray(values.astype(np.uint8)), read)
    if values.ndim == 2:
        values = values[..., None]
    # (H, W, bands) -> (bands, H, W)
    image = as_tensor(np.moveaxis(values, 2, 0).astype(_numpy_type(values, depth), copy=False))
    return deep_channels(image, read, alpha=len(image) == 4)


def _numpy_type(values: np.ndarray, depth: torch.dtype) -> Any:
    if depth == torch.uint16:
        return np.uint16
    if depth == torch.int16:
        return np.int16
    return values.dtype  # `as_tensor` makes them float32, if that holds them


# --- the header ---


@lru_cache(maxsize=1)
def _pydicom() -> Any:
    try:
        import_module("pydicom.pixels")
    except ImportError:
        raise needs_package("a DICOM file", "pydicom") from None
    # It warns of what is unusual in a file.
    warnings.filterwarnings("ignore", module=r"pydicom(\.|$)")
    return import_module("pydicom")


def _dataset(data: bytes, read: ReadSettings, pixels: bool) -> Any:
    pydicom = _pydicom()
    _check_inflated(data, read)
    return pydicom.dcmread(io.BytesIO(data), stop_before_pixels=not pixels)


def _layout(dataset: Any, read: ReadSettings) -> Layout:
    """Return what the header says. Raises ValueError for what is no image, or too large."""
    if "Rows" not in dataset or "Columns" not in dataset:
        raise ValueError("a DICOM file without an image")
    height = int(dataset.Rows)
    width = int(dataset.Columns)
    samples = int(dataset.get("SamplesPerPixel", 1))
    allocated = int(dataset.BitsAllocated)
    # Floating-point pixels do not have this element.
    stored = int(dataset.get("BitsStored", 0))
    low: int | None = None
    high: int | None = None
    if stored:
        low = 0
        high = 2**stored - 1
        if int(dataset.get("PixelRepresentation", 0)) == 1:
            low = -(2 ** (stored - 1))
            high = 2 ** (stored - 1) - 1
    if samples not in (1, 3) or allocated not in (1, 8, 16, 32, 64) or stored > allocated:
        raise ValueError(f"{samples} samples of {stored} bits in {allocated} are not read")
    if height < 1 or width < 1:
        raise ValueError(f"it has {height} x {width} pixels")
    check_pixels(height, width, read.max_pixels)
    check_values(height * width * samples, read)
    slope, intercept = _rescale(dataset)
    if samples == 3:
        slope, intercept = 1.0, 0.0
    frames = max(1, int(dataset.get("NumberOfFrames", 1) or 1))
    photometric = str(dataset.get("PhotometricInterpretation", ""))
    return Layout(height, width, samples, allocated, stored, low, high, slope, intercept, photometric, frames)


def _rescale(dataset: Any) -> tuple[float, float]:
    """Return slope and intercept of the first frame; 1 and 0 if they are missing."""
    places = [dataset]
    # Enhanced CT and MR have them in groups.
    for name in ("PerFrameFunctionalGroupsSequence", "SharedFunctionalGroupsSequence"):
        for group in (dataset.get(name) or [])[:1]:
            places += (group.get("PixelValueTransformationSequence") or [])[:1]
    for place in places:
        if "RescaleSlope" in place or "RescaleIntercept" in place:
            slope = place.get("RescaleSlope")
            intercept = place.get("RescaleIntercept")
            return float(1 if slope is None else slope), float(intercept or 0)
    return 1.0, 0.0


def _table(dataset: Any) -> Any:
    """Return the table of the modality, which stands in the place of a rescale."""
    return next(iter(dataset.get("ModalityLUTSequence") or []), None)


def _depth(dataset: Any, layout: Layout) -> torch.dtype:
    table = _table(dataset)
    bits = 0
    if layout.photometric == PALETTE:
        bits = int(dataset.RedPaletteColorLookupTableDescriptor[2])
    elif table is not None and layout.samples == 1:
        bits = int(table.LUTDescriptor[2])
    if bits:
        return torch.uint16 if bits > 8 else torch.uint8
    return layout.depth


# --- pixels ---


def _of_modality(stored: np.ndarray, dataset: Any, layout: Layout) -> np.ndarray:
    """Turn the numbers of grey pixels into the values of the modality."""
    if layout.low is not None and layout.high is not None:
        unused = 8 * stored.dtype.itemsize - layout.stored
        if layout.allocated > 1 and unused > 0:
            # Bits that are not used may hold overlays.
            stored = (stored << unused) >> unused
        if layout.photometric == INVERTED:
            stored = layout.low + layout.high - stored.astype(np.int64)
    if _table(dataset) is not None:
        return _pydicom().pixels.apply_modality_lut(stored, dataset)
    if (layout.slope, layout.intercept) == (1, 0):
        return stored
    # Products of more bits could leave int64.
    small = layout.stored <= 32 and abs(layout.slope) < 2**30 and abs(layout.intercept) < 2**30
    if layout.is_integer and small:
        return stored.astype(np.int64) * int(layout.slope) + int(layout.intercept)
    with np.errstate(over="ignore", invalid="ignore"):
        return (stored.astype(np.float64) * layout.slope + layout.intercept).astype(np.float32)


def _check_decoder(dataset: Any, layout: Layout, read: ReadSettings) -> None:
    """Raise ValueError if compressed pixels need another package, or claim another size."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if not syntax.is_encapsulated:
        return
    decoder = _pydicom().pixels.get_decoder(syntax)
    if not decoder.is_available or (syntax == EXTENDED and layout.stored > 8 and _only_pillow(decoder)):
        raise needs_package(f"{syntax.name} in DICOM", PACKAGES.get(str(syntax), JPEG))
    frames = import_module("pydicom.encaps").generate_frames(
        dataset.PixelData, number_of_frames=layout.frames
    )
    frame = next(frames)
    if syntax != RLE:
        check_stream(frame, read.max_pixels)
        return
    _check_rle(frame, layout)


def _check_rle(frame: bytes, layout: Layout) -> None:
    """Raise ValueError for a frame that unpacks to much more than its pixels: pydicom would do so."""
    plane = layout.height * layout.width  # the bytes of a segment
    size = plane * layout.samples * layout.allocated // 8
    # A frame of RLE takes little more than its pixels.
    if len(frame) > 2 * size + 4096:
        raise ValueError(f"its frame of {len(frame)} bytes is too long for {size} bytes of pixels")
    number = int.from_bytes(frame[:4], "little")
    if number > 15 or len(frame) < 64:
        raise ValueError("its frame has no valid RLE header")
    ends = [*struct.unpack_from(f"<{number}I", frame, 4), len(frame)]
    if ends != sorted(ends):
        raise ValueError("the segments of its frame overlap")
    most = max(2 * plane, RLE_SLACK)
    for start, end in pairwise(ends):
        # Two bytes give up to 128. Small segments need not be walked.
        if 64 * (end - start) > most:
            _check_segment(frame, start, end, most)


def _check_segment(frame: bytes, at: int, end: int, most: int) -> None:
    """Raise ValueError for a segment of RLE, from `at` to `end`, that unpacks to more than `most` bytes."""
    size = 0
    while at < end:
        head = frame[at]
        if head < 128:
            at += 2 + head
            size += 1 + head
        elif head > 128:
            at += 2
            size += 257 - head
        else:
            at += 1  # stands for nothing
        if size > most:
            raise ValueError(f"a segment of its frame unpacks to more than {most} bytes")


def _only_pillow(decoder: Any) -> bool:
    return set(decoder.available_plugins) <= {"pillow"}


def _check_inflated(data: bytes, read: ReadSettings) -> None:
    """Refuse deflated files that unpack to more than images of the budget: pydicom unpacks all of them."""
    if DEFLATED.encode() not in data:
        return
    syntax, start = _syntax(data)
    if syntax is not None and syntax != DEFLATED:
        return
    most = 8 * read.max_pixels * 4 + (1 << 24)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    left = data[start:]
    size = 0
    while left and size <= most:
        size += len(unpacker.decompress(left, 1 << 20))
        left = unpacker.unconsumed_tail
    if size > most:
        raise ValueError(f"it unpacks to more than {most} bytes")


def _syntax(data: bytes) -> tuple[str | None, int]:
    """Return the transfer syntax, and where the part in it begins."""
    at = MAGIC_AT + len(MAGIC)
    syntax = None
    while at + 12 <= len(data):
        group, element, kind, length = struct.unpack_from("<HH2sH", data, at)
        if group != 2:
            break
        start = at + 8
        if kind in LONG:
            length = struct.unpack_from("<I", data, at + 8)[0]
            start = at + 12
        at = start + length
        if (group, element) == SYNTAX:
            syntax = data[start:at].rstrip(b"\0 ").decode("ascii", "replace")
    return syntax, at
