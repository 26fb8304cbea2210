"""The decoder: embedding, stacked layers under a scan, final norm, output head.

A `Decoder` is a pytree. When constructed it holds declarations (`maxlm.core.parameters.Parameter`); `initialize`
returns the same tree with arrays. Its methods are pure functions of the arrays.

Dimensions: B batch, L length, D embed, V vocab.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import DEFAULT_EXECUTION, ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import Normal, Parameter, stack
from maxlm.core.remat import rematerialize
from maxlm.core.sharding import fits, gather_layers, shard
from maxlm.core.term import LossOutput
from maxlm.models.cache import KVCache
from maxlm.models.layers import TOKEN_AXES, DecoderLayer, Mlp, TokenContext, norm_scale
from maxlm.models.moe import MixtureOfExperts
from maxlm.models.pipeline_parallelism import fitting_schedule, gpipe, replacement_of_layers
from maxlm.ops.context import row_order, to_row_order, to_token_order
from maxlm.ops.linear import embed
from maxlm.ops.loss import Head, log_probabilities_in_chunks
from maxlm.ops.norm import rms_norm
from maxlm.ops.qtensor import QTensor
from maxlm.ops.rope import rope_angles


@partial(jax.tree_util.register_dataclass, data_fields=["hidden_BLD", "auxiliary"], meta_fields=[])
@dataclass(frozen=True)
class DecoderOutput:
    """hidden_BLD: final hidden states; auxiliary: auxiliary losses and metrics of the layers."""

    hidden_BLD: jax.Array
    auxiliary: LossOutput


class Decoder(nnx.Module):
    """A Llama-style causal language model."""

    # Paths of weights that are fully trained along with adapters, because they are newly initialized.
    trained_whole: tuple[str, ...] = ()

    def __init__(self, config: ModelConfig, execution: ExecutionConfig = DEFAULT_EXECUTION):
        self.config, self.execution = config, execution
        self.embedding = _table(config, execution)
        mlp = Mlp(config, execution, config.mlp_dim) if config.moe is None else MixtureOfExperts(config, execution)
        self.layers = stack(DecoderLayer(config, execution, mlp), config.num_layers)
        self.final_norm = norm_scale(config.embed_dim)
        if not config.tie_embeddings:
            self.head = _table(config, execution)

    def __call__(
        self, tokens_BL: jax.Array, *, positions_BL: jax.Array | None = None, segment_ids_BL: jax.Array | None = None
    ) -> DecoderOutput:
        """Final hidden states [batch, length, embed], the input of `logits` and `log_probabilities`."""
        config, execution = self.config, self.execution
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if segment_ids_BL is None:
            segment_ids_BL = jnp.ones_like(tokens_BL)
        order = row_order(tokens_BL.shape[1], execution.context_attention)
        tokens_BL, positions_BL, segment_ids_BL = (
            to_row_order(shard(x, "batch", "length"), order) for x in (tokens_BL, positions_BL, segment_ids_BL)
        )
        angles = rope_angles(positions_BL, config.head_dim, config.rope_theta)
        residual_axes = ("batch", "residual_length", None)
        context = TokenContext(
            angles, segment_ids_BL, residual_axes if fits(tokens_BL.shape, residual_axes[:2]) else TOKEN_AXES, order
        )
        x_BLD = shard(embed(self.embedding, tokens_BL, execution.activation_dtype), *context.residual_axes)
        x_BLD, auxiliary = self._apply_layers(x_BLD, context)
        hidden_BLD = rms_norm(x_BLD, self.final_norm, config.norm_epsilon)
        return DecoderOutput(to_token_order(shard(hidden_BLD, *TOKEN_AXES), order), auxiliary)

    def _apply_layers(self, x_BLD: jax.Array, context: TokenContext) -> tuple[jax.Array, LossOutput]:
        if (replacement := replacement_of_layers()) is not None:
            return replacement(self, x_BLD, context)
        if (schedule := fitting_schedule(self.execution.pipeline, x_BLD.shape[0])) is not None:
            return gpipe(self.apply_layers, self.layers, x_BLD, context, schedule)
        return self.apply_layers(jax.tree.map(gather_layers, self.layers), x_BLD, context)

    def apply_layers(self, layers: Any, x_BLD: jax.Array, context: TokenContext) -> tuple[jax.Array, LossOutput]:
        """Apply some of the stacked layers: whole periods of the window pattern."""
        config, execution = self.config, self.execution

        def group(x_BLD, layers):
            auxiliary = []
            for index, window in enumerate(config.window_pattern):
                layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
                x_BLD, added = layer(x_BLD, context, window)
                auxiliary.append(added)
            return x_BLD, jax.tree.map(lambda *parts: sum(parts), *auxiliary)

        group = rematerialize(group, execution.remat)
        x_BLD, auxiliary = jax.lax.scan(group, x_BLD, self._group(layers), unroll=execution.unroll)
        return x_BLD, jax.tree.map(lambda parts: jnp.sum(parts, axis=0), auxiliary)

    def decode(self, tokens_BL: jax.Array, cache: KVCache, positions_BL: jax.Array) -> tuple[jax.Array, KVCache]:
        """Hidden states of new tokens, which attend to the cache and one another.

        A token at position -1 is padding: it is not written to the cache.
        """
        config = self.config
        x_BLD = embed(self.embedding, tokens_BL, self.execution.activation_dtype)
        angles = rope_angles(positions_BL, config.head_dim, config.rope_theta)
        group_size = len(config.window_pattern)

        def group(carry, scanned):
            x_BLD, cache = carry
            layers, first = scanned
            for index, window in enumerate(config.window_pattern):
                layer = jax.tree.map(lambda leaf, index=index: leaf[index], layers)
                x_BLD, cache = layer.decode(x_BLD, angles, positions_BL, cache, first + index, window)
            return (x_BLD, cache), None

        layers = self._group(jax.tree.map(gather_layers, self.layers))
        first_layers = jnp.arange(0, config.num_layers, group_size)
        (x_BLD, cache), _ = jax.lax.scan(group, (x_BLD, cache), (layers, first_layers))
        return rms_norm(x_BLD, self.final_norm, config.norm_epsilon), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., vocab] of hidden states [..., embed]."""
        return _output_head(self.config, self.execution).logits(self._head(), hidden)

    def log_probabilities(
        self, hidden_BLD: jax.Array, targets_BL: jax.Array, *, temperature: float = 1.0
    ) -> tuple[jax.Array, jax.Array]:
        """log p(target) and log of the normalizer of softmax(logits / temperature), float32 [batch, length].

        The full logits are never materialized.
        """
        head = _output_head(self.config, self.execution, temperature)
        chunk_length = self.execution.loss_chunk_length
        return log_probabilities_in_chunks(head, self._head(), hidden_BLD, targets_BL, chunk_length=chunk_length)

    def _head(self):
        """The output table [vocab, embed]."""
        return self.embedding if self.config.tie_embeddings else self.head

    def _group(self, layers):
        """Layers as [groups, layers per group, ...], a group being one period of the window pattern."""
        size = len(self.config.window_pattern)
        return jax.tree.map(lambda leaf: leaf.reshape(leaf.shape[0] // size, size, *leaf.shape[1:]), layers)


def with_execution(model: Decoder, execution: ExecutionConfig) -> Decoder:
    """The same model, computed in another way."""
    weights = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return jax.tree.unflatten(jax.tree.structure(type(model)(model.config, execution)), weights)


def _table(config: ModelConfig, execution: ExecutionConfig) -> Any:
    shape = (config.vocab_size, config.embed_dim)
    dtype = jnp.dtype(execution.parameter_dtype)
    return nnx.data(Parameter(shape, ("vocab", "embed"), Normal(0.02), dtype, role="table"))


def _output_head(config: ModelConfig, execution: ExecutionConfig, temperature: float = 1.0) -> Head:
    def transform(logits):
        if config.logit_soft_cap is not None:
            logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
        return logits / temperature

    # A step changes the table by the same amount at each width, and a logit sums over the width (arXiv:2203.03466).
    return Head(execution.matmul_dtype, config.width, transform, execution.gradient_sum_dtype)
