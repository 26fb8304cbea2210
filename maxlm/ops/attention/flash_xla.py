"""Blockwise attention in plain XLA: for CPUs, and where no kernel is available.

Queries are split into a few static blocks; each computes only keys that are not masked, so causal attention costs
about half, and the backward pass recomputes probabilities from the saved log-sum-exp (arXiv:2205.14135) instead
of storing them.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K, H head dim, V value dim; q
and s are the lengths of a block of queries and of its keys.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from maxlm.core.hardware import traced_platform
from maxlm.ops.attention.operands import AttentionOperands, group_heads
from maxlm.ops.attention.rule import MASKED_LOGIT, AttentionRule

_MOST_BLOCKS = 8
_SMALLEST_BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """`flash.Blocks` in plain XLA. Operands of the products are `matmul_dtype`, results are float32."""

    matmul_dtype: jnp.dtype

    def forward(self, rule: AttentionRule, query_BNTH, key_BKSH, value_BKSV, operands: AttentionOperands):
        query_BKGTH = group_heads(query_BNTH, key_BKSH.shape[1])
        product = functools.partial(_einsum, self.matmul_dtype)
        outputs, log_sums = [], []
        for queries, keys in _blocks(_reach(rule, operands), query_BNTH.shape[2], key_BKSH.shape[2]):
            query_BKGqH, key_BKsH = query_BKGTH[:, :, :, queries], key_BKSH[:, :, keys]
            logits_BKGqs = rule.logits(product("bkgqh,bksh->bkgqs", query_BKGqH, key_BKsH))
            if any(bias is not None for bias in operands.biases):
                logits_BKGqs += _block_bias(operands.biases, logits_BKGqs.shape, queries, keys)
            logits_BKGqs = _mask(rule, logits_BKGqs, operands, queries, keys)
            largest_BKGq1 = jnp.max(logits_BKGqs, axis=-1, keepdims=True)
            weights_BKGqs = jnp.exp(logits_BKGqs - largest_BKGq1)
            sum_BKGq1 = jnp.sum(weights_BKGqs, axis=-1, keepdims=True)
            weights_BKGqs = _drop(operands, weights_BKGqs, queries, keys)
            mixed_BKGqV = product("bkgqs,bksh->bkgqh", weights_BKGqs, value_BKSV[:, :, keys])
            sees_any = largest_BKGq1 > MASKED_LOGIT / 2
            outputs.append(jnp.where(sees_any, mixed_BKGqV / sum_BKGq1, 0.0))
            log_sums.append(jnp.where(sees_any, largest_BKGq1 + jnp.log(sum_BKGq1), -MASKED_LOGIT))
        output_BNTV, log_sum_BNT1 = (_all_heads(jnp.concatenate(parts, axis=3)) for parts in (outputs, log_sums))
        return output_BNTV, log_sum_BNT1[..., 0]

    def backward(
        self,
        rule: AttentionRule,
        query_BNTH,
        key_BKSH,
        value_BKSV,
        operands: AttentionOperands,
        log_sum_BNT,
        mean_BNT,
        gradient_BNTV,
    ):
        length, (num_kv_heads, key_length) = query_BNTH.shape[2], key_BKSH.shape[1:3]
        query_BKGTH, gradient_BKGTV, log_sum_BKGT1, mean_BKGT1 = (
            group_heads(x, num_kv_heads)
            for x in (query_BNTH, gradient_BNTV, log_sum_BNT[..., None], mean_BNT[..., None])
        )
        product = functools.partial(_einsum, self.matmul_dtype)

        query_gradients, key_pieces, value_pieces = [], [], []
        bias_gradients = jax.tree.map(jnp.zeros_like, operands.biases)
        blocks = _blocks(_reach(rule, operands), length, key_length)
        of_gradients = product
        if len(blocks) == 1 and traced_platform() == "cpu":
            # Into a single product XLA folds a transposition of the result, and CPUs lack what results in 16 bits.
            of_gradients = functools.partial(_einsum, self.matmul_dtype, product_dtype=jnp.float32)
        for queries, keys in blocks:
            query_BKGqH, gradient_BKGqV = query_BKGTH[:, :, :, queries], gradient_BKGTV[:, :, :, queries]
            key_BKsH, value_BKsV = key_BKSH[:, :, keys], value_BKSV[:, :, keys]
            logits_BKGqs = rule.logits(product("bkgqh,bksh->bkgqs", query_BKGqH, key_BKsH))
            biased_BKGqs, to_biases = logits_BKGqs, None
            if any(bias is not None for bias in operands.biases):
                of_block = functools.partial(_block_bias, shape=logits_BKGqs.shape, queries=queries, keys=keys)
                bias_BKGqs, to_biases = jax.vjp(of_block, operands.biases)
                biased_BKGqs = logits_BKGqs + bias_BKGqs
            masked_BKGqs = _mask(rule, biased_BKGqs, operands, queries, keys)
            probabilities_BKGqs = jnp.exp(masked_BKGqs - log_sum_BKGT1[:, :, :, queries])
            mixed_gradient_BKGqs = product("bkgqh,bksh->bkgqs", gradient_BKGqV, value_BKsV)
            weights_gradient_BKGqs = _drop(operands, mixed_gradient_BKGqs, queries, keys)
            logits_gradient_BKGqs = probabilities_BKGqs * (weights_gradient_BKGqs - mean_BKGT1[:, :, :, queries])
            weights_BKGqs = _drop(operands, probabilities_BKGqs, queries, keys)
            product_gradient_BKGqs = rule.product_gradient(logits_BKGqs, logits_gradient_BKGqs)
            query_gradients.append(of_gradients("bkgqs,bksh->bkgqh", product_gradient_BKGqs, key_BKsH))
            # [H, s], not [s, H]: then the small operand is transposed, which is faster on CPUs.
            key_pieces.append(of_gradients("bkgqh,bkgqs->bkhs", query_BKGqH, product_gradient_BKGqs))
            value_pieces.append(of_gradients("bkgqh,bkgqs->bkhs", gradient_BKGqV, weights_BKGqs))
            if to_biases is not None:
                bias_gradients = jax.tree.map(jnp.add, bias_gradients, to_biases(logits_gradient_BKGqs)[0])

        return (
            _all_heads(jnp.concatenate(query_gradients, axis=3)),
            _sum_over_blocks(blocks, key_pieces, key_length),
            _sum_over_blocks(blocks, value_pieces, key_length),
            AttentionOperands(position_bias=bias_gradients[0], bias_BNTS=bias_gradients[1]),
        )


def _einsum(matmul_dtype, formula: str, left, right, *, product_dtype=None):
    """A product in float32 of operands rounded to `matmul_dtype`; in `product_dtype`, if they are then converted."""
    left, right = (x.astype(matmul_dtype).astype(product_dtype or matmul_dtype) for x in (left, right))
    return jnp.einsum(formula, left, right, preferred_element_type=jnp.float32)


def _all_heads(x_BKGTH):
    """[B, K, G, T, H] as [B, N, T, H]."""
    batch, num_kv_heads, group, length, width = x_BKGTH.shape
    return x_BKGTH.reshape(batch, num_kv_heads * group, length, width)


def _reach(rule: AttentionRule, operands: AttentionOperands) -> AttentionRule:
    """The rule that no query looks beyond."""
    return rule if operands.prefix is None else rule.bidirectional


def _block_bias(biases, shape, queries: slice, keys: slice) -> jax.Array:
    """The sum of the biases of a block, float32 [B, K, G, q, s]."""
    position_bias, bias_BNTS = biases
    parts = []
    if position_bias is not None:
        parts.append(position_bias.block(queries, keys)[None])
    if bias_BNTS is not None:
        parts.append(bias_BNTS[:, :, queries, keys].astype(jnp.float32))
    return jnp.broadcast_to(sum(group_heads(part, shape[1]) for part in parts), shape)


def _drop(operands: AttentionOperands, weights_BKGqs, queries: slice, keys: slice):
    return weights_BKGqs if operands.dropout is None else operands.dropout.block(queries, keys).apply(weights_BKGqs)


def _mask(rule, logits_BKGqs, operands: AttentionOperands, queries: slice, keys: slice):
    positions = jnp.arange(queries.start, queries.stop), jnp.arange(keys.start, keys.stop)
    visible = operands.block(queries, keys).visible(rule, *positions)
    if visible is True:
        return logits_BKGqs
    return jnp.where(group_heads(visible, logits_BKGqs.shape[1]), logits_BKGqs, MASKED_LOGIT)


def _blocks(rule: AttentionRule, query_length: int, key_length: int) -> list[tuple[slice, slice]]:
    """Every block of queries with the range of keys that any of them may attend to."""
    block = max(_SMALLEST_BLOCK, -(-query_length // _MOST_BLOCKS))
    blocks = []
    for start in range(0, query_length, block):
        end = min(start + block, query_length)
        first, last = 0, key_length
        if rule.window is not None:
            first = max(first, start + rule.offset - rule.window + 1)
        if rule.causal:
            last = min(last, end + rule.offset)
        elif rule.window is not None:
            last = min(last, end + rule.offset - 1 + rule.window)
        # A block with all keys masked still takes one key: the mask turns its rows into zeros.
        first = min(first, key_length - 1)
        blocks.append((slice(start, end), slice(first, max(first + 1, last))))
    return blocks


def _sum_over_blocks(blocks, pieces: list[jax.Array], key_length: int) -> jax.Array:
    """The sum [B, K, S, H] of pieces [B, K, H, s], each over its own block's keys; zeros without a piece."""
    edges = sorted({0, key_length, *(edge for _, keys in blocks for edge in (keys.start, keys.stop))})
    spans = []
    for start, end in itertools.pairwise(edges):
        here = [
            piece[..., start - keys.start : end - keys.start]
            for (_, keys), piece in zip(blocks, pieces)
            if keys.start <= start and end <= keys.stop
        ]
        spans.append(sum(here) if here else jnp.zeros((*pieces[0].shape[:-1], end - start), pieces[0].dtype))
    return jnp.concatenate(spans, axis=-1).swapaxes(2, 3)
