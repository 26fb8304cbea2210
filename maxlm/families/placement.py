"""Where each tensor of a family is in a model of ours: the table of the family, applied to all layers."""

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.config.model import ModelConfig
from maxlm.core.parameters import Parameter
from maxlm.core.tree import flatten
from maxlm.families.family import SCORE, Family, Tensor
from maxlm.layers.stack import layer_indices
from maxlm.models.decoder import Decoder


@dataclass(frozen=True)
class Piece:
    """A parameter, or the one of a layer or an expert, within a tensor.

    path: of the parameter; place: its index in the leading axes, over layers and experts.
    rows: the rows of the tensor that hold it; of expert `expert`, if the tensor holds all experts.
    """

    path: str
    place: tuple[int, ...]
    rows: np.ndarray
    expert: int | None = None


@dataclass(frozen=True)
class Placed:
    """A tensor of a model: its shape, and what it holds.

    is_transposed: its rows are the last axis of the parameters, as outputs of our matrices are.
    """

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    is_transposed: bool
    input_first: bool


def placed_tensors(family: Family, declared: Decoder) -> dict[str, Placed]:
    """All tensors of a model by name.

    Raises:
      LookupError: the table does not hold each parameter exactly once. The family does not have such models.
    """
    parameters = flatten(declared)
    placed: dict[str, Placed] = {}
    for each in (*family.tensors, SCORE):
        if each.only is not None and not each.only(declared.config):
            continue
        # Once for all layers and experts.
        rows = functools.cache(functools.partial(_rows, each, declared.config))
        for name, parts in _instances(each, parameters, declared.config):
            if name in placed:
                raise LookupError(f"{family.model_type}: {name} is twice in the table")
            placed[name] = _place(each, name, parts, parameters, rows)
    held = Counter((piece.path, piece.place) for tensor in placed.values() for piece in tensor.pieces)
    wanted = {
        (path, place) for path, each in parameters.items() for place in np.ndindex(each.shape[: each.num_stacked])
    }
    for path, place in sorted(wanted ^ held.keys()) + [key for key, count in held.items() if count > 1]:
        raise LookupError(f"{family.model_type}: {path}{list(place)} must be once in the table")
    return placed


# Paths and places of parameters, or those of a layer or an expert.
_Held = list[tuple[str, tuple[int, ...]]]


def _instances(
    each: Tensor, parameters: dict[str, Parameter], config: ModelConfig
) -> Iterator[tuple[str, list[_Held]]]:
    """The name of each tensor of an entry, and what it holds: of each expert, if it holds all, or else in one list."""
    if "{layer}" not in each.name:
        if all(path in parameters for path in each.holds):
            yield each.name, [[(path, ()) for path in each.holds]]
        return
    by_expert = "{expert}" in each.name or each.all_experts
    for prefix, number, place in _places_of_layers(config):
        paths = [f"{prefix}/{path.removeprefix('layer/')}" for path in each.holds]
        found = [
            path for path in paths if path in parameters and ("experts" in parameters[path].axes[:-1]) == by_expert
        ]
        if not found:
            continue
        if len(found) < len(paths):
            raise LookupError(f"{each.name} holds more than {found} of layer {number}")
        if not by_expert:
            yield each.name.format(layer=number), [[(path, place) for path in found]]
            continue
        experts = range(parameters[found[0]].shape[len(place)])
        parts = [[(path, (*place, expert)) for path in found] for expert in experts]
        if each.all_experts:
            yield each.name.format(layer=number), parts
        else:
            for expert, part in zip(experts, parts):
                yield each.name.format(layer=number, expert=expert), [part]


def _places_of_layers(config: ModelConfig) -> Iterator[tuple[str, int, tuple[int, ...]]]:
    """The path of the stack of each layer, the layer's number and its index in the stack; then the paths of each
    prediction module and its layer, which are in no stack."""
    for group, positions in enumerate(layer_indices(config)):
        for position, numbers in enumerate(positions):
            for place, number in np.ndenumerate(numbers):
                yield f"layers/{group}/{position}", int(number), place
    for number in range(config.num_modules):
        for prefix in (f"multi_token/{number}", f"multi_token/{number}/layer"):
            yield prefix, config.num_layers + number, ()


def copied_tables(family: Family, placed: dict[str, Placed], config: ModelConfig) -> dict[str, str]:
    """Names of further copies of tables, and of the tensors that they are copies of."""
    tables = {piece.path: name for name, tensor in placed.items() for piece in tensor.pieces if not piece.place}
    return {
        name.format(layer=config.num_layers + number): tables.get(path, tables["embedding"])
        for number in range(config.num_modules)
        for name, path in family.copies
    }


def _rows(each: Tensor, config: ModelConfig, sizes: tuple[int, ...]) -> list[np.ndarray]:
    """Which rows of a tensor hold which parameter.

    Raises:
      LookupError: they are not each row once.
    """
    rows = [np.asarray(part) for part in each.rows(config, sizes)]
    is_each_once = np.array_equal(np.sort(np.concatenate(rows)), np.arange(sum(sizes)))
    if tuple(map(len, rows)) != sizes or not is_each_once:
        raise LookupError(f"{each.name}: the rows of {each.holds} are not each row once")
    return rows


def _place(
    each: Tensor,
    name: str,
    parts: Sequence[_Held],
    parameters: dict[str, Parameter],
    rows_of: Callable[[tuple[int, ...]], list[np.ndarray]],
) -> Placed:
    shapes = [parameters[path].shape[len(place) :] for path, place in parts[0]]
    is_transposed = len(shapes[0]) == 2 and parameters[parts[0][0][0]].role != "table"
    sizes = tuple(shape[-1] if is_transposed else shape[0] for shape in shapes)
    rows = rows_of(sizes)
    columns = (shapes[0][0] if is_transposed else shapes[0][1],) if len(shapes[0]) == 2 else ()
    shape = (sum(sizes), *columns)
    pieces = [
        Piece(path, place, rows_of_piece, expert if each.all_experts else None)
        for expert, part in enumerate(parts)
        for (path, place), rows_of_piece in zip(part, rows)
    ]
    return Placed(
        name,
        (*([len(parts)] if each.all_experts else []), *(shape[::-1] if each.input_first else shape)),
        tuple(pieces),
        is_transposed,
        each.input_first,
    )


def ignores(family: Family, name: str, model: ModelConfig) -> bool:
    """Whether a tensor of a file holds no parameters of a model."""
    if family.ignores_later_layers and (layer := re.match(r"model\.layers\.(\d+)\.", name)):
        return int(layer[1]) >= model.num_layers + model.num_modules
    return bool(family.ignored) and re.fullmatch(family.ignored, name) is not None
