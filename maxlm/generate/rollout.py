"""Rollouts: whole completions sampled inside one compiled function, for policy optimization.

Shapes: B prompts, P prompt length after padding, N new tokens, D embed.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from maxlm.generate.sampling import log_probabilities_of, sample, scale
from maxlm.models.decoder import Decoder
from maxlm.models.regroup import unrolled


@partial(
    jax.tree_util.register_dataclass, data_fields=["tokens_BN", "lengths_B", "log_probabilities_BN"], meta_fields=[]
)
@dataclass(frozen=True)
class Rollout:
    """Sampled completions.

    tokens_BN: int32; 0 after the end of a completion.
    lengths_B: tokens of each completion, stop token included.
    log_probabilities_BN: float32, log-probability of each token under the sampling policy, i.e. under
      softmax(logits / temperature); at temperature 0 under softmax(logits). 0 after the end.
    """

    tokens_BN: jax.Array
    lengths_B: jax.Array
    log_probabilities_BN: jax.Array


@partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))
def rollout(
    model: Decoder,
    prompt_tokens_BP: jax.Array,
    prompt_lengths_B: jax.Array,
    keys_B: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float | jax.Array,
    stop_ids: tuple[int, ...],
) -> Rollout:
    """Continue each prompt until it samples one of `stop_ids` or has `max_new_tokens` tokens.

    Decoding ends when the last completion does. A row's completion depends only on its prompt and its key.

    Args:
      prompt_tokens_BP: prompts, padded on the right.
      prompt_lengths_B: their lengths, each at least 1.
      keys_B: typed PRNG keys; token t is sampled with `fold_in(key, t)`.
      temperature: of all rows; 0 takes the most likely token.
    """
    model = unrolled(model)
    batch_size, prompt_length = prompt_tokens_BP.shape
    cache_dtype = jnp.dtype(model.execution.activation_dtype)
    caches = model.create_caches(batch_size, prompt_length + max_new_tokens, cache_dtype)
    temperature_B = jnp.full(batch_size, temperature, jnp.float32)
    stop_S = jnp.asarray(stop_ids, jnp.int32)

    def draw(hidden_BD, step):
        logits_BV = model.logits(hidden_BD)
        tokens_B = sample(
            logits_BV,
            jax.vmap(jax.random.fold_in, (0, None))(keys_B, step),
            temperature_B=temperature_B,
            top_k_B=jnp.zeros(batch_size, jnp.int32),
            top_p_B=jnp.ones(batch_size),
        )
        return tokens_B, log_probabilities_of(scale(logits_BV, temperature_B), tokens_B)

    def record(step, drawn, running_B, answer):
        tokens_B, log_probabilities_B = drawn
        return Rollout(
            tokens_BN=answer.tokens_BN.at[:, step].set(jnp.where(running_B, tokens_B, 0)),
            lengths_B=answer.lengths_B + running_B,
            log_probabilities_BN=answer.log_probabilities_BN.at[:, step].set(
                jnp.where(running_B, log_probabilities_B, 0.0)
            ),
        )

    def still_running(drawn, running_B):
        return running_B & ~jnp.isin(drawn[0], stop_S)

    columns_P = jnp.arange(prompt_length)
    positions_BP = jnp.where(columns_P < prompt_lengths_B[:, None], columns_P, -1)
    output = model(prompt_tokens_BP, positions_BL=positions_BP, caches=caches)
    last_BD = jnp.take_along_axis(output.hidden_BLD, (prompt_lengths_B - 1)[:, None, None], axis=1)[:, 0]
    first = draw(last_BD, 0)
    everyone_B = jnp.ones(batch_size, bool)
    answer = Rollout(
        tokens_BN=jnp.zeros((batch_size, max_new_tokens), jnp.int32),
        lengths_B=jnp.zeros(batch_size, jnp.int32),
        log_probabilities_BN=jnp.zeros((batch_size, max_new_tokens), jnp.float32),
    )

    def condition(carry):
        step, _, running_B, _, _ = carry
        return (step < max_new_tokens) & jnp.any(running_B)

    def body(carry):
        step, tokens_B, running_B, caches, answer = carry
        positions_B = prompt_lengths_B + step - 1
        output = model(tokens_B[:, None], positions_BL=positions_B[:, None], caches=caches)
        drawn = draw(output.hidden_BLD[:, 0], step)
        return (
            step + 1,
            drawn[0],
            still_running(drawn, running_B),
            output.caches,
            record(step, drawn, running_B, answer),
        )

    start = (1, first[0], still_running(first, everyone_B), output.caches, record(0, first, everyone_B, answer))
    return jax.lax.while_loop(condition, body, start)[-1]
