"""The compiled functions of the engine: prefill a prompt into a slot, and decode tokens for all slots.

Both work on a fixed number of slots, so each compiles once (prefill: once per bucket of prompt lengths), and both
donate the state, so that the cache is updated in place.

Shapes: B slots, L prompt length after padding, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.generate.sampling import log_probabilities_of, sample
from maxlm.layers.stack import write_row
from maxlm.models.adapters.stacked import for_rows
from maxlm.models.decoder import Decoder, DecoderOutput

MIN_BUCKET = 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["seed", "stream", "temperature", "top_k", "top_p", "adapter"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplingRow:
    """Settings of one request, or with a leading [B] of all: see `maxlm.generate.sampling`.

    seed: uint32 [..., 2], the high and the low half of a 64-bit seed.
    stream: uint32 [..., 2], the random stream under that seed: index of the prompt, index of the choice.
    adapter: the number of the adapter that answers; 0 is none.
    """

    seed: jax.Array
    stream: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    adapter: jax.Array

    @classmethod
    def from_values(
        cls, *, seed: int, stream: tuple[int, int], temperature: float, top_k: int, top_p: float, adapter: int
    ) -> Self:
        # Of NumPy until a compiled program takes them.
        fields: dict[str, Any] = {
            "seed": np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32),
            "stream": np.asarray(stream, np.uint32),
            "temperature": np.float32(temperature),
            "top_k": np.int32(top_k),
            "top_p": np.float32(top_p),
            "adapter": np.int32(adapter),
        }
        return cls(**fields)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["caches", "tokens_B", "positions_B", "prompt_lengths_B", "counts_B", "sampling"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SlotState:
    """State kept on the device between steps.

    tokens_B: the newest token of each slot, sampled but not yet in the cache.
    positions_B: its position.
    prompt_lengths_B: tokens of its prompt.
    counts_B: how many tokens the slot has sampled.
    """

    caches: Any
    tokens_B: jax.Array
    positions_B: jax.Array
    prompt_lengths_B: jax.Array
    counts_B: jax.Array
    sampling: SamplingRow

    @classmethod
    def create(cls, model: Decoder, num_slots: int, max_length: int, dtype) -> Self:
        zeros_B = jnp.zeros(num_slots, jnp.int32)
        row = SamplingRow.from_values(seed=0, stream=(0, 0), temperature=0.0, top_k=0, top_p=1.0, adapter=0)
        return cls(
            caches=model.create_caches(num_slots, max_length, dtype),
            tokens_B=zeros_B,
            positions_B=zeros_B.copy(),
            prompt_lengths_B=zeros_B.copy(),
            counts_B=zeros_B.copy(),
            sampling=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_slots, *leaf.shape)).copy(), row),
        )


@partial(jax.tree_util.register_dataclass, data_fields=["tokens_B", "log_probabilities_B", "logits_BV"], meta_fields=[])
@dataclass(frozen=True)
class StepOutput:
    """Sampled tokens and their log-probabilities under the model: temperature 1, no top-k or top-p."""

    tokens_B: jax.Array
    log_probabilities_B: jax.Array
    logits_BV: jax.Array


def bucket_length(length: int, max_length: int) -> int:
    """Padded length: `length` rounded up to a power of two, between MIN_BUCKET and `max_length`."""
    return min(max(MIN_BUCKET, 1 << (length - 1).bit_length()), max_length)


def prefill(
    model: Decoder, state: SlotState, tokens_L: jax.Array, length: jax.Array, slot: jax.Array, sampling: SamplingRow
) -> tuple[SlotState, StepOutput]:
    """Run a right-padded prompt of `length` tokens, write its keys and values to `slot`, sample the first new token.

    The outputs have a leading dimension of 1.
    """
    prompt = _prompt_output(for_rows(model, sampling.adapter[None]), tokens_L, length)
    last_1D = jax.lax.dynamic_index_in_dim(prompt.hidden_BLD, length - 1, axis=1, keepdims=False)
    output = _sample(model.logits(last_1D), jax.tree.map(lambda leaf: leaf[None], sampling), jnp.zeros(1, jnp.int32))
    state = SlotState(
        caches=write_row(state.caches, prompt.caches, slot),
        tokens_B=state.tokens_B.at[slot].set(output.tokens_B[0]),
        positions_B=state.positions_B.at[slot].set(length),
        prompt_lengths_B=state.prompt_lengths_B.at[slot].set(length),
        counts_B=state.counts_B.at[slot].set(1),
        sampling=jax.tree.map(lambda whole, row: whole.at[slot].set(row), state.sampling, sampling),
    )
    return state, output


def decode(model: Decoder, state: SlotState, active_B: jax.Array, *, num_tokens: int) -> tuple[SlotState, StepOutput]:
    """Decode tokens for each active slot, one after the other; the outputs have a leading [num_tokens].

    Inactive slots are computed too, at position 0; their output is unused.
    """

    model = for_rows(model, state.sampling.adapter)

    def step(state: SlotState, _: None) -> tuple[SlotState, StepOutput]:
        positions_B = jnp.where(active_B, state.positions_B, 0)
        hidden = model(
            state.tokens_B[:, None],
            positions_BL=positions_B[:, None],
            prefix_lengths_BL=_prefix_lengths(model, state.prompt_lengths_B, 1),
            caches=state.caches,
        )
        sampling = replace(state.sampling, temperature=jnp.where(active_B, state.sampling.temperature, 0.0))
        output = _sample(model.logits(hidden.hidden_BLD[:, 0]), sampling, state.counts_B)
        state = replace(
            state,
            caches=hidden.caches,
            tokens_B=output.tokens_B,
            positions_B=positions_B + 1,
            counts_B=state.counts_B + 1,
        )
        return state, output

    if num_tokens == 1:
        state, output = step(state, None)
        return state, jax.tree.map(lambda leaf: leaf[None], output)

    def without_logits(state: SlotState, _: None) -> tuple[SlotState, StepOutput]:
        # They are large, and only asked for with a single token.
        state, output = step(state, None)
        return state, replace(output, logits_BV=None)

    return jax.lax.scan(without_logits, state, length=num_tokens)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["log_probabilities_B", "top_BK", "top_ids_BK"],
    meta_fields=[],
)
@dataclass(frozen=True)
class TokenScores:
    """Log-probabilities of given tokens [batch], and the top K with their ids, most likely first [batch, K]."""

    log_probabilities_B: jax.Array
    top_BK: jax.Array
    top_ids_BK: jax.Array


@partial(jax.jit, static_argnames="count")
def token_scores(logits_BV: jax.Array, tokens_B: jax.Array, *, count: int) -> TokenScores:
    """Log-probabilities of given tokens and of the top `count` of their rows.

    Both come from one array, because clients compare the two for equality to see whether a token is the most likely.
    """
    log_probabilities_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    chosen_B = jnp.take_along_axis(log_probabilities_BV, tokens_B[:, None], axis=-1)[:, 0]
    return TokenScores(chosen_B, *jax.lax.top_k(log_probabilities_BV, count))


def score_prompt(
    model: Decoder, tokens_L: jax.Array, length: jax.Array, adapter: jax.Array, *, count: int
) -> TokenScores:
    """Log-probability of each token of a right-padded prompt of `length` tokens, given those before it.

    Row i of the result is for token i + 1; the last row and the padding rows are meaningless.
    """
    hidden_LD = _prompt_output(for_rows(model, adapter[None]), tokens_L, length).hidden_BLD[0]
    targets_L = jnp.roll(tokens_L, -1)
    # One position at a time: the logits of a whole prompt would be the largest array by far.
    return jax.lax.map(
        lambda position: jax.tree.map(
            lambda leaf: leaf[0], token_scores(model.logits(position[0][None]), position[1][None], count=count)
        ),
        (hidden_LD, targets_L),
        batch_size=MIN_BUCKET,
    )


def request_key(seed_2: jax.Array, stream_2: jax.Array) -> jax.Array:
    """PRNG key of a request: a function of its seed and its stream."""
    key = jax.random.wrap_key_data(seed_2, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, stream_2[0]), stream_2[1])


def _prompt_output(model: Decoder, tokens_L, length) -> DecoderOutput:
    padded_length = tokens_L.shape[0]
    positions_L = jnp.where(jnp.arange(padded_length) < length, jnp.arange(padded_length), -1)
    caches = model.create_caches(1, padded_length, jnp.dtype(model.execution.activation_dtype))
    return model(
        tokens_L[None],
        positions_BL=positions_L[None],
        prefix_lengths_BL=_prefix_lengths(model, length[None], padded_length),
        caches=caches,
    )


def _prefix_lengths(model: Decoder, prompt_lengths_B, num_tokens: int) -> jax.Array | None:
    """Of prompts: all but the last token, with which the answer begins. None for causal models."""
    if not model.config.prefix_attention:
        return None
    return jnp.broadcast_to((prompt_lengths_B - 1)[:, None], (prompt_lengths_B.shape[0], num_tokens))


def _sample(logits_BV: jax.Array, sampling: SamplingRow, counts_B: jax.Array) -> StepOutput:
    keys_B = jax.vmap(request_key)(sampling.seed, sampling.stream)
    tokens_B = sample(
        logits_BV,
        jax.vmap(jax.random.fold_in)(keys_B, counts_B),
        temperature_B=sampling.temperature,
        top_k_B=sampling.top_k,
        top_p_B=sampling.top_p,
    )
    return StepOutput(tokens_B, log_probabilities_of(logits_BV, tokens_B), logits_BV)


@dataclass(frozen=True)
class Programs:
    """The compiled functions of an engine; the first argument is the flat list of the model's weights.

    Flattening a tree of modules takes longer than a decode step of a small model.
    """

    prefill: Callable[..., tuple[SlotState, StepOutput]]
    decode: Callable[..., tuple[SlotState, StepOutput]]
    score_prompt: Callable[..., TokenScores]

    @staticmethod
    @cache
    def of(structure: Any) -> "Programs":
        """The programs for models of this structure (`jax.tree.structure`)."""

        def flat(function, **settings):
            def call(weights, *arguments, **options):
                return function(jax.tree.unflatten(structure, weights), *arguments, **options)

            return jax.jit(call, **settings)

        return Programs(
            flat(prefill, donate_argnums=1),
            flat(decode, donate_argnums=1, static_argnames="num_tokens"),
            flat(score_prompt, static_argnames="count"),
        )
