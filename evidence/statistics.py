"""Comparisons of settings, paired by seed, and the verdicts that their confidence intervals give.

Runs with the same seed have the same order of images and the same crops. The difference of two such runs is
free of that part of the noise.
"""

from collections import Counter
from dataclasses import dataclass, replace

from util.report.aggregate import Aggregate

# {experiment: the content of its results file}
Results = dict[str, dict]


@dataclass(frozen=True)
class Setting:
    """The runs of an experiment that have these flags, one per seed."""

    experiment: str
    flags: tuple[tuple[str, object], ...] = ()

    def runs(self, results: Results) -> list[dict]:
        """The runs with these flags; none if the experiment was not run."""
        # Flags that are not named here may have any value.
        runs = results.get(self.experiment, {}).get("runs", [])
        return [run for run in runs if all(run["flags"].get(k) == v for k, v in self.flags)]

    def per_seed(self, results: Results, metric: str) -> dict[int, float]:
        """{seed: figure} of the runs that have the metric.

        Raises ValueError if several runs have the same seed, because the flags do not
        select a single setting.
        """
        figures: dict[int, float] = {}
        for run in self.runs(results):
            if metric not in run["figures"]:
                continue
            seed = run["flags"].get("seed", 0)
            if seed in figures:
                raise ValueError(f"{self.experiment} has several runs of seed {seed} with {dict(self.flags)}")
            figures[seed] = run["figures"][metric]
        return figures


def setting(experiment: str, **flags: object) -> Setting:
    """The setting of an experiment with these flags."""
    return Setting(experiment, tuple(flags.items()))


@dataclass(frozen=True)
class Contrast:
    """The difference sum(plus) - sum(minus) of a metric, taken for each seed.

    The claim expects a difference above 0 or, with a `margin`, one whose absolute value is below the margin.
    `minus_metric` is the name of the figure on the other side, if it differs from `metric`.
    """

    name: str
    plus: tuple[Setting, ...]
    minus: tuple[Setting, ...]
    metric: str = "test_acc1"
    margin: float | None = None
    minus_metric: str = ""

    @property
    def settings(self) -> tuple[Setting, ...]:
        return self.plus + self.minus

    def reversed(self) -> "Contrast":
        """minus - plus, for losses, where lower is better."""
        experiment, difference = self.name.split(": ")
        # The name ends in "a - b", which becomes "b - a".
        name = f"{experiment}: {self.metric}, " + " - ".join(reversed(difference.split(" - ")))
        return replace(self, name=name, plus=self.minus, minus=self.plus)

    def differences(self, results: Results) -> Aggregate:
        """One difference for each seed that all settings have."""
        # {seed: figure} of each setting.
        plus = [s.per_seed(results, self.metric) for s in self.plus]
        minus = [s.per_seed(results, self.minus_metric or self.metric) for s in self.minus]
        # A seed that one side lacks has no pair.
        seeds = sorted(set.intersection(*(set(figures) for figures in plus + minus)))
        return Aggregate(self.name, tuple(_total(plus, seed) - _total(minus, seed) for seed in seeds))

    def verdict(self, results: Results) -> str:
        """supported, contradicted or undecided; "one seed" or "not run" if there is no interval."""
        difference = self.differences(results)
        if not difference.values:
            return "not run"
        if difference.interval is None:
            return "one seed"
        return judge(
            difference.mean - difference.interval, difference.mean + difference.interval, self.margin
        )


def _total(figures: list[dict[int, float]], seed: int) -> float:
    return sum(per_seed[seed] for per_seed in figures)


def judge(low: float, high: float, margin: float | None = None) -> str:
    """The verdict on a claim "above 0", or "within the margin", from the interval [low, high] of the
    difference.
    """
    if margin is None:
        if low > 0:
            return "supported"
        if high < 0:
            return "contradicted"
        return "undecided"
    # Equality within a margin: the whole interval must lie within it, or outside of it.
    if -margin < low and high < margin:
        return "supported"
    if low > margin or high < -margin:
        return "contradicted"
    return "undecided"


def combined_verdict(verdicts: list[str]) -> str:
    """The verdict on a claim with several parts: theirs if they agree, else the number of each."""
    counts = Counter(verdicts)
    if len(counts) == 1:
        return verdicts[0]
    # A Counter keeps the order of first appearance, that of the parts.
    return "mixed: " + ", ".join(f"{verdict} {count}" for verdict, count in counts.items())


def plus_minus(figure: Aggregate, digits: int = 2) -> str:
    """The mean ± half the width of its 95 % confidence interval."""
    if figure.interval is None:
        return f"{figure.mean:.{digits}f} (one seed)"
    return f"{figure.mean:.{digits}f} ± {figure.interval:.{digits}f}"
