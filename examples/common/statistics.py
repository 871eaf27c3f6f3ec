"""Means over seeds, and how sure a difference between two methods is."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (`None` for a single value) and number of values."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Comparison:
    """The difference between two methods over the seeds that both have.

    Attributes:
        mean: Mean difference; positive where the first method is better.
        n: Number of seeds.
        bootstrap: Interval by the bootstrap over seeds; `None` for a single seed.
        student_t: Paired t interval; `None` for a single seed.
    """

    mean: float
    n: int
    bootstrap: Interval | None
    student_t: Interval | None

    @property
    def verdict(self) -> str:
        """The verdict of the bootstrap interval: is the first method better?"""
        if self.bootstrap is None:
            return "one seed"
        low, high = self.bootstrap
        return "holds" if low > 0 else "does not hold" if high < 0 else "undecided"


def summarise(values: Iterable[float]) -> Summary | None:
    """Mean and sample standard deviation; `None` if there are no values."""
    array = np.fromiter(values, dtype=float)
    if not len(array):
        return None
    return Summary(float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None, len(array))


def paired_differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Ours minus theirs, at each seed that both have."""
    return [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]


def bootstrap_interval(values: Iterable[float]) -> Interval | None:
    """Percentile interval of the mean, by the bootstrap with a fixed seed; `None` for fewer than two values."""
    return _bootstrap(tuple(values))


@cache  # a report has many a comparison in several tables
def _bootstrap(values: tuple[float, ...]) -> Interval | None:
    if len(values) < 2:
        return None
    options = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile"}
    found = stats.bootstrap((values,), np.mean, random_state=np.random.default_rng(0), **options).confidence_interval
    return float(found.low), float(found.high)


def t_interval(values: Iterable[float]) -> Interval | None:
    """Student's interval of the mean; `None` for fewer than two values."""
    summary = summarise(values)
    if summary is None or summary.std is None:
        return None
    half = stats.t.ppf((1 + CONFIDENCE) / 2, summary.n - 1) * summary.std / summary.n**0.5  # 0 for equal values
    return float(summary.mean - half), float(summary.mean + half)


def compare(ours: Mapping[int, float], theirs: Mapping[int, float], higher_is_better: bool) -> Comparison | None:
    """Compare two methods seed by seed.

    Args:
        ours: Values of the method that should be better, by seed.
        theirs: Values of the other method.
        higher_is_better: Whether a larger value is a better one.

    Returns:
        The difference, positive if ours is better; `None` without a common seed.
    """
    sign = 1 if higher_is_better else -1
    differences = [sign * difference for difference in paired_differences(ours, theirs)]
    if not differences:
        return None
    return Comparison(
        float(np.mean(differences)), len(differences), bootstrap_interval(differences), t_interval(differences)
    )
