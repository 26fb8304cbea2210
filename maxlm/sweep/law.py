"""Scaling laws fitted to small models: the loss of a larger one, and its best hyperparameters."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

from maxlm.core.interval import CONFIDENCE

# Huber delta: where a residual of the log loss turns from quadratic to linear, just above the noise of one run.
# Hoffmann et al. use 1e-3 for hundreds of runs. docs/sweep.md compares the two for a few runs.
HUBER_DELTA = 1e-2
RESAMPLES = 400
_MAX_EXPONENT = 2.0
_EXPONENTS = np.geomspace(0.01, _MAX_EXPONENT, 60)
# Lower bound of the irreducible loss, relative to the lowest loss seen, because its logarithm is fitted.
_MIN_IRREDUCIBLE = 1e-6


@dataclass(frozen=True, eq=False)
class ScalingLaw:
    """L(x) = E + A x^-alpha, with bootstrap resamples of the fit.

    Attributes:
      irreducible, coefficient, exponent: E, A, alpha.
      noise: standard deviation of the log loss around the law; None if there are no more points than parameters.
      draws: [resamples, 3] of E, A, alpha; empty without a noise estimate.
      draw_noise: [resamples], the noise of each draw.
    """

    irreducible: float
    coefficient: float
    exponent: float
    noise: float | None
    draws: np.ndarray
    draw_noise: np.ndarray

    def loss(self, x: ArrayLike) -> np.ndarray:
        return self.irreducible + self.coefficient * np.asarray(x, np.float64) ** -self.exponent

    def band(self, x: np.ndarray | float) -> tuple[np.ndarray, np.ndarray] | None:
        """95% interval of the law at each x; None without a noise estimate."""
        return None if not len(self.draws) else _quantiles(self._drawn(x))

    def predict(self, x: float) -> tuple[float, float, float] | tuple[float, None, None]:
        """Predicted loss of one more run at x, with its 95% prediction interval."""
        value = float(self.loss(x))
        if not len(self.draws):
            return value, None, None
        generator = np.random.default_rng(1)
        noise = self.draw_noise * generator.standard_normal(len(self.draw_noise))
        low, high = _quantiles(self._drawn(x)[:, 0] * np.exp(noise))
        return value, float(low), float(high)

    def interval(self, name: str) -> tuple[float, float] | None:
        """95% interval of `irreducible`, `coefficient` or `exponent`."""
        if not len(self.draws):
            return None
        low, high = _quantiles(self.draws[:, ("irreducible", "coefficient", "exponent").index(name)])
        return float(low), float(high)

    def _drawn(self, x: np.ndarray | float) -> np.ndarray:
        """[resamples, points]"""
        irreducible, coefficient, exponent = self.draws.T[:, :, None]
        return irreducible + coefficient * np.atleast_1d(np.asarray(x, np.float64)) ** -exponent


@dataclass(frozen=True, eq=False)
class PowerLaw:
    """y(x) = c x^b: a log-log line, fitted by least squares.

    Attributes:
      log_x, log_y: [n], the data.
    """

    log_x: np.ndarray
    log_y: np.ndarray

    @cached_property
    def exponent(self) -> float:
        return float(self._centered @ self.log_y / (self._centered @ self._centered))

    def value(self, x: ArrayLike) -> np.ndarray:
        return np.exp(self.log_y.mean() + self.exponent * (np.log(x) - self.log_x.mean()))

    def band(self, x: np.ndarray | float) -> tuple[np.ndarray, np.ndarray] | None:
        """95% interval of the law at x, by Student's t; None for two points, which determine the line."""
        if len(self.log_x) < 3:
            return None
        distance = np.log(x) - self.log_x.mean()
        spread = self._noise * np.sqrt(1 / len(self.log_x) + distance**2 / (self._centered @ self._centered))
        reach = self._quantile * spread
        return self.value(x) * np.exp(-reach), self.value(x) * np.exp(reach)

    @property
    def exponent_interval(self) -> tuple[float, float] | None:
        if len(self.log_x) < 3:
            return None
        reach = self._quantile * self._noise / math.sqrt(self._centered @ self._centered)
        return self.exponent - reach, self.exponent + reach

    @property
    def _centered(self) -> np.ndarray:
        return self.log_x - self.log_x.mean()

    @property
    def _noise(self) -> float:
        residuals = self.log_y - self.log_y.mean() - self.exponent * self._centered
        return math.sqrt(float(residuals @ residuals) / (len(self.log_x) - 2))

    @property
    def _quantile(self) -> float:
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, len(self.log_x) - 2))


def fit_scaling_law(
    x: ArrayLike, loss: ArrayLike, *, delta: float = HUBER_DELTA, resamples: int = RESAMPLES, seed: int = 0
) -> ScalingLaw:
    """Fit L = E + A x^-alpha like Hoffmann et al. (2022, arXiv:2203.15556, section D.2).

    The sum of Huber losses of log(E + A x^-alpha) - log L is minimized over log E, log A and alpha, which keeps all
    three positive, from the best of many initial values.

    The interval is a parametric bootstrap. With n points and three parameters, the noise variance of the log loss is
    s^2 = (sum of squared residuals) / (n - 3); each draw samples a variance (n - 3) s^2 / chi^2 and refits to losses
    with that noise around the law. So few points give wide intervals.

    Args:
      x: [n], FLOPs, weights or tokens, positive; at least three distinct values.
      loss: [n], positive.
      delta: where the Huber loss turns from quadratic to linear.

    Raises:
      ValueError: too few distinct x, or a value that is not positive.
    """
    x, loss = np.asarray(x, np.float64), np.asarray(loss, np.float64)
    if x.shape != loss.shape or x.ndim != 1 or len(np.unique(x)) < 3:
        raise ValueError("a law of three parameters needs losses at three distinct sizes")
    if not (np.all(x > 0) and np.all(loss > 0)):
        raise ValueError("sizes and losses must be positive")
    # About 1 in the middle of the points, so that A and alpha are not confounded.
    unit = math.exp(np.log(x).mean())
    log_u = np.log(x / unit)
    best = _fit(log_u, np.log(loss), delta)
    # A value at the bound counts as zero.
    least = 10 * _MIN_IRREDUCIBLE * float(loss.min())

    freedom = len(x) - 3
    draws, noises, noise = np.empty((0, 3)), np.empty(0), None
    if freedom > 0:
        fitted = _log_loss(best, log_u)
        squares = float(np.sum((np.log(loss) - fitted) ** 2))
        noise = math.sqrt(squares / freedom)
        generator = np.random.default_rng(seed)
        noises = np.sqrt(squares / generator.chisquare(freedom, resamples))
        samples = fitted + noises[:, None] * generator.standard_normal((resamples, len(x)))
        draws = np.stack([_natural(_fit(log_u, sample, delta, start=best), unit, least) for sample in samples])
    irreducible, coefficient, exponent = _natural(best, unit, least).tolist()
    return ScalingLaw(irreducible, coefficient, exponent, noise, draws, noises)


def fit_power_law(x: ArrayLike, y: ArrayLike) -> PowerLaw:
    """Fit y = c x^b.

    Raises:
      ValueError: fewer than two distinct x, or a value that is not positive.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.shape != y.shape or len(np.unique(x)) < 2 or not (np.all(x > 0) and np.all(y > 0)):
        raise ValueError("a power law needs two distinct sizes and positive values")
    return PowerLaw(np.log(x), np.log(y))


def _fit(log_u: np.ndarray, log_loss: np.ndarray, delta: float, start: np.ndarray | None = None) -> np.ndarray:
    """Fit (log E, log A, alpha), with A in the unit of u."""
    floor = float(log_loss.min()) + math.log(_MIN_IRREDUCIBLE)
    starts = [_best_start(log_u, log_loss, floor)]
    if start is not None:
        starts.append(np.maximum(start, [floor, -np.inf, _EXPONENTS[0]]))
    bounds = ([floor - 1e-9, -np.inf, 1e-3], [np.inf, np.inf, 1.01 * _MAX_EXPONENT])
    fits = [
        optimize.least_squares(
            lambda p: _log_loss(p, log_u) - log_loss,
            first,
            jac=lambda p: _jacobian(p, log_u),
            bounds=bounds,
            loss="huber",
            f_scale=delta,
            x_scale=[1.0, 1.0, 0.3],
            max_nfev=100,
        )
        for first in starts
    ]
    return min(fits, key=lambda fit: fit.cost).x


def _best_start(log_u: np.ndarray, log_loss: np.ndarray, floor: float) -> np.ndarray:
    """Initial value: the best of several alphas, each with a linear least-squares fit of E and A.

    The residuals are relative, which approximates those of the logarithm while they are small.
    """
    weights = np.exp(-log_loss)
    falling = np.exp(-_EXPONENTS[:, None] * log_u) * weights
    a, b, c = weights @ weights, falling @ weights, np.sum(falling**2, axis=1)
    right, right_falling = weights.sum(), falling.sum(axis=1)
    # Even points that are collinear in u^-alpha, up to rounding, determine E and A.
    determinant = np.maximum(a * c - b**2, 1e-12 * a * c)
    irreducible = (c * right - b * right_falling) / determinant
    coefficient = np.where(irreducible > 0, (a * right_falling - b * right) / determinant, right_falling / c)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_e = np.maximum(np.where(irreducible > 0, np.log(irreducible), -np.inf), floor)
        log_a = np.log(coefficient)
    starts = np.stack([log_e, log_a, _EXPONENTS], axis=1)[coefficient > 0]
    if not len(starts):
        # Losses that rise with size: start as flat as possible.
        return np.array([float(log_loss.mean()), floor, _EXPONENTS[0]])
    misses = np.logaddexp(starts[:, :1], starts[:, 1:2] - starts[:, 2:] * log_u) - log_loss
    return starts[np.argmin(np.abs(misses).sum(axis=1))]


def _log_loss(parameters: np.ndarray, log_u: np.ndarray) -> np.ndarray:
    log_e, log_a, alpha = parameters
    return np.logaddexp(log_e, log_a - alpha * log_u)


def _jacobian(parameters: np.ndarray, log_u: np.ndarray) -> np.ndarray:
    _, log_a, alpha = parameters
    share = np.exp(log_a - alpha * log_u - _log_loss(parameters, log_u))
    return np.stack([1 - share, share, -log_u * share], axis=1)


def _natural(parameters: np.ndarray, unit: float, least: float) -> np.ndarray:
    """E, A, alpha for x in its original unit; an E below `least` is 0."""
    log_e, log_a, alpha = parameters
    irreducible = math.exp(log_e)
    return np.array([irreducible if irreducible > least else 0.0, math.exp(log_a + alpha * math.log(unit)), alpha])


def _quantiles(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail], axis=0)
    return low, high
