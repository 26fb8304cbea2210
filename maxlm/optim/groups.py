"""Parameter groups: which optimizer settings apply to a parameter, by its path and shape."""

import difflib
from fnmatch import fnmatchcase
from typing import Any

import jax

from maxlm.config.optim import GroupConfig
from maxlm.core.tree import flatten, path_of
from maxlm.errors import ConfigError


def is_stacked(path: str) -> bool:
    """Whether the first axis of a parameter is the layer axis."""
    return "layers" in path.split("/")


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a parameter holds matrices, possibly stacked over layers and experts, and not norm vectors."""
    return leaf.ndim >= 2 + is_stacked(path)


def is_router_bias(path: str) -> bool:
    """Whether a parameter is the bias that balances experts: its gradient is their load error."""
    return path.rsplit("/", 1)[-1] == "router_bias"


def map_with_path(function, tree: Any, *others: Any) -> Any:
    """Apply `function(path, leaf, *leaves)` to each leaf, with the path as text."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_of(path), *leaves), tree, *others)


def group_of(path: str, groups: tuple[GroupConfig, ...]) -> GroupConfig:
    """The first group whose pattern matches; a default group that changes nothing if none does."""
    return next((group for group in groups if fnmatchcase(path, group.match)), GroupConfig(match="*"))


def check_groups(groups: tuple[GroupConfig, ...], tree: Any) -> None:
    """Raise ConfigError if a pattern matches no parameter of a tree, or only parameters of earlier groups."""
    paths = [path for path in flatten(tree) if not is_router_bias(path)]
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
