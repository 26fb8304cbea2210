"""Validation on held-out rows."""

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.core.dispatch import fetched
from maxlm.core.term import LossOutput, Term
from maxlm.models.applied import AppliedModel


class Evaluator:
    """Sums a loss over batches, compiled once for all validations of a run."""

    def __init__(self, loss: Callable[[AppliedModel, Batch], LossOutput], mesh: Mesh):
        self._mesh = mesh
        self._step = jax.jit(lambda model, batch: _all_terms(loss(AppliedModel.of(model, batch), batch)))

    def sums(self, model: Any, batches: Iterable[Any]) -> dict[str, Term]:
        """Each term and metric of the loss, summed over the batches, as numpy scalars."""
        outputs = fetched(self._step(model, put_batch(batch, self._mesh)) for batch in batches)
        return functools.reduce(lambda a, b: jax.tree.map(operator.add, a, b), outputs)


def means_of(loss: str, *names: str) -> Callable[[dict[str, Term], list[Batch]], dict[str, float]]:
    """A summary for `RecordData`: the mean of one term, as `loss`, and of others by their names."""

    def summarize(sums: dict[str, Term], batches: list[Batch]) -> dict[str, float]:
        del batches
        return {key: float(np.asarray(sums[name].mean())) for key, name in (("loss", loss), *zip(names, names))}

    return summarize


def cross_entropy_by_source(model: AppliedModel, batch: Batch, *, num_sources: int) -> LossOutput:
    """Cross-entropy of the targets of each source, in nats, as metrics `0` ... `num_sources - 1`.

    The batch value `source_ids_BL` [batch, length] holds the source of each token.
    """
    rows = batch["text"]
    hidden_BLD = model.outputs["text"].hidden_BLD
    log_probability_BL, _ = model.decoder.log_probabilities(hidden_BLD, rows.targets)
    terms = {}
    for source in range(num_sources):
        weights_BL = jnp.where(batch.values["source_ids_BL"] == source, rows.loss_weights, 0.0)
        terms[str(source)] = Term(-jnp.sum(weights_BL * log_probability_BL), jnp.sum(weights_BL))
    return LossOutput({}, terms)


def language_model_values(cross_entropy: Term, num_bytes: int) -> dict[str, float]:
    """Mean loss in nats, perplexity, and bits per byte of text, from a sum of cross-entropies."""
    loss = float(cross_entropy.sum / cross_entropy.weight)
    values = {"loss": loss, "perplexity": math.exp(min(loss, 50.0))}
    if num_bytes:
        values["bits_per_byte"] = float(cross_entropy.sum) / math.log(2) / num_bytes
    return values


def values_by_source(sums: dict[str, Term], names: list[str], num_bytes: np.ndarray) -> dict[str, float]:
    """`language_model_values` over all sources and, if there are several, `bits_per_byte/NAME` of each.

    The mean is over the tokens and bytes of all rows, so each source is weighted by how much of its text is read.

    Args:
      sums: as `cross_entropy_by_source` names them.
      num_bytes: [sources], bytes of text of the targets.
    """
    terms = [sums[str(source)] for source in range(len(names))]
    # fsum rounds once, so the order of the sources does not matter.
    total = Term(math.fsum(float(term.sum) for term in terms), math.fsum(float(term.weight) for term in terms))
    values = language_model_values(total, int(num_bytes.sum()))
    if len(names) > 1:
        for name, term, size in zip(names, terms, num_bytes):
            if size:
                values[f"bits_per_byte/{name}"] = float(term.sum) / math.log(2) / int(size)
    return values


def target_bytes(text: Stream, byte_lengths: np.ndarray) -> np.ndarray:
    """Bytes of text of each target with nonzero loss weight, 0 for the others: [batch, length]."""
    return np.where(text.loss_weights > 0, byte_lengths[text.targets], 0)


def _all_terms(output: LossOutput) -> dict[str, Term]:
    return {**output.terms, **output.metrics}
