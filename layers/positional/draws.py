"""Random draws that are pure functions of an image's key.

A counter-based hash takes the place of a generator: what is drawn for an image depends neither on the rank,
nor on the batch that the image is in, nor on earlier draws.

Shapes: B batch, n numbers drawn for an image.
"""

import random
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Constants of splitmix64 (Steele et al. 2014), as signed 64-bit numbers.
GAMMA = -7046029254386353131
FACTORS = (-4658895280553007687, -7723592293110705685)
# Separates the draws of labels from those of masks, which have the same keys.
LABEL_SALT = 0x2545F4914F6CDD1D


class Draws(NamedTuple):
    """What the draws of a batch follow from.

    Attributes:
        key: (B,) int64, a function of (seed, epoch, index).
        image: (B,) int64, the image's number in its data set.
    """

    key: Tensor
    image: Tensor


def draws_of(batch: Mapping[str, Tensor]) -> Draws | None:
    """The draws of a data set's batch, None if it has no keys."""
    if "key" not in batch:
        return None
    return Draws(batch["key"], batch["index"])


def sample_noise(keys: Tensor, n: int) -> Tensor:
    """Int64 keys (B,) -> float64 noise (B, n) in [0, 1), a pure function of the key: splitmix64."""
    # MPS has no float64.
    if keys.device.type == "mps":
        return sample_noise(keys.cpu(), n).float().to(keys.device)
    x = keys[:, None] + torch.arange(1, n + 1, device=keys.device) * GAMMA  # (B, n)
    for bits, factor in zip((30, 27), FACTORS):
        x = (x ^ _shifted(x, bits)) * factor
    x = x ^ _shifted(x, 31)
    return _shifted(x, 11).double() * 2.0**-53


def _shifted(x: Tensor, bits: int) -> Tensor:
    """A logical right shift: >> of int64 is arithmetic, so the sign bits are masked."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def label_keys(keys: Tensor) -> Tensor:
    """Keys (B,) -> keys (B,) whose draws are independent of the masks drawn from the given keys."""
    return keys ^ LABEL_SALT


def seed_bits(seed: int) -> int:
    """62 bits that follow from a seed, to be combined with the numbers of images by exclusive or."""
    # Plain seeds would not do: seed 1 would draw for image 0 what seed 0 draws for image 1.
    return random.Random(seed).getrandbits(62)


def permutations(keys: Tensor, n: int) -> Tensor:
    """Keys (B,) -> one permutation of n numbers per image, (B, n) int64."""
    return sample_noise(keys, n).argsort(dim=1)
