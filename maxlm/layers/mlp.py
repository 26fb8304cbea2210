"""Multilayer perceptrons: layers that process each token by itself.

Dimensions: B batch, L length, D embed, F hidden channels.
"""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.config.layers import Activation, GatedMlpConfig, PlainMlpConfig
from maxlm.config.model import ModelConfig
from maxlm.core.term import LossOutput
from maxlm.layers.context import TokenContext
from maxlm.layers.weights import bias, multiply, residual_scale, weight

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class GatedMlp(nnx.Module):
    """down(activation(gate x) * up x); with silu it is SwiGLU (arXiv:2002.05202)."""

    def __init__(self, model: ModelConfig, config: GatedMlpConfig, execution: ExecutionConfig):
        self.config, self.execution = config, execution
        embed, mlp = (model.embed_dim, "embed"), (config.dim, "mlp")
        self.gate = weight(execution, embed, mlp)
        self.up = weight(execution, embed, mlp)
        self.down = weight(execution, mlp, embed, residual_scale(model.num_layers))

    def __call__(self, x_BLD: jax.Array, context: TokenContext) -> tuple[jax.Array, LossOutput]:
        times, activation = partial(multiply, self.execution), ACTIVATIONS[self.config.activation]
        hidden_BLF = activation(times(x_BLD, self.gate)) * times(x_BLD, self.up)
        return times(hidden_BLF, self.down, context.residual_axes), LossOutput({}, {})


class PlainMlp(nnx.Module):
    """down(activation(up x)), both optionally with a bias."""

    def __init__(self, model: ModelConfig, config: PlainMlpConfig, execution: ExecutionConfig):
        self.config, self.execution = config, execution
        embed, mlp = (model.embed_dim, "embed"), (config.dim, "mlp")
        self.up = weight(execution, embed, mlp)
        self.down = weight(execution, mlp, embed, residual_scale(model.num_layers))
        if config.bias:
            self.up_bias = bias(mlp)
            self.down_bias = bias((model.embed_dim, None))

    def __call__(self, x_BLD: jax.Array, context: TokenContext) -> tuple[jax.Array, LossOutput]:
        config, times = self.config, partial(multiply, self.execution)
        hidden_BLF = times(x_BLD, self.up)
        if config.bias:
            hidden_BLF = hidden_BLF + self.up_bias.astype(hidden_BLF.dtype)
        y_BLD = times(ACTIVATIONS[config.activation](hidden_BLF), self.down, context.residual_axes)
        if config.bias:
            y_BLD = y_BLD + self.down_bias.astype(y_BLD.dtype)
        return y_BLD, LossOutput({}, {})
