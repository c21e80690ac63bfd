"""Segmentation masks: files that store a class number for each pixel.

The numbers are those in the file. A palette only colours them for the eye, and is not used.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from util.data.formats import open_image
from util.data.formats.png import is_deep_png
from util.data.formats.tiff import is_beyond_pil

IGNORED = -1  # in a decoded mask: a pixel without a class
NO_CLASS = -2  # in tables: a stored number that is neither a class nor ignored
MAX_CLASSES = 1 << 15  # of int16
ENCODINGS = ("index", "red_green")
LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")
LOSSY_TIFFS = ("jpeg", "tiff_jpeg", "webp")  # as PIL names the compressions
# PIL spreads grey of 2 and 4 bits over 0 to 255.
SPREAD = {"L;2": 85, "L;4": 17}
SHOWN = 5  # values in an error
LONGEST_REASON = 300  # characters
TO_PNG = "store masks as PNG of one band with a class number for each pixel"


class WrongMask(ValueError):
    """A mask that can be read, and does not hold what is expected."""


@dataclass(frozen=True)
class MaskSettings:
    """What the numbers in the files of masks mean.

    Attributes:
        num_classes: classes are 0 to num_classes - 1; None if it is not known yet.
        ignore_index: the stored number of pixels without a class; None or -1 for none.
        reduce_zero_label: the stored 0 is ignored, and all other numbers are lowered by one.
        encoding: "index": the stored number of one band; "red_green": red + 256 * green of an RGB image.
        table: the class of each stored number, counted from 0. What it gives as -1 or as `ignore_index` is
            ignored.

    Raises ValueError for values that make no sense, or not together.
    """

    num_classes: int | None = None
    ignore_index: int | None = 255
    reduce_zero_label: bool = False
    encoding: str = "index"
    table: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_classes is not None and not 1 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"`num_classes` is from 1 to {MAX_CLASSES}, found {self.num_classes}")
        if self.ignore_index is not None and not -1 <= self.ignore_index < 1 << 16:
            raise ValueError(f"`ignore_index` is from -1 to 65535, found {self.ignore_index}")
        if self.encoding not in ENCODINGS:
            raise ValueError(f"`encoding` is {' or '.join(ENCODINGS)}, found {self.encoding!r}")
        if self.table is not None and self.reduce_zero_label:
            raise ValueError("`reduce_zero_label` and a `table` of classes exclude each other: leave one out")

    def over(self, implied: "MaskSettings") -> "MaskSettings":
        """Return these settings, where what has its default (or None) is taken from `implied`."""
        given = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value != field.default:
                given[field.name] = value
        return replace(implied, **given)


def decode_mask(data: bytes, settings: MaskSettings, max_pixels: int) -> Tensor:
    """Decode a mask -> int16 (H, W): class numbers, and IGNORED.

    PNG, TIFF, BMP and GIF are read. Raises ValueError for other files and damaged ones, for more than
    `max_pixels` pixels, for colours where one band is expected, and for numbers that are no class.
    """
    try:
        stored = _stored(data, settings.encoding, max_pixels)
    except WrongMask:
        raise
    # Damaged files raise many types.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"not a readable mask ({len(data)} bytes, starting with {bytes(data[:4])!r}): "
            f"{reason[:LONGEST_REASON]}"
        ) from error
    return torch.from_numpy(_as_classes(stored, settings))


# --- stored numbers ---


def _stored(data: bytes, encoding: str, max_pixels: int) -> np.ndarray:
    """Return the numbers in a file, (H, W), as uint8, uint16 or int32."""
    if is_beyond_pil(data):
        raise WrongMask(f"its mask is a TIFF of several bands, or of an unusual type: {TO_PNG}")
    if is_deep_png(data):
        raise WrongMask(f"its mask is a PNG of 16 bits with colours or transparency: {TO_PNG}")
    with open_image(data, max_pixels) as image:
        _check_format(image)
        if encoding == "red_green":
            return _red_and_green(image)
        return _one_band(image)


def _check_format(image: Image.Image) -> None:
    found = image.format
    if image.format == "TIFF" and image.info.get("compression") in LOSSY_TIFFS:
        found = f"{image.info['compression']} in a TIFF"
    if found not in LOSSLESS:
        raise WrongMask(f"its mask is stored as {found}, which may change class numbers: {TO_PNG}")


def _one_band(image: Image.Image) -> np.ndarray:
    if image.mode not in ("1", "L", "P", "I") and not image.mode.startswith("I;16"):
        raise WrongMask(
            f"its mask is {image.mode}, not one band of class numbers: convert its colours to class numbers "
            "(R + 256 * G is read from the folders of ImageNet-S alone)"
        )
    raw_mode = _raw_mode(image)
    if raw_mode.endswith(("I", "IR")) and image.mode in ("1", "L"):
        raise WrongMask(f"its mask is a TIFF in which 0 is white: {TO_PNG}")
    image.load()
    values = np.asarray(image)
    if image.mode == "1":
        return values.astype(np.uint8)
    # A last R is a reversed order of bits.
    spread = SPREAD.get(raw_mode.removesuffix("R"))
    if spread is not None:
        return values // np.uint8(spread)
    if image.mode.startswith("I;16"):
        return values.astype(np.uint16, copy=False)
    # Older versions of Pillow have this mode for PNGs of 16 bits.
    if image.mode == "I" and values.size and values.min() >= 0 and values.max() < 1 << 16:
        return values.astype(np.uint16)
    return values


def _raw_mode(image: Image.Image) -> str:
    """Return how the pixels of a PNG or TIFF are packed, in PIL's words; '' for other formats."""
    tiles: Any = image.tile  # type: ignore[attr-defined]
    if image.format not in ("PNG", "TIFF") or not tiles:
        return ""
    packed = tiles[0][3]
    if isinstance(packed, str):
        return packed
    return str(packed[0])


def _red_and_green(image: Image.Image) -> np.ndarray:
    if image.mode == "P":
        # A tool has made the file smaller: colours are what counts here.
        image = image.convert("RGBA")
    if image.mode not in ("RGB", "RGBA"):
        raise WrongMask(
            f"its mask is {image.mode}, and `encoding` red_green takes RGB with the class R + 256 * G: leave "
            "`encoding` out for masks of one band"
        )
    values = np.asarray(image)
    # (H, W, 3 or 4) -> (H, W)
    return values[:, :, 0] | values[:, :, 1].astype(np.uint16) << 8


# --- classes ---


def _as_classes(stored: np.ndarray, settings: MaskSettings) -> np.ndarray:
    """Return the classes of stored numbers, int16 (H, W)."""
    if stored.dtype in (np.uint8, np.uint16):
        classes = _all_classes(settings, 1 << 8 * stored.itemsize).take(stored)
    else:
        values, places = np.unique(stored, return_inverse=True)
        table = np.array([_class_of(value, settings) for value in values.tolist()], np.int16)
        classes = table[places].reshape(stored.shape)
    if classes.size and classes.min() == NO_CLASS:
        _refuse(np.unique(stored[classes == NO_CLASS]).tolist(), settings)
    return classes


@lru_cache(maxsize=16)
def _all_classes(settings: MaskSettings, count: int) -> np.ndarray:
    return np.array([_class_of(value, settings) for value in range(count)], np.int16)


def _class_of(value: int, settings: MaskSettings) -> int:
    """Return the class of a stored number, IGNORED or NO_CLASS."""
    if value == settings.ignore_index:
        return IGNORED
    if value < 0:
        return NO_CLASS
    if settings.table is not None:
        if value >= len(settings.table):
            return NO_CLASS
        value = settings.table[value]
        if value in (IGNORED, settings.ignore_index):
            return IGNORED
    elif settings.reduce_zero_label:
        value -= 1
    if value >= (settings.num_classes or MAX_CLASSES):
        return NO_CLASS
    return value


def _refuse(values: list[int], settings: MaskSettings) -> None:
    """Raise the error for stored numbers that are no classes."""
    shown = ", ".join(map(str, values[:SHOWN]))
    if len(values) > SHOWN:
        shown += f", ... ({len(values)} values)"
    reduced = int(settings.reduce_zero_label)
    if settings.num_classes is None:
        most = MAX_CLASSES - 1 + reduced
        raise WrongMask(f"its mask has the value {shown}, and masks may have 0 to {most}")
    taken = f"`num_classes` {settings.num_classes} takes {reduced} to {settings.num_classes - 1 + reduced}"
    if reduced:
        taken += " with `reduce_zero_label`"
    if settings.table is not None:
        taken = f"the table of {settings.num_classes} classes takes 0 to {len(settings.table) - 1}"
    ignored = "and no `ignore_index` is given"
    if settings.ignore_index not in (None, -1):
        ignored = f"and `ignore_index` is {settings.ignore_index}"
    raise WrongMask(
        f"its mask has the value {shown}: {taken}, {ignored}. Give the number of classes, or the value of "
        "pixels without a class"
    )
