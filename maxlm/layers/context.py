"""What all layers of a model know about the tokens that they process."""

from dataclasses import dataclass
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp

from maxlm.config.model import ModelConfig
from maxlm.config.rope import RopeConfig
from maxlm.core.sharding import is_explicit, logical_to_spec, names_of
from maxlm.layers.noise import Noise
from maxlm.ops.attention.position_bias import RelativeBuckets
from maxlm.ops.attention.ring import RowOrder
from maxlm.ops.rope import rope_angles

# Layout of the residual stream as input of mixers and MLPs.
TOKEN_AXES = ("batch", "length", None)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions_BL", "segment_ids_BL", "angles", "prefix_lengths_BL", "noise", "relative_bias"],
    meta_fields=["residual_axes", "row_order"],
)
@dataclass(frozen=True)
class TokenContext:
    """Token metadata for all layers; the first axis of each array but those of `relative_bias` is the batch.

    positions_BL: within a document.
    segment_ids_BL: tokens of one document have the same; 0 is padding.
    angles: cosines and sines of the rotary positions, for each head size and setting in the model: see `angles_of`.
    prefix_lengths_BL: of a token's document; the tokens of a prefix attend to one another in both directions. None:
      there are no prefixes.
    noise: in training, if anything is random.
    relative_bias: of attention by distance, from a weight that layers share: gradients flow through it.
    residual_axes: sharding of the stream between layers.
    row_order: order of tokens in rows that are sharded along `context`.
    """

    positions_BL: jax.Array
    segment_ids_BL: jax.Array
    angles: dict[str, tuple[jax.Array, jax.Array]]
    prefix_lengths_BL: jax.Array | None = None
    noise: Noise | None = None
    relative_bias: RelativeBuckets | None = None
    residual_axes: tuple[str | None, ...] = TOKEN_AXES
    row_order: RowOrder = "plain"

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        positions_BL: jax.Array,
        segment_ids_BL: jax.Array,
        prefix_lengths_BL: jax.Array | None = None,
    ) -> Self:
        """The context of tokens in a model, with the rotary angles that its layers need."""
        given = [layer.mixer.rotary for layer in (*config.each_layer(), *config.module_layers)]
        settings = {_key(*rotary): rotary for rotary in given if rotary is not None}
        lengths_BL = None
        if any(rope.depends_on_length for rope, _ in settings.values()):
            lengths_BL = document_lengths(positions_BL, segment_ids_BL)
        angles = {
            key: rope_angles(positions_BL, *setting, lengths_BL, prefix_lengths_BL) for key, setting in settings.items()
        }
        return cls(positions_BL, segment_ids_BL, angles, prefix_lengths_BL)

    @property
    def prefix(self) -> tuple[jax.Array, jax.Array] | None:
        """`AttentionOperands.prefix` of these tokens and themselves."""
        if self.prefix_lengths_BL is None:
            return None
        is_prefix_BL = self.positions_BL < self.prefix_lengths_BL
        return is_prefix_BL, is_prefix_BL

    @property
    def of_tokens(self) -> "TokenContext":
        """Only the positions, segments and prefixes."""
        return TokenContext(self.positions_BL, self.segment_ids_BL, {}, self.prefix_lengths_BL)

    def prefix_in_cache(self, cached_positions_BS: jax.Array) -> tuple[jax.Array, jax.Array] | None:
        """`AttentionOperands.prefix` of these tokens and of those in a cache; a row is one sequence."""
        if self.prefix_lengths_BL is None:
            return None
        longest_B1 = jnp.max(self.prefix_lengths_BL, axis=1, keepdims=True)
        return self.positions_BL < self.prefix_lengths_BL, cached_positions_BS < longest_B1

    def angles_of(self, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
        return self.angles[_key(rope, head_dim)]


def document_lengths(positions_BL: jax.Array, segment_ids_BL: jax.Array) -> jax.Array:
    """For each token, the length of its document: int32 [B, L]. With a cache, the length so far.

    Args:
      segment_ids_BL: documents of a row, numbered from 1 to at most L; 0 is padding.
    """
    if not is_explicit():
        return _local_lengths(positions_BL, segment_ids_BL, length_axes=())
    tokens = logical_to_spec(("batch", "length"))
    local = partial(_local_lengths, length_axes=names_of(tokens[1]))
    return jax.shard_map(local, in_specs=(tokens, tokens), out_specs=tokens, check_vma=False)(
        positions_BL, segment_ids_BL
    )


def _local_lengths(positions_BL, segment_ids_BL, *, length_axes: tuple[str, ...]):
    positions, segments = positions_BL, segment_ids_BL
    if length_axes:
        # A document may continue on the next device.
        positions, segments = (
            jax.lax.all_gather(x, length_axes, axis=1, tiled=True) for x in (positions_BL, segment_ids_BL)
        )
    batch, length = segments.shape
    rows_B1 = jnp.arange(batch)[:, None]
    longest = jnp.zeros((batch, length + 1), jnp.int32).at[rows_B1, segments].max(positions + 1)
    return longest[rows_B1, segment_ids_BL]


def _key(rope: RopeConfig, head_dim: int) -> str:
    # A string, as keys of a pytree must have an order.
    return f"{head_dim} {rope!r}"
