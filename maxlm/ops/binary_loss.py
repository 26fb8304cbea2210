"""Cross-entropy of a probability given as a logit."""

import jax


def binary_cross_entropy(logit: jax.Array, label: jax.Array) -> jax.Array:
    """-y log sigmoid(x) - (1 - y) log sigmoid(-x), elementwise, for labels y in [0, 1].

    As softplus(x) - y x, which neither overflows nor cancels.
    """
    return jax.nn.softplus(logit) - label * logit
