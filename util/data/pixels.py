"""From the values of an image to the numbers that a model sees, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LARGEST = 1e37  # of the ends of a range
BYTE_RANGE = ((0.0,), (255.0,))


@dataclass(frozen=True)
class Pixels:
    """How the values of images become the numbers that a model sees.

    Each has one value, or one per channel.

    Attributes:
        mean, std: of values that are scaled to [0, 1].
        low, high: the values that become 0 and 1. Values beyond them are clipped.
        deep: whether the images have more than 8 bits, so that their range does not follow from their type.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...] = BYTE_RANGE[0]
    high: tuple[float, ...] = BYTE_RANGE[1]
    deep: bool = False

    def normalize(self, images: Tensor) -> Tensor:
        """Scale images (..., C, H, W) of any depth to float32 with zero mean and unit variance."""
        if (self.low, self.high) == BYTE_RANGE and images.dtype == torch.uint8:
            return normalize(images, self.mean, self.std)
        key = self, images.shape[-3], images.device
        low, scale, least, most = _range_and_limits(*key)
        # The first step makes a copy. The others work in place. The low end goes first: far from 0, a product
        # would lose the digits that are left.
        values = images.to(torch.float32, copy=True)
        return values.sub_(low).mul_(scale).add_(least).clamp_(least, most)

    def unnormalize(self, images: Tensor) -> Tensor:
        """Invert `normalize` for pictures: float (..., C, H, W) -> uint8, 0 for `low` and 255 for `high`."""
        return unnormalize(images, self.mean, self.std)

    def flags(self, depth: torch.dtype) -> dict[str, Any]:
        """Return what a checkpoint stores of the range, and the depth that it is a range of."""
        return {"range": self.range, "image_depth": str(depth).removeprefix("torch.") if self.range else None}

    @property
    def range(self) -> list[float] | None:
        """Return the range as flags store it, LOW HIGH for each channel; None for usual 8-bit images."""
        if not self.deep and (self.low, self.high) == BYTE_RANGE:
            return None
        count = max(len(self.low), len(self.high))
        lows = self.low * (count // len(self.low))
        highs = self.high * (count // len(self.high))
        return [value for pair in zip(lows, highs) for value in pair]


def split_range(values: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Split LOW HIGH [LOW HIGH ...] to the lows and the highs. Raises ValueError unless each low is lower."""
    lows = tuple(values[::2])
    highs = tuple(values[1::2])
    finite = all(abs(value) <= LARGEST for value in values)
    if not finite or not values or len(values) % 2 or any(low >= high for low, high in zip(lows, highs)):
        listed = " ".join(f"{value:g}" for value in values)
        raise ValueError(
            f"`range` takes a low and a higher value, or such a pair for each channel, found {listed}"
        )
    return lows, highs


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Normalise uint8 (..., C, H, W) -> float32 (images / 255 - mean) / std, on the device of the images.

    `mean` and `std` have one value, or one per channel. Raises ValueError for another number of values.
    """
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.shape[-3], images.device)
    # One multiplication and one addition per value, in place.
    return images.to(torch.float32).mul_(scale).add_(shift)


def unnormalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Invert `normalize`: float (..., C, H, W) -> uint8, rounded and clipped."""
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.shape[-3], images.device)
    return images.detach().float().sub(shift).div_(scale).round_().clamp_(0, 255).to(torch.uint8)


# Cached so that a training step copies no constants to the device.
@lru_cache(maxsize=32)
def _scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], channels: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the factor and the offset of `normalize`, float32 (C, 1, 1) or (1, 1, 1)."""
    means, stds = _means_and_stds(mean, std, channels)
    return _on(1 / (255 * stds), device), _on(-means / stds, device)


@lru_cache(maxsize=32)
def _range_and_limits(
    pixels: Pixels, channels: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the low end of a range, the factor, and what the two ends become.

    All are float32 (C, 1, 1) or (1, 1, 1).
    """
    means, stds = _means_and_stds(pixels.mean, pixels.std, channels)
    if len(pixels.low) not in (1, channels) or len(pixels.high) not in (1, channels):
        raise ValueError(
            f"`range` has {len(pixels.low)} pairs of values, and images have {channels} channels: give one "
            "pair, or one for each channel"
        )
    low = torch.tensor(pixels.low, dtype=torch.float64)
    width = torch.tensor(pixels.high, dtype=torch.float64) - low
    parts = (low, 1 / (width * stds), -means / stds, (1 - means) / stds)
    low, scale, least, most = (_on(part, device) for part in parts)
    return low, scale, least, most


def _means_and_stds(mean: tuple[float, ...], std: tuple[float, ...], channels: int) -> tuple[Tensor, Tensor]:
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise ValueError(
            f"mean {mean} and std {std} need one positive value or one per channel, and images have "
            f"{channels}: give `mean` and `std` ({channels} values each)"
        )
    # In float64, so that each result is rounded once.
    return torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64)


def _on(values: Tensor, device: torch.device) -> Tensor:
    return values.float().to(device)[:, None, None]
