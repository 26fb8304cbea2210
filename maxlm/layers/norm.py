"""Normalization of the channels of a token."""

from typing import Any

import jax
from flax import nnx

from maxlm.config.model import NormConfig
from maxlm.core.parameters import Parameter, ones, zeros
from maxlm.ops.norm import layer_norm, rms_norm


class Norm(nnx.Module):
    """RMSNorm or LayerNorm over the last axis."""

    def __init__(self, config: NormConfig, size: int):
        self.config = config
        self.scale: Any = nnx.data(Parameter((size,), ("norm",), ones, role="norm"))
        if config.kind == "layer":
            self.bias: Any = nnx.data(Parameter((size,), ("norm",), zeros, role="bias"))

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.config.kind == "layer":
            return layer_norm(x, self.scale, self.bias, self.config.epsilon)
        return rms_norm(x, self.scale, self.config.epsilon)
