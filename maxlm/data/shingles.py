"""Hashes of a text's words and word n-grams, to find near-duplicates and overlaps."""

import functools
import re

import numpy as np
import xxhash

# A run of word characters; in scripts without spaces between words, each character is a word.
_UNSPACED = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+")

_MAX_CACHED_WORDS = 1_000_000


class _WordHashes(dict):
    """word -> 64-bit hash, computed on first use."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MAX_CACHED_WORDS:
            self.clear()
        self[word] = value = xxhash.xxh3_64_intdigest(word.encode())
        return value


_word_hashes = _WordHashes()


def hash_words(text: str) -> np.ndarray:
    """`[num_words]` uint64: a case-insensitive hash of each word."""
    words = _WORD.findall(text.lower())
    return np.fromiter(map(_word_hashes.__getitem__, words), np.uint64, len(words))


@functools.cache
def _factor(place: int) -> np.uint64:
    return np.uint64(xxhash.xxh3_64_intdigest(b"place", seed=place) | 1)


def hash_ngrams(words: np.ndarray, size: int) -> np.ndarray:
    """`[num_words - size + 1]` uint64: a hash of each n-gram of `size` words; empty for a shorter text."""
    count = len(words) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    # A sum of the words' hashes, each multiplied by an odd constant for its position, then mixed (the finalizer of
    # splitmix64) so that every bit depends on every word.
    total = np.zeros(count, np.uint64)
    for place in range(size):
        total += words[place : place + count] * _factor(place)
    total = (total ^ (total >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    total = (total ^ (total >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return total ^ (total >> np.uint64(31))
