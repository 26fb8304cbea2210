"""A model together with its outputs: what a loss is a function of."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import jax.numpy as jnp

from maxlm.config.regularization import RegularizationConfig
from maxlm.core.batch import Batch
from maxlm.layers.noise import Noise
from maxlm.models.decoder import DecoderOutput
from maxlm.ops.dropout import hashed


@dataclass(frozen=True)
class AppliedModel:
    """A model, its outputs for each stream of a batch by name, and the label smoothing of its cross-entropies.

    A loss takes it in place of the model, so that a pipeline can compute the outputs its own way. `others` are applied
    to the same streams: a `teacher`, or a `critic`.
    """

    decoder: Any
    outputs: Mapping[str, DecoderOutput]
    label_smoothing: float = 0.0
    others: Mapping[str, Self] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Any, batch: Batch, rates: RegularizationConfig | None = None) -> Self:
        """Apply a model to each stream of a batch.

        Args:
          rates: of training; None: nothing is random or smoothed.
        """
        outputs = {name: model.apply(stream, noise_of(batch, name, rates)) for name, stream in batch.streams.items()}
        return cls(model, outputs, 0.0 if rates is None else rates.label_smoothing)


def noise_of(batch: Batch, stream: str, rates: RegularizationConfig | None) -> Noise | None:
    """The noise of a stream of a batch; None if nothing is random."""
    if rates is None or not rates.is_random or batch.row_seeds_B is None:
        return None
    return Noise(hashed(batch.row_seeds_B, jnp.uint32(zlib.crc32(stream.encode()))), rates)
