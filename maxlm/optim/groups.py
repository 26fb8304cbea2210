"""Parameter groups: which optimizer settings apply to a parameter, by its path."""

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config.optim import GroupConfig
from maxlm.core.parameters import LAYER_AXES, Parameter
from maxlm.core.sharding import shard
from maxlm.core.tree import path_of
from maxlm.errors import ConfigError

# Declarations of the trained parameters, by path.
Plan = Mapping[str, Parameter]


def map_with_plan(function, plan: Plan, tree: Any, *others: Any) -> Any:
    """Apply `function(path, parameter, leaf, *leaves)` to each leaf."""

    def apply(key_path, *leaves):
        path = path_of(key_path)
        return function(path, plan[path], *leaves)

    return jax.tree_util.tree_map_with_path(apply, tree, *others)


def of_trained_layers(parameter: Parameter, change: jax.Array) -> jax.Array:
    """A gradient or change of a parameter, with zeros for the layers of its stack that are not trained."""
    if parameter.trained is None:
        return change
    is_layer_axis = [axis in LAYER_AXES for axis in parameter.axes]
    shape = [size if is_layer else 1 for size, is_layer in zip(parameter.shape, is_layer_axis)]
    is_trained = jnp.asarray(parameter.trained).reshape(shape)
    is_trained = jnp.broadcast_to(is_trained, parameter.shape)
    # -0 is the number that added to any other, 0 and -0 included, returns its bits.
    return jnp.where(shard(is_trained, *parameter.axes), change, -0.0)


def group_of(path: str, groups: tuple[GroupConfig, ...]) -> GroupConfig:
    """The first group whose pattern matches; a default group that changes nothing if none does."""
    return next((group for group in groups if fnmatchcase(path, group.match)), GroupConfig(match="*"))


def check_groups(groups: tuple[GroupConfig, ...], plan: Plan) -> None:
    """Raise ConfigError if a pattern matches no parameter, or only parameters of earlier groups."""
    paths = [path for path, parameter in plan.items() if parameter.role != "router_bias"]
    problems = []
    for index, group in enumerate(groups):
        matched = [path for path in paths if fnmatchcase(path, group.match)]
        earlier = groups[:index]
        if not matched:
            near = difflib.get_close_matches(group.match, paths, 3, cutoff=0.3) or paths[:3]
            problems.append(
                f"optim.groups.{index}.match: {group.match!r} matches no parameter; the nearest are {', '.join(near)}"
            )
        elif all(any(fnmatchcase(path, other.match) for other in earlier) for path in matched):
            problems.append(
                f"optim.groups.{index}.match: {group.match!r} matches only parameters of earlier groups"
                f" ({', '.join(matched[:3])}); put it before them"
            )
    if problems:
        raise ConfigError(problems)
