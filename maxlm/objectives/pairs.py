"""Data of objectives that learn from preference pairs."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput
from maxlm.data.examples.preference import PreferencePairs
from maxlm.models.applied import AppliedModel
from maxlm.objectives.record_data import Examples, RecordData, first_examples
from maxlm.objectives.sequences import rows_of
from maxlm.objectives.validation import means_of
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, PreviewRow, RunContext


def open_pairs(
    context: RunContext,
    loss: Callable[[AppliedModel, Batch], LossOutput],
    *,
    term: str,
    prepare_examples: Callable[[Examples, np.ndarray], Examples] = lambda examples, _: examples,
    with_policy: Callable[[Any, Batch], Batch] | None = None,
    with_margins: bool = False,
) -> RecordData:
    """Batches with the streams `chosen` and `rejected`; validation reports the mean of a loss term, and accuracy and
    margin of the chosen answer. The functions are those of `RecordData`; `with_margins`: and the value `margin_B`, from
    the records."""
    config = context.config

    def read(path: str) -> PreferencePairs:
        return PreferencePairs.read(
            path,
            context.tokenizer,
            row_length=config.row_length,
            parts=context.row_parts,
            form=config.objective,
            with_margins=with_margins,
        )

    return RecordData(
        context,
        read,
        loss=loss,
        summarize=means_of(term, "accuracy", "reward_margin"),
        prepare_examples=prepare_examples,
        with_policy=with_policy,
    )


def preview_pairs(
    objective: RecordsConfig,
    config: TrainConfig,
    tokenizer: Tokenizer,
    num_examples: int,
    *,
    with_margins: bool = False,
) -> Iterator[PreviewRow]:
    """The first pairs, the chosen answer first."""
    pairs = PreferencePairs.read(
        objective.train_file, tokenizer, row_length=config.row_length, form=objective, with_margins=with_margins
    )
    batch = first_examples(pairs, config, num_examples)
    for index, (chosen, rejected) in enumerate(zip(rows_of(batch["chosen"]), rows_of(batch["rejected"]))):
        margin = f"margin: {batch.values['margin_B'][index]:g}" if with_margins else ""
        yield PreviewRow(f"pair {index + 1}, chosen", chosen, margin)
        yield PreviewRow(f"pair {index + 1}, rejected", rejected)


def example_pairs(make: ExampleMaker) -> Batch:
    """Synthetic pairs, one of them padding."""
    streams = {name: make.sequences(shared=5) for name in ("chosen", "rejected")}
    keep = np.arange(len(streams["chosen"].tokens)) != 2

    def padded(x: np.ndarray) -> np.ndarray:
        return np.where(keep[:, None], x, np.zeros_like(x))

    return jax.tree.map(padded, Batch(streams))
