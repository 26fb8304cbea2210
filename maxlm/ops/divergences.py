"""Divergences of two distributions over a vocabulary, from their log-probabilities.

P is the teacher's and Q the student's; gradients flow to both. Dimensions: V vocabulary.
"""

import math

import jax
import jax.numpy as jnp


def kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(P || Q) = sum_v p_v (log p_v - log q_v) in nats: [..., V] to [...]."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def reverse_kl_divergence(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(Q || P) in nats: [..., V] to [...]."""
    return kl_divergence(log_q, log_p)


def jensen_shannon_divergence(log_p: jax.Array, log_q: jax.Array, *, beta: float) -> jax.Array:
    """The generalized Jensen-Shannon divergence in nats (arXiv:2306.13649, equation 1): [..., V] to [...].

        beta KL(P || M) + (1 - beta) KL(Q || M),   M = beta P + (1 - beta) Q

    Divided by beta it approaches KL(P || Q) as beta approaches 0, and divided by 1 - beta KL(Q || P) as beta
    approaches 1.

    Args:
      beta: in (0, 1).
    """
    log_m = jnp.logaddexp(math.log(beta) + log_p, math.log1p(-beta) + log_q)
    return beta * kl_divergence(log_p, log_m) + (1 - beta) * kl_divergence(log_q, log_m)
