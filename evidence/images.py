"""Differences of segmentation scores with intervals over seeds and over validation images.

Each draw of the bootstrap takes seeds and images with replacement. Both sides of a difference get the same
ones.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evidence.statistics import Results, Setting, plus_minus
from util.evaluate.segments.image_counts import FILE, Counted, read_image_counts
from util.report.aggregate import Aggregate
from util.report.tables import Table

# Sources of features whose counts are kept with the results.
KEPT = ("encoder", "without_position", "with_position", "random")
DRAWS = 4000
# Consecutive frames of a video that are drawn together in the second interval.
BLOCK = 10


@dataclass(frozen=True)
class Pair:
    """The counts of a seed on both sides of a difference, and the settings that are compared."""

    plus: Counted
    minus: Counted
    source: str

    def differences(self, weights: np.ndarray) -> np.ndarray:
        """Return plus - minus in mIoU with `weights` (..., N) of the images.

        Raises ValueError if the sides have other images.
        """
        if self.plus.names != self.minus.names:
            raise ValueError("the two sides were evaluated on other images")
        sides = (self.plus, self.minus)
        plus, minus = (side.miou(side.best(self.source), weights) for side in sides)
        return plus - minus


def draw_images(draws: int, images: int, block: int, rng: np.random.Generator) -> np.ndarray:
    """Return how often each draw has each image, (draws, images).

    Blocks of consecutive images are drawn, around the end.
    """
    blocks = -(-images // block)
    starts = rng.integers(0, images, (draws, blocks))
    drawn = ((starts[..., None] + np.arange(block)) % images).reshape(draws, -1)[:, :images]
    weights = np.zeros((draws, images), dtype=np.int64)
    np.add.at(weights, (np.arange(draws)[:, None], drawn), 1)
    return weights


def interval(pairs: Sequence[Pair], block: int = 1, draws: int = DRAWS) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean difference over seeds and images.

    Raises ValueError without a pair.
    """
    if not pairs:
        raise ValueError("there is no pair of runs to compare")
    rng = np.random.default_rng(0)
    weights = draw_images(draws, len(pairs[0].plus.names), block, rng)
    per_seed = np.stack([pair.differences(weights) for pair in pairs], axis=1)  # (draws, seeds)
    seeds = rng.integers(0, len(pairs), per_seed.shape)
    low, high = np.percentile(np.take_along_axis(per_seed, seeds, axis=1).mean(1), [2.5, 97.5])
    return float(low), float(high)


def kept_counts(folder: str, run: str, follow_up: str) -> str:
    """The path of the counts of a run's follow-up among the results of an experiment."""
    return os.path.join(folder, run, f"{follow_up}-{FILE}")


def copy_counts(path: str, out: str) -> None:
    """Copy the counts of the best setting of each source in `KEPT`. Raises ValueError if they are damaged."""
    counted = read_image_counts(path)
    sources = {name.partition("/")[0] for name in counted.settings}
    counted.write(out, [counted.best(source) for source in KEPT if source in sources])


def pairs_of(
    results: Results, folder: str, sides: tuple[Setting, Setting], follow_up: str, source: str
) -> list[Pair]:
    """Return the pairs of the seeds that both settings have counts of, in the order of the seeds."""
    found = []
    for side in sides:
        counts = {}
        for run in side.runs(results):
            path = kept_counts(os.path.join(folder, side.experiment), run["name"], follow_up)
            if os.path.isfile(path):
                counts[run["flags"].get("seed", 0)] = read_image_counts(path)
        found.append(counts)
    plus, minus = found
    return [Pair(plus[seed], minus[seed], source) for seed in sorted(plus.keys() & minus.keys())]


def difference_table(
    results: Results,
    folder: str,
    sides: dict[str, tuple[Setting, Setting]],
    rows: dict[str, tuple[str, str]],
) -> Table:
    """A row for each figure of `rows`, {title: (follow-up, source)}; a column for each pair of `sides`."""
    lines = []
    for title, (follow_up, source) in rows.items():
        cells = [_cell(pairs_of(results, folder, pair, follow_up, source)) for pair in sides.values()]
        if any(cells):
            lines.append([title, *cells])
    return Table(["mIoU", *sides], lines)


def _cell(pairs: list[Pair]) -> str:
    if not pairs:
        return ""
    ones = np.ones(len(pairs[0].plus.names))
    seeds = Aggregate("", tuple(float(pair.differences(ones)) for pair in pairs))
    low, high = interval(pairs)
    wide = interval(pairs, BLOCK)
    return f"{plus_minus(seeds)}; {low:.2f} to {high:.2f}; {wide[0]:.2f} to {wide[1]:.2f}"
