"""Grouped matrix products: consecutive groups of rows, each with its own matrix.

Dimensions: M rows, G groups, I input features, O output features.

| implementation | description                                                                                  |
| -------------- | -------------------------------------------------------------------------------------------- |
| `ragged`       | TPUs: `jax.lax.ragged_dot`, one kernel; for the gradient of the weights, our `grouped_tpu`   |
| `blocks`       | a loop over blocks of rows, each within one group; rows beyond the groups cost nothing       |
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from maxlm.core.hardware import traced_platform
from maxlm.ops.moe import grouped_tpu
from maxlm.ops.qtensor import QTensor

# Rows per block: enough to fill matrix units, few enough that the last, partial block of each group is cheap.
_MIN_BLOCK, _MAX_BLOCK = 8, 128


@dataclass(frozen=True)
class GroupedProduct:
    """How rows are multiplied by the weights of their groups.

    dtype: of the operands, also in the backward pass; sums are float32.
    implementation: `ragged` or `blocks`.
    gather_names: mesh axes (of shard_map) that the weights are sharded over, along one of their axes.
    gradient_sum: dtype in which the gradients of weights are summed over those mesh axes.
    """

    dtype: str
    implementation: str
    gather_names: tuple[str, ...] = ()
    gradient_sum: str = "float32"

    def gather(self, weight: jax.Array, axis: int) -> jax.Array:
        """A weight that is sharded along `axis`, whole, as an operand."""
        weight = weight.astype(self.dtype)
        return jax.lax.all_gather(weight, self.gather_names, axis=axis, tiled=True) if self.gather_names else weight

    def scatter_sum(self, grad: jax.Array, axis: int) -> jax.Array:
        """The sum over devices of the gradients of a gathered weight, sharded as the weight."""
        if not self.gather_names:
            return grad
        grad = grad.astype(self.gradient_sum)
        return jax.lax.psum_scatter(grad, self.gather_names, scatter_dimension=axis, tiled=True)

    def product(self, x_MI: jax.Array, weight_GIO: jax.Array, sizes_G: jax.Array) -> jax.Array:
        """`grouped_linear` of operands without its gradient: float32 [M, O]."""
        match self.implementation:
            case "ragged":
                y_MO = jax.lax.ragged_dot(x_MI, weight_GIO, sizes_G, preferred_element_type=jnp.float32)
                # XLA for TPUs does not fill rows beyond the groups with zeros (0.10 to 0.12).
                return jnp.where(jnp.arange(len(y_MO))[:, None] < jnp.sum(sizes_G), y_MO, 0.0)
            case "blocks":
                return _block_product(x_MI, weight_GIO, sizes_G)
        raise ValueError(f"unknown implementation {self.implementation!r}")

    def outer_product(
        self, x_MI: jax.Array, grad_MO: jax.Array, sizes_G: jax.Array, total_GIO: jax.Array | None = None
    ) -> jax.Array:
        """Sum over the rows of each group of x^T grad, added to `total_GIO`: float32 [G, I, O]."""
        match self.implementation:
            case "ragged":
                interpret = traced_platform() != "tpu"
                return grouped_tpu.outer_product(x_MI, grad_MO, sizes_G, total_GIO, interpret=interpret)
            case "blocks":
                return _block_outer_product(x_MI, grad_MO, sizes_G, total_GIO)
        raise ValueError(f"unknown implementation {self.implementation!r}")


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_linear(
    x_MI: jax.Array, weight_GIO: jax.Array, sizes_G: jax.Array, how: GroupedProduct, gather_axis: int
) -> jax.Array:
    """Rows of group g times weight g, as [M, O] in the dtype of x; rows beyond the groups become zero.

    Args:
      x_MI: rows in the order of their groups; what is beyond the groups does not matter.
      sizes_G: number of rows of each group; their sum is at most M.
      gather_axis: the axis of the weight that is sharded over devices.
    """
    whole = how.gather(weight_GIO, gather_axis)
    return how.product(x_MI.astype(how.dtype), whole, sizes_G).astype(x_MI.dtype)


def _forward(x_MI, weight_GIO, sizes_G, how, gather_axis):
    y_MO = grouped_linear(x_MI, weight_GIO, sizes_G, how, gather_axis)
    # The residual is the sharded weight: the backward pass gathers it again instead of keeping it whole.
    return y_MO, (x_MI.astype(how.dtype), weight_GIO, sizes_G)


def _backward(how, gather_axis, residuals, grad_MO):
    x_MI, weight_GIO, sizes_G = residuals
    rough_MO = grad_MO.astype(how.dtype)
    grad_x = how.product(rough_MO, how.gather(weight_GIO, gather_axis).mT, sizes_G).astype(grad_MO.dtype)
    grad_weight = how.scatter_sum(how.outer_product(x_MI, rough_MO, sizes_G), gather_axis)
    return grad_x, grad_weight.astype(weight_GIO.dtype), None


grouped_linear.defvjp(_forward, _backward)


def undefined(shape: tuple[int, ...], dtype: jnp.dtype, sizes_G: jax.Array) -> jax.Array:
    """A buffer that is not filled, which would take as long as reading it: whoever reads a row has written it before.

    `sizes_G` is any array of integers that is computed in the loop over layers. JAX moves constants out of loops, and
    each iteration would then copy the buffer. A choice that depends on data stays inside, though both sides are equal.
    """

    def make():
        return jax.lax.empty(shape, dtype)

    return jax.lax.cond(sizes_G[0] < 0, make, make)


def grouped_quantized(x_MI: jax.Array, weights: QTensor, sizes_G: jax.Array) -> jax.Array:
    """The same with int8 weights [G, O, I], for inference: each row is quantized on the fly."""
    y_MO = _over_blocks(
        lambda rows, weight: weight.multiply(rows), x_MI.astype(jnp.float32), weights, sizes_G, weights.values.shape[-2]
    )
    return y_MO.astype(x_MI.dtype)


def _blocks(num_rows: int, sizes_G):
    """Rows per block (static); group and first row of each block; number of blocks."""
    num_groups = len(sizes_G)
    size = min(_MAX_BLOCK, max(_MIN_BLOCK, 1 << (num_rows // num_groups).bit_length() >> 1))
    blocks_G = -(-sizes_G // size)
    ends_G = jnp.cumsum(blocks_G)
    number_N = jnp.arange(num_rows // size + num_groups)
    group_N = jnp.minimum(jnp.searchsorted(ends_G, number_N, side="right"), num_groups - 1)
    first_row_G = jnp.cumsum(sizes_G) - sizes_G
    first_row_N = first_row_G[group_N] + (number_N - (ends_G - blocks_G)[group_N]) * size
    return size, group_N, first_row_N, ends_G[-1]


def _block_product(x_MI, weight_GIO, sizes_G):
    dot = partial(jnp.dot, preferred_element_type=jnp.float32)
    return _over_blocks(dot, x_MI, weight_GIO, sizes_G, weight_GIO.shape[-1])


def _over_blocks(multiply, x_MI, weights, sizes_G, num_outputs: int):
    """Apply `multiply(rows, weight)` to each block of rows and its group's weight: float32 [M, num_outputs]."""
    num_rows = len(x_MI)
    size, group_N, first_row_N, count = _blocks(num_rows, sizes_G)
    # A block may extend beyond the end.
    x_MI = jnp.pad(x_MI, ((0, size), (0, 0)))

    def body(number, y_MO):
        row, group = first_row_N[number], group_N[number]
        weight = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, group, keepdims=False), weights)
        # Rows that belong to the next group are overwritten by that group's blocks, which follow.
        y = multiply(jax.lax.dynamic_slice_in_dim(x_MI, row, size), weight)
        return jax.lax.dynamic_update_slice_in_dim(y_MO, y, row, axis=0)

    y_MO = jax.lax.fori_loop(0, count, body, jnp.zeros((len(x_MI), num_outputs), jnp.float32))[:num_rows]
    return jnp.where(jnp.arange(num_rows)[:, None] < jnp.sum(sizes_G), y_MO, 0.0)


def _block_outer_product(x_MI, grad_MO, sizes_G, total_GIO):
    size, group_N, first_row_N, count = _blocks(len(x_MI), sizes_G)
    ends_G = jnp.cumsum(sizes_G)
    x_MI, grad_MO = (jnp.pad(rows, ((0, size), (0, 0))) for rows in (x_MI, grad_MO))

    def body(number, total_GIO):
        group, row = group_N[number], first_row_N[number]
        within = row + jnp.arange(size)[:, None] < ends_G[group]
        x, grad = (jnp.where(within, jax.lax.dynamic_slice_in_dim(rows, row, size), 0) for rows in (x_MI, grad_MO))
        product = jax.lax.dot_general(x, grad, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return total_GIO.at[group].add(product)

    if total_GIO is None:
        total_GIO = jnp.zeros((len(sizes_G), x_MI.shape[-1], grad_MO.shape[-1]), jnp.float32)
    return jax.lax.fori_loop(0, count, body, total_GIO)
