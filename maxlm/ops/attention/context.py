"""Context parallelism: attention over rows sharded along the mesh axis `context`, and the token order of such rows.

Ring attention (`ring.py`) passes keys and values around. With all-to-all (arXiv:2309.14509), every device
gets whole rows of some of the heads.

Shapes: B batch, L length of a row, T a device's tokens, N query heads, K key-value heads, H head dim, V value dim.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from maxlm.core.sharding import check_row_length, current_mesh, spec_of
from maxlm.errors import ConfigError
from maxlm.ops.attention.dispatch import attention, in_pieces
from maxlm.ops.attention.operands import AttentionOperands
from maxlm.ops.attention.ring import AXIS, Ring, RowOrder, held_chunks, ring_attention
from maxlm.ops.attention.rule import AttentionRule
from maxlm.ops.dropout import WeightDropout


def context_size() -> int:
    """Number of devices that the tokens of a row are sharded over."""
    mesh = current_mesh()
    return 1 if mesh is None else mesh.shape.get(AXIS, 1)


def row_order(length: int, method: str) -> RowOrder:
    """The token order of rows in a causal model: zigzag for ring attention, if rows have two chunks per device.

    Raises:
      ConfigError: the row length is not divisible by the devices.
    """
    size = context_size()
    check_row_length(length, size)
    return "zigzag" if size > 1 and method == "ring" and length % (2 * size) == 0 else "plain"


def to_row_order(x_BL: jax.Array, order: RowOrder) -> jax.Array:
    """Rearrange rows [batch, length, ...] from token order to `order`."""
    return _exchange_chunks(x_BL, back=False) if order == "zigzag" else x_BL


def to_token_order(x_BL: jax.Array, order: RowOrder) -> jax.Array:
    """Rearrange rows [batch, length, ...] from `order` to token order."""
    return _exchange_chunks(x_BL, back=True) if order == "zigzag" else x_BL


def _exchange_chunks(x_BL: jax.Array, *, back: bool) -> jax.Array:
    """Exchange two chunks per device: in order 2i and 2i + 1, as a zigzag i and 2C - 1 - i. One is even, one odd.

    So two permutations of the devices suffice, one for the even chunks and one for the odd.
    """
    size = context_size()
    home = {chunk: device for device, chunks in enumerate(held_chunks("zigzag", size)) for chunk in chunks}
    routes = [[(device, home[2 * device + parity]) for device in range(size)] for parity in (0, 1)]

    def exchange(x):
        odd_first = jax.lax.axis_index(AXIS) % 2 == 1
        even, odd = jnp.split(x, 2, axis=1)
        if back:
            even, odd = jnp.where(odd_first, odd, even), jnp.where(odd_first, even, odd)
        even, odd = (
            jax.lax.ppermute(part, AXIS, [pair[::-1] for pair in route] if back else route)
            for part, route in zip((even, odd), routes)
        )
        if not back:
            even, odd = jnp.where(odd_first, odd, even), jnp.where(odd_first, even, odd)
        return jnp.concatenate([even, odd], axis=1)

    spec = spec_of(x_BL)
    return jax.shard_map(exchange, in_specs=spec, out_specs=spec, check_vma=False)(x_BL)


def context_attention(
    query_BTNH: jax.Array,
    key_BTKH: jax.Array,
    value_BTKV: jax.Array,
    rule: AttentionRule,
    operands: AttentionOperands,
    *,
    method: str,
    order: RowOrder = "plain",
    implementation: str | None = None,
    matmul_dtype: jnp.dtype | None = None,
) -> jax.Array:
    """`dispatch.attention` over rows sharded along `context`; call it inside `jax.shard_map`.

    Args:
      query_BTNH, key_BTKH, value_BTKV: this device's tokens and heads.
      operands: of this device's tokens and heads; masks and arrays of biases only if rows are not sharded.
      method: "ring" or "all_to_all", with the same result.
      order: token order of the rows; "all_to_all" needs "plain".
      implementation: as in `attention`; "ring" needs `xla` or `pallas_tpu`.

    Raises:
      ConfigError: the heads are not divisible by the devices, the implementation does not support "ring", or an operand
        needs whole rows.
    """
    size, length = context_size(), query_BTNH.shape[1]
    matmul_dtype = jnp.dtype(query_BTNH.dtype if matmul_dtype is None else matmul_dtype)
    if size == 1:
        return attention(
            query_BTNH, key_BTKH, value_BTKV, rule, operands, implementation=implementation, matmul_dtype=matmul_dtype
        )
    for name, array in {"a mask": operands.mask_BNTS, "an array of biases": operands.bias_BNTS}.items():
        if array is not None:
            raise ConfigError([f"execution.context_attention: {method} does not support {name}; choose mesh.context=1"])
    operands = operands.by_distance(0, length * size, length * size)
    if method == "ring":
        pieces = in_pieces(implementation, length // len(held_chunks(order, size)[0]), matmul_dtype)
        return ring_attention(Ring(rule, pieces, order, size), query_BTNH, key_BTKH, value_BTKV, operands)
    query_BTNH, key_BTKH, value_BTKV = _heads_for_tokens(query_BTNH, key_BTKH, value_BTKV, size)
    of_row = partial(jax.lax.all_gather, axis_name=AXIS, axis=1, tiled=True)
    segments, prefix = jax.tree.map(of_row, (operands.segments, operands.prefix))
    position_bias, sinks_N = jax.tree.map(
        lambda x: _heads_of_device(x, query_BTNH.shape[2]), (operands.position_bias, operands.sinks_N)
    )
    virtual = jax.tree.map(lambda x_PKH: _key_heads_of_device(x_PKH, size), operands.virtual)
    dropout = operands.dropout
    if dropout is not None:
        seeds_BTN = jax.lax.all_to_all(dropout.query_seeds_BTN, AXIS, split_axis=2, concat_axis=1, tiled=True)
        dropout = WeightDropout(seeds_BTN, of_row(dropout.key_seeds_BS), dropout.rate)
    output = attention(
        query_BTNH,
        key_BTKH,
        value_BTKV,
        rule,
        AttentionOperands(segments, prefix, position_bias, sinks_N, dropout=dropout, virtual=virtual),
        implementation=implementation,
        matmul_dtype=matmul_dtype,
    )
    return jax.lax.all_to_all(output, AXIS, split_axis=1, concat_axis=2, tiled=True)


def _heads_of_device(x_N: jax.Array, num_heads: int) -> jax.Array:
    """This device's share of the heads of an array [N, ...], after `_heads_for_tokens`."""
    return jax.lax.dynamic_slice_in_dim(x_N, jax.lax.axis_index(AXIS) * num_heads, num_heads)


def _key_heads_of_device(x_PKH: jax.Array, size: int) -> jax.Array:
    """The same of an array [tokens, key-value heads, channels]."""
    x_KPH = jnp.repeat(x_PKH, _copies(x_PKH.shape[1], size), axis=1).swapaxes(0, 1)
    return _heads_of_device(x_KPH, len(x_KPH) // size).swapaxes(0, 1)


def _copies(num_kv_heads: int, size: int) -> int:
    """How often key-value heads are replicated, so that each device gets as many: if there are fewer than devices."""
    return size // math.gcd(num_kv_heads, size)


def _heads_for_tokens(query_BTNH, key_BTKH, value_BTKV, size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All-to-all from some tokens of all heads of this device to all tokens of some of the heads."""
    num_heads, num_kv_heads = query_BTNH.shape[2], key_BTKH.shape[2]
    if num_heads % size:
        raise ConfigError(
            [
                f"execution.context_attention: all_to_all cannot split a device's {num_heads} heads over mesh.context ="
                f" {size}; choose ring, or mesh.context={math.gcd(num_heads, size)}"
            ]
        )
    # As num_heads is a multiple of both numbers, it is one of their least common multiple, and queries stay with their
    # keys.
    copies = _copies(num_kv_heads, size)
    key_BTKH, value_BTKV = (jnp.repeat(x, copies, axis=2) for x in (key_BTKH, value_BTKV))
    return tuple(
        jax.lax.all_to_all(x, AXIS, split_axis=2, concat_axis=1, tiled=True) for x in (query_BTNH, key_BTKH, value_BTKV)
    )
