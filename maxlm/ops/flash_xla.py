"""Blockwise attention in plain XLA: for CPUs, and where no kernel is available.

Queries are split into a few static blocks; each computes only keys that are not masked, so causal attention costs
about half, and the backward pass recomputes probabilities from the saved log-sum-exp (arXiv:2205.14135) instead
of storing them.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K, H head dim; q and s are
the lengths of a block of queries and of its keys.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp

from maxlm.ops.attention_rule import MASKED_LOGIT, AttentionRule, mean_gradient

_MOST_BLOCKS = 8
_SMALLEST_BLOCK = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def flash_attention(rule: AttentionRule, matmul_dtype, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS):
    """Attention as `maxlm.ops.attention.attention` defines it; segment ids are both given or both None.

    Operands of the matrix products are cast to `matmul_dtype`; products and softmax are float32.
    """
    return _forward(rule, matmul_dtype, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS)[0]


def _forward(rule, matmul_dtype, query_BTNH, *operands):
    output_BTNH, log_sum_BTN = Blockwise(matmul_dtype).forward(rule, query_BTNH, *operands)
    output_BTNH = output_BTNH.astype(query_BTNH.dtype)
    return output_BTNH, (query_BTNH, *operands, output_BTNH, log_sum_BTN)


def _backward(rule, matmul_dtype, residuals, gradient_BTNH):
    *operands, output_BTNH, log_sum_BTN = residuals
    mean_BTN = mean_gradient(output_BTNH, gradient_BTNH)
    gradients = Blockwise(matmul_dtype).backward(rule, *operands, log_sum_BTN, mean_BTN, gradient_BTNH)
    return *(gradient.astype(x.dtype) for gradient, x in zip(gradients, operands)), None, None


flash_attention.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """Attention over part of the keys of a query, as parts that can be merged."""

    matmul_dtype: jnp.dtype

    def forward(self, rule: AttentionRule, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS):
        """The output [B, T, N, H] and the log-sum-exp of the logits [B, T, N], float32.

        For a fully masked query they are 0 and +1e30, which makes its probabilities in `backward` exact zeros.
        """
        query_BKGTH = _group(query_BTNH, key_BSKH.shape[2])
        key_BKSH, value_BKSH = key_BSKH.swapaxes(1, 2), value_BSKH.swapaxes(1, 2)
        product = functools.partial(_einsum, self.matmul_dtype)
        outputs, log_sums = [], []
        for queries, keys in _blocks(rule, query_BTNH.shape[1], key_BSKH.shape[1]):
            query_BKGqH, key_BKsH = query_BKGTH[:, :, :, queries], key_BKSH[:, :, keys]
            logits_BKGqs = rule.logits(product("bkgqh,bksh->bkgqs", query_BKGqH, key_BKsH))
            logits_BKGqs = _mask(rule, logits_BKGqs, segments_BT, segments_BS, queries, keys)
            largest_BKGq1 = jnp.max(logits_BKGqs, axis=-1, keepdims=True)
            weights_BKGqs = jnp.exp(logits_BKGqs - largest_BKGq1)
            sum_BKGq1 = jnp.sum(weights_BKGqs, axis=-1, keepdims=True)
            mixed_BKGqH = product("bkgqs,bksh->bkgqh", weights_BKGqs, value_BKSH[:, :, keys])
            sees_any = largest_BKGq1 > MASKED_LOGIT / 2
            outputs.append(jnp.where(sees_any, mixed_BKGqH / sum_BKGq1, 0.0))
            log_sums.append(jnp.where(sees_any, largest_BKGq1 + jnp.log(sum_BKGq1), -MASKED_LOGIT))
        output_BTNH, log_sum_BTN1 = (_ungroup(jnp.concatenate(parts, axis=3)) for parts in (outputs, log_sums))
        return output_BTNH, log_sum_BTN1[..., 0]

    def backward(
        self,
        rule: AttentionRule,
        query_BTNH,
        key_BSKH,
        value_BSKH,
        segments_BT,
        segments_BS,
        log_sum_BTN,
        mean_BTN,
        gradient_BTNH,
    ):
        """Gradients of query, key and value, float32; `log_sum_BTN` and `mean_BTN` are over all keys."""
        length, (key_length, num_kv_heads) = query_BTNH.shape[1], key_BSKH.shape[1:3]
        query_BKGTH, gradient_BKGTH, log_sum_BKGT1, mean_BKGT1 = (
            _group(x, num_kv_heads) for x in (query_BTNH, gradient_BTNH, log_sum_BTN[..., None], mean_BTN[..., None])
        )
        key_BKSH, value_BKSH = key_BSKH.swapaxes(1, 2), value_BSKH.swapaxes(1, 2)
        product = functools.partial(_einsum, self.matmul_dtype)

        query_gradients, key_pieces, value_pieces = [], [], []
        blocks = _blocks(rule, length, key_length)
        for queries, keys in blocks:
            query_BKGqH, gradient_BKGqH = query_BKGTH[:, :, :, queries], gradient_BKGTH[:, :, :, queries]
            key_BKsH, value_BKsH = key_BKSH[:, :, keys], value_BKSH[:, :, keys]
            logits_BKGqs = rule.logits(product("bkgqh,bksh->bkgqs", query_BKGqH, key_BKsH))
            masked_BKGqs = _mask(rule, logits_BKGqs, segments_BT, segments_BS, queries, keys)
            probabilities_BKGqs = jnp.exp(masked_BKGqs - log_sum_BKGT1[:, :, :, queries])
            above_mean_BKGqs = product("bkgqh,bksh->bkgqs", gradient_BKGqH, value_BKsH) - mean_BKGT1[:, :, :, queries]
            product_gradient_BKGqs = rule.product_gradient(logits_BKGqs, probabilities_BKGqs * above_mean_BKGqs)
            query_gradients.append(product("bkgqs,bksh->bkgqh", product_gradient_BKGqs, key_BKsH))
            # [H, s], not [s, H]: then the small operand is transposed, which is faster on CPUs.
            key_pieces.append(product("bkgqh,bkgqs->bkhs", query_BKGqH, product_gradient_BKGqs))
            value_pieces.append(product("bkgqh,bkgqs->bkhs", gradient_BKGqH, probabilities_BKGqs))

        return (
            _ungroup(jnp.concatenate(query_gradients, axis=3)),
            _sum_over_blocks(blocks, key_pieces, key_length),
            _sum_over_blocks(blocks, value_pieces, key_length),
        )


def _einsum(matmul_dtype, formula: str, left, right):
    return jnp.einsum(
        formula, left.astype(matmul_dtype), right.astype(matmul_dtype), preferred_element_type=jnp.float32
    )


def _group(x_BTNH, num_kv_heads: int):
    """Heads first, grouped by their key-value head: [B, K, G, T, H]."""
    batch, length, num_heads, width = x_BTNH.shape
    return x_BTNH.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, width).transpose(0, 2, 3, 1, 4)


def _ungroup(x_BKGTH):
    batch, num_kv_heads, group, length, width = x_BKGTH.shape
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_kv_heads * group, width)


def _mask(rule, logits_BKGqs, segments_BT, segments_BS, queries: slice, keys: slice):
    query_position = jnp.arange(queries.start, queries.stop)[:, None]
    key_position = jnp.arange(keys.start, keys.stop)[None, :]
    visible = rule.sees(query_position, key_position)
    if segments_BT is not None:
        query_segment, key_segment = segments_BT[:, queries, None], segments_BS[:, None, keys]
        visible &= (query_segment == key_segment) & (query_segment != 0)
        visible = visible[:, None, None]
    return logits_BKGqs if visible is True else jnp.where(visible, logits_BKGqs, MASKED_LOGIT)


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
    """The sum [B, S, K, H] of pieces [B, K, H, s], each over its own block's keys; zeros without a piece."""
    edges = sorted({0, key_length, *(edge for _, keys in blocks for edge in (keys.start, keys.stop))})
    spans = []
    for start, end in itertools.pairwise(edges):
        here = [
            piece[..., start - keys.start : end - keys.start]
            for (_, keys), piece in zip(blocks, pieces)
            if keys.start <= start and end <= keys.stop
        ]
        spans.append(sum(here) if here else jnp.zeros((*pieces[0].shape[:-1], end - start), pieces[0].dtype))
    return jnp.concatenate(spans, axis=-1).transpose(0, 3, 1, 2)
