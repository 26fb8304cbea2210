"""Which parameters adapters are for: patterns of names, paths and roles."""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from maxlm.core.parameters import Parameter
from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.layers.stack import layer_indices
from maxlm.models.decoder import Decoder

_ROLE = "role:"
# What the stack is of (the critic's layers are those of a model of the same shape), group, position, path in a layer.
_STACKED = re.compile(r"((?:critic/)?)layers/(\d+)/(\d+)/(.+)")


@dataclass(frozen=True)
class Target:
    """A parameter that is adapted.

    numbers: of the layers in its stack, in the shape of its leading axes; None: it is of no layer.
    is_chosen: whether each of them is adapted.
    """

    parameter: Parameter
    name: str
    numbers: np.ndarray | None = None
    is_chosen: np.ndarray | None = None

    @property
    def trained(self) -> tuple[bool, ...] | None:
        """`Parameter.trained` of its adapter."""
        if self.is_chosen is None or self.is_chosen.all():
            return None
        return tuple(self.is_chosen.ravel().tolist())


def choose(
    plan: Decoder, patterns: Sequence[str], key: str, *, allowed: Callable[[Parameter], bool], what: str
) -> dict[str, Target]:
    """The parameters that match any pattern, by path.

    Args:
      patterns: names (`query`), paths (`layers/3/mixer/query`, with the number of the layer), both with wildcards, or
        roles (`role:norm`).
      key: of the setting that has them.
      allowed: whether a parameter can be adapted; what: a word for those that can.

    Raises:
      ConfigError: a pattern matches none of the parameters that are allowed.
    """
    candidates = {
        path: (leaf, names_of_layers(plan, path), _numbers(plan, path))
        for path, leaf in flatten(plan).items()
        if allowed(leaf)
    }
    for pattern in patterns:
        if not any(_matches(pattern, leaf, names).any() for leaf, names, _ in candidates.values()):
            raise ConfigError([f"{key}: {_unknown(pattern, candidates, what)}"])
    targets = {}
    for path, (leaf, names, numbers) in candidates.items():
        is_chosen = np.any([_matches(pattern, leaf, names) for pattern in patterns], axis=0)
        if not is_chosen.any():
            continue
        name = path if (found := _STACKED.fullmatch(path)) is None else found[1] + found[4]
        targets[path] = Target(leaf, name, numbers, None if numbers is None else is_chosen)
    return targets


def names_of_layers(plan: Decoder, path: str) -> np.ndarray:
    """The path of a parameter in each layer of its stack, with the layer's number: `layers/3/mixer/query`."""
    numbers, found = _numbers(plan, path), _STACKED.fullmatch(path)
    if numbers is None or found is None:
        return np.array(path, object)
    return np.vectorize(lambda number: f"{found[1]}layers/{number}/{found[4]}", otypes=[object])(numbers)


def _numbers(plan: Decoder, path: str) -> np.ndarray | None:
    """The numbers of the layers in a parameter's stack; None: it is of no layer."""
    if (found := _STACKED.fullmatch(path)) is None:
        return None
    return layer_indices(plan.config)[int(found[2])][int(found[3])]


def _matches(pattern: str, parameter: Parameter, names: np.ndarray) -> np.ndarray:
    """Whether a pattern matches each of these parameters of layers."""
    if pattern.startswith(_ROLE):
        return np.full(names.shape, parameter.role == pattern.removeprefix(_ROLE))
    match = lambda name: fnmatchcase(name if "/" in pattern else name.rsplit("/", 1)[-1], pattern)  # noqa: E731
    return np.vectorize(match, otypes=[bool])(names)


def _unknown(pattern: str, candidates: dict, what: str) -> str:
    """The message for a pattern without a match."""
    if pattern.startswith(_ROLE):
        roles = sorted({leaf.role for leaf, *_ in candidates.values()})
        return f"{pattern!r} matches no {what}; allowed: {', '.join(_ROLE + role for role in roles)}"
    if "/" in pattern:
        paths = [str(name) for _, names, _ in candidates.values() for name in names.ravel()]
        near = difflib.get_close_matches(pattern, paths, 3, cutoff=0.3) or paths[:3]
        return f"{pattern!r} matches no {what}; the nearest are {', '.join(near)}"
    leaf_names = sorted({path.rsplit("/", 1)[-1] for path in candidates})
    return f"{pattern!r} is not a {what}; allowed: {', '.join(leaf_names)}"
