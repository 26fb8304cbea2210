"""Losses of preferences: pure functions of log-probabilities of whole answers, or of rewards.

The gain of an answer is log p(answer) - log p_ref(answer), and the margin of a pair m = gain(chosen) - gain(rejected).

Dimensions: B pairs or answers.
"""

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid

# exp of more would overflow in float32 when it is squared, as in a gradient norm.
_LARGEST_EXPONENT = 40.0


def cost_loss(safer_B: jax.Array, other_B: jax.Array, safer_safe_B: jax.Array, other_safe_B: jax.Array) -> jax.Array:
    """The loss of pairs of costs, of the safer and the other answer: [B] (arXiv:2310.12773, equation 6).

        -log sigmoid(other - safer) - log sigmoid(sign other) - log sigmoid(sign' safer)

    with sign 1 for a harmful and -1 for a safe answer: the cost of the other answer is higher, and costs of harmful
    answers are above 0.

    Args:
      safer_safe_B, other_safe_B: 1 for a safe and 0 for a harmful answer.
    """
    order_B = -jax.nn.log_sigmoid(other_B - safer_B)
    signed = ((1 - 2 * safe_B) * cost_B for safe_B, cost_B in ((safer_safe_B, safer_B), (other_safe_B, other_B)))
    return order_B - sum(jax.nn.log_sigmoid(x_B) for x_B in signed)


def bradley_terry_loss(chosen_B: jax.Array, rejected_B: jax.Array, margin_B: jax.Array | float = 0.0) -> jax.Array:
    """-log sigmoid(r_chosen - r_rejected - m) of each pair.

    Without a margin m: -log P(chosen is preferred) (Bradley and Terry, 1952). With one, rewards of a pair are pushed
    further apart the clearer its preference is (Llama 2, arXiv:2307.09288, equation 2).
    """
    return -log_sigmoid(chosen_B - rejected_B - margin_B)


def logistic_loss(logits_B: jax.Array, *, label_smoothing: float = 0.0) -> jax.Array:
    """-(1 - s) log sigmoid(z) - s log sigmoid(-z); s is the assumed share of mislabeled pairs ("conservative DPO")."""
    return -(1 - label_smoothing) * log_sigmoid(logits_B) - label_smoothing * log_sigmoid(-logits_B)


def dpo_loss(margin_B: jax.Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Direct preference optimization (arXiv:2305.18290): `logistic_loss` of beta m."""
    return logistic_loss(beta * margin_B, label_smoothing=label_smoothing)


def divergence_score(gain_B: jax.Array, *, alpha: float) -> jax.Array:
    """What replaces a gain in DPO towards an alpha-divergence from the reference (arXiv:2309.16240, table 1).

        f'(u) = (1 - u^-alpha) / alpha,   u = p / p_ref

    alpha = 0 is the reverse KL divergence of DPO, f'(u) = log u, and alpha = 1 the forward one.
    """
    if alpha == 0:
        return gain_B
    return -jnp.expm1(jnp.minimum(-alpha * gain_B, _LARGEST_EXPONENT)) / alpha


def jensen_shannon_score(gain_B: jax.Array) -> jax.Array:
    """As `divergence_score`, for the Jensen-Shannon divergence: f'(u) = log(2 u / (1 + u))."""
    return jnp.log(2.0) + log_sigmoid(gain_B)


def robust_loss(margin_B: jax.Array, *, beta: float, label_smoothing: float) -> jax.Array:
    """An unbiased estimate of DPO's loss without the share s of mislabeled pairs (arXiv:2403.00409).

    [-(1 - s) log sigmoid(beta m) + s log sigmoid(-beta m)] / (1 - 2 s)
    """
    logits_B = beta * margin_B
    right, wrong = (1 - label_smoothing) * log_sigmoid(logits_B), label_smoothing * log_sigmoid(-logits_B)
    return (wrong - right) / (1 - 2 * label_smoothing)


def hinge_loss(margin_B: jax.Array, *, beta: float) -> jax.Array:
    """max(0, 1 - beta m) of each pair (SLiC, arXiv:2305.10425, in arXiv:2309.06657)."""
    return jnp.maximum(0.0, 1.0 - beta * margin_B)


def ipo_loss(margin_B: jax.Array, *, beta: float) -> jax.Array:
    """(m - 1 / (2 beta))^2 (arXiv:2310.12036, equation 17, where beta is tau)."""
    return jnp.square(margin_B - 1 / (2 * beta))


def exo_loss(margin_B: jax.Array, *, beta: float, label_smoothing: float) -> jax.Array:
    """KL(q || p) of q = (sigmoid(beta m), sigmoid(-beta m)) from p = (1 - s, s) (arXiv:2402.00856, equation 16)."""
    logits_B = beta * margin_B
    right = sigmoid(logits_B) * (log_sigmoid(logits_B) - jnp.log1p(-label_smoothing))
    wrong = sigmoid(-logits_B) * (log_sigmoid(-logits_B) - jnp.log(label_smoothing))
    return right + wrong


def discopop_loss(margin_B: jax.Array, *, beta: float, temperature: float) -> jax.Array:
    """A discovered mixture of the logistic and the exponential loss (arXiv:2406.08414, equation 5).

    -(1 - w) log sigmoid(z) + w exp(-z),   z = beta m, w = sigmoid(z / temperature)
    """
    logits_B = beta * margin_B
    weight_B = sigmoid(logits_B / temperature)
    exponential_B = jnp.exp(jnp.minimum(-logits_B, _LARGEST_EXPONENT))
    return -(1 - weight_B) * log_sigmoid(logits_B) + weight_B * exponential_B


def nca_loss(chosen_gain_B: jax.Array, rejected_gain_B: jax.Array, *, beta: float) -> jax.Array:
    """Noise contrastive alignment of a pair (arXiv:2402.05369).

    -log sigmoid(r_c) - [log sigmoid(-r_c) + log sigmoid(-r_r)] / 2,   r = beta gain
    """
    chosen_B, rejected_B = beta * chosen_gain_B, beta * rejected_gain_B
    return -log_sigmoid(chosen_B) - 0.5 * (log_sigmoid(-chosen_B) + log_sigmoid(-rejected_B))


def bco_loss(chosen_gain_B: jax.Array, rejected_gain_B: jax.Array, *, beta: float) -> jax.Array:
    """Binary classifier optimization of a pair, without a reward shift (arXiv:2404.04656).

    -log sigmoid(r_c) - log sigmoid(-r_r),   r = beta gain
    """
    return -log_sigmoid(beta * chosen_gain_B) - log_sigmoid(-beta * rejected_gain_B)


def sppo_loss(chosen_gain_B: jax.Array, rejected_gain_B: jax.Array, *, beta: float) -> jax.Array:
    """Self-play preference optimization with certain preferences (arXiv:2405.00675, equation 4.7; beta is 1 / eta).

    (gain_c - 1 / (2 beta))^2 + (gain_r + 1 / (2 beta))^2
    """
    return jnp.square(chosen_gain_B - 0.5 / beta) + jnp.square(rejected_gain_B + 0.5 / beta)


def apo_zero_loss(chosen_gain_B: jax.Array, rejected_gain_B: jax.Array, *, beta: float) -> jax.Array:
    """Anchored preference optimization for chosen answers better than the model's (arXiv:2408.06266, equation 7).

    1 - sigmoid(beta gain_c) + sigmoid(beta gain_r)
    """
    return sigmoid(-beta * chosen_gain_B) + sigmoid(beta * rejected_gain_B)


def apo_down_loss(chosen_gain_B: jax.Array, rejected_gain_B: jax.Array, *, beta: float) -> jax.Array:
    """Anchored preference optimization for chosen answers worse than the model's (arXiv:2408.06266, equation 8).

    sigmoid(beta gain_c) + 1 - sigmoid(beta (gain_c - gain_r))
    """
    return sigmoid(beta * chosen_gain_B) + sigmoid(-beta * (chosen_gain_B - rejected_gain_B))


def odds_ratio_loss(chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
    """-log sigmoid(log odds(chosen) - log odds(rejected)) (ORPO, arXiv:2403.07691), with odds p / (1 - p).

    Args:
      chosen_B, rejected_B: mean log-probability of the tokens of an answer, which is log p.
    """

    def log_odds(log_p_B):
        # Certain answers would have infinite odds.
        log_p_B = jnp.minimum(log_p_B, -1e-6)
        return log_p_B - jnp.log(-jnp.expm1(log_p_B))

    return -log_sigmoid(log_odds(chosen_B) - log_odds(rejected_B))


def kto_loss(gain_B: jax.Array, is_good_B: jax.Array, baseline_B: jax.Array, *, beta: float) -> jax.Array:
    """Kahneman-Tversky optimization of an answer that was judged alone (arXiv:2402.01306, equation 8).

    1 - sigmoid(beta (gain - z0)) of a good answer, 1 - sigmoid(beta (z0 - gain)) of a bad one

    Args:
      is_good_B: 1.0 for a good answer, 0.0 for a bad one.
      baseline_B: z0, an estimate of the KL divergence from the reference; without a gradient.
    """
    return sigmoid(-beta * (2 * is_good_B - 1) * (gain_B - baseline_B))
