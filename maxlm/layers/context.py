"""What all layers of a model know about the tokens that they process."""

from dataclasses import dataclass
from functools import partial
from typing import Self

import jax

from maxlm.config.model import ModelConfig
from maxlm.config.rope import RopeConfig
from maxlm.layers.noise import Noise
from maxlm.ops.attention.ring import RowOrder
from maxlm.ops.rope import rope_angles

# Layout of the residual stream as input of mixers and MLPs.
TOKEN_AXES = ("batch", "length", None)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["positions_BL", "segment_ids_BL", "angles", "noise"],
    meta_fields=["residual_axes", "row_order"],
)
@dataclass(frozen=True)
class TokenContext:
    """Token metadata for all layers; the first axis of each array is the batch.

    positions_BL: within a document.
    segment_ids_BL: tokens of one document have the same; 0 is padding.
    angles: cosines and sines of the rotary positions, for each head size and setting in the model: see `angles_of`.
    noise: in training, if anything is random.
    residual_axes: sharding of the stream between layers.
    row_order: order of tokens in rows that are sharded along `context`.
    """

    positions_BL: jax.Array
    segment_ids_BL: jax.Array
    angles: dict[str, tuple[jax.Array, jax.Array]]
    noise: Noise | None = None
    residual_axes: tuple[str | None, ...] = TOKEN_AXES
    row_order: RowOrder = "plain"

    @classmethod
    def create(cls, config: ModelConfig, positions_BL: jax.Array, segment_ids_BL: jax.Array, **layout) -> Self:
        """The context of tokens in a model, with the rotary angles that its layers need."""
        given = [layer.mixer.rotary for layer in config.each_layer()]
        settings = {_key(*rotary): rotary for rotary in given if rotary is not None}
        angles = {key: rope_angles(positions_BL, *setting) for key, setting in settings.items()}
        return cls(positions_BL, segment_ids_BL, angles, **layout)

    def angles_of(self, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
        return self.angles[_key(rope, head_dim)]


def _key(rope: RopeConfig, head_dim: int) -> str:
    # A string, as keys of a pytree must have an order.
    return f"{head_dim} {rope!r}"
