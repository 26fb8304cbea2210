"""Rematerialization: what the backward pass recomputes, and what the forward pass saves for it."""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

from maxlm.core.hardware import multiplies_bfloat16

_SAVED = "product"


def saved(x: jax.Array) -> jax.Array:
    """Mark a product that `remat: dots` saves.

    Marked values are saved in their own dtype: a policy that finds the products itself would save their float32 sums.
    """
    return checkpoint_name(x, _SAVED)


def rematerialize(function: Callable, policy: str) -> Callable:
    """`function` with another backward pass.

    Args:
      policy: what it recomputes: "none"; "dots", all but marked products; "full"; "auto", "full" where products are
        fast, else "dots".
    """
    if policy == "auto":
        policy = "full" if multiplies_bfloat16() else "dots"
    if policy == "none":
        return function
    names = (_SAVED,) if policy == "dots" else ()
    return jax.checkpoint(function, policy=jax.checkpoint_policies.save_only_these_names(*names))
