"""Prefixes of packed documents, for prefix language models."""

from collections.abc import Sequence

import numpy as np


def with_prefixes(
    rows: dict[str, np.ndarray], key: Sequence[int], *, first_row: int = 0, rate: float = 1.0
) -> dict[str, np.ndarray]:
    """Rows of the loader with `prefix_lengths`; only what follows a prefix keeps its loss weight.

    The prefix of a document of n tokens has 0 to n - 1 of them, drawn evenly: a function of the key and the number of
    the row. Its last token predicts what follows it.

    Args:
      key: such as a seed and a step.
      first_row: number of the first of these rows.
      rate: share of the documents that have a prefix.
    """
    prefix_lengths = np.zeros_like(rows["segment_ids"])
    for number, segments in enumerate(rows["segment_ids"]):
        sizes = np.bincount(segments)
        share, is_chosen = np.random.default_rng([*key, first_row + number]).random((2, len(segments) + 1))
        lengths = np.where(is_chosen < rate, np.floor(share * np.pad(sizes, (0, len(share) - len(sizes)))), 0)
        # Padding has none.
        lengths[0] = 0
        prefix_lengths[number] = lengths[segments]
    loss_weights = np.where(rows["positions"] >= prefix_lengths - 1, rows["loss_weights"], 0).astype(np.float32)
    return {**rows, "loss_weights": loss_weights, "prefix_lengths": prefix_lengths}
