"""Declarations for small trees of arrays, as optimizers need them."""

from typing import Any

import jax

from maxlm.core.parameters import Parameter, zeros


def declared(tree: Any) -> Any:
    """A matrix for each array with two axes or more, a vector for the others."""

    def one(leaf):
        axes = (None,) * leaf.ndim
        return Parameter(leaf.shape, axes, zeros, leaf.dtype, role="matrix" if leaf.ndim > 1 else "vector")

    return jax.tree.map(one, tree)
