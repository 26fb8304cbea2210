"""A running mean of the weights, which often does better than the weights themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def create_ema(params: Any) -> Any:
    """The mean before the first step: the parameters, in float32."""
    return optax.tree.cast(params, jnp.float32)


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """The mean after `step` (0-based) left `params`.

    Early on the decay is (1 + step) / (10 + step), where that is less: the mean of few steps would else be mostly the
    values that the run began with.
    """
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda mean, value: mean + rate * (value.astype(jnp.float32) - mean), ema, params)


def ema_as(ema: Any, params: Any) -> Any:
    """The mean in the dtypes of the parameters."""
    return jax.tree.map(lambda mean, value: mean.astype(value.dtype), ema, params)
