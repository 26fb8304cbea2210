"""Losses of sampled answers, each a function of log-probabilities and advantages alone.

Dimensions: B rows (answers), L length of prompt and answer.
"""

import jax
import jax.numpy as jnp


def clipped_surrogate(
    log_ratio_BL: jax.Array, advantages_B: jax.Array, *, clip_low: float, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, and whether it is clipped (arXiv:1707.06347, with two bounds as in arXiv:2503.14476).

        -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),   rho = p(token) / p_sampled(token)

    Returns:
      (loss [B, L], bool [B, L]: the clip is active, so the token has no gradient).
    """
    ratio_BL = jnp.exp(log_ratio_BL)
    advantages_B1 = advantages_B[:, None]
    free_BL = ratio_BL * advantages_B1
    clipped_BL = jnp.clip(ratio_BL, 1 - clip_low, 1 + clip_high) * advantages_B1
    return -jnp.minimum(free_BL, clipped_BL), clipped_BL < free_BL


def clipped_importance_loss(
    log_p_BL: jax.Array, log_ratio_BL: jax.Array, advantages_B: jax.Array, *, clip_high: float
) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, and whether its weight is clipped: CISPO (arXiv:2506.13585).

        -stop_gradient(min(rho, 1 + clip_high)) A log p(token)

    Tokens whose ratio is clipped keep a gradient, unlike those of `clipped_surrogate`.

    Returns:
      (loss [B, L], bool [B, L]: the weight is clipped).
    """
    ratio_BL = jax.lax.stop_gradient(jnp.exp(log_ratio_BL))
    weight_BL = jnp.minimum(ratio_BL, 1 + clip_high)
    return -weight_BL * advantages_B[:, None] * log_p_BL, weight_BL < ratio_BL


def kl_to_reference(log_p_BL: jax.Array, log_reference_BL: jax.Array) -> jax.Array:
    """An estimate of KL(p || p_ref) from samples of p that is never negative (Schulman, 2020: "k3").

    p_ref / p - log(p_ref / p) - 1
    """
    log_ratio_BL = log_reference_BL - log_p_BL
    return jnp.expm1(log_ratio_BL) - log_ratio_BL
