"""Figures of several seeds put together: mean, 95 % confidence interval, and the table of a sweep."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from util.report.runs import RunRecord, setting_name
from util.report.tables import Table


def student_probability(t: float, degrees: int) -> float:
    """P(|T| < t) for Student's t distribution with a whole number of degrees of freedom.

    This is 1 - I_x(degrees / 2, 1 / 2) at x = degrees / (degrees + t^2), with the regularised incomplete beta
    function I. For whole degrees it is a finite sum: Abramowitz and Stegun, Handbook of Mathematical
    Functions, 26.7.3 (odd degrees) and 26.7.4 (even ones).
    """
    # scipy.stats.t has it too, but no dependency of this project brings scipy.
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term = math.cos(angle) ** odd
    total = 0.0
    for power in range(odd, degrees - 1, 2):
        total += term
        term *= (power + 1) / (power + 2) * math.cos(angle) ** 2
    total *= math.sin(angle)
    if odd:
        return 2 / math.pi * (angle + total)
    return total


@cache
def student_quantile(degrees: int) -> float:
    """The t with P(|T| < t) = 0.95: half the width of a 95 % interval, in standard errors."""
    # The quantile falls from 12.71 for one degree of freedom to the normal distribution's 1.96.
    low = 1.9
    high = 13.0
    for _ in range(60):
        middle = (low + high) / 2
        if student_probability(middle, degrees) < 0.95:
            low = middle
        else:
            high = middle
    return high


@dataclass(frozen=True)
class Aggregate:
    """The figures of all seeds at one value `x` of a flag."""

    x: object
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def interval(self) -> float | None:
        """Half the width of the mean's 95 % confidence interval (Student's t); None for a single seed."""
        n = len(self.values)
        if n < 2:
            return None
        # The sample variance, with Bessel's correction, as Student's t needs it.
        variance = sum((value - self.mean) ** 2 for value in self.values) / (n - 1)
        return student_quantile(n - 1) * (variance / n) ** 0.5


def aggregate(runs: list[RunRecord], flag: str, metric: str) -> dict[str, list[Aggregate]]:
    """A metric in the last epoch against a flag: {values of the other swept flags: aggregates by `flag`}.

    Runs that differ by their seed alone are put together. Runs without the flag or the metric are left out.
    """
    groups: dict[str, dict] = {}
    for run in runs:
        figure = run.last(metric)
        if figure is None or flag not in run.flags:
            continue
        # Runs that differ by their seed alone are one setting.
        group = groups.setdefault(setting_name(run.flags, flag, "seed"), {})
        group.setdefault(_hashable(run.flags[flag]), []).append(figure)
    return {others: _sorted_aggregates(group) for others, group in sorted(groups.items())}


def _sorted_aggregates(group: dict[object, list[float]]) -> list[Aggregate]:
    return [Aggregate(x, tuple(group[x])) for x in sorted(group, key=_order)]


def _hashable(value: object) -> object:
    # Flags with several values are lists.
    if isinstance(value, list):
        return tuple(map(_hashable, value))
    if isinstance(value, dict):
        return str(value)
    return value


def is_number(x: object) -> bool:
    """Whether a flag's value has a place on an axis of numbers."""
    return isinstance(x, (int, float)) and -1e100 < x < 1e100


def _order(x: object) -> tuple:
    """Numbers by size, then all other values by their text."""
    if is_number(x):
        return (0, x, "")
    return (1, 0, str(x))


def chance_of(runs: Iterable[RunRecord], metric: str) -> float | None:
    """The chance level of a metric, None if runs disagree or log none."""
    key = "chance_" + metric.removeprefix("train_").removeprefix("test_")
    # Chance depends on settings such as the mask ratio, so runs of a sweep may have several levels.
    levels = {run.last(key) for run in runs}
    if len(levels) != 1:
        return None
    return levels.pop()


def sweep_table(groups: dict[str, list[Aggregate]], flag: str, metric: str, chance: float | None) -> Table:
    """The figures of `aggregate`, a row for each value of the flag: mean, 95 % interval, and every seed."""
    title = metric
    if chance is not None:
        title += f" (chance {chance:.4f})"
    # Without other swept flags there is one group, whose name is empty.
    header = [flag, title, "95 % interval", "each seed"]
    several = len(groups) > 1
    if several:
        header.insert(0, "other flags")
    rows = []
    for others, aggregates in groups.items():
        for point in aggregates:
            row = _sweep_row(point)
            if several:
                row.insert(0, others)
            rows.append(row)
    return Table(header, rows)


def _sweep_row(point: Aggregate) -> list[str]:
    interval = "one seed"
    if point.interval is not None:
        interval = f"± {point.interval:.4f}"
    each = ", ".join(f"{value:.4f}" for value in point.values)
    return [str(point.x), f"{point.mean:.4f}", interval, each]
