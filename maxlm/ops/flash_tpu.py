"""Flash attention for TPUs: Pallas kernels for the forward pass, the query gradient, and the key and value gradients.

Fully masked blocks are skipped: a static table lists the other pairs of blocks, and the grid runs over
the table. Tiles are kept as [keys, queries]: per-query values (maximum, sum, log-sum-exp) are then rows
along the lanes, stored without padding; sums over keys need no moves across lanes; and no product in
the key and value gradients has to transpose a tile. Logits are in units of log 2, as the hardware computes 2^x.
Algorithm: arXiv:2205.14135 and arXiv:2307.08691.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, H head dim, q and s the lengths of a
block of queries and a block of keys. Every length is a multiple of its block inside this file.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxlm.ops.attention_rule import MASKED_LOGIT, AttentionRule, mean_gradient

_LANES = 128
_LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """Static parameters of one call. Results have the dtype of the operands, or `result_dtype`."""

    rule: AttentionRule
    query_block: int
    key_block: int
    interpret: bool
    result_dtype: jnp.dtype | None = None


def flash_attention(
    rule: AttentionRule,
    query_BTNH,
    key_BSKH,
    value_BSKH,
    segments_BT,
    segments_BS,
    *,
    largest_block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attention as `maxlm.ops.attention.attention` defines it; segment ids are both given or both None.

    Matrix products keep the dtype of their operands and return float32. Lengths are padded to multiples of the blocks.
    Under a mesh, call it inside `jax.shard_map(..., check_vma=False)`. `interpret` runs the kernels on a CPU, in tests.
    """
    kernel = _kernel(rule, query_BTNH.shape[1], key_BSKH.shape[1], largest_block, interpret)
    operands = _padded(kernel, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS)
    return _attention(kernel, *operands)[:, : query_BTNH.shape[1]]


@dataclasses.dataclass(frozen=True)
class Kernels:
    """Attention over part of the keys of a query, by the kernels, as parts that can be merged.

    The same interface as `maxlm.ops.flash_xla.Blockwise`.
    """

    matmul_dtype: jnp.dtype
    largest_block: int | None = None
    interpret: bool = False

    def forward(self, rule: AttentionRule, *operands):
        length, kernel, operands = self._prepare(rule, *operands)
        output_BTNH, (*_, log_sum_BN1T) = _forward(kernel, *operands)
        log_sum_BTN = log_sum_BN1T[:, :, 0, :length].swapaxes(1, 2)
        log_sum_BTN = jnp.where(log_sum_BTN < -MASKED_LOGIT, log_sum_BTN / _LOG2_E, -MASKED_LOGIT)
        return output_BTNH[:, :length], log_sum_BTN

    def backward(self, rule: AttentionRule, *operands):
        *unpadded, log_sum_BTN, mean_BTN, gradient_BTNH = operands
        key_length = unpadded[1].shape[1]
        length, kernel, arrays = self._prepare(rule, *unpadded)
        gradient_BTNH, log_sum_BTN, mean_BTN = (
            _pad_length(x, arrays[0].shape[1] - length)
            for x in (gradient_BTNH.astype(self.matmul_dtype), log_sum_BTN * _LOG2_E, mean_BTN)
        )
        log_sum_BN1T = log_sum_BTN.swapaxes(1, 2)[:, :, None]
        query_gradient, *others = _gradients(kernel, *(*arrays, log_sum_BN1T, mean_BTN, gradient_BTNH))
        return query_gradient[:, :length], *(gradient[:, :key_length] for gradient in others)

    def _prepare(self, rule, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS) -> Any:
        length, key_length = query_BTNH.shape[1], key_BSKH.shape[1]
        kernel = _kernel(rule, length, key_length, self.largest_block, self.interpret, jnp.dtype(jnp.float32))
        query_BTNH, key_BSKH, value_BSKH = (x.astype(self.matmul_dtype) for x in (query_BTNH, key_BSKH, value_BSKH))
        return length, kernel, _padded(kernel, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS)


def _kernel(
    rule, length: int, key_length: int, largest_block: int | None, interpret: bool, result_dtype=None
) -> _Kernel:
    largest_block = largest_block or _largest_block(rule, min(length, key_length))
    blocks = _block_size(length, largest_block), _block_size(key_length, largest_block)
    return _Kernel(rule, *blocks, interpret, result_dtype)


def _largest_block(rule: AttentionRule, length: int) -> int:
    """Large blocks cost less per element, but more elements that are masked: along the diagonal and window."""
    reach = length if rule.window is None else min(length, rule.window)
    return 1024 if reach >= 4096 else 512


def _padded(kernel: _Kernel, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS):
    """The operands padded to multiples of the blocks; no query attends to a padding key."""
    length, key_length = query_BTNH.shape[1], key_BSKH.shape[1]
    query_padding, key_padding = -length % kernel.query_block, -key_length % kernel.key_block
    hides_padding = kernel.rule.causal and length + kernel.rule.offset <= key_length
    if key_padding and segments_BT is None and not hides_padding:
        segments_BT, segments_BS = jnp.ones(query_BTNH.shape[:2], jnp.int32), jnp.ones(key_BSKH.shape[:2], jnp.int32)
    return (
        _pad_length(query_BTNH, query_padding),
        _pad_length(key_BSKH, key_padding),
        _pad_length(value_BSKH, key_padding),
        None if segments_BT is None else _pad_length(segments_BT, query_padding),
        None if segments_BS is None else _pad_length(segments_BS, key_padding),
    )


def _block_size(length: int, largest: int) -> int:
    """A multiple of the number of lanes, at most `largest`, that splits `length` evenly."""
    blocks = -(-length // largest)
    return -(-length // (blocks * _LANES)) * _LANES


def _pad_length(x, padding: int):
    return jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)) if padding else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(kernel: _Kernel, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS):
    return _forward(kernel, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS)[0]


def _forward(kernel, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS):
    batch, length, num_heads, head_dim = query_BTNH.shape
    group = num_heads // key_BSKH.shape[2]
    pairs = _visible_pairs(kernel, length, key_BSKH.shape[1])

    def query_at(batch, head, pair, pairs):
        return batch, head, pairs[0, pair]

    def key_at(batch, head, pair, pairs):
        return batch, head // group, pairs[1, pair]

    output_BNHT, log_sum_BN1T = pl.pallas_call(
        functools.partial(_forward_kernel, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_heads, pairs.shape[1]),
            in_specs=[
                _rows(query_at, kernel.query_block, head_dim),
                _rows(key_at, kernel.key_block, head_dim),
                _columns(key_at, head_dim, kernel.key_block),
                *_segment_specs(kernel, segments_BT, query_at, key_at),
            ],
            out_specs=[_columns(query_at, head_dim, kernel.query_block), _columns(query_at, 1, kernel.query_block)],
            scratch_shapes=[
                pltpu.VMEM((1, kernel.query_block), jnp.float32),
                pltpu.VMEM((1, kernel.query_block), jnp.float32),
                pltpu.VMEM((head_dim, kernel.query_block), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, num_heads, head_dim, length), kernel.result_dtype or query_BTNH.dtype),
            jax.ShapeDtypeStruct((batch, num_heads, 1, length), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(kernel, batch * num_heads * pairs.shape[1], query_BTNH, products=2),
        interpret=kernel.interpret,
        name="flash_attention_forward",
    )(
        pairs,
        query_BTNH.swapaxes(1, 2),
        key_BSKH.swapaxes(1, 2),
        value_BSKH.transpose(0, 2, 3, 1),
        *_segment_rows(segments_BT, segments_BS),
    )
    output_BTNH = output_BNHT.transpose(0, 3, 1, 2)
    return output_BTNH, (query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, output_BTNH, log_sum_BN1T)


def _forward_kernel(kernel, pairs, query_qH, key_sH, value_Hs, *refs):
    *segments, output_Hq, log_sum_1q, largest_1q, sum_1q, mixed_Hq = refs
    first, last = _ends_of_run(pairs, pl.program_id(2), pl.num_programs(2))

    @pl.when(first)
    def _start():
        largest_1q[...] = jnp.full_like(largest_1q, MASKED_LOGIT)
        sum_1q[...] = jnp.zeros_like(sum_1q)
        mixed_Hq[...] = jnp.zeros_like(mixed_Hq)

    def step(mask_sq):
        logits_sq = kernel.rule.logits(_dot(key_sH[...], query_qH[...], 1, 1)) * _LOG2_E
        logits_sq = mask_sq(logits_sq)
        new_largest_1q = jnp.maximum(largest_1q[...], jnp.max(logits_sq, axis=0, keepdims=True))
        weights_sq = jnp.exp2(logits_sq - new_largest_1q)
        decay_1q = jnp.exp2(largest_1q[...] - new_largest_1q)
        largest_1q[...] = new_largest_1q
        sum_1q[...] = sum_1q[...] * decay_1q + jnp.sum(weights_sq, axis=0, keepdims=True)
        value = value_Hs[...]
        mixed_Hq[...] = mixed_Hq[...] * decay_1q + _dot(value, weights_sq.astype(value.dtype), 1, 0)

    _for_visible(kernel, pairs, segments, step)

    @pl.when(last)
    def _finish():
        # Weights of a fully masked query are 2^0 everywhere so far: its output is zero, and +1e30 makes
        # every probability of the backward pass zero.
        sees_any = largest_1q[...] > MASKED_LOGIT / 2
        output_Hq[...] = jnp.where(sees_any, mixed_Hq[...] / sum_1q[...], 0.0).astype(output_Hq.dtype)
        log_sum_1q[...] = jnp.where(sees_any, largest_1q[...] + jnp.log(sum_1q[...]) * _LOG2_E, -MASKED_LOGIT)


def _backward(kernel, residuals, gradient_BTNH):
    *operands, output_BTNH, log_sum_BN1T = residuals
    mean_BTN = mean_gradient(output_BTNH, gradient_BTNH)
    return *_gradients(kernel, *operands, log_sum_BN1T, mean_BTN, gradient_BTNH), None, None


_attention.defvjp(_forward, _backward)


def _gradients(
    kernel, query_BTNH, key_BSKH, value_BSKH, segments_BT, segments_BS, log_sum_BN1T, mean_BTN, gradient_BTNH
):
    operands = (
        query_BTNH.swapaxes(1, 2),
        key_BSKH.swapaxes(1, 2),
        value_BSKH.swapaxes(1, 2),
        gradient_BTNH.swapaxes(1, 2),
        log_sum_BN1T,
        mean_BTN.swapaxes(1, 2)[:, :, None],
        *_segment_rows(segments_BT, segments_BS),
    )
    query_gradient_BTNH = _query_gradient(kernel, segments_BT, *operands)
    key_gradient_BSKH, value_gradient_BSKH = _key_value_gradient(kernel, segments_BT, *operands)
    return query_gradient_BTNH, key_gradient_BSKH, value_gradient_BSKH


def _query_gradient(kernel, segments_BT, *operands):
    query_BNTH, key_BKSH = operands[:2]
    batch, num_heads, length, head_dim = query_BNTH.shape
    group = num_heads // key_BKSH.shape[1]
    pairs = _visible_pairs(kernel, length, key_BKSH.shape[2])

    def query_at(batch, head, pair, pairs):
        return batch, head, pairs[0, pair]

    def key_at(batch, head, pair, pairs):
        return batch, head // group, pairs[1, pair]

    gradient_BNHT = pl.pallas_call(
        functools.partial(_query_gradient_kernel, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_heads, pairs.shape[1]),
            in_specs=_backward_specs(kernel, head_dim, segments_BT, query_at, key_at),
            out_specs=_columns(query_at, head_dim, kernel.query_block),
            scratch_shapes=[pltpu.VMEM((head_dim, kernel.query_block), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, num_heads, head_dim, length), kernel.result_dtype or query_BNTH.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(kernel, batch * num_heads * pairs.shape[1], query_BNTH, products=3),
        interpret=kernel.interpret,
        name="flash_attention_query_gradient",
    )(pairs, *operands)
    return gradient_BNHT.transpose(0, 3, 1, 2)


def _query_gradient_kernel(kernel, pairs, query_qH, key_sH, value_sH, gradient_qH, log_sum_1q, mean_1q, *refs):
    *segments, output_Hq, sum_Hq = refs
    first, last = _ends_of_run(pairs, pl.program_id(2), pl.num_programs(2))

    @pl.when(first)
    def _start():
        sum_Hq[...] = jnp.zeros_like(sum_Hq)

    def step(mask_sq):
        _, product_gradient_sq = _backward_tile(
            kernel, mask_sq, query_qH, key_sH, value_sH, gradient_qH, log_sum_1q, mean_1q
        )
        key = key_sH[...]
        sum_Hq[...] += _dot(key, product_gradient_sq.astype(key.dtype), 0, 0)

    _for_visible(kernel, pairs, segments, step)

    @pl.when(last)
    def _finish():
        output_Hq[...] = sum_Hq[...].astype(output_Hq.dtype)


def _key_value_gradient(kernel, segments_BT, *operands):
    query_BNTH, key_BKSH = operands[:2]
    num_heads = query_BNTH.shape[1]
    batch, num_kv_heads, key_length, head_dim = key_BKSH.shape
    group = num_heads // num_kv_heads
    pairs = _visible_pairs(kernel, query_BNTH.shape[2], key_length, by_key=True)

    # The heads of a group are the innermost grid axis: their sum stays in fast memory until a key block is done.
    def query_at(batch, kv_head, pair, member, pairs):
        return batch, kv_head * group + member, pairs[0, pair]

    def key_at(batch, kv_head, pair, member, pairs):
        return batch, kv_head, pairs[1, pair]

    key_gradient_BKSH, value_gradient_BKSH = pl.pallas_call(
        functools.partial(_key_value_gradient_kernel, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_kv_heads, pairs.shape[1], group),
            in_specs=_backward_specs(kernel, head_dim, segments_BT, query_at, key_at),
            out_specs=[_rows(key_at, kernel.key_block, head_dim)] * 2,
            scratch_shapes=[pltpu.VMEM((kernel.key_block, head_dim), jnp.float32)] * 2,
        ),
        out_shape=[jax.ShapeDtypeStruct(key_BKSH.shape, kernel.result_dtype or x.dtype) for x in operands[1:3]],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        cost_estimate=_cost(kernel, batch * num_heads * pairs.shape[1], query_BNTH, products=4),
        interpret=kernel.interpret,
        name="flash_attention_key_value_gradient",
    )(pairs, *operands)
    return key_gradient_BKSH.swapaxes(1, 2), value_gradient_BKSH.swapaxes(1, 2)


def _key_value_gradient_kernel(kernel, pairs, query_qH, key_sH, value_sH, gradient_qH, log_sum_1q, mean_1q, *refs):
    *segments, key_output_sH, value_output_sH, key_sum_sH, value_sum_sH = refs
    first, last = _ends_of_run(pairs, pl.program_id(2), pl.num_programs(2), row=1)
    head, heads = pl.program_id(3), pl.num_programs(3)

    @pl.when(first & (head == 0))
    def _start():
        key_sum_sH[...] = jnp.zeros_like(key_sum_sH)
        value_sum_sH[...] = jnp.zeros_like(value_sum_sH)

    def step(mask_sq):
        probabilities_sq, product_gradient_sq = _backward_tile(
            kernel, mask_sq, query_qH, key_sH, value_sH, gradient_qH, log_sum_1q, mean_1q
        )
        query, gradient = query_qH[...], gradient_qH[...]
        key_sum_sH[...] += _dot(product_gradient_sq.astype(query.dtype), query, 1, 0)
        value_sum_sH[...] += _dot(probabilities_sq.astype(gradient.dtype), gradient, 1, 0)

    _for_visible(kernel, pairs, segments, step)

    @pl.when(last & (head == heads - 1))
    def _finish():
        key_output_sH[...] = key_sum_sH[...].astype(key_output_sH.dtype)
        value_output_sH[...] = value_sum_sH[...].astype(value_output_sH.dtype)


def _backward_tile(kernel, mask_sq, query_qH, key_sH, value_sH, gradient_qH, log_sum_1q, mean_1q):
    """The probabilities, and the gradient of the dot products of keys and queries."""
    logits_sq = kernel.rule.logits(_dot(key_sH[...], query_qH[...], 1, 1))
    probabilities_sq = jnp.exp2(mask_sq(logits_sq * _LOG2_E) - log_sum_1q[...])
    above_mean_sq = _dot(value_sH[...], gradient_qH[...], 1, 1) - mean_1q[...]
    return probabilities_sq, kernel.rule.product_gradient(logits_sq, probabilities_sq * above_mean_sq)


def _dot(left, right, left_axis: int, right_axis: int):
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def _visible_pairs(kernel: _Kernel, length: int, key_length: int, *, by_key: bool = False) -> np.ndarray:
    """int32 [2, pairs]: query block and key block of every pair of blocks that is not fully masked.

    Pairs of one query block (`by_key`: of one key block) are consecutive, and every such block occurs at least once,
    so that each block of the output is written.
    """
    query_starts = np.arange(0, length, kernel.query_block)[:, None]
    key_starts = np.arange(0, key_length, kernel.key_block)[None, :]
    visible = kernel.rule.block_has_visible(
        query_starts, query_starts + kernel.query_block, key_starts, key_starts + kernel.key_block
    )
    visible = np.broadcast_to(visible, (query_starts.size, key_starts.size)).copy()
    axis = 0 if by_key else 1
    nothing = ~visible.any(axis=axis)
    visible[(0, nothing) if by_key else (nothing, 0)] = True
    order = np.argwhere(visible.T)[:, ::-1] if by_key else np.argwhere(visible)
    return np.ascontiguousarray(order.T, np.int32)


def _ends_of_run(pairs, step, steps, row: int = 0):
    """Whether this step is the first, and whether it is the last, with the same block in `row`."""
    block = pairs[row, step]
    first = (step == 0) | (pairs[row, jnp.maximum(step - 1, 0)] != block)
    last = (step == steps - 1) | (pairs[row, jnp.minimum(step + 1, steps - 1)] != block)
    return first, last


def _for_visible(kernel: _Kernel, pairs, segments, step):
    """Run `step` on this pair of blocks with a function that masks logits; a no-op if nothing is masked."""
    pair = pl.program_id(2)
    query_start, key_start = pairs[0, pair] * kernel.query_block, pairs[1, pair] * kernel.key_block

    def mask(logits_sq, by_position=True):
        visible: Any = True
        if by_position:
            query_position = query_start + jax.lax.broadcasted_iota(jnp.int32, logits_sq.shape, 1)
            key_position = key_start + jax.lax.broadcasted_iota(jnp.int32, logits_sq.shape, 0)
            visible = kernel.rule.sees(query_position, key_position)
        if segments:
            query_segment_1q, key_segment_sl = (segment[...] for segment in segments)
            visible &= query_segment_1q == jnp.tile(key_segment_sl, (1, kernel.query_block // _LANES))
        return logits_sq if visible is True else jnp.where(visible, logits_sq, MASKED_LOGIT)

    if kernel.rule.everything_visible:
        step(mask)
        return
    all_visible = kernel.rule.block_is_visible(
        query_start, query_start + kernel.query_block, key_start, key_start + kernel.key_block
    )
    pl.when(all_visible)(lambda: step(functools.partial(mask, by_position=False)))
    pl.when(~all_visible)(lambda: step(mask))


def _segment_rows(segments_BT, segments_BS) -> list[jax.Array]:
    """The segments of queries along lanes and of keys along sublanes, repeated in every lane; padding fits no key."""
    if segments_BT is None:
        return []
    query_segments_B1T = jnp.where(segments_BT == 0, -1, segments_BT)[:, None]
    return [query_segments_B1T, jnp.broadcast_to(segments_BS[:, :, None], (*segments_BS.shape, _LANES))]


# `at` maps a grid step to (batch, head, index of the block along the length).


def _rows(at, block: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, block, width), lambda *step: (*at(*step), 0))


def _columns(at, width: int, block: int) -> pl.BlockSpec:
    def index(*step):
        batch, head, number = at(*step)
        return batch, head, 0, number

    return pl.BlockSpec((None, None, width, block), index)


def _segment_specs(kernel: _Kernel, segments_BT, query_at, key_at) -> list[pl.BlockSpec]:
    def row(at, block):
        def index(*step):
            batch, _, number = at(*step)
            return batch, 0, number

        return pl.BlockSpec((None, 1, block), index)

    def column(at, block):
        def index(*step):
            batch, _, number = at(*step)
            return batch, number, 0

        return pl.BlockSpec((None, block, _LANES), index)

    return [] if segments_BT is None else [row(query_at, kernel.query_block), column(key_at, kernel.key_block)]


def _backward_specs(kernel: _Kernel, head_dim: int, segments_BT, query_at, key_at) -> list[pl.BlockSpec]:
    queries, keys = _rows(query_at, kernel.query_block, head_dim), _rows(key_at, kernel.key_block, head_dim)
    row = _columns(query_at, 1, kernel.query_block)
    return [queries, keys, keys, queries, row, row, *_segment_specs(kernel, segments_BT, query_at, key_at)]


def _cost(kernel: _Kernel, tiles: int, operand: jax.Array, products: int) -> pl.CostEstimate:
    """Cost estimate for the compiler, which cannot analyze a kernel. Each tile fetches two blocks like `operand`'s."""
    elements = tiles * kernel.query_block * kernel.key_block
    head_dim = operand.shape[-1]
    return pl.CostEstimate(
        flops=2 * products * elements * head_dim,
        transcendentals=elements,
        bytes_accessed=2 * tiles * kernel.key_block * head_dim * operand.dtype.itemsize,
    )
