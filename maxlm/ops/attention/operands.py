"""What attention reads besides queries, keys and values, and what a query may attend to.

Shapes: B batch, T query length, S key length, N query heads, K key-value heads, G = N / K; q and s the lengths of a
block of queries and of its keys.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from maxlm.ops.attention.position_bias import DistanceBias, PositionBias
from maxlm.ops.attention.rule import AttentionRule
from maxlm.ops.dropout import WeightDropout


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["segments", "prefix", "position_bias", "sinks_N", "mask_BNTS", "bias_BNTS", "dropout", "virtual"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class AttentionOperands:
    """The optional arrays of attention.

    Prefer what has structure: kernels compute `segments`, `prefix` and `position_bias` block by block, while `mask` and
    `bias` are matrices in memory, for what nothing else can say. The float arrays have gradients.

    Attributes:
      segments: int >= 0, of queries [B, T] and of keys [B, S]; a query attends only to keys of its own segment, and 0
        is padding.
      prefix: int >= 0 or bool, of queries [B, T] and of keys [B, S]; queries and keys with the same id, other than 0,
        attend to each other as if the rule were not causal. Segments and windows still hold.
      position_bias: added to the capped logits, by distance and head.
      sinks_N: by query head, a logit in the denominator of the softmax, with no value.
      mask_BNTS: bool, True attends; its batch and head axes may be 1.
      bias_BNTS: float, added to the capped logits; its batch and head axes may be 1.
      dropout: of the softmax's weights of keys; sinks and virtual tokens are not dropped.
      virtual: keys [P, K, H] and values [P, K, V] of virtual tokens (prefix tuning, arXiv:2101.00190). Every query that
        attends to a key also attends to them: no mask hides them. They have no position, and no bias is added.
    """

    segments: tuple[jax.Array, jax.Array] | None = None
    prefix: tuple[jax.Array, jax.Array] | None = None
    position_bias: PositionBias | None = None
    sinks_N: jax.Array | None = None
    mask_BNTS: jax.Array | None = None
    bias_BNTS: jax.Array | None = None
    dropout: WeightDropout | None = None
    virtual: tuple[jax.Array, jax.Array] | None = None

    def block(self, queries: slice, keys: slice) -> "AttentionOperands":
        """The ids and the mask of a block; without the others."""
        return AttentionOperands(
            segments=_block_ids(self.segments, queries, keys),
            prefix=_block_ids(self.prefix, queries, keys),
            mask_BNTS=None if self.mask_BNTS is None else self.mask_BNTS[:, :, queries, keys],
        )

    def by_distance(self, offset: int, length: int, kv_length: int) -> "AttentionOperands":
        """The same with `position_bias` computed once for each distance between a query and a key.

        offset: position of the first query relative to the first key; the distances of the result do not count it.
        """
        if self.position_bias is None:
            return self
        first = 1 - kv_length
        values_ND = self.position_bias.at(np.arange(first, length) + offset)
        return dataclasses.replace(self, position_bias=DistanceBias(values_ND, first))

    @property
    def has_mask(self) -> bool:
        """Whether these operands hide keys or, by a prefix, show them."""
        return any(x is not None for x in (self.segments, self.prefix, self.mask_BNTS))

    @property
    def biases(self) -> tuple[PositionBias | None, jax.Array | None]:
        return self.position_bias, self.bias_BNTS

    def visible(self, rule: AttentionRule, query_position, key_position) -> Any:
        """Which keys each query may attend to: True if all, else bool [B or 1, N or 1, T, S].

        Positions are [T] and [S], or [B or 1, T] and [B or 1, S].
        """
        query_position, key_position = query_position[..., :, None], key_position[..., None, :]
        visible: Any = rule.sees(query_position, key_position)
        if self.prefix is not None:
            visible |= _same(*self.prefix) & rule.bidirectional.sees(query_position, key_position)
        if self.segments is not None:
            visible &= _same(*self.segments)
        if visible is not True:
            visible = visible[:, None] if visible.ndim == 3 else visible[None, None]
        return visible if self.mask_BNTS is None else visible & self.mask_BNTS


NO_OPERANDS = AttentionOperands()


def check_operands(
    operands: AttentionOperands, query_shape: tuple[int, ...], key_shape: tuple[int, ...], value_shape: tuple[int, ...]
) -> None:
    """Raise ValueError if a shape does not fit the shapes of `attention`'s query, key and value."""
    batch, length, num_heads, _ = query_shape
    kv_length = key_shape[1]
    for name in ("segments", "prefix"):
        ids = getattr(operands, name)
        if ids is not None and (ids[0].shape, ids[1].shape) != ((batch, length), (batch, kv_length)):
            raise ValueError(
                f"{name} must be of queries {(batch, length)} and of keys {(batch, kv_length)}, not {ids[0].shape} and"
                f" {ids[1].shape}"
            )
    if operands.sinks_N is not None and operands.sinks_N.shape != (num_heads,):
        raise ValueError(f"sinks must be [num_heads] {(num_heads,)}, not {operands.sinks_N.shape}")
    if operands.position_bias is not None and operands.position_bias.num_heads != num_heads:
        raise ValueError(f"position_bias is for {operands.position_bias.num_heads} heads, not num_heads {num_heads}")
    if operands.virtual is not None:
        shapes = tuple(x.shape[1:] for x in operands.virtual)
        if shapes != (key_shape[2:], value_shape[2:]):
            raise ValueError(
                f"virtual tokens must have keys {key_shape[2:]} and values {value_shape[2:]}, not {shapes[0]} and"
                f" {shapes[1]}"
            )
    if (dropout := operands.dropout) is not None:
        shapes = dropout.query_seeds_BTN.shape, dropout.key_seeds_BS.shape
        if shapes != ((batch, length, num_heads), (batch, kv_length)):
            raise ValueError(
                f"dropout must have seeds of queries {(batch, length, num_heads)} and of keys"
                f" {(batch, kv_length)}, not {shapes[0]} and {shapes[1]}"
            )
    for name, array in {"mask": operands.mask_BNTS, "bias": operands.bias_BNTS}.items():
        if array is not None and (
            array.ndim != 4
            or array.shape[0] not in (1, batch)
            or array.shape[1] not in (1, num_heads)
            or array.shape[2:] != (length, kv_length)
        ):
            raise ValueError(
                f"{name} must be [batch or 1, num_heads or 1, length, kv_length] of"
                f" {(batch, num_heads, length, kv_length)}, not {array.shape}"
            )


def _block_ids(ids, queries: slice, keys: slice):
    return None if ids is None else (ids[0][:, queries], ids[1][:, keys])


def _same(ids_BT, ids_BS):
    """Whether a query and a key have the same id, other than 0: bool [B, T, S]."""
    ids_BT1, ids_B1S = ids_BT[:, :, None], ids_BS[:, None, :]
    return (ids_BT1 == ids_B1S) & (ids_BT1 != 0)


def group_heads(x_BNTS: jax.Array, num_kv_heads: int) -> jax.Array:
    """[B, N, T, S] as [B, K, G, T, S] by key-value head; one head as [B, 1, 1, T, S]. S may be any channels."""
    batch, num_heads, *lengths = x_BNTS.shape
    num_kv_heads = min(num_heads, num_kv_heads)
    return x_BNTS.reshape(batch, num_kv_heads, num_heads // num_kv_heads, *lengths)
