"""Sampling tokens from logits: pure functions in which every row has its own settings and PRNG key.

Shapes: B requests, V vocabulary.
"""

import jax
import jax.numpy as jnp

# Below this temperature the distribution is one-hot in float32; the bound keeps the division finite.
_MIN_TEMPERATURE = 1e-6


def sample(
    logits_BV: jax.Array, keys_B: jax.Array, *, temperature_B: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array
) -> jax.Array:
    """Sample one token for each row.

    The order is temperature, top-k, then top-p (nucleus sampling, Holtzman et al. 2020) over what top-k kept. Tokens
    that tie with the last one kept are kept too. A row depends only on its own inputs.

    Args:
      logits_BV: float32 [batch, vocab].
      keys_B: PRNG keys [batch], one for each draw.
      temperature_B: float32 [batch]; 0 takes the most likely token and uses no key.
      top_k_B: int32 [batch]; 0 keeps all.
      top_p_B: float32 [batch]; 1 keeps all, 0 takes the most likely token, as temperature 0 does.

    Returns:
      int32 [batch].
    """
    greedy_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw() -> jax.Array:
        scaled_BV = scale(logits_BV, temperature_B)
        # Top-k and top-p cost two passes of bisection: skipped when no row uses them.
        kept_BV = jax.lax.cond(
            jnp.any(top_k_B > 0) | jnp.any(top_p_B < 1),
            lambda: truncate(scaled_BV, top_k_B, top_p_B),
            lambda: scaled_BV,
        )
        noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, kept_BV.shape[1:]))(keys_B)
        drawn_B = jnp.argmax(kept_BV + noise_BV, axis=-1).astype(jnp.int32)
        return jnp.where(is_random_B, drawn_B, greedy_B)

    is_random_B = (temperature_B > 0) & (top_p_B > 0)
    return jax.lax.cond(jnp.any(is_random_B), draw, lambda: greedy_B)


def scale(logits_BV: jax.Array, temperature_B: jax.Array) -> jax.Array:
    """Logits over temperature, shifted so that a row's largest is 0; a temperature of 0 leaves the scale unchanged."""
    divisor_B = jnp.where(temperature_B > 0, jnp.maximum(temperature_B, _MIN_TEMPERATURE), 1.0)
    return (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / divisor_B[:, None]


def truncate(logits_BV: jax.Array, top_k_B: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Mask with -inf what top-k, then top-p remove; 0 and 1 turn them off. The most likely token is always kept."""
    vocab_size = logits_BV.shape[-1]
    # An unreachable target keeps everything.
    count_B = jnp.where(top_k_B > 0, top_k_B, vocab_size + 1).astype(jnp.float32)
    kept_BV = _keep_top(logits_BV, jnp.ones_like(logits_BV), count_B)
    mass_B = jnp.where(top_p_B < 1, jnp.maximum(top_p_B, 1e-9), 2.0)
    return _keep_top(kept_BV, jax.nn.softmax(kept_BV, axis=-1), mass_B)


def log_probabilities_of(logits_BV: jax.Array, tokens_B: jax.Array) -> jax.Array:
    """log softmax(logits)[token] for each row: float32 [batch], in nats."""
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def _keep_top(values_BV: jax.Array, weights_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Keep the fewest largest values whose weights add up to the target; all if the target is out of reach.

    Finds the cutoff bit by bit, from the highest, over an integer that orders like the float: 32 sums instead of a
    sort, which is the slowest operation of a decode step on both CPU and TPU.
    """
    order_BV = _ordered_bits(values_BV)

    def set_bit(i: jax.Array, cutoff_B: jax.Array) -> jax.Array:
        candidate_B = cutoff_B | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass_B = jnp.sum(jnp.where(order_BV >= candidate_B[:, None], weights_BV, 0.0), axis=-1)
        return jnp.where(mass_B >= target_B, candidate_B, cutoff_B)

    cutoff_B = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros(values_BV.shape[0], jnp.uint32))
    return jnp.where(order_BV >= cutoff_B[:, None], values_BV, -jnp.inf)


def _ordered_bits(values: jax.Array) -> jax.Array:
    """uint32 that order like the float32 they come from (-0 below +0)."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
