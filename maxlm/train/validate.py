"""Validation on held-out rows."""

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from maxlm.core.batch import Batch, put_batch
from maxlm.core.term import LossOutput, Term


class Evaluator:
    """Sums a loss over batches, compiled once for all validations of a run."""

    def __init__(self, loss: Callable[[Any, Any], LossOutput], mesh: Mesh):
        self._mesh = mesh
        self._step = jax.jit(lambda model, batch: _all_terms(loss(model, batch)))

    def sums(self, model: Any, batches: Iterable[Any]) -> dict[str, Term]:
        """Each term and metric of the loss, added over the batches, as numpy numbers."""
        outputs = [self._step(model, put_batch(batch, self._mesh)) for batch in batches]
        return functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b), jax.device_get(outputs))


def language_model_values(sums: dict[str, Term], num_bytes: int) -> dict[str, float]:
    """Mean loss in nats, perplexity, and bits per byte of text, from a sum of cross-entropies."""
    cross_entropy = sums["cross_entropy"]
    loss = float(cross_entropy.sum / cross_entropy.weight)
    values = {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
    if num_bytes:
        values["bits_per_byte"] = float(cross_entropy.sum) / math.log(2) / num_bytes
    return values


def target_bytes(batch: Batch, byte_lengths: np.ndarray) -> int:
    """Bytes of text that a batch's weighted targets stand for."""
    return int(byte_lengths[batch.targets][batch.loss_weights > 0].sum())


def _all_terms(output: LossOutput) -> dict[str, Term]:
    return {**output.terms, **output.metrics}
