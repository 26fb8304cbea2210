"""The language-model loss that most objectives share."""

import jax.numpy as jnp

from maxlm.core.batch import Stream
from maxlm.core.term import LossOutput, Term
from maxlm.models.decoder import Decoder


def language_model_loss(model: Decoder, text: Stream, *, z_loss: float = 0.0) -> LossOutput:
    """Cross-entropy of the targets in nats, the z-loss of PaLM (arXiv:2204.02311): mean of log(Z)^2, and the auxiliary
    losses of the model's layers."""
    output = model(text.tokens, positions_BL=text.positions, segment_ids_BL=text.segment_ids)
    log_probability, log_normalizer = model.log_probabilities(output.hidden_BLD, text.targets)
    weights = text.loss_weights
    weight = jnp.sum(weights)
    terms = {"cross_entropy": Term(-jnp.sum(weights * log_probability), weight)}
    if z_loss:
        terms["z_loss"] = Term(z_loss * jnp.sum(weights * jnp.square(log_normalizer)), weight)
    return LossOutput(terms, {}).joined(output.auxiliary)
