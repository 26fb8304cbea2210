"""The gated MLPs of experts on buffers sized for the worst case, of which only a part is filled.

All tokens of a group of devices may be routed to the experts of one, so a device that receives rows of others needs
room for all of them, several times what it receives on average. Here only the rows themselves have that room: the
hidden channels exist for one chunk of rows at a time, in a loop that ends with the last row received. The backward
pass computes them again.

Dimensions: M rows, C rows of a chunk, G groups, D embed, F hidden channels.
"""

from functools import partial

import jax
import jax.numpy as jnp

from maxlm.ops.moe.grouped_matmul import GroupedProduct, undefined

Weights = tuple[jax.Array, jax.Array, jax.Array]

# The axis of gate, up and down that is the embedding.
_EMBED_AXES = (1, 1, 2)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_mlp(
    x_MD: jax.Array, weights: Weights, sizes_G: jax.Array, how: GroupedProduct, num_chunks: int
) -> jax.Array:
    """down(silu(gate x) * up x), with the weights of each row's group, as [M, D].

    Rows beyond the groups are undefined, and so are their gradients.

    Args:
      x_MD: rows in the order of their groups; what is beyond the groups does not matter.
      weights: gate and up [G, D, F], down [G, F, D]; sharded along D.
      sizes_G: number of rows of each group; their sum is at most M.
      num_chunks: that the M rows are split into evenly.
    """
    whole = _gather(weights, how)

    def body(number, y_MD):
        x_CD, chunk_G = _rows(x_MD, number, num_chunks), _sizes(sizes_G, number, len(x_MD) // num_chunks)
        _, _, hidden_CF = _hidden(x_CD, whole, chunk_G, how)
        y_CD = how.product(hidden_CF.astype(how.dtype), whole[2], chunk_G).astype(x_MD.dtype)
        return _put(y_MD, y_CD, number)

    return jax.lax.fori_loop(0, _count(x_MD, sizes_G, num_chunks), body, undefined(x_MD.shape, x_MD.dtype, sizes_G))


def _forward(x_MD, weights, sizes_G, how, num_chunks):
    return grouped_mlp(x_MD, weights, sizes_G, how, num_chunks), (x_MD, weights, sizes_G)


def _backward(how, num_chunks, residuals, grad_MD):
    x_MD, weights, sizes_G = residuals
    whole = gate, up, down = _gather(weights, how)

    def body(number, carry):
        grad_x_MD, grad_weights = carry
        x_CD, grad_CD = (_rows(rows, number, num_chunks) for rows in (x_MD, grad_MD))
        chunk_G = _sizes(sizes_G, number, len(x_MD) // num_chunks)
        times, outer = (partial(function, sizes_G=chunk_G) for function in (how.product, how.outer_product))
        gated_CF, widened_CF, hidden_CF = _hidden(x_CD, whole, chunk_G, how)
        x_CD, grad_CD = x_CD.astype(how.dtype), grad_CD.astype(how.dtype)
        grad_hidden_CF = times(grad_CD, down.mT).astype(x_MD.dtype)
        _, pull = jax.vjp(_activate, gated_CF, widened_CF)
        grad_gated_CF, grad_widened_CF = (grad.astype(how.dtype) for grad in pull(grad_hidden_CF))
        grad_x_CD = times(grad_gated_CF, gate.mT) + times(grad_widened_CF, up.mT)
        grad_weights = (
            outer(x_CD, grad_gated_CF, total_GIO=grad_weights[0]),
            outer(x_CD, grad_widened_CF, total_GIO=grad_weights[1]),
            outer(hidden_CF.astype(how.dtype), grad_CD, total_GIO=grad_weights[2]),
        )
        return _put(grad_x_MD, grad_x_CD.astype(x_MD.dtype), number), grad_weights

    first = tuple(jnp.zeros(weight.shape, jnp.float32) for weight in whole)
    carry = undefined(x_MD.shape, x_MD.dtype, sizes_G), first
    grad_x_MD, grad_weights = jax.lax.fori_loop(0, _count(x_MD, sizes_G, num_chunks), body, carry)
    grad_weights = tuple(
        how.scatter_sum(grad, axis).astype(weight.dtype)
        for grad, axis, weight in zip(grad_weights, _EMBED_AXES, weights)
    )
    return grad_x_MD, grad_weights, None


grouped_mlp.defvjp(_forward, _backward)


def _hidden(x_CD, whole: Weights, sizes_G, how):
    """The products with gate and up, and the hidden channels: [C, F] in the dtype of x."""
    gate, up, _ = whole
    gated_CF, widened_CF = (
        how.product(x_CD.astype(how.dtype), weight, sizes_G).astype(x_CD.dtype) for weight in (gate, up)
    )
    return gated_CF, widened_CF, _activate(gated_CF, widened_CF)


def _activate(gated, widened):
    return jax.nn.silu(gated) * widened


def _gather(weights: Weights, how: GroupedProduct) -> Weights:
    gate, up, down = (how.gather(weight, axis) for weight, axis in zip(weights, _EMBED_AXES))
    return gate, up, down


def _count(x_MD, sizes_G, num_chunks: int):
    """Number of chunks with rows in them."""
    return -(-jnp.sum(sizes_G) // (len(x_MD) // num_chunks))


def _rows(x_MD, number, num_chunks: int):
    size = len(x_MD) // num_chunks
    return jax.lax.dynamic_slice_in_dim(x_MD, number * size, size)


def _put(x_MD, x_CD, number):
    return jax.lax.dynamic_update_slice_in_dim(x_MD, x_CD, number * len(x_CD), axis=0)


def _sizes(sizes_G, number, size: int):
    """Number of rows of each group within a chunk."""
    ends_G = jnp.cumsum(sizes_G)
    starts_G = ends_G - sizes_G
    first, last = number * size, (number + 1) * size
    return jnp.clip(ends_G, first, last) - jnp.clip(starts_G, first, last)
