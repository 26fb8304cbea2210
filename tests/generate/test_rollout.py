"""The compiled rollout against the forward pass without a cache, and against the engine."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlm.generate.decoding import request_key
from maxlm.generate.request import Request
from maxlm.generate.rollout import rollout

PROMPTS = [[1, 40, 41], [1, 200, 33, 34, 35, 36, 90], [1], [1, 77, 78, 79, 80, 81]]
NEW = 20


def padded_prompts():
    lengths = np.asarray([len(prompt) for prompt in PROMPTS], np.int32)
    tokens = np.full((len(PROMPTS), lengths.max()), 299, np.int32)  # the contents of the padding must not matter
    for row, prompt in enumerate(PROMPTS):
        tokens[row, : len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray(lengths)


def keys():
    return jax.vmap(jax.random.key)(jnp.arange(len(PROMPTS)))


def run(model, *, temperature, stop_ids=(), keys_B=None):
    tokens, lengths = padded_prompts()
    result = rollout(
        model.decoder,
        tokens,
        lengths,
        keys() if keys_B is None else keys_B,
        max_new_tokens=NEW,
        temperature=temperature,
        stop_ids=stop_ids,
    )
    return jax.tree.map(np.asarray, result)


def reference_logits(model, prompt, answer):
    """float64 logits at the positions that predict the answer's tokens, from one forward pass without a cache."""
    return model.logits(np.asarray([[*prompt, *answer]]))[0, len(prompt) - 1 : -1].astype(np.float64)


def test_greedy_answers_are_the_argmax_of_the_forward_pass(model):
    result = run(model, temperature=0.0)
    for prompt, answer in zip(PROMPTS, result.tokens_BN):
        np.testing.assert_array_equal(reference_logits(model, prompt, answer).argmax(-1), answer)


def test_greedy_answers_match_the_engine(model):
    result = run(model, temperature=0.0, stop_ids=model.stop_ids)
    with model.engine(num_slots=4) as engine:
        for prompt, tokens, length in zip(PROMPTS, result.tokens_BN, result.lengths_B):
            events = engine.stream(Request(tuple(prompt), max_new_tokens=NEW, temperature=0.0))
            expected = [event.token.id for event in events if event.token]
            assert [id_ for id_ in tokens[:length] if id_ not in model.stop_ids] == expected


def test_sampled_answers_match_the_engine(model):
    """A request and a rollout with the key of its stream sample the same tokens."""
    streams = [(row, 2 * row) for row in range(len(PROMPTS))]
    keys_B = jax.vmap(request_key)(jnp.asarray([[0, 50]] * len(PROMPTS), jnp.uint32), jnp.asarray(streams, jnp.uint32))
    result = run(model, temperature=0.9, stop_ids=model.stop_ids, keys_B=keys_B)
    with model.engine(num_slots=4) as engine:
        for row, prompt in enumerate(PROMPTS):
            request = Request(tuple(prompt), max_new_tokens=NEW, temperature=0.9, seed=50, stream=streams[row])
            events = engine.stream(request)
            expected = [event.token.id for event in events if event.token]
            drawn = result.tokens_BN[row, : result.lengths_B[row]]
            assert [id_ for id_ in drawn if id_ not in model.stop_ids] == expected


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0, 1.7])
def test_log_probabilities_match_the_sampling_policy(model, temperature):
    result = run(model, temperature=temperature)
    for prompt, answer, log_probabilities in zip(PROMPTS, result.tokens_BN, result.log_probabilities_BN):
        logits = reference_logits(model, prompt, answer) / (temperature or 1.0)
        logits -= logits.max(-1, keepdims=True)
        expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(log_probabilities, expected[np.arange(NEW), answer], atol=1e-4)


def test_answer_ends_with_its_first_stop_token(model):
    free = run(model, temperature=1.0)
    stop_ids = (int(free.tokens_BN[0, 4]), int(free.tokens_BN[3, 9]))
    stopped = run(model, temperature=1.0, stop_ids=stop_ids)
    for row in range(len(PROMPTS)):
        hits = np.flatnonzero(np.isin(free.tokens_BN[row], stop_ids))
        length = hits[0] + 1 if len(hits) else NEW
        assert stopped.lengths_B[row] == length
        np.testing.assert_array_equal(stopped.tokens_BN[row, :length], free.tokens_BN[row, :length])
        assert not stopped.tokens_BN[row, length:].any()
        assert not stopped.log_probabilities_BN[row, length:].any()
    assert stopped.lengths_B[0] <= 5


def test_row_depends_only_on_its_prompt_and_key(model):
    whole = run(model, temperature=1.0)
    tokens, lengths = padded_prompts()
    order = jnp.asarray([2, 0, 3, 1])
    shuffled = rollout(
        model.decoder,
        tokens[order],
        lengths[order],
        keys()[order],
        max_new_tokens=NEW,
        temperature=1.0,
        stop_ids=(),
    )
    np.testing.assert_array_equal(shuffled.tokens_BN, whole.tokens_BN[np.asarray(order)])
