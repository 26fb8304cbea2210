"""Flash attention for TPUs: the kernels of the query gradient, and of the key and value gradients.

Shapes as in `flash_tpu.py`; D distances.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxlm.ops.attention.flash_tpu_tile import (
    Kernel,
    columns,
    cost_estimate,
    distances,
    dot,
    dropout,
    ends_of_run,
    for_visible,
    rows,
    sums_by_distance,
    tile_operands,
    tile_specs,
    visible_pairs,
)
from maxlm.ops.attention.operands import AttentionOperands


def gradients(kernel: Kernel, arrays, operands: AttentionOperands):
    """Gradients of query, key, value and the biases by distance [N, D] (None without), for operands in whole blocks.

    arrays: query, key, value and the gradient of the output with heads first; log-sum-exp and mean [B, N, 1, T].
    """
    tile = tile_operands(operands)
    query_gradient_BNTH, by_distance_ND = _query_gradient(kernel, arrays, tile)
    return query_gradient_BNTH, *_key_value_gradient(kernel, arrays, tile), by_distance_ND


def _query_gradient(kernel: Kernel, arrays, tile: dict[str, Any]):
    query_BNTH, key_BKSH = arrays[:2]
    batch, num_heads, length, head_dim = query_BNTH.shape
    group = num_heads // key_BKSH.shape[1]
    pairs = visible_pairs(kernel)

    def query_at(batch, head, pair, pairs):
        return batch, head, pairs[0, pair]

    def key_at(batch, head, pair, pairs):
        return batch, head // group, pairs[1, pair]

    out_specs = [columns(query_at, head_dim, kernel.query_block)]
    out_shape = [jax.ShapeDtypeStruct((batch, num_heads, head_dim, length), kernel.result_dtype)]
    if "bias_by_distance" in tile:
        num_distances = tile["bias_by_distance"].shape[-1]
        out_specs.append(pl.BlockSpec((None, None, 1, num_distances), lambda batch, head, *_: (batch, head, 0, 0)))
        out_shape.append(jax.ShapeDtypeStruct((batch, num_heads, 1, num_distances), jnp.float32))
    gradient_BNHT, *by_distance_BN1D = pl.pallas_call(
        functools.partial(_query_gradient_kernel, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_heads, pairs.shape[1]),
            in_specs=_specs(kernel, arrays, tile, query_at, key_at),
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM((head_dim, kernel.query_block), jnp.float32)],
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost_estimate(kernel, batch * num_heads * pairs.shape[1], query_BNTH, products=3),
        interpret=kernel.interpret,
        name="flash_attention_query_gradient",
    )(pairs, *arrays, tile)
    by_distance_ND = jnp.sum(by_distance_BN1D[0], axis=(0, 2)) if by_distance_BN1D else None
    return gradient_BNHT.swapaxes(2, 3), by_distance_ND


def _query_gradient_kernel(
    kernel, pairs, query_qH, key_sH, value_sV, gradient_qV, log_sum_1q, mean_1q, tile, output_Hq, *refs
):
    *by_distance_1D, sum_Hq = refs
    first, last = ends_of_run(pairs, pl.program_id(2), pl.num_programs(2))

    @pl.when(first)
    def _start():
        sum_Hq[...] = jnp.zeros_like(sum_Hq)

    of_block = distances(kernel, pairs)
    for total_1D in by_distance_1D:

        @pl.when(pl.program_id(2) == 0)
        def _start_biases(total_1D=total_1D):
            total_1D[...] = jnp.zeros_like(total_1D)

    def step(finish_sq):
        _, logits_gradient_sq, product_gradient_sq = _backward_tile(
            kernel, tile, finish_sq, query_qH, key_sH, value_sV, gradient_qV, log_sum_1q, mean_1q
        )
        key = key_sH[...]
        sum_Hq[...] += dot(key, product_gradient_sq.astype(key.dtype), 0, 0)
        for total_1D in by_distance_1D:
            total_1D[:, of_block] += sums_by_distance(logits_gradient_sq)

    for_visible(kernel, pairs, tile, step)

    @pl.when(last)
    def _finish():
        output_Hq[...] = sum_Hq[...].astype(output_Hq.dtype)


def _key_value_gradient(kernel: Kernel, arrays, tile: dict[str, Any]):
    query_BNTH, key_BKSH, value_BKSV = arrays[:3]
    num_heads = query_BNTH.shape[1]
    batch, num_kv_heads = key_BKSH.shape[:2]
    group = num_heads // num_kv_heads
    pairs = visible_pairs(kernel, by_key=True)

    # The heads of a group are the innermost grid axis: their sum stays in fast memory until a key block is done.
    def query_at(batch, kv_head, pair, member, pairs):
        return batch, kv_head * group + member, pairs[0, pair]

    def key_at(batch, kv_head, pair, member, pairs):
        return batch, kv_head, pairs[1, pair]

    return pl.pallas_call(
        functools.partial(_key_value_gradient_kernel, kernel),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, num_kv_heads, pairs.shape[1], group),
            in_specs=_specs(kernel, arrays, tile, query_at, key_at),
            out_specs=[rows(key_at, kernel.key_block, x.shape[-1]) for x in (key_BKSH, value_BKSV)],
            scratch_shapes=[pltpu.VMEM((kernel.key_block, x.shape[-1]), jnp.float32) for x in (key_BKSH, value_BKSV)],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, kernel.result_dtype) for x in (key_BKSH, value_BKSV)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary")),
        cost_estimate=cost_estimate(kernel, batch * num_heads * pairs.shape[1], query_BNTH, products=4),
        interpret=kernel.interpret,
        name="flash_attention_key_value_gradient",
    )(pairs, *arrays, tile)


def _key_value_gradient_kernel(
    kernel,
    pairs,
    query_qH,
    key_sH,
    value_sV,
    gradient_qV,
    log_sum_1q,
    mean_1q,
    tile,
    key_output_sH,
    value_output_sV,
    key_sum_sH,
    value_sum_sV,
):
    first, last = ends_of_run(pairs, pl.program_id(2), pl.num_programs(2), row=1)
    head, heads = pl.program_id(3), pl.num_programs(3)

    @pl.when(first & (head == 0))
    def _start():
        key_sum_sH[...] = jnp.zeros_like(key_sum_sH)
        value_sum_sV[...] = jnp.zeros_like(value_sum_sV)

    def step(finish_sq):
        weights_sq, _, product_gradient_sq = _backward_tile(
            kernel, tile, finish_sq, query_qH, key_sH, value_sV, gradient_qV, log_sum_1q, mean_1q
        )
        query, gradient = query_qH[...], gradient_qV[...]
        key_sum_sH[...] += dot(product_gradient_sq.astype(query.dtype), query, 1, 0)
        value_sum_sV[...] += dot(weights_sq.astype(gradient.dtype), gradient, 1, 0)

    for_visible(kernel, pairs, tile, step)

    @pl.when(last & (head == heads - 1))
    def _finish():
        key_output_sH[...] = key_sum_sH[...].astype(key_output_sH.dtype)
        value_output_sV[...] = value_sum_sV[...].astype(value_output_sV.dtype)


def _backward_tile(kernel, tile, finish_sq, query_qH, key_sH, value_sV, gradient_qV, log_sum_1q, mean_1q):
    """The weights of the values, the gradient of the logits, and that of the dot products of keys and queries."""
    logits_sq = kernel.rule.logits(dot(key_sH[...], query_qH[...], 1, 1))
    probabilities_sq = jnp.exp2(finish_sq(logits_sq) - log_sum_1q[...])
    drop = dropout(kernel, tile)
    weights_gradient_sq = drop(dot(value_sV[...], gradient_qV[...], 1, 1))
    logits_gradient_sq = probabilities_sq * (weights_gradient_sq - mean_1q[...])
    return drop(probabilities_sq), logits_gradient_sq, kernel.rule.product_gradient(logits_sq, logits_gradient_sq)


def _specs(kernel: Kernel, arrays, tile: dict[str, Any], query_at, key_at) -> list[Any]:
    query_BNTH, _, value_BKSV = arrays[:3]
    head_dim, value_dim = query_BNTH.shape[-1], value_BKSV.shape[-1]
    statistics = columns(query_at, 1, kernel.query_block)
    return [
        rows(query_at, kernel.query_block, head_dim),
        rows(key_at, kernel.key_block, head_dim),
        rows(key_at, kernel.key_block, value_dim),
        rows(query_at, kernel.query_block, value_dim),
        statistics,
        statistics,
        tile_specs(kernel, tile, query_at, key_at),
    ]
