"""A decoder with matrices quantized to int8."""

from typing import Literal

import jax.numpy as jnp

from maxlm.core.parameters import Parameter
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import CheckFailed
from maxlm.models.decoder import Decoder
from maxlm.ops.qtensor import quantize

# Storage format of the vocabulary tables (embedding, head).
Tables = Literal["int8", "float16"]


def quantize_model(model: Decoder, tables: Tables = "int8") -> Decoder:
    """The model with each matrix replaced by a QTensor; norms and routers are unchanged.

    Raises:
      CheckFailed: a matrix is left in floating point: quantization does not know its declaration.
    """
    flat = flatten(model)
    for path, parameter in flatten(Decoder(model.config)).items():
        if _is_table(parameter):
            # [vocab, embed] is output-first already, for lookup and product.
            flat[path] = quantize(flat[path]) if tables == "int8" else flat[path].astype(tables)
        elif _is_matrix(parameter):
            flat[path] = quantize(jnp.swapaxes(flat[path], -1, -2))
    quantized = unflatten(flat, model)
    check_quantized(quantized)
    return quantized


def check_quantized(model: Decoder) -> None:
    """Raise CheckFailed if a matrix of the model is still in floating point, and name it.

    Checks only the arrays, not the declarations that `quantize_model` uses.
    """
    left = [
        path
        for path, leaf in flatten(model).items()
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        and leaf.ndim - path.startswith("layers/") >= 2
        and not path.endswith(("/router", "/scales"))
        and not (path in ("embedding", "head") and leaf.dtype == jnp.float16)
    ]
    if left:
        raise CheckFailed(f"{len(left)} matrices were not quantized, {left[0]} first; quantization must know them all")


def _is_table(parameter: Parameter) -> bool:
    return parameter.axes[0] == "vocab"


def _is_matrix(parameter: Parameter) -> bool:
    # A router has an axis without a name: rounding it would select other experts, and save almost nothing.
    return "norm" not in parameter.axes and None not in parameter.axes
