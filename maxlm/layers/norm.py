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
        start = zeros if config.unit_offset else ones
        self.scale: Any = nnx.data(Parameter((size,), ("norm",), start, role="norm"))
        if config.kind == "layer" and config.bias:
            self.bias: Any = nnx.data(Parameter((size,), ("norm",), zeros, role="bias"))

    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        scale = 1 + self.scale if config.unit_offset else self.scale
        if config.kind == "layer":
            return layer_norm(x, scale, self.bias if config.bias else None, config.epsilon)
        return rms_norm(x, scale, config.epsilon)
