"""Decontamination: documents that share a word n-gram with an evaluation set are rejected."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from maxlm.data.files import unreadable
from maxlm.data.json_values import Broken, read_values
from maxlm.data.shingles import hash_ngrams, hash_words
from maxlm.errors import DataError


def evaluation_ngrams(files: Sequence[str], ngram_words: int) -> np.ndarray:
    """`[num_ngrams]` uint64, sorted: hashes of the word n-grams in the strings of JSON, JSONL or Parquet files.

    Strings shorter than an n-gram are ignored: a few common words do not make a document a copy.

    Raises:
      DataError: if a file is missing or malformed, or has no n-gram, so that nothing would be removed silently.
    """
    ngrams = [np.empty(0, np.uint64)]
    for file in files:
        found = [hash_ngrams(hash_words(text), ngram_words) for text in _strings(Path(file).expanduser())]
        if not sum(map(len, found)):
            raise DataError(f"decontaminate.files: {file} has no string of {ngram_words} words, so nothing can overlap")
        ngrams += found
    return np.unique(np.concatenate(ngrams))


def count_overlaps(words: np.ndarray, ngrams: np.ndarray, ngram_words: int) -> int:
    """The number of a document's word n-grams that are in evaluation sets."""
    own = hash_ngrams(words, ngram_words)
    places = np.searchsorted(ngrams, own)
    return int((ngrams[np.minimum(places, len(ngrams) - 1)] == own).sum()) if len(ngrams) else 0


def _strings(file: Path) -> Iterator[str]:
    if problem := unreadable(file):
        raise DataError(f"decontaminate.files: {file}: {problem}")
    for item in read_values(file):
        if isinstance(item, Broken):
            raise DataError(f"decontaminate.files: {item.where}: {item.detail}")
        yield from _strings_in(item.value)


def _strings_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings_in(item)
