"""Bits per byte count every byte of every document once, regardless of windowing and packing."""

import numpy as np
import pytest

from maxlm.errors import DataError
from maxlm.eval.likelihood import bits_per_byte, likelihood_difference


def naive_bits(model, text: str) -> float:
    """One document alone, one window at a time, float64 softmax over all logits."""
    ids = [model.tokenizer.bos_id, *model.tokenizer.encode(text), model.tokenizer.eos_id]
    context, bits, start, done = model.execution.max_length, 0.0, 0, 1
    while done < len(ids):
        inputs = ids[start : start + context]
        logits = model.logits(np.array([inputs]))[0].astype(np.float64)
        log_softmax = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        log_softmax -= logits.max(-1, keepdims=True)
        for position in range(len(inputs)):
            target = start + position + 1
            if done <= target < len(ids):
                bits -= log_softmax[position, ids[target]] / np.log(2)
        done = min(start + context + 1, len(ids))
        start += context - context // 4
    return bits


def test_matches_a_naive_computation_per_document(model, sentences):
    texts = [*sentences[:25], " ".join(sentences[:9]), "", "x", "naïve 橋 \n\n\ttabs"]
    result = bits_per_byte(model, texts)
    expected = np.array([naive_bits(model, text) for text in texts])
    np.testing.assert_allclose(result.bits, expected, rtol=2e-5)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert result.bits_per_byte.value == pytest.approx(expected.sum() / num_bytes, rel=1e-5)
    tokens = sum(len(model.tokenizer.encode(text)) + 1 for text in texts)
    assert result.perplexity.value == pytest.approx(2 ** (expected.sum() / tokens), rel=1e-4)


def test_long_document_is_scored_once_by_overlapping_windows(model, sentences):
    text = " ".join(sentences)
    assert len(model.tokenizer.encode(text)) > 20 * model.execution.max_length
    result = bits_per_byte(model, [text])
    assert result.bits[0] == pytest.approx(naive_bits(model, text), rel=1e-5)
    assert result.num_tokens[0] == len(model.tokenizer.encode(text)) + 1
    assert result.bits_per_byte.low is None


def test_documents_are_scored_independently(model, sentences):
    alone = bits_per_byte(model, sentences[3:4]).bits[0]
    assert bits_per_byte(model, sentences).bits[3] == pytest.approx(alone, rel=1e-5)


def test_difference_of_two_models_matches_their_results(model, other_model, sentences):
    before, after = bits_per_byte(model, sentences), bits_per_byte(other_model, sentences)
    difference = likelihood_difference(before, after)
    assert difference.value == pytest.approx(after.bits_per_byte.value - before.bits_per_byte.value)
    assert difference.low < difference.value < difference.high
    same = likelihood_difference(before, before)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_no_text_raises(model):
    with pytest.raises(DataError, match="no text"):
        bits_per_byte(model, ["", ""])
