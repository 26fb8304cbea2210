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
                rows.append(("  " * depth + _name(part, parameter), "", "", "", _count(_below(declared, part))))
        shape = parameter.shape[len(_stacked_axes(parameter)) :]
        name, dtype = "  " * len(path) + path[-1], jnp.dtype(parameter.dtype).name
        rows.append((name, str(list(shape)), dtype, parameter.role, _count([parameter])))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join([*map(str.ljust, row[:-1], widths), row[-1].rjust(widths[-1])]) for row in rows)


def _below(declared: dict[tuple[str, ...], Parameter], part: tuple[str, ...]) -> list[Parameter]:
    return [parameter for path, parameter in declared.items() if path[: len(part)] == part]


def _name(part: tuple[str, ...], parameter: Parameter) -> str:
    """The last component; for a group of layers with its repeats, for a position of its pattern with its times."""
    sizes = parameter.shape[: len(_stacked_axes(parameter))]
    depth = len(part) - part.index("layers") if "layers" in part else 0
    if depth not in (2, 3):
        return part[-1]
    name = ("group", "position")[depth - 2]
    return f"{name} {part[-1]}" + "".join(f" x {size}" for size in sizes[depth - 2 : depth - 1])


def _stacked_axes(parameter: Parameter) -> list[str | None]:
    return [axis for axis in parameter.axes if axis in ("layers", "unstaged_layers", "times")]


def _count(parameters: Iterable[Parameter]) -> str:
    return f"{sum(math.prod(parameter.shape) for parameter in parameters):,}"
