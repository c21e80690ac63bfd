"""From the bytes of an image to the numbers that a model sees, and back."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pixels:
    """How uint8 images become the numbers that a model sees.

    `mean` and `std` have one value per channel, for images scaled to [0, 1].
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalize(self, images: Tensor) -> Tensor:
        """Scale images (..., C, H, W) from uint8 to float32 with zero mean and unit variance."""
        return normalize(images, self.mean, self.std)


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
    if len(mean) not in (1, channels) or len(std) not in (1, channels) or min(std) <= 0:
        raise ValueError(
            f"mean {mean} and std {std} need one positive value or one per channel, and images have "
            f"{channels}: give `mean` and `std` ({channels} values each)"
        )
    # In float64, so that each result is rounded once.
    means = torch.tensor(mean, dtype=torch.float64)
    stds = torch.tensor(std, dtype=torch.float64)
    scale = 1 / (255 * stds)
    shift = -means / stds
    return scale.float().to(device)[:, None, None], shift.float().to(device)[:, None, None]
