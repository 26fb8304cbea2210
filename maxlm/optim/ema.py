"""Exponential moving average of the weights, which often evaluates better than the weights themselves."""

from typing import Any

import jax
import jax.numpy as jnp
import optax


def create_ema(params: Any) -> Any:
    """The average before the first step: the parameters, in float32."""
    return optax.tree.cast(params, jnp.float32)


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """The average after `step` (0-based) produced `params`.

    Early on the decay is (1 + step) / (10 + step) if that is less: otherwise the average of the first steps would be
    mostly the initial values.
    """
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda mean, value: mean + rate * (value.astype(jnp.float32) - mean), ema, params)


def ema_as(ema: Any, params: Any) -> Any:
    """The average in the dtypes of the parameters."""
    return jax.tree.map(lambda mean, value: mean.astype(value.dtype), ema, params)
