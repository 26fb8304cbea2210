"""Batched scoring of token sequences, shared by likelihoods, multiple choice and rewards.

Dimensions: B rows, L length.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.core.batch import Stream
from maxlm.core.packing import pack
from maxlm.generate.decoding import bucket_length
from maxlm.models.decoder import Decoder
from maxlm.ops.loss import in_chunks
from maxlm.runtime.progress import track

# Limits of a batch: tokens, and bytes of logits in memory at a time.
_BATCH_TOKENS = 8192
_LOGIT_BYTES = 256 << 20

# (model, rows) -> per-token values: arrays [batch, length].
Program = Callable[[Any, Stream], tuple[jax.Array, ...]]


@jax.jit
def target_scores(model: Decoder, rows: Stream) -> tuple[jax.Array, ...]:
    """log p(target) of each token in nats, and whether the target is the argmax: [B, L]."""

    def chunk(model, hidden_BCD, targets_BC):
        logits_BCV = model.logits(hidden_BCD)
        target_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        log_p_BC = target_BC - jax.nn.logsumexp(logits_BCV, axis=-1)
        return log_p_BC, jnp.argmax(logits_BCV, axis=-1) == targets_BC

    hidden_BLD = model.apply(rows).hidden_BLD
    return in_chunks(chunk, model, hidden_BLD, rows.targets, chunk_length=model.execution.loss_chunk_length)


def score_sequences(
    program: Program,
    model: Decoder,
    tokens: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]] | None = None,
    *,
    prefix_lengths: Sequence[int] | None = None,
    title: str | None = None,
) -> list[tuple[np.ndarray, ...]]:
    """Run `program` over sequences; return its per-token values: for each sequence, arrays [its length].

    Sequences are packed into rows, separated by segment ids, to compile few shapes and waste little on padding.

    Args:
      tokens: ids; each sequence has at least one and fits the model's context.
      targets: the target of each token; None for programs that use no targets.
      prefix_lengths: of each sequence, for prefix language models; None: there are no prefixes.
      title: of the progress bar; None shows none.
    """
    lengths = [len(ids) for ids in tokens]
    row_length = bucket_length(max(lengths), model.execution.max_length)
    rows = pack(np.array(lengths), row_length)
    num_rows = min(_rows_of_a_batch(row_length, model), _power_of_two(len(rows)))
    batches = [rows[start : start + num_rows] for start in range(0, len(rows), num_rows)]
    scores: dict[int, tuple[np.ndarray, ...]] = {}
    for members in batches if title is None else track(batches, title):
        stream = _lay_out(members, tokens, targets, prefix_lengths, shape=(num_rows, row_length))
        outputs = jax.device_get(program(model, stream))
        for row, indices in enumerate(members):
            ends = np.cumsum([lengths[index] for index in indices])
            for index, end in zip(indices, ends):
                scores[index] = tuple(output[row, end - lengths[index] : end] for output in outputs)
    return [scores[index] for index in range(len(lengths))]


def _lay_out(
    members: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]] | None,
    prefix_lengths: Sequence[int] | None,
    *,
    shape: tuple[int, int],
) -> Stream:
    """Pack sequences into rows; each is a segment with positions from 0."""
    names = ["tokens", "targets", "segment_ids", "positions"] + ["prefix_lengths"] * (prefix_lengths is not None)
    rows = {name: np.zeros(shape, np.int32) for name in names}
    for row, indices in enumerate(members):
        start = 0
        for segment, index in enumerate(indices, start=1):
            place = slice(start, start + len(tokens[index]))
            rows["tokens"][row, place] = tokens[index]
            if targets is not None:
                rows["targets"][row, place] = targets[index]
            rows["segment_ids"][row, place] = segment
            rows["positions"][row, place] = np.arange(len(tokens[index]))
            if prefix_lengths is not None:
                rows["prefix_lengths"][row, place] = prefix_lengths[index]
            start = place.stop
    return Stream(**rows, loss_weights=(rows["segment_ids"] > 0).astype(np.float32))


def _rows_of_a_batch(length: int, model: Decoder) -> int:
    row_logits = min(length, model.execution.loss_chunk_length) * model.config.vocab_size * 4
    return max(1, min(_BATCH_TOKENS // length, _LOGIT_BYTES // row_logits))


def _power_of_two(count: int) -> int:
    """The smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
