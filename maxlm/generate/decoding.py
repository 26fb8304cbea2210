"""The two compiled functions of the engine: put a prompt into a slot, and advance all slots by one token.

Both work on a fixed number of slots, so each compiles once (prefill: once for each bucket of prompt lengths), and both
donate the state, so that the cache is updated in place.

Shapes: B slots, L prompt length after padding, V vocabulary.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.model import ModelConfig
from maxlm.generate.sampling import sample, token_log_probabilities
from maxlm.models.cache import KVCache
from maxlm.models.decoder import Decoder

MIN_BUCKET = 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["seed", "temperature", "top_k", "top_p"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SamplingRow:
    """How one request samples, or with a leading [B] how all do: see `maxlm.generate.sampling`.

    seed: uint32 [..., 2], the high and the low half of a 64-bit seed.
    """

    seed: jax.Array
    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array

    @classmethod
    def from_values(cls, *, seed: int, temperature: float, top_k: int, top_p: float) -> Self:
        return cls(
            seed=np.asarray([seed >> 32 & 0xFFFFFFFF, seed & 0xFFFFFFFF], np.uint32),
            temperature=np.float32(temperature),
            top_k=np.int32(top_k),
            top_p=np.float32(top_p),
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "tokens_B", "positions_B", "counts_B", "sampling"],
    meta_fields=[],
)
@dataclass(frozen=True)
class SlotState:
    """What lives on the device between steps.

    tokens_B: the newest token of each slot, sampled and not yet in the cache.
    positions_B: its position.
    counts_B: how many tokens the slot has sampled.
    """

    cache: KVCache
    tokens_B: jax.Array
    positions_B: jax.Array
    counts_B: jax.Array
    sampling: SamplingRow

    @classmethod
    def create(cls, config: ModelConfig, num_slots: int, max_length: int, dtype) -> Self:
        zeros_B = jnp.zeros(num_slots, jnp.int32)
        row = SamplingRow.from_values(seed=0, temperature=0.0, top_k=0, top_p=1.0)
        return cls(
            cache=KVCache.create(config, num_slots, max_length, dtype=dtype),
            tokens_B=zeros_B,
            positions_B=zeros_B.copy(),
            counts_B=zeros_B.copy(),
            sampling=jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_slots, *leaf.shape)).copy(), row),
        )


@partial(jax.tree_util.register_dataclass, data_fields=["tokens_B", "log_probabilities_B", "logits_BV"], meta_fields=[])
@dataclass(frozen=True)
class StepOutput:
    """Sampled tokens and their log-probabilities under the model itself: temperature 1, nothing cut off."""

    tokens_B: jax.Array
    log_probabilities_B: jax.Array
    logits_BV: jax.Array


def bucket_length(length: int, max_length: int) -> int:
    """The power of two that `length` is padded to, at least MIN_BUCKET and at most `max_length`."""
    return min(max(MIN_BUCKET, 1 << (length - 1).bit_length()), max_length)


@partial(jax.jit, donate_argnames="state")
def prefill(
    model: Decoder, state: SlotState, tokens_L: jax.Array, length: jax.Array, slot: jax.Array, sampling: SamplingRow
) -> tuple[SlotState, StepOutput]:
    """Run a right-padded prompt of `length` tokens, put its keys and values into `slot`, sample the first new token.

    The outputs have a leading dimension of 1.
    """
    padded_length = tokens_L.shape[0]
    positions_L = jnp.where(jnp.arange(padded_length) < length, jnp.arange(padded_length), -1)
    prompt_cache = KVCache.create(model.config, 1, padded_length, dtype=state.cache.keys.dtype)
    hidden_1LD, prompt_cache = model.decode(tokens_L[None], prompt_cache, positions_L[None])
    last_1D = jax.lax.dynamic_index_in_dim(hidden_1LD, length - 1, axis=1, keepdims=False)
    output = _sample(model.logits(last_1D), jax.tree.map(lambda leaf: leaf[None], sampling), jnp.zeros(1, jnp.int32))

    def insert(whole, part):
        return jax.lax.dynamic_update_slice(whole, part, (0, slot) + (0,) * (whole.ndim - 2))

    state = SlotState(
        cache=jax.tree.map(insert, state.cache, prompt_cache),
        tokens_B=state.tokens_B.at[slot].set(output.tokens_B[0]),
        positions_B=state.positions_B.at[slot].set(length),
        counts_B=state.counts_B.at[slot].set(1),
        sampling=jax.tree.map(lambda whole, row: whole.at[slot].set(row), state.sampling, sampling),
    )
    return state, output


@partial(jax.jit, donate_argnames="state")
def decode_step(model: Decoder, state: SlotState, active_B: jax.Array) -> tuple[SlotState, StepOutput]:
    """One token for each active slot. The others run along at position 0 of their slot, which nobody reads."""
    positions_B = jnp.where(active_B, state.positions_B, 0)
    hidden_B1D, cache = model.decode(state.tokens_B[:, None], state.cache, positions_B[:, None])
    sampling = replace(state.sampling, temperature=jnp.where(active_B, state.sampling.temperature, 0.0))
    output = _sample(model.logits(hidden_B1D[:, 0]), sampling, state.counts_B)
    state = replace(
        state,
        cache=cache,
        tokens_B=output.tokens_B,
        positions_B=positions_B + 1,
        counts_B=state.counts_B + 1,
    )
    return state, output


@partial(jax.jit, static_argnames="count")
def top_log_probabilities(logits_BV: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` likeliest tokens of each row, likeliest first: log-probabilities and ids, each [batch, count]."""
    return jax.lax.top_k(jax.nn.log_softmax(logits_BV, axis=-1), count)


def request_key(seed_2: jax.Array, count: jax.Array) -> jax.Array:
    """The key of a request's `count`-th draw: a function of its seed and of nothing else."""
    return jax.random.fold_in(jax.random.wrap_key_data(seed_2, impl="threefry2x32"), count)


def _sample(logits_BV: jax.Array, sampling: SamplingRow, counts_B: jax.Array) -> StepOutput:
    tokens_B = sample(
        logits_BV,
        jax.vmap(request_key)(sampling.seed, counts_B),
        temperature_B=sampling.temperature,
        top_k_B=sampling.top_k,
        top_p_B=sampling.top_p,
    )
    return StepOutput(tokens_B, token_log_probabilities(logits_BV, tokens_B), logits_BV)
