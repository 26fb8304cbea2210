"""A decoder whose matrices are quantised to int8."""

from typing import Literal

import jax.numpy as jnp

from maxlm.core.parameters import Parameter
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import CheckFailed
from maxlm.models.decoder import Decoder
from maxlm.ops.qtensor import quantize

# How the tables of the vocabulary (embedding, head) are kept.
Tables = Literal["int8", "float16"]


def quantize_model(model: Decoder, tables: Tables = "int8") -> Decoder:
    """The model with a QTensor in the place of each matrix; norms and routers of experts stay as they are.

    Raises:
      CheckFailed: a matrix is left in floating point: its declaration is not one that quantisation knows.
    """
    flat = flatten(model)
    for path, parameter in flatten(Decoder(model.config)).items():
        if _is_table(parameter):
            # [vocab, embed], looked up or multiplied with, is output-first as it stands.
            flat[path] = quantize(flat[path]) if tables == "int8" else flat[path].astype(tables)
        elif _is_matrix(parameter):
            flat[path] = quantize(jnp.swapaxes(flat[path], -1, -2))
    quantized = unflatten(flat, model)
    check_quantized(quantized)
    return quantized


def check_quantized(model: Decoder) -> None:
    """Raise CheckFailed, naming it, if a matrix of the model is still in floating point.

    Goes by the arrays alone, not by the declarations that `quantize_model` goes by.
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
        raise CheckFailed(f"{len(left)} matrices were not quantised, {left[0]} first; quantisation must know them all")


def _is_table(parameter: Parameter) -> bool:
    return parameter.axes[0] == "vocab"


def _is_matrix(parameter: Parameter) -> bool:
    # A router has an axis without a name: rounding it would choose other experts, and save next to nothing.
    return "norm" not in parameter.axes and None not in parameter.axes
