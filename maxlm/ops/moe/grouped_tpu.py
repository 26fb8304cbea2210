"""The gradient of grouped matrix products, for TPUs: a Pallas kernel.

XLA compiles this ragged product to a dense one, of all rows for every group. Here the grid runs over pairs of a tile of
rows and a group that has rows in it: rows beyond the groups cost nothing.

Dimensions: M rows, G groups, I input features, O output features, N pairs; m, i and o the sizes of a tile.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_LARGEST_TILE = (512, 1024, 512)


def outer_product(
    x_MI: jax.Array,
    grad_MO: jax.Array,
    sizes_G: jax.Array,
    total_GIO: jax.Array | None = None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Sum over the rows of each group of x^T grad: float32 [G, I, O].

    Args:
      x_MI, grad_MO: rows in the order of their groups; what is beyond the groups does not matter.
      sizes_G: number of rows of each group; their sum is at most M.
      total_GIO: float32, what to add the sum to, in place.
      interpret: run the kernel on a CPU, in tests.
    """
    rows, inputs = x_MI.shape
    outputs = grad_MO.shape[1]
    tile_m = min(_LARGEST_TILE[0], -(-rows // _LANES) * _LANES)
    tile_i, tile_o = min(_LARGEST_TILE[1], inputs), min(_LARGEST_TILE[2], outputs)
    if padding := -rows % tile_m:
        x_MI, grad_MO = (jnp.pad(each, ((0, padding), (0, 0))) for each in (x_MI, grad_MO))
    ends_G = jnp.cumsum(sizes_G).astype(jnp.int32)
    starts_G = ends_G - sizes_G.astype(jnp.int32)
    group_N, tile_N, count = _pairs(starts_G, ends_G, tile_m, len(x_MI) // tile_m)
    totals = [] if total_GIO is None else [total_GIO]
    num_products = (len(x_MI) // tile_m + len(sizes_G)) * tile_m
    # The same tile of the result for all pairs of a group: it stays in fast memory as their sum.
    result_tile = pl.BlockSpec((None, tile_i, tile_o), lambda o, i, n, group, *_: (group[n], i, o))
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(outputs, tile_o), pl.cdiv(inputs, tile_i), count),
            in_specs=[
                pl.BlockSpec((tile_m, tile_i), lambda o, i, n, group, tile, *_: (tile[n], i)),
                pl.BlockSpec((tile_m, tile_o), lambda o, i, n, group, tile, *_: (tile[n], o)),
                *(result_tile for _ in totals),
            ],
            out_specs=result_tile,
        ),
        out_shape=jax.ShapeDtypeStruct((len(sizes_G), inputs, outputs), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_products * inputs * outputs,
            bytes_accessed=x_MI.nbytes * pl.cdiv(outputs, tile_o)
            + grad_MO.nbytes * pl.cdiv(inputs, tile_i)
            + 4 * len(sizes_G) * inputs * outputs * (1 + len(totals)),
            transcendentals=0,
        ),
        input_output_aliases={6: 0} if totals else {},
        interpret=interpret,
        name="grouped_outer_product",
    )(group_N, tile_N, starts_G, ends_G, x_MI, grad_MO, *totals)


def _pairs(starts_G, ends_G, tile_m: int, num_tiles: int):
    """Group and tile of each pair, by group, and their number. An empty group has one pair, which begins its sum."""
    first_G = jnp.minimum(starts_G // tile_m, num_tiles - 1)
    counts_G = jnp.where(ends_G > starts_G, (ends_G - 1) // tile_m - first_G + 1, 1)
    before_G = jnp.cumsum(counts_G) - counts_G
    number_N = jnp.arange(num_tiles + len(starts_G), dtype=jnp.int32)
    group_N = (jnp.searchsorted(before_G, number_N, side="right") - 1).astype(jnp.int32)
    tile_N = jnp.minimum(first_G[group_N] + number_N - before_G[group_N], num_tiles - 1)
    return group_N, tile_N, jnp.sum(counts_G)


def _kernel(group_N, tile_N, starts_G, ends_G, x_mi, grad_mo, *totals):
    *before, total_io = totals
    number = pl.program_id(2)
    group, first_row = group_N[number], tile_N[number] * x_mi.shape[0]
    start, end = starts_G[group], ends_G[group]

    @pl.when((number == 0) | (group_N[jnp.maximum(number - 1, 0)] != group))
    def _start():
        total_io[...] = before[0][...] if before else jnp.zeros_like(total_io)

    def add(x, grad):
        dimensions = (((0,), (0,)), ((), ()))
        total_io[...] += jax.lax.dot_general(x, grad, dimensions, preferred_element_type=jnp.float32)

    def within(rows):
        row = first_row + jax.lax.broadcasted_iota(jnp.int32, rows.shape, 0)
        return jnp.where((start <= row) & (row < end), rows[...].astype(jnp.float32), 0.0).astype(rows.dtype)

    is_whole = (start <= first_row) & (first_row + x_mi.shape[0] <= end)

    @pl.when(is_whole)
    def _whole():
        add(x_mi[...], grad_mo[...])

    @pl.when(~is_whole & (start < end))
    def _part():
        add(within(x_mi), within(grad_mo))
