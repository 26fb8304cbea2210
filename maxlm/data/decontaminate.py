"""Overlap with evaluation sets: documents that share a run of words with one are left out."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from maxlm.data.files import unreadable
from maxlm.data.json_values import Broken, read_values
from maxlm.data.shingles import hash_ngrams, hash_words
from maxlm.errors import DataError


def evaluation_ngrams(files: Sequence[str], ngram_words: int) -> np.ndarray:
    """`[num_ngrams]` uint64, sorted: a hash of each run of words in the strings of JSON, JSONL or Parquet files.

    Strings shorter than a run are left out: a few common words do not make a document a copy.

    Raises:
      DataError: if a file is missing, broken, or holds no run of words: removing nothing would go unnoticed.
    """
    ngrams = [np.empty(0, np.uint64)]
    for file in files:
        found = [hash_ngrams(hash_words(text), ngram_words) for text in _strings(Path(file).expanduser())]
        if not sum(map(len, found)):
            raise DataError(
                f"decontaminate.files: {file} holds no string of {ngram_words} words, so nothing can overlap"
            )
        ngrams += found
    return np.unique(np.concatenate(ngrams))


def count_overlaps(words: np.ndarray, ngrams: np.ndarray, ngram_words: int) -> int:
    """How many runs of words of a document stand in evaluation sets."""
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
