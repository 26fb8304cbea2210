"""Adafactor, of each matrix of a stack by itself."""

from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import is_explicit, spec_of
from maxlm.core.tree import flatten, unflatten
from maxlm.optim.groups import is_matrix

# The largest root mean square of an update (arXiv:1804.04235, section 6).
CLIP_RMS = 1.0


def scale_by_adafactor() -> optax.GradientTransformation:
    """optax's factored second moments and clipping of the update, as if each matrix of a stack were a leaf of its own.

    On a stack as it is, optax would take the two longest axes for a matrix, which the layers may be one of, and clip
    the stack as a whole.
    """
    one = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(CLIP_RMS))

    def init(params):
        return {path: _on_stack(one.init, path, leaf) for path, leaf in flatten(params).items()}

    def update(updates, state, params=None):
        del params
        directions, new_state = {}, {}
        for path, grad in flatten(updates).items():
            # What optax asks of the parameter is its shape.
            step = lambda grad, state: one.update(grad, state, grad)  # noqa: E731
            directions[path], new_state[path] = _on_stack(step, path, grad, state[path])
        return unflatten(directions, updates), new_state

    return optax.GradientTransformation(init, update)


def _on_stack(function, path: str, leaf: jax.Array, *others: Any) -> Any:
    """`function` of each matrix (or vector) of a leaf, and of what belongs to it."""
    num_axes = leaf.ndim - (2 if is_matrix(path, leaf) else 1)
    for _ in range(num_axes):
        function = jax.vmap(function)
    results = function(leaf, *others)
    if not is_explicit():
        return results
    # What does not depend on the leaf, such as a count, comes back whole and must be cut as the leaf is.
    leading = spec_of(leaf)[:num_axes]
    return jax.tree.map(lambda x: jax.reshard(x, P(*leading, *spec_of(x)[num_axes:])), results)
