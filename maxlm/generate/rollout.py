"""Rollouts: whole completions sampled inside one compiled function, for policy optimization.

Under an explicit mesh the model stays sharded as in training: each layer's weights are gathered when a decode step
needs them, rows are sharded over the batch axes, and caches over rows and heads. Without one, the model is on the
device.

Shapes: U prompts, P prompt length after padding, B completions, N new tokens, D embed, V vocabulary.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.core.sharding import is_explicit, logical_to_spec, on_each_device, shard, sharded_count, specs_of
from maxlm.generate.sampling import log_probabilities_of, sample, scale
from maxlm.layers.stack import take_rows
from maxlm.models.decoder import Decoder
from maxlm.models.regroup import unrolled

# When half of a device's rows have ended, the others go on alone: so often at most, as each size compiles the decode
# step again, and not for so few rows that a step takes as long as for half of them.
_HALVINGS = 3
_FEWEST_ROWS = 8


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


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens_B", "positions_B", "running_B", "keys_B", "caches", "answers"],
    meta_fields=[],
)
@dataclass(frozen=True)
class _Rows:
    """Completions that are being sampled.

    tokens_B, positions_B: the newest token, which is not yet in the cache, and its position.
    running_B: whether it was not the last one.
    """

    tokens_B: jax.Array
    positions_B: jax.Array
    running_B: jax.Array
    keys_B: jax.Array
    caches: Any
    answers: Rollout

    def take(self, rows: jax.Array) -> "_Rows":
        others = jax.tree.map(lambda x: jnp.take(x, rows, axis=0), replace(self, caches=None))
        return replace(others, caches=take_rows(self.caches, rows))


@partial(jax.jit, static_argnames=("max_new_tokens", "stop_ids"))
def rollout(
    model: Decoder,
    prompt_tokens_UP: jax.Array,
    prompt_lengths_U: jax.Array,
    keys_B: jax.Array,
    *,
    max_new_tokens: int,
    temperature: float | jax.Array,
    stop_ids: tuple[int, ...],
) -> Rollout:
    """Continue prompts until they sample one of `stop_ids` or have `max_new_tokens` tokens.

    There may be several completions per prompt, which is prefilled once. A row's completion depends only on its prompt
    and its key. Rows that have ended are left out of the computation whenever half of a device's rows have.

    Args:
      prompt_tokens_UP: prompts, padded on the right.
      prompt_lengths_U: their lengths; one of 0 gets no completions.
      keys_B: typed PRNG keys; token t is sampled with `fold_in(key, t)`. B is a multiple of U, also on each device:
        the completions of a prompt are adjacent.
      temperature: of all rows; 0 takes the most likely token.
    """
    if not is_explicit():
        model = unrolled(model)
    temperature = jnp.float32(temperature)
    batch = logical_to_spec(("batch",))

    def draw(hidden_BD, keys_B, step):
        def local(logits_BV, keys_B, step, temperature):
            num_rows = logits_BV.shape[0]
            temperature_B = jnp.full(num_rows, temperature)
            tokens_B = sample(
                logits_BV,
                jax.vmap(jax.random.fold_in, (0, None))(keys_B, step),
                temperature_B=temperature_B,
                top_k_B=jnp.zeros(num_rows, jnp.int32),
                top_p_B=jnp.ones(num_rows),
            )
            return tokens_B, log_probabilities_of(scale(logits_BV, temperature_B), tokens_B)

        logits_BV = shard(model.logits(hidden_BD), "batch", None)
        return on_each_device(local, logits_BV, keys_B, step, temperature, out_specs=batch)

    def record(rows: _Rows, drawn, step) -> _Rows:
        """The rows with the tokens that those still running have drawn."""
        (tokens_B, log_probabilities_B), running_B, answers = drawn, rows.running_B, rows.answers
        is_column_N = jnp.arange(max_new_tokens) == step

        def written(whole_BN, new_B):
            return jnp.where(is_column_N & running_B[:, None], new_B[:, None], whole_BN)

        ends_B = jnp.zeros_like(running_B)
        for stop_id in stop_ids:
            ends_B |= tokens_B == stop_id
        return replace(
            rows,
            tokens_B=tokens_B,
            running_B=running_B & ~ends_B,
            answers=Rollout(
                tokens_BN=written(answers.tokens_BN, tokens_B),
                lengths_B=answers.lengths_B + running_B,
                log_probabilities_BN=written(answers.log_probabilities_BN, log_probabilities_B),
            ),
        )

    def decode(rows: _Rows, step) -> _Rows:
        output = model(rows.tokens_B[:, None], positions_BL=rows.positions_B[:, None], caches=rows.caches)
        rows = replace(rows, positions_B=rows.positions_B + 1, caches=output.caches)
        return record(rows, draw(output.hidden_BLD[:, 0], rows.keys_B, step), step)

    def finish(rows: _Rows, step, halvings: int) -> Rollout:
        """The answers of rows whose first `step` tokens are sampled."""
        num_rows = len(rows.tokens_B) // sharded_count(batch) if is_explicit() else len(rows.tokens_B)
        num_kept = num_rows // 2 if halvings and num_rows > _FEWEST_ROWS else 0

        def condition(carry):
            rows, step = carry
            running = on_each_device(lambda running_B: jnp.sum(running_B)[None], rows.running_B, out_specs=batch)
            return (step < max_new_tokens) & (jnp.max(running) > num_kept)

        def body(carry):
            rows, step = carry
            return decode(rows, step), step + 1

        rows, step = jax.lax.while_loop(condition, body, (rows, step))
        if num_kept == 0:
            return rows.answers

        def keep_running(rows: _Rows):
            places = jnp.argsort(~rows.running_B, stable=True)[:num_kept]
            return rows.take(places), places

        kept, places = on_each_device(keep_running, rows, out_specs=(specs_of(rows), batch))
        finished = finish(kept, step, halvings - 1)

        def put(whole: Rollout, places, part: Rollout):
            return jax.tree.map(lambda x, new: x.at[places].set(new), whole, part)

        return on_each_device(put, rows.answers, places, finished, out_specs=specs_of(rows.answers))

    num_prompts, prompt_length = prompt_tokens_UP.shape
    num_rows = len(keys_B)
    columns_P = jnp.arange(prompt_length)
    positions_UP = jnp.where(columns_P < prompt_lengths_U[:, None], columns_P, -1)
    cache_dtype = jnp.dtype(model.execution.activation_dtype)
    caches = model.create_caches(num_prompts, prompt_length + max_new_tokens, cache_dtype)
    output = model(prompt_tokens_UP, positions_BL=positions_UP, caches=caches)

    def repeat(hidden_UPD, lengths_U, caches):
        """The last hidden state of the prompt of each row, its length, and its caches."""
        last_UD = jnp.take_along_axis(hidden_UPD, (lengths_U - 1)[:, None, None], axis=1)[:, 0]
        prompts = jnp.arange(len(lengths_U) * (num_rows // num_prompts)) // (num_rows // num_prompts)
        return last_UD[prompts], lengths_U[prompts], take_rows(caches, prompts)

    hidden_BD, lengths_B, caches = on_each_device(
        repeat,
        shard(output.hidden_BLD, "batch", None, None),
        prompt_lengths_U,
        output.caches,
        out_specs=(batch, batch, specs_of(output.caches)),
    )
    empty_BN = jnp.zeros((num_rows, max_new_tokens), jnp.int32)
    start = _Rows(
        tokens_B=jnp.zeros_like(lengths_B),
        positions_B=lengths_B,
        running_B=lengths_B > 0,
        keys_B=keys_B,
        caches=caches,
        answers=Rollout(
            shard(empty_BN, "batch", None),
            jnp.zeros_like(lengths_B),
            shard(empty_BN.astype(jnp.float32), "batch", None),
        ),
    )
    first = record(start, draw(hidden_BD, keys_B, jnp.int32(0)), jnp.int32(0))
    return finish(first, jnp.int32(1), _HALVINGS)
