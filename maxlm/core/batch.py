"""The batch type."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.core.sharding import check_row_length, logical_to_spec, row_groups, row_shard, shard


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "targets", "loss_weights", "segment_ids", "positions", "prefix_lengths"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Stream:
    """Rows of packed or padded sequences of tokens; every field is [batch, length].

    Documents and padding are identified by `segment_ids` (0 is padding), never by a token's value. `loss_weights` is
    float32; the others are int32. `prefix_lengths`, for prefix language models, is the length of the prefix of each
    token's document: its first tokens, which attend to one another in both directions.
    """

    tokens: Any
    targets: Any
    loss_weights: Any
    segment_ids: Any
    positions: Any
    prefix_lengths: Any = None

    @classmethod
    def from_rows(cls, rows: dict[str, np.ndarray]) -> Self:
        """From the data loader's arrays by name, of which others are left out."""
        return cls(**{field.name: rows[field.name] for field in fields(cls) if field.name in rows})


@partial(jax.tree_util.register_dataclass, data_fields=["streams", "values", "row_seeds_B"], meta_fields=[])
@dataclass(frozen=True)
class Batch:
    """Input of a loss: token streams by name, and values per row [batch] or per token [batch, length] by name.

    The first axis of every array is the batch. `batch["text"]` is a stream. `row_seeds_B`: for randomness in the loss,
    uint32; None: nothing is random.
    """

    streams: Mapping[str, Stream]
    values: Mapping[str, Any] = field(default_factory=dict)
    row_seeds_B: Any = None

    def __getitem__(self, name: str) -> Stream:
        return self.streams[name]


def look_ahead(stream: Stream, distance: int) -> Stream:
    """At each place what stands `distance` places later; padding where the document has ended by then."""

    def later(x_BL: jax.Array) -> jax.Array:
        # Devices along `context` exchange whole rows: a few bytes a token.
        whole_BL = jnp.pad(shard(x_BL, "batch", None), ((0, 0), (0, distance)))
        return shard(whole_BL[:, distance:], "batch", "length")

    is_same_BL = later(stream.segment_ids) == stream.segment_ids
    fields = ("tokens", "targets", "loss_weights", "segment_ids", "positions")
    return Stream(**{name: jnp.where(is_same_BL, later(getattr(stream, name)), 0) for name in fields})


def document_lengths(segment_ids_BL: jax.Array) -> jax.Array:
    """The number of tokens of each token's document in its row: int32 [B, L]; for padding, that of the padding."""
    # Devices along `context` exchange whole rows: a few bytes a token.
    whole_BL = shard(segment_ids_BL, "batch", None)
    length = whole_BL.shape[1]
    starts_BL = whole_BL[:, 1:] != whole_BL[:, :-1]
    begins_BL, ends_BL = (jnp.pad(starts_BL, ((0, 0), side), constant_values=True) for side in ((1, 0), (0, 1)))
    columns_L = jnp.arange(length)
    first_BL = jax.lax.cummax(jnp.where(begins_BL, columns_L, 0), axis=1)
    last_BL = jax.lax.cummin(jnp.where(ends_BL, columns_L, length), axis=1, reverse=True)
    return shard(last_BL - first_BL + 1, "batch", "length")


def put_batch(batch: Any, mesh: Mesh, axes: tuple[str | None, ...] = ("batch", "length")) -> Any:
    """Turn this process's rows into global arrays, sharded along the logical axes of their first dimensions.

    Args:
      batch: a tree of host arrays [rows] or [rows, length, ...].

    Raises:
      ConfigError: rows cannot be split along their length.
    """
    rows, groups = row_shard(mesh), row_groups(mesh)

    def put(x: np.ndarray) -> jax.Array:
        if "length" in axes[: x.ndim]:
            check_row_length(x.shape[1], mesh.shape["context"])
        spec = logical_to_spec((*axes, *[None] * x.ndim)[: x.ndim])
        size = x.shape[0] // len(groups)

        def part(index: tuple[slice, ...]) -> np.ndarray:
            place = groups.index((index[0].start or 0) // size) * size
            return x[(slice(place, place + size), *index[1:])]

        shape = (rows.count * x.shape[0], *x.shape[1:])
        return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)

    return jax.tree.map(put, batch)


def num_tokens(batch: Any) -> int:
    """Number of tokens in a batch, including padding."""
    parts = jax.tree.leaves(batch, is_leaf=lambda part: isinstance(part, Stream))
    return sum(part.tokens.size for part in parts if isinstance(part, Stream))
