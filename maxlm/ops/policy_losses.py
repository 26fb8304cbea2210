"""Losses of sampled answers: pure functions of log-probabilities, advantages and values of their tokens.

rho = p(token) / p_sampled(token) is the probability ratio of the trained policy to the one that sampled.

Dimensions: B rows (answers), L length of prompt and answer.
"""

import jax
import jax.numpy as jnp
import numpy as np

# exp of more, or of less than its negative, is of no use in float32.
_LARGEST_LOG_RATIO = 20.0


def probability_ratio(log_ratio: jax.Array) -> jax.Array:
    """exp(log_ratio), bounded."""
    return jnp.exp(jnp.clip(log_ratio, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO))


def answer_log_ratio(log_ratio_BL: jax.Array, is_answer_BL: jax.Array) -> jax.Array:
    """Mean over the tokens of an answer, for each of its tokens: [B, L] (GSPO, arXiv:2507.18071, equation 5)."""
    length_B1 = jnp.maximum(jnp.sum(is_answer_BL, axis=1, keepdims=True), 1.0)
    mean_B1 = jnp.sum(is_answer_BL * log_ratio_BL, axis=1, keepdims=True) / length_B1
    # A sum, unlike a broadcast, has the sharding of the tokens.
    return mean_B1 + jnp.zeros_like(log_ratio_BL)


def clipped_surrogate(
    log_ratio_BL: jax.Array,
    advantages_BL: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
    largest_ratio: float | None = None,
    largest_loss_ratio: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, and whether it is clipped (arXiv:1707.06347, with two bounds as in arXiv:2503.14476).

        -min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

    Args:
      largest_ratio: rho in the first term is at most this (two-sided clipping, arXiv:2505.07291).
      largest_loss_ratio: for negative advantages the loss is at most -A times this (dual clip, arXiv:1912.09729).

    Returns:
      (loss [B, L], bool [B, L]: a clip is active, so the token has no gradient).
    """
    ratio_BL = probability_ratio(log_ratio_BL)
    kept_BL = ratio_BL if largest_ratio is None else jnp.minimum(ratio_BL, largest_ratio)
    inside_BL = jnp.clip(ratio_BL, 1 - clip_low, 1 + clip_high)
    free_BL, clipped_BL = kept_BL * advantages_BL, inside_BL * advantages_BL
    loss_BL = -jnp.minimum(free_BL, clipped_BL)
    is_clipped_BL = jnp.where(clipped_BL < free_BL, inside_BL != ratio_BL, kept_BL != ratio_BL)
    if largest_loss_ratio is not None:
        bound_BL = -largest_loss_ratio * advantages_BL
        is_bounded_BL = (advantages_BL < 0) & (loss_BL > bound_BL)
        loss_BL, is_clipped_BL = jnp.where(is_bounded_BL, bound_BL, loss_BL), is_clipped_BL | is_bounded_BL
    return loss_BL, is_clipped_BL


def clipped_importance_loss(
    log_p_BL: jax.Array,
    log_ratio_BL: jax.Array,
    advantages_BL: jax.Array,
    *,
    clip_low: float,
    clip_high: float,
) -> tuple[jax.Array, jax.Array]:
    """Loss of each token, and whether its weight is clipped: CISPO (arXiv:2506.13585, equation 4).

        -stop_gradient(clip(rho, 1 - clip_low, 1 + clip_high)) A log p(token)

    Tokens whose ratio is clipped keep a gradient, unlike those of `clipped_surrogate`.

    Args:
      clip_low: 1 sets no lower bound, as in the paper's experiments.

    Returns:
      (loss [B, L], bool [B, L]: the weight is clipped).
    """
    ratio_BL = jax.lax.stop_gradient(probability_ratio(log_ratio_BL))
    weight_BL = jnp.clip(ratio_BL, 1 - clip_low, 1 + clip_high)
    return -weight_BL * advantages_BL * log_p_BL, weight_BL != ratio_BL


def soft_gate_loss(
    log_ratio_BL: jax.Array, advantages_BL: jax.Array, *, positive_temperature: float, negative_temperature: float
) -> jax.Array:
    """Loss of each token with a smooth gate in place of a clip: SAPO (arXiv:2511.20347).

    -A (4 / t) sigmoid(t (rho - 1)),   t by the sign of A
    """
    temperature_BL = jnp.where(advantages_BL > 0, positive_temperature, negative_temperature)
    gate_BL = 4 / temperature_BL * jax.nn.sigmoid(temperature_BL * (probability_ratio(log_ratio_BL) - 1))
    return -gate_BL * advantages_BL


def gamma_weighted_loss(
    log_p_BL: jax.Array,
    log_ratio_BL: jax.Array,
    advantages_BL: jax.Array,
    is_answer_BL: jax.Array,
    *,
    positive_shape: tuple[float, float],
    negative_shape: tuple[float, float],
) -> jax.Array:
    """Loss of each token with a smooth weight of its whole answer: VESPO (arXiv:2602.10693).

        -stop_gradient(exp(d (1 - w)) w^k) A log p(token),   w = the product of the ratios of the answer's tokens

    Args:
      positive_shape, negative_shape: (k, d) by the sign of A.
    """
    log_w_B1 = jnp.sum(is_answer_BL * log_ratio_BL, axis=1, keepdims=True)
    log_w_B1 = jnp.clip(log_w_B1, jnp.log(1e-8), _LARGEST_LOG_RATIO)
    (k_BL, d_BL) = (
        jnp.where(advantages_BL >= 0, positive, negative) for positive, negative in zip(positive_shape, negative_shape)
    )
    weight_BL = jnp.exp(k_BL * log_w_B1 + d_BL * (1 - jnp.exp(log_w_B1)))
    return -jax.lax.stop_gradient(weight_BL) * advantages_BL * log_p_BL


def policy_gradient_loss(log_p_BL: jax.Array, advantages_BL: jax.Array) -> jax.Array:
    """-A log p(token) of each token (REINFORCE; Williams, 1992)."""
    return -advantages_BL * log_p_BL


def value_loss(
    values_BL: jax.Array, old_values_BL: jax.Array, returns_BL: jax.Array, *, clip: float | None
) -> jax.Array:
    """Half the squared error of each token's value, pessimistic beyond a distance from the old value (PPO).

    max((v - R)^2, (clip(v, v_old - clip, v_old + clip) - R)^2) / 2
    """
    error_BL = jnp.square(values_BL - returns_BL)
    if clip is not None:
        near_BL = jnp.clip(values_BL, old_values_BL - clip, old_values_BL + clip)
        error_BL = jnp.maximum(error_BL, jnp.square(near_BL - returns_BL))
    return 0.5 * error_BL


def kl_estimate(log_p_BL: jax.Array, log_reference_BL: jax.Array, *, estimator: str) -> jax.Array:
    """An estimate of KL(p || p_ref) of each token from a sample of p (Schulman, 2020).

    | estimator | with r = log p - log p_ref | gradient of its mean over samples of p         |
    | --------- | -------------------------- | ---------------------------------------------- |
    | `k1`      | r                          | zero: not useful in a loss                     |
    | `k2`      | r^2 / 2                    | that of KL(p || p_ref)                         |
    | `k3`      | exp(-r) + r - 1            | that of KL(p_ref || p)                         |

    k1 and k3 are unbiased, k2 and k3 never negative.
    """
    log_ratio_BL = log_p_BL - log_reference_BL
    if estimator == "k1":
        return log_ratio_BL
    if estimator == "k2":
        return 0.5 * jnp.square(log_ratio_BL)
    bounded_BL = jnp.clip(-log_ratio_BL, -_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)
    return jnp.expm1(bounded_BL) - bounded_BL


def with_gradient_of(value: jax.Array, other: jax.Array) -> jax.Array:
    """A value with the gradient of another one."""
    return jax.lax.stop_gradient(value - other) + other


def high_entropy_tokens(
    entropies_BL: np.ndarray, is_answer_BL: np.ndarray, everywhere: np.ndarray, *, fraction: float
) -> np.ndarray:
    """1.0 for answer tokens whose entropy is at least the (1 - fraction)-quantile (arXiv:2506.01939): float32 [B, L].

    Args:
      is_answer_BL: bool.
      everywhere: the entropies of the tokens of all answers of the batch, of which these are a part; in any order.
    """
    if not everywhere.size:
        return np.zeros(entropies_BL.shape, np.float32)
    return (is_answer_BL & (entropies_BL >= np.quantile(everywhere, 1 - fraction))).astype(np.float32)
