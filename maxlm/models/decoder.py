"""The decoder: embedding, stacked layers under scans, final norm, output head.

A `Decoder` is a pytree. When constructed it holds declarations (`maxlm.core.parameters.Parameter`); `initialize`
returns the same tree with arrays. Its methods are pure functions of the arrays.

Dimensions: B batch, L length, D embed, V vocab.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm.config.execution import DEFAULT_EXECUTION, ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.batch import Stream, document_lengths, look_ahead
from maxlm.core.parameters import Normal, Parameter, zeros
from maxlm.core.sharding import fits, gather_layers, shard
from maxlm.core.term import LossOutput, unite
from maxlm.core.tree import flatten, unflatten
from maxlm.layers.context import TOKEN_AXES, TokenContext
from maxlm.layers.noise import Noise
from maxlm.layers.norm import Norm
from maxlm.layers.prediction_module import PredictionModule, declare_modules
from maxlm.layers.stack import Group, apply_group, create_caches, declare_layers
from maxlm.models.pipeline_parallelism import fitting_schedule, gpipe
from maxlm.ops.attention.context import row_order, to_row_order, to_token_order
from maxlm.ops.attention.position_bias import RelativeBuckets
from maxlm.ops.linear import embed, operand_dtype
from maxlm.ops.loss import Head, log_probabilities_in_chunks
from maxlm.ops.norm import with_unit_rows
from maxlm.ops.qtensor import QTensor


@partial(jax.tree_util.register_dataclass, data_fields=["hidden_BLD", "auxiliary", "caches", "context"], meta_fields=[])
@dataclass(frozen=True)
class DecoderOutput:
    """hidden_BLD: final hidden states; auxiliary: auxiliary losses and metrics of the layers; caches: with the new
    tokens, if there were any; context: of the layers, if there were none."""

    hidden_BLD: jax.Array
    auxiliary: LossOutput
    caches: Any = None
    context: TokenContext | None = None


@partial(jax.tree_util.register_dataclass, data_fields=["x_BLD", "auxiliary"], meta_fields=[])
@dataclass(frozen=True)
class Residual:
    """The residual stream between two layers, and the auxiliary losses of the layers so far."""

    x_BLD: jax.Array
    auxiliary: LossOutput


class Decoder(nnx.Module):
    """A causal language model, or one that scores sequences, if its configuration has `labels`.

    It is computed in three parts, which a pipeline schedules separately: `enter`, `trunk` (the longest group of layers)
    and `leave`.
    """

    def __init__(self, config: ModelConfig, execution: ExecutionConfig = DEFAULT_EXECUTION):
        self.config, self.execution = config, execution
        self.embedding = _table(config, execution)
        if config.learned_positions is not None:
            self.positions = _table(config, execution, config.learned_positions, None)
        if config.embedding_norm:
            self.embedding_norm = Norm(config.norm, config.embed_dim)
        if config.bias_table is not None:
            self.relative_bias = _bias_table(config)
        self.layers: tuple[Group, ...] = nnx.data(declare_layers(config, execution))
        self.final_norm = Norm(config.norm, config.embed_dim)
        if config.labels is not None:
            self.score = _score_table(len(config.labels), config, execution)
        elif not config.tie_embeddings:
            self.head = _table(config, execution)
        self.multi_token: tuple[PredictionModule, ...] = nnx.data(declare_modules(config, execution))
        if config.critic == "shared":
            self.value = _score_table(1, config, execution)
        elif config.critic == "own":
            self.critic = Decoder(config.main_model.model_copy(update={"labels": ("value",)}), execution)

    def __call__(
        self,
        tokens_BL: jax.Array,
        *,
        positions_BL: jax.Array | None = None,
        segment_ids_BL: jax.Array | None = None,
        prefix_lengths_BL: jax.Array | None = None,
        caches: Any = None,
        noise: Noise | None = None,
    ) -> DecoderOutput:
        """Final hidden states [batch, length, embed], the input of `logits` and `log_probabilities`.

        Args:
          positions_BL: by default those of whole rows. With caches, -1 is padding.
          segment_ids_BL: by default one sequence in each row.
          prefix_lengths_BL: of a prefix language model: for each token, the length of the prefix of its sequence, whose
            tokens attend to one another; with caches, they are given in one call. None: there are no prefixes.
          caches: of earlier tokens, from `create_caches`: the tokens attend to them and to one another.
          noise: of training; None: nothing is random.
        """
        if positions_BL is None:
            positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        if segment_ids_BL is None:
            segment_ids_BL = (positions_BL >= 0).astype(jnp.int32)
        if caches is not None:
            return self._extend(tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL, caches)
        residual, context = self.enter(tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL, noise)
        trunk = self.trunk_layers
        if (schedule := fitting_schedule(self.execution.pipeline, tokens_BL.shape[0])) is not None:
            x_BLD, auxiliary = gpipe(self.trunk, trunk, residual.x_BLD, context, schedule)
        else:
            x_BLD, auxiliary = self.trunk(jax.tree.map(gather_layers, trunk), residual.x_BLD, context, 0)
        return self.leave(Residual(x_BLD, unite([residual.auxiliary, auxiliary])), context)

    def apply(self, stream: Stream, noise: Noise | None = None) -> DecoderOutput:
        """The outputs for a stream of tokens."""
        return self(
            stream.tokens,
            positions_BL=stream.positions,
            segment_ids_BL=stream.segment_ids,
            prefix_lengths_BL=stream.prefix_lengths,
            noise=noise,
        )

    def enter(
        self,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        prefix_lengths_BL: jax.Array | None = None,
        noise: Noise | None = None,
    ) -> tuple[Residual, TokenContext]:
        """The input of the trunk: embeddings, after the groups of layers before it."""
        execution = self.execution
        order = row_order(tokens_BL.shape[1], execution.context_attention)
        lengths_BL = None
        if noise is not None and noise.rates.neftune_alpha:
            lengths_BL = to_row_order(document_lengths(segment_ids_BL), order)
        tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL = jax.tree.map(
            lambda x: to_row_order(shard(x, "batch", "length"), order),
            (tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL),
        )
        residual_axes = ("batch", "residual_length", None)
        if not fits(tokens_BL.shape, residual_axes[:2]):
            residual_axes = TOKEN_AXES
        if noise is not None:
            columns_BL = shard(jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape), "batch", "length")
            noise = noise.in_model(to_row_order(columns_BL, order), lengths_BL, residual_axes, self.config.num_layers)
        context = replace(
            self._context(positions_BL, segment_ids_BL, prefix_lengths_BL),
            noise=noise,
            residual_axes=residual_axes,
            row_order=order,
        )
        x_BLD = shard(self._embed(tokens_BL, positions_BL), *residual_axes)
        x_BLD = x_BLD if noise is None else noise.embedding(x_BLD)
        before = range(self.config.longest_group)
        return self._apply_groups(before, Residual(x_BLD, LossOutput({}, {})), context), context

    @property
    def trained_whole(self) -> tuple[str, ...]:
        """Paths of weights that are trained along with adapters, because they are newly initialized."""
        of_critic = {None: (), "shared": ("value",), "own": ("critic/score",)}[self.config.critic]
        return of_critic if self.config.labels is None else ("score",)

    @property
    def trunk_layers(self) -> Group:
        """The layers of the trunk, or a stage's part of them."""
        return self.layers[self.config.longest_group]

    def trunk(
        self, layers: Group, x_BLD: jax.Array, context: TokenContext, first_repeat: int | jax.Array
    ) -> tuple[jax.Array, LossOutput]:
        """Apply some of the repeats of the longest group, from `first_repeat` on."""
        number = self.config.longest_group
        group = self.config.layers[number]
        first = self._first_layer(number) + first_repeat * group.layers_per_repeat
        return apply_group(layers, group.pattern, self.execution, x_BLD, context, first=first)[:2]

    def leave(self, residual: Residual, context: TokenContext) -> DecoderOutput:
        """The outputs, after the groups of layers that follow the trunk."""
        rest = range(self.config.longest_group + 1, len(self.layers))
        residual = self._apply_groups(rest, residual, context)
        hidden_BLD = shard(self.final_norm(residual.x_BLD), *TOKEN_AXES)
        return DecoderOutput(to_token_order(hidden_BLD, context.row_order), residual.auxiliary, context=context)

    def predict_ahead(self, output: DecoderOutput, stream: Stream) -> list[tuple[Stream, DecoderOutput]]:
        """For each prediction module the tokens that it reads, with its targets, and its outputs.

        Args:
          output: of `apply` for this stream.
        """
        hidden_BLD, outputs = output.hidden_BLD, []
        order, axes = output.context.row_order, output.context.residual_axes
        for number, module in enumerate(self.multi_token, 1):
            ahead = look_ahead(stream, number)
            tokens_BL, positions_BL, segment_ids_BL = (
                to_row_order(x, order) for x in (ahead.tokens, ahead.positions, ahead.segment_ids)
            )
            hidden_BLD, auxiliary = module(
                shard(self._embed(tokens_BL, positions_BL), *axes),
                shard(to_row_order(hidden_BLD, order), *axes),
                replace(output.context, segment_ids_BL=segment_ids_BL),
            )
            hidden_BLD = to_token_order(shard(hidden_BLD, *TOKEN_AXES), order)
            outputs.append((ahead, DecoderOutput(hidden_BLD, auxiliary)))
        return outputs

    def _apply_groups(self, numbers: range, residual: Residual, context: TokenContext) -> Residual:
        for number in numbers:
            layers, pattern = self.layers[number], self.config.layers[number].pattern
            first = self._first_layer(number)
            x_BLD, added, _ = apply_group(layers, pattern, self.execution, residual.x_BLD, context, first=first)
            residual = Residual(x_BLD, unite([residual.auxiliary, added]))
        return residual

    def _extend(self, tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL, caches) -> DecoderOutput:
        tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL = jax.tree.map(
            lambda x: shard(x, "batch", "length"), (tokens_BL, positions_BL, segment_ids_BL, prefix_lengths_BL)
        )
        context = self._context(positions_BL, segment_ids_BL, prefix_lengths_BL)
        x_BLD, auxiliary, extended = self._embed(tokens_BL, positions_BL), [], []
        for number, (layers, group, cache) in enumerate(zip(self.layers, self.config.layers, caches)):
            layers, first = jax.tree.map(gather_layers, layers), self._first_layer(number)
            x_BLD, added, cache = apply_group(layers, group.pattern, self.execution, x_BLD, context, cache, first=first)
            auxiliary.append(added)
            extended.append(cache)
        return DecoderOutput(self.final_norm(x_BLD), unite(auxiliary), tuple(extended))

    def _context(self, positions_BL, segment_ids_BL, prefix_lengths_BL) -> TokenContext:
        context = TokenContext.create(self.config, positions_BL, segment_ids_BL, prefix_lengths_BL)
        if self.config.bias_table is None:
            return context
        settings, _ = self.config.bias_table
        bias = RelativeBuckets(self.relative_bias, settings.max_distance, bidirectional=False)
        return replace(context, relative_bias=bias)

    def _embed(self, tokens_BL, positions_BL) -> jax.Array:
        config, dtype = self.config, self.execution.activation_dtype
        x_BLD = embed(self.embedding, tokens_BL, dtype)
        if config.embedding_scale is not None:
            # A Python number keeps the dtype.
            x_BLD = x_BLD * config.embedding_scale
        if config.learned_positions is not None:
            # Padding has no position.
            x_BLD = x_BLD + embed(self.positions, jnp.maximum(positions_BL, 0), dtype)
        return self.embedding_norm(x_BLD) if config.embedding_norm else x_BLD

    def _first_layer(self, group: int) -> int:
        """The number of a group's first layer."""
        return sum(each.num_layers for each in self.config.layers[:group])

    def create_caches(self, batch_size: int, max_length: int, dtype: Any) -> Any:
        """Empty caches of all layers, for sequences of up to `max_length` tokens."""
        return create_caches(self.layers, self.config, batch_size, max_length, dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 logits [..., vocab] of hidden states [..., embed]."""
        return _output_head(self.config, self.execution).logits(self._head(), hidden)

    def log_probabilities(
        self, hidden_BLD: jax.Array, targets_BL: jax.Array, *, temperature: float = 1.0, smoothing: float = 0.0
    ) -> tuple[jax.Array, jax.Array]:
        """log p(target) and log of the normalizer of softmax(logits / temperature), float32 [batch, length].

        The full logits are never materialized.

        Args:
          smoothing: label smoothing of log p(target); see `ops.loss.Head`.
        """
        head = replace(_output_head(self.config, self.execution, temperature), smoothing=smoothing)
        chunk_length = self.execution.loss_chunk_length
        return log_probabilities_in_chunks(head, self._head(), hidden_BLD, targets_BL, chunk_length=chunk_length)

    def _head(self):
        """The output table [vocab, embed]."""
        table = self.embedding if self.config.tie_embeddings else self.head
        return with_unit_rows(table) if self.config.normalized_head else table


def with_execution(model: Decoder, execution: ExecutionConfig) -> Decoder:
    """The same model, computed in another way."""
    weights = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    return jax.tree.unflatten(jax.tree.structure(type(model)(model.config, execution)), weights)


def with_matrices_cast(model: Decoder) -> Decoder:
    """The same model with the matrices of its layers in the dtype of the operands of their products: the same results.

    Quantized matrices, and those whose products are 8-bit, are unchanged.
    """
    if model.execution.eight_bit is not None:
        return model
    dtype = operand_dtype(model.execution.matmul_dtype)
    declared, flat = flatten(type(model)(model.config, model.execution)), flatten(model)
    cast = {path: flat[path].astype(dtype) for path, each in declared.items() if each.role == "matrix" and path in flat}
    return unflatten(flat | cast, model)


def _table(
    config: ModelConfig, execution: ExecutionConfig, num_rows: int | None = None, axis: str | None = "vocab"
) -> Any:
    """A row for each token of the vocabulary, or for each of something else."""
    shape = (config.vocab_size if num_rows is None else num_rows, config.embed_dim)
    dtype = jnp.dtype(execution.parameter_dtype)
    return nnx.data(Parameter(shape, (axis, "embed"), Normal(0.02), dtype, role="table"))


def _score_table(num_scores: int, config: ModelConfig, execution: ExecutionConfig) -> Any:
    """A row for each score of a hidden state; zeros, so that all begin equal."""
    dtype = jnp.dtype(execution.parameter_dtype)
    return nnx.data(Parameter((num_scores, config.embed_dim), (None, None), zeros, dtype, role="table"))


def _bias_table(config: ModelConfig) -> Any:
    """A number for each range of distances and each head; drawn as in T5."""
    settings, num_heads = config.bias_table
    initializer = Normal(1 / math.sqrt(config.embed_dim))
    return nnx.data(Parameter((settings.buckets, num_heads), (None, "heads"), initializer, role="bias_table"))


def _output_head(config: ModelConfig, execution: ExecutionConfig, temperature: float = 1.0) -> Head:
    def transform(logits):
        if config.logit_soft_cap is not None:
            logits = config.logit_soft_cap * jnp.tanh(logits / config.logit_soft_cap)
        return logits / temperature

    # A step changes the table by the same amount at each width, and a logit sums over the width (arXiv:2203.03466).
    return Head(execution.matmul_dtype, config.width, transform, execution.gradient_sum_dtype)
