"""The one batch type."""

from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self

import jax
import numpy as np


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "targets", "loss_weights", "segment_ids", "positions"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Batch:
    """Rows of packed or padded sequences; every field is [batch, length].

    Documents and padding are told apart by `segment_ids` (0 is padding), never by a token's value. `loss_weights` is
    float32; the others are int32.
    """

    tokens: Any
    targets: Any
    loss_weights: Any
    segment_ids: Any
    positions: Any

    @classmethod
    def from_rows(cls, rows: dict[str, np.ndarray]) -> Self:
        """From the arrays that the data loader gives, by name."""
        return cls(**{field.name: rows[field.name] for field in fields(cls)})
