"""Mixture of experts: routing, expert-parallel dispatch and combine, and a reference.

| implementation | how tokens are sent to experts on other devices                                             |
| -------------- | ------------------------------------------------------------------------------------------- |
| `ragged`       | a ragged all-to-all sends only the rows that must be sent: TPUs and GPUs                    |
| `padded`       | a plain all-to-all of buffers sized for the worst case: any device                          |
| `reference`    | not at all: every expert computes every token, in float32, weighted by the router           |

All are exact: no token is ever dropped.

Dimensions: B batch, L length, D embed, F channels of an expert, E experts, K experts per token, S devices along the
expert axis; on one device: T tokens, A = T * K assignments of a token to an expert, G experts, N rows sent, M received.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.hardware import traced_platform
from maxlm.core.remat import saved
from maxlm.core.sharding import LOGICAL_AXES, current_mesh, is_explicit, logical_to_spec
from maxlm.errors import ConfigError
from maxlm.ops.linear import linear
from maxlm.ops.moe.grouped_matmul import GroupedProduct, grouped_linear, grouped_quantized, undefined
from maxlm.ops.moe.grouped_mlp import ExpertWeights, grouped_mlp
from maxlm.ops.qtensor import QTensor

IMPLEMENTATIONS = ("ragged", "padded", "reference")

_TOKENS = ("batch", "length", None)
_WIDENING, _WIDENING_BIAS = ("experts", "expert_embed", "mlp"), ("experts", "mlp")
_NARROWING = ("experts", "mlp", "expert_embed")


@dataclass(frozen=True)
class Routing:
    """experts_BLK: the experts of each token, best first; weights_BLK: float32, the weight of each one's output."""

    experts_BLK: jax.Array
    weights_BLK: jax.Array


def router_scores(logits_BLE: jax.Array, scoring: str) -> jax.Array:
    return jax.nn.softmax(logits_BLE, axis=-1) if scoring == "softmax" else jax.nn.sigmoid(logits_BLE)


@dataclass(frozen=True)
class Groups:
    """Groups of experts, of which each token has a few: `config.layers.MoeConfig`."""

    count: int = 1
    per_token: int = 1
    score: str = "best"

    def limit(self, scores_BLE: jax.Array) -> jax.Array:
        """The scores, -inf outside of the token's groups: those with the highest sum of their best one or two."""
        if self.count == self.per_token:
            return scores_BLE
        *shape, num_experts = scores_BLE.shape
        scores_BLGX = scores_BLE.reshape(*shape, self.count, num_experts // self.count)
        best, _ = jax.lax.top_k(scores_BLGX, 2 if self.score == "best_two" else 1)
        _, groups_BLT = jax.lax.top_k(jnp.sum(best, axis=-1), self.per_token)
        is_chosen_BLG = jnp.any(groups_BLT[..., None] == jnp.arange(self.count), axis=-2)
        return jnp.where(is_chosen_BLG[..., None], scores_BLGX, -jnp.inf).reshape(scores_BLE.shape)


def route(
    scores_BLE: jax.Array,
    bias_E: jax.Array | None,
    *,
    experts_per_token: int,
    normalize_weights: bool,
    scaling: float,
    groups: Groups = Groups(),
) -> Routing:
    """Route each token to the experts with the highest scores in its groups; ties go to the lower index.

    A bias affects only the choice, not the weights (arXiv:2408.15664).
    """
    choosing = scores_BLE if bias_E is None else scores_BLE + jax.lax.stop_gradient(bias_E)
    _, experts_BLK = jax.lax.top_k(groups.limit(jax.lax.stop_gradient(choosing)), experts_per_token)
    weights_BLK = jnp.take_along_axis(scores_BLE, experts_BLK, axis=-1)
    if normalize_weights:
        # All sigmoids may be close to zero.
        weights_BLK = weights_BLK / (jnp.sum(weights_BLK, axis=-1, keepdims=True) + 1e-20)
    return Routing(experts_BLK, scaling * weights_BLK)


def mixture_of_experts(
    x_BLD: jax.Array,
    routing: Routing,
    real_BL: jax.Array,
    weights: ExpertWeights,
    *,
    dtype: str,
    gradient_sum: str = "float32",
    output_axes: tuple[str | None, ...] | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """The weighted sum of the outputs of each token's experts, each a SwiGLU with or without biases.

    Args:
      real_BL: bool; other tokens are padding, are not routed and get zeros.
      dtype: of the operands of matrix products.
      gradient_sum: dtype in which gradients of the weights are summed over devices.
      output_axes: logical axes of the result's sharding, if not those of x.
      implementation: one of `IMPLEMENTATIONS`, or None for the best available.

    Returns:
      [batch, length, embed] in the dtype of x.

    Raises:
      ConfigError: the implementation is unknown, or not available here.
    """
    implementation = _choose(implementation)
    if implementation == "reference":
        y_BLD = reference_mixture(x_BLD, routing, real_BL, weights)
        return jax.reshard(y_BLD, logical_to_spec(output_axes)) if output_axes and is_explicit() else y_BLD
    down_bias_ED, weights = weights.down_bias_GD, replace(weights, down_bias_GD=None)
    arguments = (x_BLD, routing.experts_BLK, routing.weights_BLK, real_BL, weights)
    product = partial(GroupedProduct, dtype, "ragged" if traced_platform() == "tpu" else "blocks")
    local = partial(_local_mixture, implementation=implementation)
    if is_explicit():
        tokens, out = logical_to_spec(_TOKENS), logical_to_spec(output_axes or _TOKENS)
        sharded = jax.shard_map(
            partial(
                local,
                num_shards=current_mesh().shape["expert"],
                product=product(LOGICAL_AXES["expert_embed"], gradient_sum),
                sum_over="tensor",
                scatter="tensor" in (out[1] or ()),
            ),
            in_specs=(tokens, tokens, tokens, P(*tokens[:2]), _specs_of(weights)),
            out_specs=out,
            check_vma=False,
        )
        y_BLD = sharded(*arguments)
    else:
        y_BLD = local(*arguments, product=product(), num_shards=1, sum_over=None, scatter=False)
    if down_bias_ED is None:
        return y_BLD
    # The weighted sum of the biases of a token's experts: where the token is, once for all devices along `tensor`.
    weights_BLE = _weights_of_experts(routing, real_BL, len(down_bias_ED))
    return y_BLD + linear(weights_BLE, down_bias_ED, "float32", output_axes or _TOKENS).astype(y_BLD.dtype)


def _specs_of(weights: ExpertWeights) -> ExpertWeights:
    """The sharding of each array, without that of the bias of down."""
    widening, bias = logical_to_spec(_WIDENING), logical_to_spec(_WIDENING_BIAS)
    specs: dict[str, Any] = {"gate_GDF": widening, "up_GDF": widening, "down_GFD": logical_to_spec(_NARROWING)}
    if weights.gate_bias_GF is not None:
        specs |= {"gate_bias_GF": bias, "up_bias_GF": bias}
    return replace(weights, **specs)


def _weights_of_experts(routing: Routing, real_BL: jax.Array, num_experts: int) -> jax.Array:
    """float32 [B, L, E]: the weight of each expert's output; zeros for padding."""
    chosen_BLKE = routing.experts_BLK[..., None] == jnp.arange(num_experts)
    weights_BLE = jnp.sum(jnp.where(chosen_BLKE, routing.weights_BLK[..., None], 0.0), axis=-2)
    return jnp.where(real_BL[..., None], weights_BLE, 0.0)


def reference_mixture(x_BLD: jax.Array, routing: Routing, real_BL: jax.Array, weights: ExpertWeights) -> jax.Array:
    """The definition, in float32: every expert on every token, weighted by the routing."""
    whole = jax.tree.map(lambda weight: _whole(weight).astype(jnp.float32), weights)
    x, biases = x_BLD.astype(jnp.float32), (whole.gate_bias_GF, whole.up_bias_GF)
    product = partial(jnp.einsum, precision="highest")
    gated, widened = (product("bld,edf->blef", x, weight) for weight in (whole.gate_GDF, whole.up_GDF))
    gated, widened = (y if bias is None else y + bias for y, bias in zip((gated, widened), biases))
    y_BLED = product("blef,efd->bled", whole.hidden(gated, widened), whole.down_GFD)
    if whole.down_bias_GD is not None:
        y_BLED += whole.down_bias_GD
    weights_BLE = _weights_of_experts(routing, real_BL, len(whole.gate_GDF))
    return product("bled,ble->bld", y_BLED, weights_BLE).astype(x_BLD.dtype)


def _whole(weight):
    return jax.reshard(weight, P(*[None] * weight.ndim)) if is_explicit() else weight


def _choose(implementation: str | None) -> str:
    platform = traced_platform()
    if implementation is None:
        return "padded" if platform == "cpu" else "ragged"
    if implementation not in IMPLEMENTATIONS:
        raise ConfigError(
            [f"mixture of experts: implementation {implementation!r} is unknown; allowed: {', '.join(IMPLEMENTATIONS)}"]
        )
    if implementation == "ragged" and platform == "cpu":
        raise ConfigError(
            ["mixture of experts: implementation 'ragged' needs a TPU or GPU, not a CPU; choose 'padded'"]
        )
    return implementation


def _local_mixture(
    x_BLD,
    experts_BLK,
    weights_BLK,
    real_BL,
    weights: ExpertWeights,
    *,
    product: GroupedProduct,
    implementation: str,
    num_shards: int,
    sum_over: str | None,
    scatter: bool,
):
    """One device's part: its tokens are sent to the devices of their experts and back."""
    embed = x_BLD.shape[-1]
    num_per_token = experts_BLK.shape[-1]
    x_TD = x_BLD.reshape(-1, embed)
    num_experts = num_shards * len(jax.tree.leaves(weights.gate_GDF)[0])
    # Padding is assigned to an expert index beyond the last.
    experts_A = jnp.where(real_BL[..., None], experts_BLK, num_experts).reshape(-1)
    if num_shards == 1:
        exchange = _sort_only(experts_A, num_experts)
    elif implementation == "ragged":
        exchange = _exchange_ragged(experts_A, num_experts, num_shards, num_per_token)
    else:
        exchange = _exchange_padded(experts_A, num_experts, num_shards, num_per_token)

    row_of_A = _inverse(exchange.assignment_N, len(experts_A))
    rows_ND = _permute(x_TD, exchange.assignment_N // num_per_token, row_of_A.reshape(-1, num_per_token))
    rows_MD = exchange.send(rows_ND)
    if exchange.order_M is not None:
        order_of_M = _inverse(exchange.order_M, len(rows_MD))
        rows_MD = _permute(rows_MD, exchange.order_M, order_of_M)
    rows_MD = _experts(rows_MD, weights, exchange.sizes_G, product, len(experts_A))
    if exchange.order_M is not None:
        rows_MD = _permute(rows_MD, order_of_M, exchange.order_M)
    y_AD = _permute(exchange.send_back(rows_MD), row_of_A, exchange.assignment_N)

    y_TKD = y_AD.reshape(-1, num_per_token, embed).astype(jnp.float32)
    y_BLD = jnp.einsum("tk,tkd->td", weights_BLK.reshape(-1, num_per_token), y_TKD).reshape(x_BLD.shape)
    if sum_over and scatter:
        y_BLD = jax.lax.psum_scatter(y_BLD, sum_over, scatter_dimension=1, tiled=True)
    elif sum_over:
        y_BLD = jax.lax.psum(y_BLD, sum_over)
    return y_BLD.astype(x_BLD.dtype)


def _experts(ordered_MD, weights: ExpertWeights, sizes_G, product: GroupedProduct, num_assignments: int):
    """The outputs of the experts, before the bias of down, for rows in the order of experts.

    A device with more room than the rows that it receives on average, one per assignment, works through it in chunks.
    """
    num_chunks = _largest_divisor(len(ordered_MD), len(ordered_MD) // num_assignments)
    if num_chunks > 1 and not isinstance(weights.gate_GDF, QTensor):
        return saved(grouped_mlp(ordered_MD, weights, sizes_G, product, num_chunks))

    def times(x_MI, weight, embed_axis):
        if isinstance(weight, QTensor):
            return grouped_quantized(x_MI, weight, sizes_G)
        return saved(grouped_linear(x_MI, weight, sizes_G, product, embed_axis))

    gated_MF, widened_MF = times(ordered_MD, weights.gate_GDF, 1), times(ordered_MD, weights.up_GDF, 1)
    return times(weights.hidden_of_rows(gated_MF, widened_MF, sizes_G), weights.down_GFD, 2)


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


@dataclass(frozen=True)
class _Exchange:
    """Which rows a device sends, how they are sent, and the order of its received rows by expert. Received rows that no
    device sent are undefined, in both directions.

    assignment_N: index in A of each row that is sent; -1 is an empty row.
    send: [N, D] -> [M, D]; send_back: the reverse.
    order_M: the received row for each row in expert order, -1 after the last; None if they arrive in that order.
    sizes_G: number of rows of each expert.
    """

    assignment_N: jax.Array
    send: Callable[[jax.Array], jax.Array]
    send_back: Callable[[jax.Array], jax.Array]
    order_M: jax.Array | None
    sizes_G: jax.Array


def _sort_only(experts_A, num_experts):
    """Exchange on one device: all experts are local."""
    order_A, counts_E = _sorted(experts_A, num_experts)
    order_A = jnp.where(jnp.arange(len(order_A)) < jnp.sum(counts_E), order_A, -1)
    return _Exchange(order_A, _identity, _identity, None, counts_E)


def _exchange_padded(experts_A, num_experts, num_shards, num_per_token):
    order_A, counts_E = _sorted(experts_A, num_experts)
    counts_SE = jax.lax.all_gather(counts_E, "expert")
    room = _room(len(experts_A), num_experts // num_shards, num_per_token)
    sent_S = counts_E.reshape(num_shards, -1).sum(-1)
    assignment_N = _take_runs(order_A, _exclusive_sum(sent_S), sent_S, room)
    order_M, sizes_G = _order_of_experts(counts_SE, room * jnp.arange(num_shards), num_shards * room)
    swap = partial(_swap, num_shards=num_shards)
    return _Exchange(assignment_N, swap, swap, order_M, sizes_G)


def _exchange_ragged(experts_A, num_experts, num_shards, num_per_token):
    order_A, counts_E = _sorted(experts_A, num_experts)
    counts_SE = jax.lax.all_gather(counts_E, "expert")
    me = jax.lax.axis_index("expert")
    room = num_shards * _room(len(experts_A), num_experts // num_shards, num_per_token)
    # Rows from each device (first axis) to each expert of each device (the others): their number, and where they start
    # at the sender, which has them by expert, and at the receiver, which gets them by expert and then by sender.
    sent_SSG = counts_SE.reshape(num_shards, num_shards, -1)
    leave_SSG = _exclusive_sum(counts_SE, axis=1).reshape(sent_SSG.shape)
    arrive_SSG = _exclusive_sum(sent_SSG.sum(0), axis=1) + _exclusive_sum(sent_SSG, axis=0)
    there = (leave_SSG[me], sent_SSG[me], arrive_SSG[me], sent_SSG[:, me])
    back = (arrive_SSG[:, me], sent_SSG[:, me], leave_SSG[:, me], sent_SSG[me])
    there, back = (tuple(part.reshape(-1) for part in way) for way in (there, back))
    place_A = jnp.arange(len(order_A))
    return _Exchange(
        jnp.where(place_A < jnp.sum(counts_E), order_A, -1),
        lambda rows_ND: _send_ragged(rows_ND, there, back, len(order_A), room),
        lambda rows_MD: _send_ragged(rows_MD, back, there, room, len(order_A)),
        None,
        sent_SSG[:, me].sum(0),
    )


def _sorted(experts_A, num_experts):
    """Assignments sorted by expert (then by token; padding last), and the number of each expert."""
    counts_E = jnp.zeros(num_experts, jnp.int32).at[experts_A].add(1, mode="drop")
    return jnp.argsort(experts_A, stable=True).astype(jnp.int32), counts_E


def _room(num_assignments: int, experts_of_shard: int, num_per_token: int) -> int:
    """Maximum number of rows that a device can send to another: the experts of a token are distinct."""
    return num_assignments // num_per_token * min(num_per_token, experts_of_shard)


def _take_runs(order_A, starts_R, sizes_R, room: int):
    """Runs of `order_A`, each padded to `room` entries with -1."""
    places = jnp.arange(room)
    filled = places < sizes_R[:, None]
    taken = order_A[jnp.where(filled, starts_R[:, None] + places, 0)]
    return jnp.where(filled, taken, -1).reshape(-1)


def _order_of_experts(counts_SE, first_row_S, num_rows: int):
    """Sort received rows, which are by sender and then by expert, by expert: the order, and the rows per expert."""
    num_shards = len(counts_SE)
    mine_SG = jax.lax.dynamic_index_in_dim(
        counts_SE.reshape(num_shards, num_shards, -1), jax.lax.axis_index("expert"), axis=1, keepdims=False
    )
    source_SG = first_row_S[:, None] + _exclusive_sum(mine_SG, axis=1)
    sizes, sources = mine_SG.T.reshape(-1), source_SG.T.reshape(-1)
    ends = jnp.cumsum(sizes)
    place_M = jnp.arange(num_rows)
    run_M = jnp.minimum(jnp.searchsorted(ends, place_M, side="right"), len(ends) - 1)
    order_M = sources[run_M] + place_M - (ends - sizes)[run_M]
    return jnp.where(place_M < ends[-1], order_M, -1), mine_SG.sum(0)


def _identity(rows):
    return rows


def _swap(rows_ND, num_shards: int):
    """All-to-all of equal parts, which is its own inverse."""
    parts = rows_ND.reshape(num_shards, -1, rows_ND.shape[-1])
    return jax.lax.all_to_all(parts, "expert", 0, 0, tiled=True).reshape(rows_ND.shape)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _send_ragged(rows, there, back, num_rows: int, num_received: int):
    """Ragged all-to-all of one run of rows for each expert of each device.

    `there` and `back`: input offsets, send sizes, output offsets, receive sizes.
    """
    del back, num_rows
    # Rows that are not received are never read.
    output = undefined((num_received, rows.shape[-1]), rows.dtype, there[1])
    return jax.lax.ragged_all_to_all(rows, output, *there, axis_name="expert")


def _send_ragged_forward(rows, there, back, num_rows, num_received):
    return _send_ragged(rows, there, back, num_rows, num_received), (there, back)


def _send_ragged_backward(num_rows, num_received, residuals, grad):
    there, back = residuals
    return _send_ragged(grad, back, there, num_received, num_rows), None, None


_send_ragged.defvjp(_send_ragged_forward, _send_ragged_backward)


@jax.custom_vjp
def _permute(x, index, inverse):
    """Rows x[index], zeros where the index is -1. `inverse` holds, for each row of x, its place in the result: one
    ([rows]) or several ([rows, times]), with -1 for none.

    The gradient of a gather is a scatter, which is slow; with the inverse known, it is a gather too.
    """
    return _rows(x, index)


def _permute_forward(x, index, inverse):
    return _rows(x, index), inverse


def _permute_backward(inverse, grad):
    rows = _rows(grad, inverse)
    if inverse.ndim == 2:
        rows = jnp.sum(rows, axis=1, dtype=jnp.float32).astype(grad.dtype)
    return rows, None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _rows(x, index):
    return jnp.where((index >= 0)[..., None], x[jnp.maximum(index, 0)], 0)


def _inverse(index_N, size: int):
    """The place of each of 0 .. size - 1 in `index_N`; -1 if absent."""
    targets = jnp.where(index_N >= 0, index_N, size)
    return jnp.full(size, -1, jnp.int32).at[targets].set(jnp.arange(len(index_N), dtype=jnp.int32), mode="drop")


def _exclusive_sum(x, axis: int = 0):
    return jnp.cumsum(x, axis=axis) - x
