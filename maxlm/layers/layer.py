"""A residual layer: a mixer and an MLP, each after a norm."""

from typing import Any

import jax
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.config.layers import LayerConfig
from maxlm.config.model import ModelConfig
from maxlm.core.sharding import shard
from maxlm.core.term import LossOutput
from maxlm.layers.attention import Attention
from maxlm.layers.context import TOKEN_AXES, TokenContext
from maxlm.layers.gru import Gru
from maxlm.layers.mlp import GatedMlp, PlainMlp
from maxlm.layers.moe import MixtureOfExperts
from maxlm.layers.norm import Norm

# The module of each kind of mixer and MLP: (ModelConfig, the kind's own config, ExecutionConfig) -> module.
MIXERS: dict[str, Any] = {"attention": Attention, "gru": Gru}
MLPS: dict[str, Any] = {"gated": GatedMlp, "plain": PlainMlp, "moe": MixtureOfExperts}


class Layer(nnx.Module):
    """Pre-norm residual blocks.

    Between the blocks tokens are also sharded along the tensor axis (sequence parallelism), so norms and sums are not
    repeated on its devices (arXiv:2205.05198): a block all-gathers them, and reduce-scatters its last product.
    """

    def __init__(self, model: ModelConfig, config: LayerConfig, execution: ExecutionConfig):
        self.mixer_norm = Norm(model.norm, model.embed_dim)
        self.mixer = MIXERS[config.mixer.kind](model, config.mixer, execution)
        self.mlp_norm = Norm(model.norm, model.embed_dim)
        self.mlp = MLPS[config.mlp.kind](model, config.mlp, execution)

    def __call__(self, x_BLD: jax.Array, context: TokenContext, cache: Any = None) -> tuple[jax.Array, LossOutput, Any]:
        """The stream after this layer, the layer's auxiliary losses, and the mixer's cache with these tokens added."""
        mixed_BLD, cache = self.mixer(shard(self.mixer_norm(x_BLD), *TOKEN_AXES), context, cache)
        x_BLD = x_BLD + (mixed_BLD if context.noise is None else context.noise.mixer_output(mixed_BLD))
        added_BLD, auxiliary = self.mlp(shard(self.mlp_norm(x_BLD), *TOKEN_AXES), context)
        x_BLD = x_BLD + (added_BLD if context.noise is None else context.noise.mlp_output(added_BLD))
        return x_BLD, auxiliary, cache
