"""Bootstrap confidence intervals: how far a metric would move with another sample of the same size.

The percentile bootstrap of Efron & Tibshirani (1993), chapter 13: draw n of the n units with replacement, recompute the
metric, and take the quantiles. Units are documents or examples. Draws depend only on the seed.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
_NORMAL_QUANTILE = 1.959963984540054  # of (1 + CONFIDENCE) / 2

# Indices drawn at a time: 32 MB.
_DRAWS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A metric and its 95 % interval; `low` and `high` are None for a single unit, which has no spread."""

    value: float
    low: float | None
    high: float | None

    def map(self, function: Callable[[float], float]) -> "Interval":
        """The interval after applying an increasing function."""
        return Interval(function(self.value), *(bound if bound is None else function(bound) for bound in self.bounds))

    @property
    def bounds(self) -> tuple[float | None, float | None]:
        return self.low, self.high

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)

    def format(self, digits: int = 3) -> str:
        """`2.134 [2.080, 2.190]`"""
        text = f"{self.value:.{digits}f}"
        return text if self.low is None else f"{text} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


def ratio_interval(numerators: np.ndarray, denominators: np.ndarray, *, seed: int = 0) -> Interval:
    """sum(numerators) / sum(denominators), with units resampled as pairs.

    Args:
      numerators, denominators: [n], such as bits and bytes of each document; denominators are not negative.

    Raises:
      ValueError: there are no units, the lengths differ, or the denominators sum to zero.
    """
    numerators, denominators = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if numerators.shape != denominators.shape or numerators.ndim != 1:
        raise ValueError(
            f"numerators {numerators.shape} and denominators {denominators.shape} must be 1-D and of equal length"
        )
    if denominators.sum() <= 0:
        raise ValueError("the denominators sum to zero")
    value = float(numerators.sum() / denominators.sum())
    count = len(numerators)
    if count == 1:
        return Interval(value, None, None)
    generator = np.random.default_rng(seed)
    rows = max(1, _DRAWS // count)
    ratios = []
    for start in range(0, RESAMPLES, rows):
        drawn = generator.integers(count, size=(min(rows, RESAMPLES - start), count))
        totals = denominators[drawn].sum(axis=1)
        # Skip draws in which all units are empty.
        ratios.append(numerators[drawn].sum(axis=1)[totals > 0] / totals[totals > 0])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.concatenate(ratios), [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def mean_interval(values: np.ndarray, *, seed: int = 0) -> Interval:
    """The mean of values [n]."""
    return ratio_interval(values, np.ones(len(values)), seed=seed)


def proportion_interval(correct: np.ndarray, *, seed: int = 0) -> Interval:
    """The proportion of ones among zeros and ones [n].

    If all are equal, so is every resample, and the bootstrap interval would have zero width; then it is the score
    interval of Wilson (1927), which is valid at the edges.
    """
    correct = np.asarray(correct)
    interval = mean_interval(correct, seed=seed)
    if 0 < interval.value < 1:
        return interval
    return wilson_interval(int(correct.sum()), len(correct))


def wilson_interval(successes: int, trials: int) -> Interval:
    """The score interval of Wilson (1927), JASA 22, for a binomial proportion."""
    share, z = successes / trials, _NORMAL_QUANTILE
    center = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials**2)) / (1 + z * z / trials)
    # The formula gives 0 and 1 at the edges up to rounding.
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == trials else center + half
    return Interval(share, low, high)


def paired_difference(
    before: np.ndarray, after: np.ndarray, *, weights: np.ndarray | None = None, seed: int = 0
) -> Interval:
    """The metric of `after` minus that of `before`, both on the same units, which are resampled as pairs.

    Args:
      before, after: [n], one number per unit: 0 or 1 for a wrong or right answer, a reward, or a document's bits.
      weights: [n], denominators of the sums, such as a document's bytes; None makes it a difference of means.

    Raises:
      ValueError: the two have different numbers of units.
    """
    before, after = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if before.shape != after.shape:
        raise ValueError(f"before has {before.shape} units and after {after.shape}: they must be the same units")
    return ratio_interval(after - before, np.ones(len(before)) if weights is None else weights, seed=seed)
