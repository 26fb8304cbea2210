"""A module that predicts one token further than the model, or than the module before it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.remat import rematerialize
from maxlm.core.term import LossOutput
from maxlm.layers.context import TokenContext
from maxlm.layers.layer import Layer
from maxlm.layers.norm import Norm
from maxlm.layers.weights import multiply, weight


class PredictionModule(nnx.Module):
    """Equations 21 and 22 of DeepSeek-V3 (arXiv:2412.19437), and a norm before the output head, which is the model's.

    The input of its layer is a projection of [norm(embedding of a later token); norm(hidden state)]. The paper has the
    two the other way round; this is the order of its released weights (`eh_proj`), and of vLLM, SGLang, Megatron-LM and
    transformers. The hidden state is that which the output head reads, after the final norm, as in all of these.
    """

    def __init__(self, model: ModelConfig, number: int, execution: ExecutionConfig):
        """`number`: of its layer, counted on from the model's."""
        (layer,), size = model.module_layers, model.embed_dim
        self.number, self.execution = number, execution
        self.embedding_norm = Norm(model.norm, size)
        self.hidden_norm = Norm(model.norm, size)
        self.project = weight(execution, (2 * size, "embed"), (size, None))
        self.layer = Layer(model, layer, execution)
        self.final_norm = Norm(model.norm, size)

    def __call__(
        self, embedded_BLD: jax.Array, hidden_BLD: jax.Array, context: TokenContext
    ) -> tuple[jax.Array, LossOutput]:
        """The hidden states that the output head reads, and the auxiliary losses of the layer.

        Args:
          embedded_BLD: embeddings of the later tokens; hidden_BLD: hidden states of the model or the module before;
            both are sharded as the stream between layers.
          context: in which tokens without a later token are padding.
        """
        if (noise := context.noise) is not None:
            # As deep as the last layer of a model with one layer for each module before it.
            noise = replace(noise.at_layer(self.number), num_layers=self.number + 1)
            context, embedded_BLD = replace(context, noise=noise), noise.embedding(embedded_BLD)
        return rematerialize(type(self)._apply, self.execution.remat)(self, embedded_BLD, hidden_BLD, context)

    def _apply(self, embedded_BLD, hidden_BLD, context: TokenContext) -> tuple[jax.Array, LossOutput]:
        both_BLE = jnp.concatenate([self.embedding_norm(embedded_BLD), self.hidden_norm(hidden_BLD)], axis=-1)
        x_BLD = multiply(self.execution, both_BLE, self.project)
        x_BLD, auxiliary, _ = self.layer(x_BLD, context)
        return self.final_norm(x_BLD), auxiliary


def declare_modules(model: ModelConfig, execution: ExecutionConfig) -> tuple[PredictionModule, ...]:
    """The declarations of a model's prediction modules."""
    return tuple(PredictionModule(model, model.num_layers + number, execution) for number in range(model.num_modules))
