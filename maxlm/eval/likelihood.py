"""Perplexity and bits per byte of whole documents.

A document is scored as start token, text, end token. Each of its tokens but the first is predicted exactly once. A
document longer than the model's context is read through windows: each overlaps the one before by a quarter of the
context, and scores only what that one did not. So every token but those of the first window sees at least that quarter,
and the work is a third more than without overlap.

The windows are packed into rows of one length, kept apart by segment ids: one compilation, little padding.

Shapes: B rows, L length.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from maxlm.config.model import ModelConfig
from maxlm.core.interval import Interval, paired_difference, ratio_interval
from maxlm.errors import DataError
from maxlm.generate.decoding import bucket_length
from maxlm.generate.model import LoadedModel, segment_positions
from maxlm.models.decoder import Decoder
from maxlm.runtime.progress import track

# Of a batch: tokens, and bytes of the logits that live at a time.
_BATCH_TOKENS = 8192
_LOGIT_BYTES = 256 << 20


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts documents.

    bits_per_byte: the cost of all tokens, the end tokens included, over the bytes of the text.
    perplexity: of a token.
    bits, num_bytes, num_tokens: [n], of each document.
    """

    bits_per_byte: Interval
    perplexity: Interval
    bits: np.ndarray
    num_bytes: np.ndarray
    num_tokens: np.ndarray


@dataclass(frozen=True)
class _Window:
    """Ids start..end of a document, of which those from `first_scored` on are predicted here."""

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
    sequences = model.tokenizer.encode_batch(texts, bos=True, eos=True)
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
    """Bits per byte of the documents of each source, by name; empty where all are of one.

    Args:
      sources: [n], of each document.
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
    """Minus the log-probability of each sequence given its first token, float64 [n]."""
    windows = [window for index, ids in enumerate(sequences) for window in _windows(index, len(ids), decoder)]
    longest = max(window.end - window.start - 1 for window in windows)
    length = bucket_length(longest, decoder.config.max_length)
    rows = _pack(windows, length)
    num_rows = min(_batch_rows(length, decoder.config), len(rows))
    nats = np.zeros(len(sequences), np.float64)
    batches = [rows[start : start + num_rows] for start in range(0, len(rows), num_rows)]
    for batch in track(batches, "likelihood"):
        tokens_BL, targets_BL, segment_ids_BL = (np.zeros((num_rows, length), np.int32) for _ in range(3))
        for row, packed in enumerate(batch):
            for segment, (offset, window) in enumerate(packed, start=1):
                ids = sequences[window.document][window.start : window.end]
                place = slice(offset, offset + len(ids) - 1)
                tokens_BL[row, place], targets_BL[row, place] = ids[:-1], ids[1:]
                segment_ids_BL[row, place] = segment
        log_probabilities_BL = np.asarray(
            _log_probabilities(decoder, tokens_BL, targets_BL, segment_ids_BL, segment_positions(segment_ids_BL)),
            np.float64,
        )
        for row, packed in enumerate(batch):
            for offset, window in packed:
                first, last = offset - window.start - 1 + window.first_scored, offset - window.start - 1 + window.end
                nats[window.document] -= log_probabilities_BL[row, first:last].sum()
    return nats


def _windows(document: int, length: int, decoder: Decoder) -> Iterator[_Window]:
    """Windows that together score ids 1..length of a document once; a window feeds at most a context of tokens."""
    context = decoder.config.max_length
    start, scored = 0, 1
    while True:
        end = min(start + context + 1, length)
        yield _Window(document, start, end, scored)
        if end == length:
            return
        start, scored = start + context - context // 4, end


def _pack(windows: Sequence[_Window], length: int) -> list[list[tuple[int, _Window]]]:
    """Rows of (offset, window), filled longest first, each into the fullest row that has room."""
    rows: list[list[tuple[int, _Window]]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(length + 1)]
    for window in sorted(windows, key=lambda window: window.start - window.end):
        size = window.end - window.start - 1
        room = next((room for room in range(size, length + 1) if rows_with_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            row = rows_with_room[room].pop()
        rows[row].append((length - room, window))
        rows_with_room[room - size].append(row)
    return rows


def _batch_rows(length: int, config: ModelConfig) -> int:
    row_logits = min(length, config.loss_chunk_length) * config.vocab_size * 4
    return max(1, min(_BATCH_TOKENS // length, _LOGIT_BYTES // row_logits))


@jax.jit
def _log_probabilities(decoder: Decoder, tokens_BL, targets_BL, segment_ids_BL, positions_BL) -> jax.Array:
    output = decoder(tokens_BL, positions_BL=positions_BL, segment_ids_BL=segment_ids_BL)
    return decoder.log_probabilities(output.hidden_BLD, targets_BL)[0]
