"""A decoder with matrices quantized to int8."""

from typing import Literal

import jax.numpy as jnp

from maxlm.core.tree import flatten, unflatten
from maxlm.errors import CheckFailed
from maxlm.models.decoder import Decoder
from maxlm.ops.qtensor import quantize

# Storage format of the vocabulary tables (embedding, head).
Tables = Literal["int8", "float16"]
# Rounding a router would select other experts, and save almost nothing.
_KEPT_IN_FLOAT = ("norm", "bias", "bias_table", "vector", "virtual", "router", "router_bias")


def quantize_model(model: Decoder, tables: Tables = "int8") -> Decoder:
    """The model with each matrix replaced by a QTensor; norms and routers are unchanged.

    Raises:
      CheckFailed: a matrix is left in floating point: quantization does not know its declaration.
    """
    flat = flatten(model)
    for path, parameter in flatten(Decoder(model.config, model.execution)).items():
        if parameter.role == "table":
            # [vocab, embed] is output-first already, for lookup and product.
            flat[path] = quantize(flat[path]) if tables == "int8" else flat[path].astype(tables)
        elif parameter.role == "matrix":
            flat[path] = quantize(jnp.swapaxes(flat[path], -1, -2))
    quantized = unflatten(flat, model)
    check_quantized(quantized)
    return quantized


def check_quantized(model: Decoder) -> None:
    """Raise CheckFailed if a matrix of the model is still in floating point, and name it.

    Checks the arrays: only parameters whose role is listed here stay in floating point.
    """
    arrays = flatten(model)
    left = [
        path
        for path, parameter in flatten(type(model)(model.config)).items()
        if path in arrays
        and jnp.issubdtype(arrays[path].dtype, jnp.floating)
        and parameter.role not in _KEPT_IN_FLOAT
        and not (parameter.role == "table" and arrays[path].dtype == jnp.float16)
    ]
    if left:
        raise CheckFailed(f"{len(left)} matrices were not quantized, {left[0]} first; quantization must know them all")
