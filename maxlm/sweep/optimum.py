"""Interpolate the best value of a field between the tried ones."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.sweep.outcome import Outcome

# The parabola is fitted to this fraction of the values, the best ones: far from the optimum a loss is not parabolic.
_SHARE = 0.5


@dataclass(frozen=True)
class Optimum:
    """The best value of a field at one size.

    `at_edge`: it is the smallest or largest tried value, so the true optimum may lie outside.
    """

    value: float
    at_edge: bool


def find_optimum(outcomes: Sequence[Outcome], name: str, *, sign: int = 1) -> Optimum | None:
    """The vertex of a parabola in the logarithm of a field, fitted to the better half of its values, at least three.

    Of several outcomes with the same value, which differ in other fields, the best one counts. If the parabola has no
    vertex between the fitted values, or there are fewer than three, the best value itself is returned.

    Args:
      outcomes: all of the same size and number of steps.
      name: a field whose values are numbers.
      sign: -1 if higher is better.

    Returns:
      None if a value is not positive, or no trial has finished.
    """
    best: dict[float, float] = {}
    for outcome in outcomes:
        value = outcome.setting[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            return None
        if outcome.value is not None:
            best[value] = min(best.get(value, np.inf), sign * outcome.value)
    if not best:
        return None
    tried = sorted(best, key=best.get)
    winner = float(tried[0])
    at_edge = winner in (min(best), max(best)) if len(best) > 1 else True
    used = tried[: max(3, round(_SHARE * len(tried)))]
    if len(used) < 3 or at_edge:
        return Optimum(winner, at_edge)
    center = np.log(winner)
    curvature, slope, _ = np.polyfit(np.log(used) - center, [best[value] for value in used], 2)
    if curvature > 0:
        vertex = float(np.exp(center - slope / (2 * curvature)))
        if min(used) <= vertex <= max(used):
            return Optimum(vertex, False)
    return Optimum(winner, False)
