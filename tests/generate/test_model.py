"""Logits, scores and text of a loaded model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import maxlm
from maxlm.errors import CheckpointError, RequestError, TokenizerError
from maxlm.generate.model import LoadedModel, for_this_backend, segment_positions
from maxlm.generate.request import Request
from maxlm.interop.int8 import write_bundle
from maxlm.models.decoder import with_execution
from maxlm.models.quantized import quantize_model


@jax.jit
def padded_logits(decoder, tokens_BL):
    return decoder.logits(decoder(tokens_BL).hidden_BLD)


def full_logits(decoder, ids):
    """One row through the forward pass without a cache: float64 [length, vocab]."""
    padded = np.zeros((1, decoder.execution.max_length), np.int32)
    padded[0, : len(ids)] = ids
    return np.asarray(padded_logits(decoder, padded))[0, : len(ids)].astype(np.float64)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def greedy_by_full_forward(decoder, ids, count, stop_ids):
    """Reference: no cache, no batch, one full forward pass per token."""
    ids, new = list(ids), []
    for _ in range(count):
        new.append(int(full_logits(decoder, ids)[-1].argmax()))
        ids.append(new[-1])
        if new[-1] in stop_ids:
            break
    return new


def test_logits_match_the_forward_pass(model, decoder):
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (3, 21))
    logits = model.logits(tokens)
    assert logits.shape == (3, 21, model.config.vocab_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, decoder.logits(decoder(jnp.asarray(tokens)).hidden_BLD), atol=2e-5)


def test_segments_do_not_attend_to_each_other(model, decoder):
    tokens = np.random.default_rng(1).integers(0, model.config.vocab_size, (1, 20))
    segment_ids = np.asarray([[1] * 8 + [2] * 9 + [0] * 3])
    logits = model.logits(tokens, segment_ids)[0]
    np.testing.assert_allclose(logits[:8], full_logits(decoder, tokens[0, :8]), atol=2e-5)
    np.testing.assert_allclose(logits[8:17], full_logits(decoder, tokens[0, 8:17]), atol=2e-5)


def test_positions_restart_at_each_segment():
    np.testing.assert_array_equal(
        segment_positions(np.asarray([[1, 1, 1, 2, 2, 0, 0], [3, 4, 4, 4, 4, 5, 5]])),
        [[0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, 0, 1]],
    )


def test_greedy_text_is_the_argmax_of_the_forward_pass(model, decoder, tokenizer):
    prompts = ["The quick", "A model writes one token at a time and", ""]
    texts = model.generate(prompts, max_new_tokens=24)
    for prompt, text in zip(prompts, texts):
        ids = greedy_by_full_forward(decoder, model.encode(prompt), 24, model.stop_ids)
        assert text == tokenizer.decode(ids)


@pytest.mark.parametrize("length", [15, 16, 17, 33, 100])
def test_greedy_tokens_cross_prompt_buckets_and_windows(model, decoder, length):
    ids = np.random.default_rng(length).integers(10, model.config.vocab_size, length).tolist()
    with model.engine(num_slots=2) as engine:
        events = list(engine.stream(Request(tuple(ids), max_new_tokens=12, temperature=0)))
    tokens = [event.token.id for event in events if event.token]
    expected = greedy_by_full_forward(decoder, ids, 12, model.stop_ids)
    assert tokens == [id_ for id_ in expected if id_ not in model.stop_ids]


def test_chat_is_a_valid_prompt(model, decoder, tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    ids = tokenizer.encode_chat(messages, generation_prompt=True).ids
    expected = tokenizer.decode(greedy_by_full_forward(decoder, ids, 10, model.stop_ids))
    assert model.generate(messages, max_new_tokens=10) == [expected]
    assert model.generate([messages, "The"], max_new_tokens=10)[0] == expected


def test_text_depends_only_on_the_seed(model):
    settings = {"max_new_tokens": 20, "temperature": 1.0, "top_p": 0.95}
    together = model.generate(["The dog"] * 5, seed=100, **settings)
    assert model.generate(["The dog"] * 5, seed=100, **settings) == together
    assert model.generate("The dog", seed=100, **settings) == together[:1]
    # Each prompt has its own random stream, shared with no other seed.
    assert len({*together, *model.generate(["The dog"] * 5, seed=101, **settings)}) == 10


def test_chat_continues_a_partial_answer(model, tokenizer):
    messages = [{"role": "user", "content": "Hello"}]
    ids = model.encode([*messages, {"role": "assistant", "content": "The fox"}], continue_final=True)
    assert ids == model.encode(messages) + tokenizer.encode("The fox")


def test_text_ends_before_a_stop_string(model):
    whole = model.generate("The", max_new_tokens=30, temperature=1.0, seed=3)[0]
    stop = whole[10:13]
    assert model.generate("The", max_new_tokens=30, temperature=1.0, seed=3, stop=[stop]) == [
        whole[: whole.index(stop)]
    ]


def test_scores_are_sums_of_log_softmax(model, decoder):
    rng = np.random.default_rng(2)
    prompts = [rng.integers(10, 300, length).tolist() for length in (1, 5, 17, 40, 3, 8, 2, 9, 11)]
    continuations = [rng.integers(10, 300, length).tolist() for length in (3, 1, 20, 7, 2, 2, 6, 1, 4)]
    scores = model.score_tokens(prompts, continuations)
    for prompt, continuation, score in zip(prompts, continuations, scores):
        logits = full_logits(decoder, [*prompt, *continuation])[len(prompt) - 1 : -1]
        expected = log_softmax(logits)[np.arange(len(continuation)), continuation].sum()
        assert score.log_probability == pytest.approx(expected, abs=1e-4)
        assert score.num_tokens == len(continuation)
        assert score.is_greedy == bool((logits.argmax(-1) == continuation).all())


def test_the_greedy_continuation_is_scored_as_greedy(model, decoder):
    prompt = model.encode("A model")
    continuation = greedy_by_full_forward(decoder, prompt, 6, ())
    greedy, other = model.score_tokens(
        [prompt, prompt], [continuation, [*continuation[:-1], (continuation[-1] + 1) % model.config.vocab_size]]
    )
    assert greedy.is_greedy
    assert not other.is_greedy
    assert other.log_probability < greedy.log_probability


def test_prompt_and_continuation_are_tokenized_together(model, tokenizer):
    """The prompt ends inside a token of the joint text: that token counts as continuation."""
    whole = tokenizer.encode("The quick brown fox")
    seam = len(tokenizer.decode(whole[:2])) + 1
    text = tokenizer.decode(whole)
    [score] = model.score([text[:seam]], [text[seam:]])
    [expected] = model.score_tokens([[tokenizer.bos_id, *whole[:2]]], [whole[2:]])
    assert score == expected


def test_scores_of_chats(model, tokenizer):
    messages = [{"role": "user", "content": "Hello"}]
    [score] = model.score([messages], ["The fox"])
    ids = tokenizer.encode_chat(messages, generation_prompt=True).ids
    assert score == model.score_tokens([ids], [tokenizer.encode("The fox")])[0]


def with_bfloat16(decoder):
    """The fixture's weights in a model that declares bfloat16 activations."""
    return with_execution(decoder, decoder.execution.model_copy(update={"activation_dtype": "bfloat16"}))


def test_activations_are_float32_on_cpu(decoder):
    """The weights are unchanged, and the logits match the float32 model rather than the bfloat16 one."""
    tokens = jnp.asarray([[5, 50, 100, 150]])
    declared = with_bfloat16(decoder)
    converted = for_this_backend(declared)
    assert converted.execution.activation_dtype == "float32"
    expected = decoder.logits(decoder(tokens).hidden_BLD)
    assert jnp.abs(declared.logits(declared(tokens).hidden_BLD) - expected).max() > 1e-4
    np.testing.assert_allclose(converted.logits(converted(tokens).hidden_BLD), expected, atol=1e-6)


def test_load_reads_an_int8_bundle(decoder, tokenizer, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    quantized = quantize_model(with_bfloat16(decoder))
    write_bundle(folder, quantized, tokenizer, receipt={})
    loaded = maxlm.load(folder)
    assert loaded.name == "bundle"
    assert loaded.execution.activation_dtype == "float32"
    tokens = np.asarray([[1, 40, 50, 60, 70]])
    exact = np.asarray(decoder.logits(decoder(jnp.asarray(tokens)).hidden_BLD))
    np.testing.assert_allclose(loaded.logits(tokens), exact, atol=0.05 * np.abs(exact).max())
    assert loaded.generate("The dog", max_new_tokens=5) == loaded.generate("The dog", max_new_tokens=5)


def test_model_without_tokenizer_takes_token_ids_but_no_text(decoder, tmp_path):
    folder = tmp_path / "bundle"
    folder.mkdir()
    write_bundle(folder, quantize_model(decoder), None, receipt={})
    loaded = maxlm.load(folder)
    assert loaded.logits(np.asarray([[1, 40, 50]])).shape == (1, 3, decoder.config.vocab_size)
    assert loaded.score_tokens([[1]], [[40, 50]])[0].num_tokens == 2
    refused = (
        lambda: loaded.generate("The dog", max_new_tokens=5),
        lambda: loaded.score(["The"], [" dog"]),
        lambda: loaded.engine(num_slots=2),
    )
    for call in refused:
        with pytest.raises(RequestError, match="bundle: has no tokenizer"):
            call()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.zeros(5, np.int32), "integers"),
        (np.zeros((2, 5)), "integers"),
        (np.zeros((1, 129), np.int32), "context of 128"),
        (np.full((1, 4), 10_000), "between 0 and"),
        (np.full((1, 4), -1), "between 0 and"),
    ],
)
def test_logits_reject_invalid_token_batches(model, tokens, message):
    with pytest.raises(RequestError, match=message):
        model.logits(tokens)


def test_invalid_inputs_raise(model, decoder, tokenizer, tmp_path):
    with pytest.raises(RequestError, match="the context holds 128"):
        model.generate("The quick", max_new_tokens=500)
    with pytest.raises(RequestError, match="temperature"):
        model.generate("The quick", max_new_tokens=5, temperature=-1)
    with pytest.raises(RequestError, match="temperature"):
        model.generate("The quick", max_new_tokens=5, temperature=float("nan"))
    with pytest.raises(RequestError, match="pair 0"):
        model.score(["The"], [""])
    with pytest.raises(RequestError, match="2 prompts and 1"):
        model.score(["The", "A"], ["x"])
    with pytest.raises(CheckpointError, match="no such folder"):
        maxlm.load(tmp_path / "nothing")
    other = jax.tree.map(lambda leaf: leaf, decoder)
    other.config = decoder.config.model_copy(update={"vocab_size": 7})
    with pytest.raises(TokenizerError, match="the model only 7;"):
        LoadedModel(other, tokenizer)
