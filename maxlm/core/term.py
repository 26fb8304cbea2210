"""Losses as (sum, weight) pairs: what every loss, and every layer that adds to one, returns."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@partial(jax.tree_util.register_dataclass, data_fields=["sum", "weight"], meta_fields=[])
@dataclass(frozen=True)
class Term:
    """A weighted sum and the sum of its weights.

    Sums and weights are added over microbatches, devices and hosts, and divided once, so that the result depends on
    none of them. The weight is a function of the batch only, never of the parameters.
    """

    sum: jax.Array | float
    weight: jax.Array | float

    def __add__(self, other: "Term") -> "Term":
        return Term(self.sum + other.sum, self.weight + other.weight)

    def mean(self):
        """sum / weight; 0 if the weight is 0."""
        return self.sum / jnp.where(self.weight > 0, self.weight, 1.0)


@partial(jax.tree_util.register_dataclass, data_fields=["terms", "metrics"], meta_fields=[])
@dataclass(frozen=True)
class LossOutput:
    """Terms to minimize, whose means are summed to the total, and metrics that are only reported."""

    terms: dict[str, Term]
    metrics: dict[str, Term]

    def joined(self, other: "LossOutput") -> "LossOutput":
        """Merge both, which have different names."""
        return LossOutput({**self.terms, **other.terms}, {**self.metrics, **other.metrics})


def add(left: Any, right: Any) -> Any:
    """The leaf-wise sum of two trees: LossOutputs of two microbatches, or their gradients."""
    return jax.tree.map(jnp.add, left, right)


def unite(outputs: Sequence[LossOutput]) -> LossOutput:
    """The sum of outputs that may lack some of the names, as those of different kinds of layers."""

    def total(parts: Sequence[dict[str, Term]]) -> dict[str, Term]:
        sums: dict[str, Term] = {}
        for part in parts:
            for name, term in part.items():
                sums[name] = sums[name] + term if name in sums else term
        return sums

    return LossOutput(total([each.terms for each in outputs]), total([each.metrics for each in outputs]))
