"""Baselines without a neural network: n-gram models and a general compressor, on the same held-out documents.

A language model that does not beat them has learned nothing worth its training.
"""

import lzma
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np

from maxlm.core.interval import Interval, ratio_interval
from maxlm.errors import DataError
from maxlm.tokenizer.codec import Tokenizer

_SMALLEST_DICTIONARY, _LARGEST_DICTIONARY = 1 << 16, 1536 << 20  # what xz accepts
_BYTE_SYMBOLS = 257  # the bytes, plus the boundary between documents
_BOUNDARY = 256


@dataclass(frozen=True)
class Baselines:
    """Bits per byte of held-out text.

    unigram, bigram: count models over the tokenizer's tokens, fitted to the training text.
    byte_bigram: the same over bytes.
    xz: `xz -9e` on the held-out text only.
    xz_after_training: what the held-out text adds to the compressed size of the training text.
    train_bytes, valid_bytes: bytes of text.
    """

    unigram: Interval
    bigram: Interval
    byte_bigram: Interval
    xz: float
    xz_after_training: float
    train_bytes: int
    valid_bytes: int

    def to_dict(self) -> dict:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: v.to_dict() if isinstance(v, Interval) else v for name, v in values.items()}


def baselines(
    train_texts: Sequence[str], valid_texts: Sequence[str], tokenizer: Tokenizer, *, seed: int = 0
) -> Baselines:
    """Bits per byte of `valid_texts` under models of `train_texts`.

    xz takes about a second for each megabyte, and ten times the text in memory.

    Raises:
      DataError: one of the two is empty.
    """
    if not any(train_texts) or not any(valid_texts):
        raise DataError("the baselines need both training text and held-out text; one of them is empty")
    valid_bytes = np.array([len(text.encode()) for text in valid_texts])
    # lzma releases the GIL, so it runs in parallel with the counting.
    with ThreadPoolExecutor(3) as pool:
        train, valid = _joined(train_texts), _joined(valid_texts)
        sizes = [pool.submit(xz_size, data) for data in (valid, train, train + valid)]

        def interval(bits: np.ndarray) -> Interval:
            return ratio_interval(bits, valid_bytes, seed=seed)

        tokens = BigramModel(_token_sequences(train_texts, tokenizer), tokenizer.vocab_size)
        held_out = _token_sequences(valid_texts, tokenizer)
        unigram, bigram = interval(tokens.unigram_bits(held_out)), interval(tokens.bits(held_out))
        byte_model = BigramModel([_byte_sequence(text) for text in train_texts], _BYTE_SYMBOLS)
        byte_bigram = interval(byte_model.bits([_byte_sequence(text) for text in valid_texts]))
        alone, before, after = (size.result() for size in sizes)
    total = int(valid_bytes.sum())
    return Baselines(
        unigram,
        bigram,
        byte_bigram,
        xz=8 * alone / total,
        xz_after_training=8 * (after - before) / total,
        train_bytes=sum(len(text.encode()) for text in train_texts),
        valid_bytes=total,
    )


class BigramModel:
    """Bigram probabilities of symbols, from counts.

    A sequence's first symbol is given, not predicted; its last one marks the end and is predicted, as a language model
    predicts the end of a document.

    Attributes:
      unigram: p(symbol), float64 [vocab]: add-one estimates.
    """

    def __init__(self, sequences: Sequence[np.ndarray], vocab_size: int):
        self._vocab_size = vocab_size
        pairs = np.concatenate([self._pairs(sequence) for sequence in sequences])
        counts = np.bincount(pairs % vocab_size, minlength=vocab_size)
        self.unigram = (counts + 1) / (counts.sum() + vocab_size)
        # A table of all pairs would not fit for a large vocabulary; few of them occur.
        self._seen_pairs, self._pair_counts = np.unique(pairs, return_counts=True)
        self._context_counts = np.bincount(pairs // vocab_size, minlength=vocab_size)
        self._successors = np.maximum(np.bincount(self._seen_pairs // vocab_size, minlength=vocab_size), 1)

    def probabilities(self, sequence: np.ndarray) -> np.ndarray:
        """p(symbol | previous symbol), float64 [length - 1], interpolated with the unigram.

        Witten & Bell (1991), IEEE Trans. Information Theory 37, method C: after a context seen c times with t different
        successors, the weight t / (c + t) goes to the shorter context.
        """
        pairs = self._pairs(sequence)
        places = np.minimum(np.searchsorted(self._seen_pairs, pairs), len(self._seen_pairs) - 1)
        counts = np.where(self._seen_pairs[places] == pairs, self._pair_counts[places], 0)
        seen, successors = self._context_counts[sequence[:-1]], self._successors[sequence[:-1]]
        return (counts + successors * self.unigram[sequence[1:]]) / (seen + successors)

    def bits(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """Bits of each sequence, float64 [n]."""
        return np.array([-np.log2(self.probabilities(sequence)).sum() for sequence in sequences])

    def unigram_bits(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """Bits of each sequence under the unigram model, float64 [n]."""
        return np.array([-np.log2(self.unigram[sequence[1:]]).sum() for sequence in sequences])

    def _pairs(self, sequence: np.ndarray) -> np.ndarray:
        return sequence[:-1] * self._vocab_size + sequence[1:]


def xz_size(data: bytes) -> int:
    """Compressed size by `xz -9e` in bytes, with a dictionary as large as `data`, within the limits of xz."""
    dictionary = min(max(_SMALLEST_DICTIONARY, len(data)), _LARGEST_DICTIONARY)
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": dictionary}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, check=lzma.CHECK_NONE, filters=filters))


def _token_sequences(texts: Sequence[str], tokenizer: Tokenizer) -> list[np.ndarray]:
    return [np.array(ids, np.int64) for ids in tokenizer.encode_documents(texts)]


def _byte_sequence(text: str) -> np.ndarray:
    sequence = np.full(len(text.encode()) + 2, _BOUNDARY, np.int64)
    sequence[1:-1] = np.frombuffer(text.encode(), np.uint8)
    return sequence


def _joined(texts: Sequence[str]) -> bytes:
    """Documents with a separator byte after each, so that xz too has to encode where they end."""
    return b"".join(text.encode() + b"\0" for text in texts)
