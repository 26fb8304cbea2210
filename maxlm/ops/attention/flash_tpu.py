"""Flash attention for TPUs, in Pallas: the entry and the forward kernel.

Fully masked blocks are skipped: a static table lists the other pairs of blocks, and the grid runs over
the table. Tiles are kept as [keys, queries]: per-query values (maximum, sum, log-sum-exp) are then rows
along the lanes, stored without padding; sums over keys need no moves across lanes; and no product in
the key and value gradients has to transpose a tile. Logits are in units of log 2, as the hardware computes 2^x.
Algorithm: arXiv:2205.14135 and arXiv:2307.08691.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, H head dim, V value dim, q and s the
lengths of a block of queries and a block of keys.
"""

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxlm.ops.attention.flash_tpu_gradients import gradients
from maxlm.ops.attention.flash_tpu_tile import (
    LANES,
    LOG2_E,
    Kernel,
    columns,
    cost_estimate,
    dot,
    dropout,
    ends_of_run,
    for_visible,
    rows,
    tile_operands,
    tile_specs,
    visible_pairs,
)
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.position_bias import DistanceBias, PositionBias
from maxlm.ops.attention.rule import MASKED_LOGIT, AttentionRule
from maxlm.ops.dropout import WeightDropout


@dataclasses.dataclass(frozen=True)
class Kernels:
    """`flash.Blocks` by the kernels.

    Lengths are padded to multiples of the blocks. Under a mesh, use it inside `jax.shard_map(..., check_vma=False)`.

    Attributes:
      matmul_dtype: of the operands of matrix products, which accumulate in float32.
      result_dtype: of the output and the gradients of query, key and value.
      largest_block: of queries and of keys; by default chosen by the length and the rule.
      interpret: runs the kernels on a CPU, in tests.
    """

    matmul_dtype: jnp.dtype
    result_dtype: jnp.dtype
    largest_block: int | None = None
    interpret: bool = False

    def forward(self, rule: AttentionRule, query_BNTH, key_BKSH, value_BKSV, operands: AttentionOperands):
        length = query_BNTH.shape[2]
        kernel = self._kernel(rule, length, key_BKSH.shape[2], operands)
        arrays, operands = self._padded(kernel, query_BNTH, key_BKSH, value_BKSV, operands)
        output_BNTV, log_sum_BN1T = _forward(kernel, arrays, operands)
        log_sum_BNT = log_sum_BN1T[:, :, 0, :length]
        log_sum_BNT = jnp.where(log_sum_BNT < -MASKED_LOGIT, log_sum_BNT / LOG2_E, -MASKED_LOGIT)
        return output_BNTV[:, :, :length], log_sum_BNT

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
        length, key_length = query_BNTH.shape[2], key_BKSH.shape[2]
        kernel = self._kernel(rule, length, key_length, operands)
        arrays, padded = self._padded(kernel, query_BNTH, key_BKSH, value_BKSV, operands)
        gradient_BNTV = _pad_length(gradient_BNTV.astype(self.matmul_dtype), kernel.length, axis=2)
        # Padding queries have no probabilities, whatever their biases.
        log_sum_BNT = _pad_length(log_sum_BNT * LOG2_E, kernel.length, -MASKED_LOGIT, axis=2)
        mean_BNT = _pad_length(mean_BNT, kernel.length, axis=2)
        log_sum_BN1T, mean_BN1T = log_sum_BNT[:, :, None], mean_BNT[:, :, None]
        query, key, value, by_distance_ND = gradients(kernel, (*arrays, gradient_BNTV, log_sum_BN1T, mean_BN1T), padded)
        if operands.position_bias is not None:
            first = kernel.key_length - key_length
            by_distance_ND = by_distance_ND[:, first : first + length + key_length - 1]
            bias_gradients = AttentionOperands(
                position_bias=dataclasses.replace(operands.position_bias, values_ND=by_distance_ND)
            )
        else:
            bias_gradients = AttentionOperands()
        return query[:, :, :length], key[:, :, :key_length], value[:, :, :key_length], bias_gradients

    def _kernel(self, rule: AttentionRule, length: int, key_length: int, operands: AttentionOperands) -> Kernel:
        reach = rule if operands.prefix is None else rule.bidirectional
        largest = self.largest_block or _largest_block(rule, min(length, key_length))
        query_block, key_block = _block_size(length, largest), _block_size(key_length, largest)
        lengths = length + -length % query_block, key_length + -key_length % key_block
        rate = 0.0 if operands.dropout is None else operands.dropout.rate
        return Kernel(rule, reach, *lengths, query_block, key_block, self.result_dtype, self.interpret, rate)

    def _padded(self, kernel: Kernel, query_BNTH, key_BKSH, value_BKSV, operands: AttentionOperands) -> Any:
        """The arrays cast and padded to the lengths of the kernel; no query attends to a padding key."""
        query_BNTH, key_BKSH, value_BKSV = (x.astype(self.matmul_dtype) for x in (query_BNTH, key_BKSH, value_BKSV))
        batch, _, length, _ = query_BNTH.shape
        key_length = key_BKSH.shape[2]
        segments, prefix = operands.segments, operands.prefix
        hides_padding = kernel.rule.causal and length + kernel.rule.offset <= key_length
        if key_length < kernel.key_length and segments is None and not hides_padding:
            segments = jnp.ones((batch, length), jnp.int32), jnp.ones((batch, key_length), jnp.int32)
        operands = dataclasses.replace(
            operands,
            segments=segments
            and (_pad_length(segments[0], kernel.length), _pad_length(segments[1], kernel.key_length)),
            prefix=prefix and (_pad_length(prefix[0], kernel.length), _pad_length(prefix[1], kernel.key_length)),
            position_bias=_padded_bias(kernel, length, key_length, operands.position_bias),
            mask_BNTS=_padded_mask(kernel, operands.mask_BNTS),
            dropout=_padded_dropout(kernel, operands.dropout),
        )
        key_BKSH, value_BKSV = (_pad_length(x, kernel.key_length, axis=2) for x in (key_BKSH, value_BKSV))
        return (_pad_length(query_BNTH, kernel.length, axis=2), key_BKSH, value_BKSV), operands


def _largest_block(rule: AttentionRule, length: int) -> int:
    """Large blocks cost less per element, but more elements that are masked: along the diagonal and window."""
    reach = length if rule.window is None else min(length, rule.window)
    return 1024 if reach >= 4096 else 512


def _block_size(length: int, largest: int) -> int:
    """A multiple of the number of lanes, at most `largest`, that splits `length` evenly."""
    blocks = -(-length // largest)
    return -(-length // (blocks * LANES)) * LANES


def _pad_length(x, length: int, value: float = 0, axis: int = 1):
    padding = [(0, length - size if i == axis else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, padding, constant_values=value)


def _padded_bias(kernel: Kernel, length: int, key_length: int, bias: PositionBias | None) -> DistanceBias | None:
    """The biases of all distances of the padded lengths, and one more that does not occur: length + key_length."""
    if bias is None:
        return None
    padding = kernel.key_length - key_length, kernel.length - length + 1
    return DistanceBias(jnp.pad(cast(DistanceBias, bias).values_ND, ((0, 0), padding)), 1 - kernel.key_length)


def _padded_mask(kernel: Kernel, mask_BNTS):
    if mask_BNTS is None:
        return None
    length, key_length = mask_BNTS.shape[2:]
    return jnp.pad(mask_BNTS, ((0, 0), (0, 0), (0, kernel.length - length), (0, kernel.key_length - key_length)))


def _padded_dropout(kernel: Kernel, dropout: WeightDropout | None) -> WeightDropout | None:
    if dropout is None:
        return None
    return WeightDropout(
        _pad_length(dropout.query_seeds_BTN, kernel.length),
        _pad_length(dropout.key_seeds_BS, kernel.key_length),
        dropout.rate,
    )


def _forward(kernel: Kernel, arrays, operands: AttentionOperands):
    """The output [B, N, T, V] and the log-sum-exp of the logits in units of log 2, [B, N, 1, T]."""
    query_BNTH, key_BKSH, value_BKSV = arrays
    batch, num_heads, length, head_dim = query_BNTH.shape
    value_dim = value_BKSV.shape[3]
    group = num_heads // value_BKSV.shape[1]
    pairs = visible_pairs(kernel)
    tile = tile_operands(operands)

    def query_at(batch, head, pair, pairs):
        return batch, head, pairs[0, pair]

    def key_at(batch, head, pair, pairs):
        return batch, head // group, pairs[1, pair]

    output_BNVT, log_sum_BN1T = pl.pallas_call(
        functools.partial(_forward_kernel, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_heads, pairs.shape[1]),
            in_specs=[
                rows(query_at, kernel.query_block, head_dim),
                rows(key_at, kernel.key_block, head_dim),
                columns(key_at, value_dim, kernel.key_block),
                tile_specs(kernel, tile, query_at, key_at),
            ],
            out_specs=[columns(query_at, value_dim, kernel.query_block), columns(query_at, 1, kernel.query_block)],
            scratch_shapes=[
                pltpu.VMEM((1, kernel.query_block), jnp.float32),
                pltpu.VMEM((1, kernel.query_block), jnp.float32),
                pltpu.VMEM((value_dim, kernel.query_block), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_heads, value_dim, length), kernel.result_dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost_estimate(kernel, batch * num_heads * pairs.shape[1], query_BNTH, products=2),
        interpret=kernel.interpret,
        name="flash_attention_forward",
    )(pairs, query_BNTH, key_BKSH, value_BKSV.swapaxes(2, 3), tile)
    return output_BNVT.swapaxes(2, 3), log_sum_BN1T


def _forward_kernel(
    kernel, pairs, query_qH, key_sH, value_Vs, tile, output_Vq, log_sum_1q, largest_1q, sum_1q, mixed_Vq
):
    first, last = ends_of_run(pairs, pl.program_id(2), pl.num_programs(2))

    @pl.when(first)
    def _start():
        largest_1q[...] = jnp.full_like(largest_1q, MASKED_LOGIT)
        sum_1q[...] = jnp.zeros_like(sum_1q)
        mixed_Vq[...] = jnp.zeros_like(mixed_Vq)

    def step(finish_sq):
        logits_sq = finish_sq(kernel.rule.logits(dot(key_sH[...], query_qH[...], 1, 1)))
        new_largest_1q = jnp.maximum(largest_1q[...], jnp.max(logits_sq, axis=0, keepdims=True))
        weights_sq = jnp.exp2(logits_sq - new_largest_1q)
        decay_1q = jnp.exp2(largest_1q[...] - new_largest_1q)
        largest_1q[...] = new_largest_1q
        sum_1q[...] = sum_1q[...] * decay_1q + jnp.sum(weights_sq, axis=0, keepdims=True)
        value, drop = value_Vs[...], dropout(kernel, tile)
        mixed_Vq[...] = mixed_Vq[...] * decay_1q + dot(value, drop(weights_sq).astype(value.dtype), 1, 0)

    for_visible(kernel, pairs, tile, step)

    @pl.when(last)
    def _finish():
        # Weights of a fully masked query are 2^0 everywhere so far: its output is zero, and +1e30 makes
        # every probability of the backward pass zero.
        sees_any = largest_1q[...] > MASKED_LOGIT / 2
        output_Vq[...] = jnp.where(sees_any, mixed_Vq[...] / sum_1q[...], 0.0).astype(output_Vq.dtype)
        log_sum_1q[...] = jnp.where(sees_any, largest_1q[...] + jnp.log(sum_1q[...]) * LOG2_E, -MASKED_LOGIT)
