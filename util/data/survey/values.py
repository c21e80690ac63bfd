"""The values of images: percentiles, means and standard deviations of each channel."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

KEPT = 1 << 22  # float32 values of each channel that are kept at most
KEPT_IN_ALL = 1 << 26  # and of all channels
# The lowest value of each type of integers, and how many there are.
INTEGERS = {torch.uint8: (0, 1 << 8), torch.uint16: (0, 1 << 16), torch.int16: (-(1 << 15), 1 << 16)}


class Stats(NamedTuple):
    """Mean and standard deviation of each channel, of values that are scaled to [0, 1]."""

    mean: list[float]
    std: list[float]


class Values:
    """The values of each channel of images that are added one by one.

    Integers are counted, so that all statistics are exact. Of float32 the lowest and the highest value are
    exact, and up to KEPT values of each channel are kept, evenly spread over the images and over each of
    them.

    Args:
        channels: of the images.
        depth: the type of their pixels.
        images: how many will be added; the share of each follows from it.
    """

    def __init__(self, channels: int, depth: torch.dtype, images: int):
        self.channels = channels
        self.depth = depth
        self.images = 0
        self.share = max(1, min(KEPT, KEPT_IN_ALL // channels) // max(1, images))
        self.kept: list[np.ndarray] = []
        self.lowest = torch.full((channels,), math.inf)
        self.highest = torch.full((channels,), -math.inf)
        # Sums of floats would take eight times the memory of an image.
        self.counts = np.zeros((channels, INTEGERS.get(depth, (0, 0))[1]), np.int64)

    def add(self, image: torch.Tensor) -> None:
        """Add an image (C, H, W)."""
        self.images += 1
        flat = image.flatten(1)  # (C, H, W) -> (C, H*W)
        if self.depth not in INTEGERS:
            self._keep(flat, image.shape[2])
            return
        first, size = INTEGERS[self.depth]
        for counts, channel in zip(self.counts, flat):
            counts += torch.bincount(channel.int() - first, minlength=size).numpy()

    def _keep(self, flat: torch.Tensor, width: int) -> None:
        self.lowest = torch.minimum(self.lowest, flat.amin(1))
        self.highest = torch.maximum(self.highest, flat.amax(1))
        step = -(-flat.shape[1] // self.share)
        # A step that has a divisor in common with the width would see some columns only.
        while math.gcd(step, width) > 1:
            step += 1
        self.kept.append(flat[:, ::step].numpy().copy())

    def ends(self) -> list[tuple[float, float]]:
        """Return the lowest and the highest value of each channel."""
        if self.depth not in INTEGERS:
            return list(zip(self.lowest.tolist(), self.highest.tolist()))
        return [(low, high) for low, high in self.percentiles([0, 100])]

    def percentiles(self, percents: Sequence[float]) -> list[list[float]]:
        """Return the values below which these percentages lie, one list for each channel."""
        if self.depth not in INTEGERS:
            values = np.concatenate(self.kept, 1)
            return np.percentile(values, percents, axis=1, method="inverted_cdf").T.tolist()
        first = INTEGERS[self.depth][0]
        found = []
        for counts in self.counts:
            sums = np.cumsum(counts)
            # The smallest value that at least this share does not exceed.
            places = [np.searchsorted(sums, percent / 100 * sums[-1]) for percent in percents]
            found.append([float(first + self._with_count(counts, int(place))) for place in places])
        return found

    @staticmethod
    def _with_count(counts: np.ndarray, place: int) -> int:
        # The 0th percentile is the smallest value that occurs.
        while place < len(counts) - 1 and counts[place] == 0:
            place += 1
        return place

    def constant(self) -> list[int]:
        """Return the numbers of the channels that have one value only."""
        return [i for i, (low, high) in enumerate(self.ends()) if low == high]

    def stats(self, low: Sequence[float], high: Sequence[float]) -> Stats:
        """Return the statistics of values that are mapped from [low, high] to [0, 1] and clipped.

        `low` and `high` have one value, or one per channel.
        """
        stats = Stats([], [])
        lows = np.broadcast_to(np.asarray(low, np.float64), self.channels)
        highs = np.broadcast_to(np.asarray(high, np.float64), self.channels)
        for channel in range(self.channels):
            values, weights = self._distribution(channel)
            # A constant channel has no width.
            width = (highs[channel] - lows[channel]) or 1.0
            scaled = np.clip((values - lows[channel]) / width, 0, 1)
            mean = np.average(scaled, weights=weights)
            stats.mean.append(float(mean))
            stats.std.append(float(np.sqrt(np.average((scaled - mean) ** 2, weights=weights))))
        return stats

    def _distribution(self, channel: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Return values, and how often each occurs; None for once each."""
        if self.depth not in INTEGERS:
            return np.concatenate([part[channel] for part in self.kept]).astype(np.float64), None
        first, size = INTEGERS[self.depth]
        return np.arange(first, first + size, dtype=np.float64), self.counts[channel]
