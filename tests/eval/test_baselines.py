"""The baselines against manual counts and against lzma itself."""

import lzma
import math
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from maxlm.errors import DataError
from maxlm.eval.baselines import BigramModel, baselines, xz_size


def counted_bits(train: list[list[int]], sequence: list[int], vocab_size: int) -> tuple[float, float]:
    """Unigram and bigram bits from dictionaries, one symbol at a time."""
    unigram = Counter(symbol for s in train for symbol in s[1:])
    contexts = Counter(symbol for s in train for symbol in s[:-1])
    pairs = Counter(pair for s in train for pair in pairwise(s))
    total = sum(unigram.values())
    unigram_bits = bigram_bits = 0.0
    for before, symbol in pairwise(sequence):
        p = (unigram[symbol] + 1) / (total + vocab_size)
        unigram_bits -= math.log2(p)
        followers = len({b for a, b in pairs if a == before})
        if followers:
            share = followers / (contexts[before] + followers)
            p = (1 - share) * pairs[before, symbol] / contexts[before] + share * p
        bigram_bits -= math.log2(p)
    return unigram_bits, bigram_bits


def test_bigrams_match_a_manual_count():
    generator = random.Random(0)
    vocab_size = 11
    train = [[10, *(generator.choice((0, 1, 1, 2, 5, 7)) for _ in range(30)), 10] for _ in range(4)]
    # 3 and 8 are never seen in training, as symbol or as context.
    valid = [[10, 1, 1, 3, 8, 3, 0, 10], [10, 10], [10, 7, 5, 2, 10]]
    model = BigramModel([np.array(s) for s in train], vocab_size)
    sequences = [np.array(s) for s in valid]
    expected = np.array([counted_bits(train, s, vocab_size) for s in valid]).T
    np.testing.assert_allclose(model.unigram_bits(sequences), expected[0], rtol=1e-12)
    np.testing.assert_allclose(model.bits(sequences), expected[1], rtol=1e-12)


def test_probabilities_sum_to_one():
    model = BigramModel([np.array([4, 0, 1, 0, 1, 2, 4])], 5)
    assert model.unigram.sum() == pytest.approx(1)
    for context in range(5):
        total = sum(model.probabilities(np.array([context, symbol]))[0] for symbol in range(5))
        assert total == pytest.approx(1)


def test_xz_is_lzma_at_its_best_preset():
    data = random.Random(0).randbytes(2000) * 20
    plain = len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME, check=lzma.CHECK_NONE))
    # Identical except for the dictionary size, which does not affect the size here.
    assert xz_size(data) == plain
    assert xz_size(b"") > 0


def test_xz_dictionary_covers_all_of_the_training_text():
    early = random.Random(1).randbytes(3000)
    between = random.Random(2).randbytes(200_000)
    # Random bytes: 3000 of them cost 3000, unless they are matched in the dictionary.
    assert xz_size(early + between + early) - xz_size(early + between) < 600


def test_baselines_of_a_corpus(tokenizer, sentences):
    train, valid = sentences[:100], sentences[100:]
    found = baselines(train, valid, tokenizer)
    num_bytes = sum(len(text.encode()) for text in valid)
    assert (found.train_bytes, found.valid_bytes) == (sum(len(text.encode()) for text in train), num_bytes)

    def framed(texts):
        return [[tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id] for text in texts]

    bits = [counted_bits(framed(train), ids, tokenizer.vocab_size) for ids in framed(valid)]
    assert found.unigram.value == pytest.approx(sum(b[0] for b in bits) / num_bytes)
    assert found.bigram.value == pytest.approx(sum(b[1] for b in bits) / num_bytes)
    by_byte = [counted_bits([[256, *t.encode(), 256] for t in train], [256, *t.encode(), 256], 257) for t in valid]
    assert found.byte_bigram.value == pytest.approx(sum(b[1] for b in by_byte) / num_bytes)
    assert found.xz_after_training < found.xz
    assert found.bigram.low < found.bigram.value < found.bigram.high
    assert found.to_dict()["bigram"]["value"] == found.bigram.value


def test_empty_text_raises(tokenizer):
    with pytest.raises(DataError, match="training text and held-out text"):
        baselines(["text"], [], tokenizer)
