"""Search space: the settings to try, and for how many steps."""

import itertools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxlm.config.sweep import Dimension, HalvingMethod, Method, Range

Setting = dict[str, Any]

# Sampled values are rounded to be easy to read and type.
_DIGITS = 4
# Consecutive duplicate draws after which a space of choices counts as exhausted.
_MAX_DUPLICATES = 1000


@dataclass(frozen=True)
class Rung:
    """A round of a search: `count` settings, each trained to `steps`."""

    count: int
    steps: int


def draw_settings(fields: Mapping[str, Dimension], method: Method, *, integers: Collection[str]) -> list[Setting]:
    """The initial settings of a search; deterministic.

    Args:
      fields: dotted key -> range or choices. Without any, there is one empty setting.
      method: a larger number of random trials starts with those of a smaller one.
      integers: keys whose values are integers.
    """
    if not fields:
        return [{}]
    if method.kind == "grid":
        values = [_grid_values(fields[name], name in integers) for name in fields]
        return [dict(zip(fields, combination)) for combination in itertools.product(*values)]
    generator = np.random.default_rng(method.seed)
    found: dict[str, Setting] = {}
    duplicates = 0
    while len(found) < method.trials and duplicates < _MAX_DUPLICATES:
        setting = {name: _draw(fields[name], name in integers, generator) for name in fields}
        key = json.dumps(setting, sort_keys=True)
        duplicates = duplicates + 1 if key in found else 0
        found.setdefault(key, setting)
    return list(found.values())


def halving_rungs(method: HalvingMethod, num_settings: int, steps: int) -> list[Rung]:
    """Rounds of successive halving by a factor of eta (Jamieson & Talwalkar, 2016, arXiv:1502.07943).

    Round k of K has floor(n / eta^k) settings, at least one, for R / eta^(K - k) steps, where R is `max_steps` or,
    without it, `steps`, and K is the largest number for which the first round has at least `min_steps`.
    """
    most = method.max_steps or steps
    num_halvings, factor = 0, method.eta
    while most / factor >= method.min_steps and num_settings >= factor:
        num_halvings, factor = num_halvings + 1, factor * method.eta
    return [
        Rung(max(1, num_settings // method.eta**k), max(1, round(most / method.eta ** (num_halvings - k))))
        for k in range(num_halvings + 1)
    ]


def _grid_values(dimension: Dimension, whole: bool) -> list[Any]:
    if not isinstance(dimension, Range):
        return list(dimension)
    fractions = np.linspace(0, 1, dimension.points)
    return list(dict.fromkeys(_at(dimension, float(fraction), whole) for fraction in fractions))


def _draw(dimension: Dimension, whole: bool, generator: np.random.Generator) -> Any:
    # One random number per value for every kind of field, so that other fields' values do not change.
    fraction = float(generator.random())
    if isinstance(dimension, Range):
        return _at(dimension, fraction, whole)
    return dimension[int(fraction * len(dimension))]


def _at(dimension: Range, fraction: float, whole: bool) -> float | int:
    """The value at a fraction of the way from `low` to `high`."""
    if dimension.log:
        value = dimension.low * (dimension.high / dimension.low) ** fraction
    else:
        value = dimension.low + (dimension.high - dimension.low) * fraction
    if whole:
        return min(max(round(value), math.ceil(dimension.low)), math.floor(dimension.high))
    return min(max(round_digits(value), dimension.low), dimension.high)


def round_digits(value: float) -> float:
    """Round to four significant digits."""
    return float(f"{value:.{_DIGITS}g}")
