"""A model as text: its parts in order, with shapes and numbers of parameters."""

import math
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp

from maxlm.core.parameters import Parameter
from maxlm.core.tree import flatten


def describe_model(plan: Any) -> str:
    """A line for each part of a declared model, indented: name, shape, dtype, role, number of parameters.

    Stacked layers are shown once, with their number; shapes are those of one layer.
    """
    declared = {tuple(path.split("/")): parameter for path, parameter in flatten(plan).items()}
    rows = [("total", "", "", "", _count(declared.values()))]
    shown: set[tuple[str, ...]] = set()
    for path, parameter in declared.items():
        for depth in range(1, len(path)):
            part = path[:depth]
            if part not in shown:
                shown.add(part)
                below, above = (_below(declared, each) for each in (part, part[:-1]))
                repeats = f" x {parameter.shape[0]}" if _are_stacked(below) and not _are_stacked(above) else ""
                rows.append(("  " * depth + part[-1] + repeats, "", "", "", _count(below)))
        shape = parameter.shape[_are_stacked([parameter]) :]
        name, dtype = "  " * len(path) + path[-1], jnp.dtype(parameter.dtype).name
        rows.append((name, str(list(shape)), dtype, parameter.role, _count([parameter])))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])]) for row in rows)


def _below(declared: dict[tuple[str, ...], Parameter], part: tuple[str, ...]) -> list[Parameter]:
    return [parameter for path, parameter in declared.items() if path[: len(part)] == part]


def _are_stacked(parameters: Iterable[Parameter]) -> bool:
    return all(parameter.axes[0] == "layers" for parameter in parameters)


def _count(parameters: Iterable[Parameter]) -> str:
    return f"{sum(math.prod(parameter.shape) for parameter in parameters):,}"
