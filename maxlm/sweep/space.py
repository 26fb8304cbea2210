"""Which settings are tried, and for how many steps."""

import itertools
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from maxlm.config.sweep import Dimension, HalvingMethod, Method, Range

Setting = dict[str, Any]

# Drawn values are rounded, so that they can be read and typed.
_DIGITS = 4
# Draws in a row that are all known already, before a space of choices counts as used up.
_VAIN_DRAWS = 1000


@dataclass(frozen=True)
class Rung:
    """A round of a search: `count` settings, each trained to `steps`."""

    count: int
    steps: int


def draw_settings(fields: Mapping[str, Dimension], method: Method, *, integers: Collection[str]) -> list[Setting]:
    """The settings that a search begins with, always the same for the same arguments.

    Args:
      fields: dotted key -> range or choices. Without any, the one empty setting.
      method: a larger number of random trials begins with those of a smaller one.
      integers: keys whose values are whole numbers.
    """
    if not fields:
        return [{}]
    if method.kind == "grid":
        values = [_grid_values(fields[name], name in integers) for name in fields]
        return [dict(zip(fields, combination)) for combination in itertools.product(*values)]
    generator = np.random.default_rng(method.seed)
    found: dict[str, Setting] = {}
    vain = 0
    while len(found) < method.trials and vain < _VAIN_DRAWS:
        setting = {name: _draw(fields[name], name in integers, generator) for name in fields}
        key = json.dumps(setting, sort_keys=True)
        vain = vain + 1 if key in found else 0
        found.setdefault(key, setting)
    return list(found.values())


def halving_rungs(method: HalvingMethod, num_settings: int, steps: int) -> list[Rung]:
    """Rounds of successive halving (Jamieson & Talwalkar, 2016, arXiv:1502.07943, by a factor of eta).

    Round k of K has floor(n / eta^k) settings, one at least, for R / eta^(K - k) steps, where R is `max_steps` or,
    without it, `steps`, and K the largest number for which the first round is no shorter than `min_steps`.
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
    # One number of the generator for each value, whatever the field: settings do not depend on how they are made.
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
    """To four significant digits."""
    return float(f"{value:.{_DIGITS}g}")
