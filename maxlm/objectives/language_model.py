"""The language-model loss that most objectives share."""

import jax.numpy as jnp

from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term
from maxlm.models.applied import AppliedModel


def language_model_loss(applied: AppliedModel, batch: Batch, *, z_loss: float = 0.0) -> LossOutput:
    """Cross-entropy of the targets in nats, the z-loss of PaLM (arXiv:2204.02311): mean of log(Z)^2, and the auxiliary
    losses of the model's layers. In training, targets may be smoothed."""
    text, output = batch["text"], applied.outputs["text"]
    log_probability, log_normalizer = applied.decoder.log_probabilities(
        output.hidden_BLD, text.targets, smoothing=applied.label_smoothing
    )
    weights = text.loss_weights
    weight = jnp.sum(weights)
    terms = {"cross_entropy": Term(-jnp.sum(weights * log_probability), weight)}
    if z_loss:
        terms["z_loss"] = Term(z_loss * jnp.sum(weights * jnp.square(log_normalizer)), weight)
    return LossOutput(terms, {}).joined(output.auxiliary)
