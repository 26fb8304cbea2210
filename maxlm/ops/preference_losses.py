"""Losses of preference pairs, each a function of rewards or margins alone.

Dimensions: B pairs.
"""

import jax
import jax.numpy as jnp


def bradley_terry_loss(chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
    """-log P(chosen is preferred) = -log sigmoid(r_chosen - r_rejected) of each pair (Bradley and Terry, 1952)."""
    return -jax.nn.log_sigmoid(chosen_B - rejected_B)


def dpo_loss(margin_B: jax.Array, *, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """Loss of each pair in direct preference optimization (arXiv:2305.18290).

        -(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)
        m = [log p(chosen) - log p_ref(chosen)] - [log p(rejected) - log p_ref(rejected)]

    s is the assumed fraction of mislabeled pairs ("conservative DPO").
    """
    scaled_B = beta * margin_B
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(scaled_B) - label_smoothing * jax.nn.log_sigmoid(-scaled_B)


def hinge_loss(margin_B: jax.Array, *, beta: float) -> jax.Array:
    """max(0, 1 - beta m) of each pair, with the margin of `dpo_loss` (SLiC, arXiv:2305.10425, in arXiv:2309.06657)."""
    return jnp.maximum(0.0, 1.0 - beta * margin_B)
