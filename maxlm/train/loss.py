"""Losses as (sum, weight) pairs, and the language-model loss that most objectives share."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.core.batch import Batch
from maxlm.models.decoder import Decoder


@partial(jax.tree_util.register_dataclass, data_fields=["sum", "weight"], meta_fields=[])
@dataclass(frozen=True)
class Term:
    """A weighted sum and the sum of its weights.

    Sums and weights are added over microbatches, devices and hosts, and divided once, so that the result depends on
    none of them. The weight is a function of the batch alone, never of the parameters.
    """

    sum: jax.Array
    weight: jax.Array

    def __add__(self, other: "Term") -> "Term":
        return Term(self.sum + other.sum, self.weight + other.weight)

    def mean(self):
        """sum / weight; 0 where there is no weight."""
        return self.sum / jnp.where(self.weight > 0, self.weight, 1.0)


@partial(jax.tree_util.register_dataclass, data_fields=["terms", "metrics"], meta_fields=[])
@dataclass(frozen=True)
class LossOutput:
    """terms: what is minimised, the total being the sum of their means; metrics: what is only reported."""

    terms: dict[str, Term]
    metrics: dict[str, Term]


def language_model_loss(model: Decoder, batch: Batch, *, z_loss: float = 0.0) -> LossOutput:
    """Cross-entropy of the targets in nats, and the z-loss of PaLM (arXiv:2204.02311): mean of log(Z)^2."""
    hidden = model(batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids)
    log_probability, log_normalizer = model.log_probabilities(hidden, batch.targets)
    weights = batch.loss_weights
    weight = jnp.sum(weights)
    terms = {"cross_entropy": Term(-jnp.sum(weights * log_probability), weight)}
    if z_loss:
        terms["z_loss"] = Term(z_loss * jnp.sum(weights * jnp.square(log_normalizer)), weight)
    return LossOutput(terms, {})


def add(left: Any, right: Any) -> Any:
    """The leaf-wise sum of two trees: LossOutputs of two microbatches, or their gradients."""
    return jax.tree.map(jnp.add, left, right)
