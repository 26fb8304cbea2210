"""What an optimizer does to which parameter: told by its path and shape."""

import difflib
from fnmatch import fnmatchcase
from typing import Any

import jax

from maxlm.config.optim import GroupConfig
from maxlm.core.tree import flatten, path_of
from maxlm.errors import ConfigError


def is_stacked(path: str) -> bool:
    """Whether the first axis of a parameter is that of the layers."""
    return "layers" in path.split("/")


def is_matrix(path: str, leaf: Any) -> bool:
    """Whether a parameter holds matrices, maybe stacked over layers and experts, and not vectors of norms."""
    return leaf.ndim >= 2 + is_stacked(path)


def is_router_bias(path: str) -> bool:
    """Whether a parameter is the bias that balances experts: its gradient is the error of their load."""
    return path.rsplit("/", 1)[-1] == "router_bias"


def map_with_path(function, tree: Any, *others: Any) -> Any:
    """`function(path, leaf, *leaves)` of each leaf, the path as text."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(path_of(path), *leaves), tree, *others)


def group_of(path: str, groups: tuple[GroupConfig, ...]) -> GroupConfig:
    """The first group whose pattern matches; one that changes nothing where none does."""
    return next((group for group in groups if fnmatchcase(path, group.match)), GroupConfig(match="*"))


def check_groups(groups: tuple[GroupConfig, ...], tree: Any) -> None:
    """Raise ConfigError when a pattern matches none of a tree's parameters, or only those of groups before it."""
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
                f"optim.groups.{index}.match: {group.match!r} matches only what groups before it match"
                f" ({', '.join(matched[:3])}); put it before them"
            )
    if problems:
        raise ConfigError(problems)
