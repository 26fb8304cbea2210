"""Pytree paths as strings, and trees as flat dicts from path to leaf."""

from typing import Any

import jax


def path_of(key_path: tuple) -> str:
    """`layers/attention/query` for the key path of a leaf."""
    return "/".join(str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key)))) for key in key_path)


def flatten(tree: Any) -> dict[str, Any]:
    """Flatten a tree to its leaves by path."""
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def part_at(tree: Any, path: str) -> Any:
    """The part of a tree at a path, which need not be a leaf."""
    for name in path.split("/"):
        if isinstance(tree, dict):
            tree = tree[name]
        else:
            tree = tree[int(name)] if isinstance(tree, (list, tuple)) else getattr(tree, name)
    return tree


def unflatten(flat: dict[str, Any], like: Any) -> Any:
    """A tree with the structure of `like` and the leaves of `flat`.

    Raises:
      KeyError: the paths differ; the message names the first few that are missing or unexpected.
    """
    paths = [path_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(like)]
    missing = [path for path in paths if path not in flat]
    extra = sorted(set(flat).difference(paths))
    if missing or extra:
        raise KeyError(f"missing {missing[:3]}, unexpected {extra[:3]}")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in paths])
