"""The weights that layers are made of: declarations and products."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.core.parameters import Normal, Parameter, zeros
from maxlm.ops.linear import Weight, linear


def weight(execution: ExecutionConfig, inputs: tuple[int, str], outputs: tuple[int, str], scale: float = 1.0) -> Any:
    """A matrix [in, out], each side given as (size, logical axis), drawn with variance scale^2 / in."""
    (in_size, in_axis), (out_size, out_axis) = inputs, outputs
    initializer = Normal(scale / math.sqrt(in_size))
    dtype = jnp.dtype(execution.parameter_dtype)
    return nnx.data(Parameter((in_size, out_size), (in_axis, out_axis), initializer, dtype, role="matrix"))


def bias(outputs: tuple[int, str | None]) -> Any:
    """A vector added to the outputs of a product, given as (size, logical axis); starts at zero."""
    size, axis = outputs
    return nnx.data(Parameter((size,), (axis,), zeros, role="bias"))


def multiply(
    execution: ExecutionConfig, x: jax.Array, weight: Weight, output_axes: tuple[str | None, ...] | None = None
) -> jax.Array:
    """x [..., in] times a weight of the layers; `output_axes`: the layout of the result, as in `ops.linear.linear`."""
    return linear(x, weight, execution.layer_matmul_dtype, output_axes, gradient_sum=execution.gradient_sum_dtype)


def residual_scale(num_layers: int) -> float:
    """Scale of the matrices that write to the residual stream: a layer adds two outputs to it (GPT-2)."""
    return 1 / math.sqrt(2 * num_layers)
