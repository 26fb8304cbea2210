"""Data of objectives that read a file of records, chats or pairs: every epoch in a new order."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np

from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.sharding import RowShard
from maxlm.core.term import LossOutput, Term
from maxlm.data.chat import EpochOrder, padded_batches, share_of, step_batches, training_order
from maxlm.objectives.validation import Evaluator
from maxlm.train.objective import RunContext


class Examples(Protocol):
    """The examples of a file, as token ids."""

    def __len__(self) -> int: ...

    def batch(self, indices: np.ndarray) -> Batch:
        """The examples with these indices, in this order; -1 gives padding."""

    def places(self, index: int) -> list[str]:
        """FILE:LINE of each record in an example."""


class RecordData:
    """Batches from a training file, and validation on another file.

    Args:
      context: its configuration names both files.
      read: a file's path -> its examples.
      loss: (model, batch) -> terms that validation sums.
      summarize: (those sums, the full validation batches) -> values by name.
      complete: adds outputs of a model to this process's rows of a batch.
    """

    def __init__(
        self,
        context: RunContext,
        read: Callable[[str], Examples],
        *,
        loss: Callable[[Any, Batch], LossOutput],
        summarize: Callable[[dict[str, Term], list[Batch]], dict[str, float]],
        complete: Callable[[Batch], Batch] = lambda batch: batch,
    ):
        self._config, self._rows = context.config, context.rows
        self._read, self._summarize, self._complete = read, summarize, complete
        self._examples = read(self._config.objective.train_file)
        self._evaluator = Evaluator(loss, context.mesh)

    def prepare(self, frozen: dict[str, Any]) -> None:
        if self._config.objective.valid_file is not None:
            _ = self._valid_rows

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        size = self._config.batch_size
        batches = step_batches(self._order, self._examples.batch, start_step, batch_size=size, rows=self._rows)
        return map(self._complete, batches)

    def documents(self, batch: int) -> list[dict[str, Any]]:
        examples = self._order.indices(batch, batch_size=self._config.batch_size)
        return [{"id": place} for example in examples for place in self._examples.places(example)]

    def validate(self, model: Any) -> dict[str, float]:
        if self._config.objective.valid_file is None:
            return {}
        return self._summarize(self._evaluator.sums(model, self._valid_rows), self._valid_batches)

    @functools.cached_property
    def _order(self) -> EpochOrder:
        config = self._config
        path, count = config.objective.train_file, len(self._examples)
        return training_order(path, count, batch_size=config.batch_size, seed=config.seed)

    @functools.cached_property
    def _valid_batches(self) -> list[Batch]:
        """The validation batches, with the rows of all processes."""
        config = self._config
        examples = self._read(config.objective.valid_file)
        return [examples.batch(i) for i in padded_batches(len(examples), config.batch_size, config.eval_batches)]

    @functools.cached_property
    def _valid_rows(self) -> list[Batch]:
        """This process's rows of the validation batches."""
        return [self._complete(_share(batch, self._rows)) for batch in self._valid_batches]


def first_examples(examples: Examples, config: TrainConfig, count: int) -> Batch:
    """The first `count` examples that training reads."""
    return examples.batch(first_indices(len(examples), config, count))


def first_indices(num_examples: int, config: TrainConfig, count: int) -> np.ndarray:
    """Indices of the first examples that training reads, at most `count`."""
    return EpochOrder(num_examples, seed=config.seed).indices(0, batch_size=min(count, num_examples))


def _share(batch: Batch, rows: RowShard) -> Batch:
    return jax.tree.map(lambda x: share_of(x, rows.index, rows.count), batch)
