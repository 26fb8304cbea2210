"""Tiles of the flash kernels for TPUs: which pairs of blocks there are, what is fetched for each, its biases and mask.

A tile is [keys, queries]. Ids of queries lie along the lanes; those of keys along the sublanes, repeated in every lane,
so that a mask is one comparison. A bias by distance is one row per head, from which a tile is made by strided rotation.

Shapes: B batch, T query length, S key length, N query heads, D distances; q and s the lengths of a block of queries and
a block of keys, W = q + s, l lanes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.position_bias import DistanceBias
from maxlm.ops.attention.rule import MASKED_LOGIT, AttentionRule
from maxlm.ops.dropout import weight_dropout

LANES = 128
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Static parameters of one call; lengths are multiples of their blocks.

    reach: the rule that no query looks beyond; wider than `rule` if there are prefixes.
    dropout_rate: of the weights; 0 without dropout.
    """

    rule: AttentionRule
    reach: AttentionRule
    length: int
    key_length: int
    query_block: int
    key_block: int
    result_dtype: jnp.dtype
    interpret: bool
    dropout_rate: float = 0.0


# Pairs of blocks


def visible_pairs(kernel: Kernel, *, by_key: bool = False) -> np.ndarray:
    """int32 [2, pairs]: query block and key block of every pair of blocks that is not fully masked.

    Pairs of one query block (`by_key`: of one key block) are consecutive, and every such block occurs at least once,
    so that each block of the output is written.
    """
    query_starts = np.arange(0, kernel.length, kernel.query_block)[:, None]
    key_starts = np.arange(0, kernel.key_length, kernel.key_block)[None, :]
    visible = kernel.reach.block_has_visible(
        query_starts, query_starts + kernel.query_block, key_starts, key_starts + kernel.key_block
    )
    visible = np.broadcast_to(visible, (query_starts.size, key_starts.size)).copy()
    axis = 0 if by_key else 1
    nothing = ~visible.any(axis=axis)
    visible[(0, nothing) if by_key else (nothing, 0)] = True
    order = np.argwhere(visible.T)[:, ::-1] if by_key else np.argwhere(visible)
    return np.ascontiguousarray(order.T, np.int32)


def ends_of_run(pairs, step, steps, row: int = 0):
    """Whether this step is the first, and whether it is the last, with the same block in `row`."""
    block = pairs[row, step]
    first = (step == 0) | (pairs[row, jnp.maximum(step - 1, 0)] != block)
    last = (step == steps - 1) | (pairs[row, jnp.minimum(step + 1, steps - 1)] != block)
    return first, last


def cost_estimate(kernel: Kernel, tiles: int, operand: jax.Array, *, products: int) -> pl.CostEstimate:
    """Cost estimate for the compiler, which cannot analyze a kernel. Each tile fetches two blocks like `operand`'s."""
    elements = tiles * kernel.query_block * kernel.key_block
    head_dim = operand.shape[-1]
    return pl.CostEstimate(
        flops=2 * products * elements * head_dim,
        transcendentals=elements,
        bytes_accessed=2 * tiles * kernel.key_block * head_dim * operand.dtype.itemsize,
    )


# Blocks in memory. `at` maps a grid step to (batch, head, index of the block along the length).


def rows(at, block: int, width: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, None, block, width), lambda *step: (*at(*step), 0))


def columns(at, width: int, block: int) -> pl.BlockSpec:
    def index(*step):
        batch, head, number = at(*step)
        return batch, head, 0, number

    return pl.BlockSpec((None, None, width, block), index)


def row_of_head(at, width: int) -> pl.BlockSpec:
    """A row of an array [N, 1, D]."""

    def index(*step):
        _, head, _ = at(*step)
        return head, 0, 0

    return pl.BlockSpec((None, 1, width), index)


def tile_operands(operands: AttentionOperands) -> dict[str, Any]:
    """The arrays that `for_visible` and `dropout` read, as they want them, by name."""
    arrays: dict[str, Any] = {}
    for name, ids in {"segments": operands.segments, "prefix": operands.prefix}.items():
        if ids is not None:
            query_ids_BT, key_ids_BS = (side.astype(jnp.int32) for side in ids)
            # Id 0 of a query fits no key.
            query_ids_B1T = jnp.where(query_ids_BT == 0, -1, query_ids_BT)[:, None]
            arrays[name] = [query_ids_B1T, _in_every_lane(key_ids_BS)]
    if operands.dropout is not None:
        seeds_BN1T = operands.dropout.query_seeds_BTN.swapaxes(1, 2)[:, :, None]
        arrays["dropout"] = [seeds_BN1T, _in_every_lane(operands.dropout.key_seeds_BS)]
    if operands.mask_BNTS is not None:
        arrays["mask"] = operands.mask_BNTS.swapaxes(2, 3).astype(jnp.int8)
    if operands.position_bias is not None:
        arrays["bias_by_distance"] = cast(DistanceBias, operands.position_bias).values_ND[:, None] * LOG2_E
    return arrays


def _in_every_lane(ids_BS):
    return jnp.broadcast_to(ids_BS[:, :, None], (*ids_BS.shape, LANES))


def tile_specs(kernel: Kernel, arrays: dict[str, Any], query_at, key_at) -> dict[str, Any]:
    """The blocks of `tile_operands`."""

    def query_ids(*step):
        batch, _, number = query_at(*step)
        return batch, 0, number

    def key_ids(*step):
        batch, _, number = key_at(*step)
        return batch, number, 0

    def mask(*step):
        (batch, head, number), (_, _, key_number) = query_at(*step), key_at(*step)
        batches, heads = arrays["mask"].shape[:2]
        return batch if batches > 1 else 0, head if heads > 1 else 0, key_number, number

    of_keys = pl.BlockSpec((None, kernel.key_block, LANES), key_ids)
    ids = [pl.BlockSpec((None, 1, kernel.query_block), query_ids), of_keys]
    specs: dict[str, Any] = {name: ids for name in ("segments", "prefix") if name in arrays}
    if "dropout" in arrays:
        specs["dropout"] = [columns(query_at, 1, kernel.query_block), of_keys]
    if "mask" in arrays:
        specs["mask"] = pl.BlockSpec((None, None, kernel.key_block, kernel.query_block), mask)
    if "bias_by_distance" in arrays:
        specs["bias_by_distance"] = row_of_head(query_at, arrays["bias_by_distance"].shape[-1])
    return specs


# Inside a kernel


def dot(left, right, left_axis: int, right_axis: int):
    return jax.lax.dot_general(
        left, right, (((left_axis,), (right_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def for_visible(kernel: Kernel, pairs, tile: dict[str, Any], step) -> None:
    """Run `step` on this pair of blocks with a function from logits to masked logits with biases, in units of log 2."""
    query_start, key_start = starts(kernel, pairs)
    block = (query_start, query_start + kernel.query_block, key_start, key_start + kernel.key_block)
    of_block = distances(kernel, pairs)

    def finish(logits_sq, by_position: bool):
        logits_sq = logits_sq * LOG2_E
        if "bias_by_distance" in tile:
            logits_sq += _spread(tile["bias_by_distance"][:, of_block], *logits_sq.shape)
        visible: Any = True
        if by_position:
            query_position = query_start + jax.lax.broadcasted_iota(jnp.int32, logits_sq.shape, 1)
            key_position = key_start + jax.lax.broadcasted_iota(jnp.int32, logits_sq.shape, 0)
            visible = kernel.rule.sees(query_position, key_position)
            if "prefix" in tile:
                visible |= same_ids(*tile["prefix"]) & kernel.reach.sees(query_position, key_position)
        if "segments" in tile:
            visible &= same_ids(*tile["segments"])
        if "mask" in tile:
            visible &= tile["mask"][...].astype(jnp.int32) != 0
        return logits_sq if visible is True else jnp.where(visible, logits_sq, MASKED_LOGIT)

    def same_ids(query_ids_1q, key_ids_sl):
        return query_ids_1q[...] == _by_query(kernel, key_ids_sl)

    if kernel.rule.everything_visible:
        step(functools.partial(finish, by_position=False))
        return
    all_visible = kernel.rule.block_is_visible(*block)
    pl.when(all_visible)(lambda: step(functools.partial(finish, by_position=False)))
    some_visible = ~all_visible
    if "prefix" in tile:
        query_prefix_1q, key_prefix_sl = (ids[...] for ids in tile["prefix"])
        has_prefix = (jnp.max(query_prefix_1q) > 0) & (jnp.max(key_prefix_sl) > 0)
        some_visible &= kernel.rule.block_has_visible(*block) | has_prefix
    pl.when(some_visible)(lambda: step(functools.partial(finish, by_position=True)))


def dropout(kernel: Kernel, tile: dict[str, Any]) -> Callable[[Any], Any]:
    """The dropout of a tile's weights, and of what is proportional to them."""
    if "dropout" not in tile:
        return lambda weights_sq: weights_sq
    query_seeds_1q, key_seeds_sl = tile["dropout"]
    return weight_dropout(kernel.dropout_rate, query_seeds_1q[...], _by_query(kernel, key_seeds_sl))


def _by_query(kernel: Kernel, of_keys_sl):
    """A number of each key, [s, q]."""
    return jnp.tile(of_keys_sl[...], (1, kernel.query_block // LANES))


def starts(kernel: Kernel, pairs):
    """Positions of the first query and the first key of this pair of blocks."""
    pair = pl.program_id(2)
    return pairs[0, pair] * kernel.query_block, pairs[1, pair] * kernel.key_block


def distances(kernel: Kernel, pairs):
    """The slice of D with the W distances of this pair of blocks, of which the last does not occur."""
    query_start, key_start = starts(kernel, pairs)
    first = query_start - key_start + kernel.key_length - kernel.key_block
    return pl.ds(pl.multiple_of(first, LANES), kernel.query_block + kernel.key_block)


def _spread(row_1W, key_block: int, query_block: int):
    """Biases [s, q] of a tile, from the biases by distance: each key's row is the one before, one lane later."""
    width = row_1W.shape[1]
    rolled_lW = pltpu.roll(jnp.broadcast_to(row_1W, (LANES, width)), 1, 1, stride=1, stride_axis=0)
    parts = [rolled_lW[:, key_block - start :][:, :query_block] for start in range(0, key_block, LANES)]
    return jnp.concatenate(parts, axis=0)


def sums_by_distance(tile_sq):
    """The transpose of `_spread`: the sums [1, W] of a tile along its diagonals."""
    key_block, query_block = tile_sq.shape
    width = key_block + query_block
    sum_lW = sum(
        jnp.pad(tile_sq[start : start + LANES], ((0, 0), (key_block - start, start)))
        for start in range(0, key_block, LANES)
    )
    # Row i belongs i + 1 lanes to the left.
    count = LANES
    while count > 1:
        count //= 2
        sum_lW = sum_lW[:count] + pltpu.roll(sum_lW[count:], width - count, 1)
    return pltpu.roll(sum_lW, width - 1, 1)
