"""The gated MLPs of experts on buffers sized for the worst case, of which only a part is filled.

All tokens of a group of devices may be routed to the experts of one, so a device that receives rows of others needs
room for all of them, several times what it receives on average. Here only the rows themselves have that room: the
hidden channels exist for one chunk of rows at a time, in a loop that ends with the last row received. The backward
pass computes them again.

Dimensions: M rows, C rows of a chunk, G groups, D embed, F hidden channels.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp

from maxlm.ops.moe.grouped_matmul import GroupedProduct, undefined
from maxlm.ops.qtensor import QTensor

# The slope of the sigmoid of gpt-oss, with which it is close to GELU (arXiv:1606.08415).
_ALPHA = 1.702


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["gate_GDF", "up_GDF", "down_GFD", "gate_bias_GF", "up_bias_GF", "down_bias_GD"],
    meta_fields=["swiglu_limit"],
)
@dataclass(frozen=True)
class ExpertWeights:
    """Experts that compute down(hidden(gate x + its bias, up x + its bias)) + its bias; biases may be None.

    swiglu_limit: see `hidden`.
    """

    gate_GDF: jax.Array | QTensor
    up_GDF: jax.Array | QTensor
    down_GFD: jax.Array | QTensor
    gate_bias_GF: jax.Array | None = None
    up_bias_GF: jax.Array | None = None
    down_bias_GD: jax.Array | None = None
    swiglu_limit: float | None = None

    def hidden(self, gated: jax.Array, widened: jax.Array) -> jax.Array:
        """silu(g) * u, or with a limit g * sigmoid(1.702 g) * (u + 1), with g at most the limit and |u| too."""
        if (limit := self.swiglu_limit) is None:
            return jax.nn.silu(gated) * widened
        gated, widened = jnp.minimum(gated, limit), jnp.clip(widened, -limit, limit)
        return gated * jax.nn.sigmoid(_ALPHA * gated) * (widened + 1)

    def hidden_of_rows(self, gated_MF: jax.Array, widened_MF: jax.Array, sizes_G: jax.Array) -> jax.Array:
        """`hidden` of the products of rows in the order of their groups, which the biases are added to."""
        if self.gate_bias_GF is not None and self.up_bias_GF is not None:
            gated_MF = gated_MF + _of_rows(self.gate_bias_GF, sizes_G, gated_MF)
            widened_MF = widened_MF + _of_rows(self.up_bias_GF, sizes_G, widened_MF)
        return self.hidden(gated_MF, widened_MF)


def _of_rows(vectors_GF, sizes_G, like_MF):
    """The vector of each row's group, in the shape and dtype of `like`; zeros beyond the groups."""
    group_M = jnp.searchsorted(jnp.cumsum(sizes_G), jnp.arange(len(like_MF)), side="right")
    vectors_GF = vectors_GF.astype(like_MF.dtype)
    return jnp.take(vectors_GF, group_M, axis=0, mode="fill", fill_value=0, indices_are_sorted=True)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def grouped_mlp(
    x_MD: jax.Array, weights: ExpertWeights, sizes_G: jax.Array, how: GroupedProduct, num_chunks: int
) -> jax.Array:
    """The outputs, before the bias of down, of the expert of each row's group, as [M, D].

    Rows beyond the groups are undefined, and so are their gradients.

    Args:
      x_MD: rows in the order of their groups; what is beyond the groups does not matter.
      weights: of each group, without the bias of down; matrices are sharded along D.
      sizes_G: number of rows of each group; their sum is at most M.
      num_chunks: that the M rows are split into evenly.
    """
    whole = _of_matrices(how.gather, weights)

    def body(number, y_MD):
        x_CD, chunk_G = _rows(x_MD, number, num_chunks), _sizes(sizes_G, number, len(x_MD) // num_chunks)
        hidden_CF = whole.hidden_of_rows(*_widened(x_CD, whole, chunk_G, how), chunk_G)
        y_CD = how.product(hidden_CF.astype(how.dtype), whole.down_GFD, chunk_G).astype(x_MD.dtype)
        return _put(y_MD, y_CD, number)

    return jax.lax.fori_loop(0, _count(x_MD, sizes_G, num_chunks), body, undefined(x_MD.shape, x_MD.dtype, sizes_G))


def _forward(x_MD, weights, sizes_G, how, num_chunks):
    return grouped_mlp(x_MD, weights, sizes_G, how, num_chunks), (x_MD, weights, sizes_G)


def _backward(how, num_chunks, residuals, grad_MD):
    x_MD, weights, sizes_G = residuals
    whole = _of_matrices(how.gather, weights)

    def body(number, carry):
        grad_x_MD, grad_weights = carry
        x_CD, grad_CD = (_rows(rows, number, num_chunks) for rows in (x_MD, grad_MD))
        chunk_G = _sizes(sizes_G, number, len(x_MD) // num_chunks)
        times, outer = (partial(function, sizes_G=chunk_G) for function in (how.product, how.outer_product))
        gated_CF, widened_CF = _widened(x_CD, whole, chunk_G, how)
        biases = whole.gate_bias_GF, whole.up_bias_GF

        def hidden(gated_CF, widened_CF, gate_bias_GF, up_bias_GF):
            biased = replace(whole, gate_bias_GF=gate_bias_GF, up_bias_GF=up_bias_GF)
            return biased.hidden_of_rows(gated_CF, widened_CF, chunk_G)

        hidden_CF, pull = jax.vjp(hidden, gated_CF, widened_CF, *biases)
        x_CD, grad_CD = x_CD.astype(how.dtype), grad_CD.astype(how.dtype)
        *grads_CF, grad_gate_bias_GF, grad_up_bias_GF = pull(times(grad_CD, whole.down_GFD.mT).astype(x_MD.dtype))
        grad_gated_CF, grad_widened_CF = (grad.astype(how.dtype) for grad in grads_CF)
        grad_x_CD = times(grad_gated_CF, whole.gate_GDF.mT) + times(grad_widened_CF, whole.up_GDF.mT)
        grad_weights = replace(
            grad_weights,
            gate_GDF=outer(x_CD, grad_gated_CF, total_GIO=grad_weights.gate_GDF),
            up_GDF=outer(x_CD, grad_widened_CF, total_GIO=grad_weights.up_GDF),
            down_GFD=outer(hidden_CF.astype(how.dtype), grad_CD, total_GIO=grad_weights.down_GFD),
            gate_bias_GF=_sum_of(grad_weights.gate_bias_GF, grad_gate_bias_GF),
            up_bias_GF=_sum_of(grad_weights.up_bias_GF, grad_up_bias_GF),
        )
        return _put(grad_x_MD, grad_x_CD.astype(x_MD.dtype), number), grad_weights

    first = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), whole)
    carry = undefined(x_MD.shape, x_MD.dtype, sizes_G), first
    grad_x_MD, grads = jax.lax.fori_loop(0, _count(x_MD, sizes_G, num_chunks), body, carry)
    grads = _of_matrices(how.scatter_sum, grads)
    return grad_x_MD, jax.tree.map(lambda grad, weight: grad.astype(weight.dtype), grads, weights), None


grouped_mlp.defvjp(_forward, _backward)


def _widened(x_CD, whole: ExpertWeights, sizes_G, how):
    """The products with gate and up: [C, F] in the dtype of x."""
    return [
        how.product(x_CD.astype(how.dtype), weight, sizes_G).astype(x_CD.dtype)
        for weight in (whole.gate_GDF, whole.up_GDF)
    ]


def _of_matrices(function, weights: ExpertWeights) -> ExpertWeights:
    """`function(matrix, axis)` of each matrix and its axis that is the embedding."""
    return replace(
        weights,
        gate_GDF=function(weights.gate_GDF, 1),
        up_GDF=function(weights.up_GDF, 1),
        down_GFD=function(weights.down_GFD, 2),
    )


def _sum_of(total, added):
    return None if total is None else total + added


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
