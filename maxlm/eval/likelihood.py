"""Perplexity and bits per byte of whole documents.

A document is scored as start token, text, end token. Every token except the first is predicted exactly once. A
document longer than the model's context is split into windows: each overlaps the previous one by a quarter of the
context and scores only new tokens. So every token after the first window has at least that quarter as context,
at a third more compute than without overlap.

Shapes: L length of a window.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from maxlm.core.interval import Interval, paired_difference, ratio_interval
from maxlm.errors import DataError
from maxlm.generate.model import LoadedModel
from maxlm.generate.scorer import score_sequences, target_scores
from maxlm.models.decoder import Decoder


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts documents.

    bits_per_byte: bits of all tokens, end tokens included, over the bytes of the text.
    perplexity: per token.
    bits, num_bytes, num_tokens: [n], per document.
    """

    bits_per_byte: Interval
    perplexity: Interval
    bits: np.ndarray
    num_bytes: np.ndarray
    num_tokens: np.ndarray


@dataclass(frozen=True)
class _Window:
    """Ids start..end of a document; this window scores those from `first_scored` on."""

    document: int
    start: int
    end: int
    first_scored: int


def bits_per_byte(model: LoadedModel, texts: Sequence[str], *, seed: int = 0) -> Likelihood:
    """Score every text; the intervals are over documents.

    Raises:
      DataError: there is no text to score.
    """
    if not any(texts):
        raise DataError("there is no text to measure bits per byte on")
    sequences = model.tokenizer.encode_documents(texts)
    nats = _document_nats(model.decoder, sequences)
    bits = nats / math.log(2)
    num_bytes = np.array([len(text.encode()) for text in texts])
    num_tokens = np.array([len(sequence) - 1 for sequence in sequences])
    return Likelihood(
        bits_per_byte=ratio_interval(bits, num_bytes, seed=seed),
        perplexity=ratio_interval(nats, num_tokens, seed=seed).map(lambda mean: math.exp(min(mean, 700.0))),
        bits=bits,
        num_bytes=num_bytes,
        num_tokens=num_tokens,
    )


def bits_per_byte_by_source(likelihood: Likelihood, sources: Sequence[str], *, seed: int = 0) -> dict[str, Interval]:
    """Bits per byte of the documents of each source, by name; empty if all have the same source.

    Args:
      sources: [n], the source of each document.
    """
    names = list(dict.fromkeys(sources))
    members = {name: np.array(sources) == name for name in names if len(names) > 1}
    return {
        name: ratio_interval(likelihood.bits[mask], likelihood.num_bytes[mask], seed=seed)
        for name, mask in members.items()
        if likelihood.num_bytes[mask].any()
    }


def likelihood_difference(before: Likelihood, after: Likelihood, *, seed: int = 0) -> Interval:
    """Bits per byte of `after` minus those of `before` on the same texts; the models' tokenizers may differ."""
    return paired_difference(before.bits, after.bits, weights=before.num_bytes, seed=seed)


def _document_nats(decoder: Decoder, sequences: Sequence[Sequence[int]]) -> np.ndarray:
    """Negative log-likelihood of each sequence given its first token, float64 [n]."""
    windows = [window for index, ids in enumerate(sequences) for window in _windows(index, len(ids), decoder)]
    ids = [sequences[window.document][window.start : window.end] for window in windows]
    scores = score_sequences(
        target_scores, decoder, [each[:-1] for each in ids], [each[1:] for each in ids], title="likelihood"
    )
    nats = np.zeros(len(sequences), np.float64)
    for window, (log_p_L, _) in zip(windows, scores):
        # Position 0 predicts the second id of the window.
        nats[window.document] -= log_p_L[window.first_scored - window.start - 1 :].sum(dtype=np.float64)
    return nats


def _windows(document: int, length: int, decoder: Decoder) -> Iterator[_Window]:
    """Windows that together score ids 1..length of a document once; a window is at most one context long."""
    context = decoder.execution.max_length
    start, scored = 0, 1
    while True:
        end = min(start + context + 1, length)
        yield _Window(document, start, end, scored)
        if end == length:
            return
        start, scored = start + context - context // 4, end
