"""Adafactor, applied to each matrix of a stack separately."""

from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P

from maxlm.core.parameters import Parameter
from maxlm.core.sharding import is_explicit, spec_of
from maxlm.core.tree import flatten, unflatten
from maxlm.optim.groups import Plan

# The largest root mean square of an update (arXiv:1804.04235, section 6).
CLIP_RMS = 1.0


def scale_by_adafactor(plan: Plan) -> optax.GradientTransformation:
    """optax's factored second moments and update clipping, as if each matrix of a stack were a separate leaf.

    On a whole stack, optax would factor the two longest axes, one of which may be the layers, and clip the stack as a
    whole.
    """
    one = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(CLIP_RMS))

    def init(params):
        return {path: _on_stack(one.init, plan[path], leaf) for path, leaf in flatten(params).items()}

    def update(updates, state, params=None):
        del params
        directions, new_state = {}, {}
        for path, grad in flatten(updates).items():
            # optax needs only the shape of the parameter.
            step = lambda grad, state: one.update(grad, state, grad)  # noqa: E731
            directions[path], new_state[path] = _on_stack(step, plan[path], grad, state[path])
        return unflatten(directions, updates), new_state

    return optax.GradientTransformation(init, update)


def _on_stack(function, parameter: Parameter, leaf: jax.Array, *others: Any) -> Any:
    """Apply `function` to each matrix (or vector) of a leaf, with its part of the others."""
    num_axes = parameter.num_stacked
    for _ in range(num_axes):
        function = jax.vmap(function)
    results = function(leaf, *others)
    if not is_explicit():
        return results
    # Results that do not depend on the leaf, such as a count, are replicated and must be sharded like the leaf.
    leading = spec_of(leaf)[:num_axes]
    return jax.tree.map(lambda x: jax.reshard(x, P(*leading, *spec_of(x)[num_axes:])), results)
