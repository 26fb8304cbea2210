"""A residual layer: a mixer and an MLP, with norms before or after them."""

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
from maxlm.layers.latent_attention import LatentAttention
from maxlm.layers.mlp import GatedMlp, PlainMlp
from maxlm.layers.moe import MixtureOfExperts
from maxlm.layers.norm import Norm

# The module of each kind of mixer and MLP: (ModelConfig, the kind's own config, ExecutionConfig) -> module.
MIXERS: dict[str, Any] = {"attention": Attention, "mla": LatentAttention, "gru": Gru}
MLPS: dict[str, Any] = {"gated": GatedMlp, "plain": PlainMlp, "moe": MixtureOfExperts}


class Layer(nnx.Module):
    """Two residual blocks, each normalized where `NormConfig.placement` says.

    Between the blocks tokens are also sharded along the tensor axis (sequence parallelism), so norms and sums are not
    repeated on its devices (arXiv:2205.05198): a block all-gathers them, and reduce-scatters its last product.
    """

    def __init__(self, model: ModelConfig, config: LayerConfig, execution: ExecutionConfig):
        self.residual, self.residual_factor = model.residual, model.residual_factor
        before, after = model.norm.placement != "after", model.norm.placement != "before"
        self.mixer_norm = Norm(model.norm, model.embed_dim) if before else None
        self.mixer = MIXERS[config.mixer.kind](model, config.mixer, execution)
        self.mixer_output_norm = Norm(model.norm, model.embed_dim) if after else None
        has_mlp_norm = before and model.residual != "parallel_one_norm"
        self.mlp_norm = Norm(model.norm, model.embed_dim) if has_mlp_norm else None
        self.mlp = MLPS[config.mlp.kind](model, config.mlp, execution)
        self.mlp_output_norm = Norm(model.norm, model.embed_dim) if after else None

    def __call__(self, x_BLD: jax.Array, context: TokenContext, cache: Any = None) -> tuple[jax.Array, LossOutput, Any]:
        """The stream after this layer, the layer's auxiliary losses, and the mixer's cache with these tokens added."""
        mixer_input_BLD = _normalized(self.mixer_norm, x_BLD)
        mixed_BLD, cache = self.mixer(shard(mixer_input_BLD, *TOKEN_AXES), context, cache)
        mixed_BLD = _normalized(self.mixer_output_norm, mixed_BLD)
        mixed_BLD = mixed_BLD if context.noise is None else context.noise.mixer_output(mixed_BLD)
        sum_BLD = self._stream(x_BLD, mixer_input_BLD) + mixed_BLD
        match self.residual:
            case "sequential" | "normalized":
                mlp_input_BLD = _normalized(self.mlp_norm, sum_BLD)
            case "parallel":
                mlp_input_BLD = _normalized(self.mlp_norm, x_BLD)
            case "parallel_one_norm":
                mlp_input_BLD = mixer_input_BLD
        added_BLD, auxiliary = self.mlp(shard(mlp_input_BLD, *TOKEN_AXES), context)
        added_BLD = _normalized(self.mlp_output_norm, added_BLD)
        added_BLD = added_BLD if context.noise is None else context.noise.mlp_output(added_BLD)
        return self._stream(sum_BLD, mlp_input_BLD) + added_BLD, auxiliary, cache

    def _stream(self, x_BLD: jax.Array, normalized_BLD: jax.Array) -> jax.Array:
        """What an output is added to."""
        x_BLD = normalized_BLD if self.residual == "normalized" else x_BLD
        # A Python number keeps the dtype.
        return x_BLD if self.residual_factor == 1 else self.residual_factor * x_BLD


def _normalized(norm: Norm | None, x_BLD: jax.Array) -> jax.Array:
    return x_BLD if norm is None else norm(x_BLD)
