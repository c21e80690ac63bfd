"""What is read of an image file, and what every decoder checks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from util.flags.groups import MAX_PIXELS

# The types of pixels, the narrowest first.
DEPTHS = (torch.uint8, torch.uint16, torch.int16, torch.float32)
BYTES = [0, 255]  # the usual range of 8-bit images
# Of integers beyond it, float32 holds only some.
LARGEST_EXACT = 1 << 24


@dataclass(frozen=True)
class ReadSettings:
    """How the bytes of a file become the channels that a model sees.

    Attributes:
        in_chans: number of channels that the model sees.
        channels: which bands of the file these are, counted from 0, in this order; empty for all bands.
        bands: number of bands in a file, if `channels` picks some of them and the file does not say it.
        transparency: what becomes of it if no channel shows it: "drop" shows the colours under it,
            "white" and "black" lay the image on a background.
        exif: "apply" turns and mirrors an image as its EXIF orientation says; "ignore" leaves it as stored.
        max_pixels: an image with more pixels (H * W) counts as unreadable.
        depth: the type of the pixels, if files of narrower types are to be widened; None keeps each file's.
        stream_depth: the type of the pixels of a stream, whose images cannot be looked at before.
    """

    in_chans: int = 3
    channels: tuple[int, ...] = ()
    bands: int | None = None
    transparency: str = "drop"
    exif: str = "ignore"
    max_pixels: int = MAX_PIXELS
    depth: torch.dtype | None = None
    stream_depth: torch.dtype = torch.uint8

    def __post_init__(self) -> None:
        if self.transparency not in ("drop", "white", "black"):
            raise ValueError(f"`transparency` is drop, white or black, found {self.transparency!r}")
        if self.exif not in ("ignore", "apply"):
            raise ValueError(f"`exif` is ignore or apply, found {self.exif!r}")

    @classmethod
    def of(cls, flags: Mapping[str, Any]) -> "ReadSettings":
        """Make those of flags, of a run or stored in a checkpoint. What is absent has its default."""
        names = {"in_chans", "bands", "exif", "max_pixels"}
        found = {name: flags[name] for name in names if flags.get(name) is not None}
        # Their values are known then, and float32 holds all of them.
        if list(flags.get("range") or BYTES) != BYTES:
            found["stream_depth"] = torch.float32
        transparency = flags.get("alpha") or flags.get("image_alpha") or "drop"
        return cls(channels=tuple(flags.get("channels") or ()), transparency=transparency, **found)

    @property
    def stored_bands(self) -> int | None:
        """Return the number of bands that a file must have; None if any that has `channels` will do."""
        if self.channels:
            return self.bands
        return self.in_chans

    @property
    def plain(self) -> bool:
        """Tell whether the decoder's own choice of bands is right: no picking, and no turning."""
        return not self.channels and self.exif == "ignore"


def check_pixels(height: int, width: int, max_pixels: int) -> None:
    """Raise ValueError if an image of that size has more than `max_pixels` pixels."""
    if height * width > max_pixels:
        raise ValueError(f"its {height} x {width} pixels are more than `max_pixels` {max_pixels}")


def check_values(count: int, read: ReadSettings) -> None:
    """Raise ValueError for more values than `max_pixels` pixels have: of the bands that are read, or four."""
    most = read.max_pixels * max(4, read.stored_bands or 1 + max(read.channels))
    if count > most:
        raise ValueError(f"its {count} values are more than {most}, those of `max_pixels` {read.max_pixels}")


def needs_package(found: str, package: str) -> ValueError:
    """Return the error for a file that an optional package reads."""
    return ValueError(f"{found} needs a package that is not installed: pip install {package}")


def depth_name(depth: torch.dtype) -> str:
    """Return the name of a type of pixels: "uint16"."""
    return str(depth).removeprefix("torch.")


def widest(depths: set[torch.dtype]) -> torch.dtype:
    """Return the narrowest type that holds every value of the given ones; uint8 for none."""
    if {torch.uint16, torch.int16} <= depths:
        return torch.float32
    return max(depths, key=DEPTHS.index, default=torch.uint8)


def with_depth(image: torch.Tensor, depth: torch.dtype) -> torch.Tensor:
    """Widen the pixels of an image to `depth`. Raises ValueError if that cannot hold all of their values."""
    if image.dtype == depth:
        return image
    if widest({image.dtype, depth}) != depth:
        raise ValueError(
            f"its pixels are {depth_name(image.dtype)}, and the data set has {depth_name(depth)}: convert "
            "it, or keep images of other depths in folders of their own"
        )
    return image.to(depth)


def to_depth(values: torch.Tensor, depth: torch.dtype) -> torch.Tensor:
    """Round and clip float32 values, which are overwritten, to a type of pixels."""
    if depth == torch.float32:
        return values
    limits = torch.iinfo(depth)
    return values.round_().clamp_(limits.min, limits.max).to(depth)


def picked(image: torch.Tensor, read: ReadSettings) -> torch.Tensor:
    """Return the channels of an image with all bands of its file, (bands, H, W) -> (C, H, W)."""
    if not read.channels:
        return image
    if len(image) <= max(read.channels):
        raise ValueError(
            f"it has {len(image)} bands, and `channels` asks for number {max(read.channels)}, counted from 0"
        )
    return image[list(read.channels)]


class Facts(NamedTuple):
    """What the header of a file tells.

    Attributes:
        depth: type of its pixels.
        bands: number of its bands.
        pages: number of images in it, of which the first is read.
        alpha: whether some of its pixels may be transparent.
        orientation: of EXIF; 1 is upright.
    """

    depth: torch.dtype
    bands: int
    pages: int = 1
    alpha: bool = False
    orientation: int = 1
