"""Log-probabilities of target tokens without ever holding [batch, length, vocab].

Dimensions: B batch, L length, D embed, V vocab, C tokens in a chunk.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import is_explicit, spec_of


def token_log_probabilities(
    hidden_BLD: jax.Array, project, head, targets_BL: jax.Array, *, chunk_length: int
) -> tuple[jax.Array, jax.Array]:
    """log p(target) and the log of the softmax's normaliser, each float32 [batch, length].

    The sequence is cut into chunks; each chunk's logits live only while it is worked on, in the forward and, computed
    again, in the backward pass.

    Args:
      hidden_BLD: final hidden states.
      project: (head, hidden [B, C, D]) -> float32 logits [B, C, V].
      head: the pytree of weights that `project` uses; gradients flow to it.
      targets_BL: token ids.
      chunk_length: tokens of a row in a chunk; clipped to L. A last, shorter chunk is worked on by itself.
    """

    @jax.checkpoint
    def chunk(head, hidden, targets):
        return _gather_log_probability(project(head, hidden), targets)

    length = targets_BL.shape[1]
    parts = [
        chunk(head, hidden_BLD[:, start : start + chunk_length], targets_BL[:, start : start + chunk_length])
        for start in range(0, length, chunk_length)
    ]
    if len(parts) == 1:
        return parts[0]
    log_probability, log_normalizer = zip(*parts)
    return jnp.concatenate(log_probability, axis=1), jnp.concatenate(log_normalizer, axis=1)


@partial(jax.custom_vjp)
def _gather_log_probability(logits, targets):
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    return _select(logits, targets) - log_normalizer, log_normalizer


def _forward(logits, targets):
    log_probability, log_normalizer = _gather_log_probability(logits, targets)
    return (log_probability, log_normalizer), (logits, targets, log_normalizer)


def _backward(residuals, grads):
    # d log p = onehot - p, d log Z = p: one pass, where autodiff of logsumexp and a gather would make several.
    logits, targets, log_normalizer = residuals
    grad_log_probability, grad_log_normalizer = grads
    probabilities = jnp.exp(logits - log_normalizer[..., None])
    grad_logits = (grad_log_normalizer - grad_log_probability)[..., None] * probabilities
    return jnp.where(_one_hot(logits, targets), grad_logits + grad_log_probability[..., None], grad_logits), None


_gather_log_probability.defvjp(_forward, _backward)


def _one_hot(logits, targets):
    # A comparison rather than a gather: it stays local where the vocabulary is cut over devices.
    shape = logits.shape[-1:]
    sharding = P(spec_of(logits)[-1]) if is_explicit() else None
    vocabulary = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    if sharding is not None:
        vocabulary = jax.reshard(vocabulary, sharding)
    return vocabulary == targets[..., None]


def _select(logits, targets):
    return jnp.sum(jnp.where(_one_hot(logits, targets), logits, 0.0), axis=-1)
