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
from maxlm.data.examples.chat import EpochOrder, padded_batches, share_of, step_batches, training_order
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
      prepare_examples: (examples, indices of those that are read) -> examples with values of the starting model.
      with_policy: (current model, this process's rows of a batch) -> the batch with values of that model, which are
        constants of the loss.
    """

    def __init__(
        self,
        context: RunContext,
        read: Callable[[str], Examples],
        *,
        loss: Callable[[Any, Batch], LossOutput],
        summarize: Callable[[dict[str, Term], list[Batch]], dict[str, float]],
        prepare_examples: Callable[[Examples, np.ndarray], Examples] = lambda examples, _: examples,
        with_policy: Callable[[Any, Batch], Batch] | None = None,
    ):
        self._config, self._rows = context.config, context.rows
        self._read, self._summarize = read, summarize
        self._prepare_examples, self._with_policy = prepare_examples, with_policy
        examples = read(self._config.objective.train_file)
        self._examples = prepare_examples(examples, read_in_training(len(examples), self._config))
        self._evaluator = Evaluator(loss, context.mesh)

    def prepare(self, frozen: dict[str, Any]) -> None:
        if self._config.objective.valid_file is not None:
            _ = self._valid_rows

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        size = self._config.batch_size
        batches = step_batches(self._order, self._examples.batch, start_step, batch_size=size, rows=self._rows)
        if self._with_policy is None:
            return batches
        return (self._with_policy(current_model(), batch) for batch in batches)

    def documents(self, batch: int) -> list[dict[str, Any]]:
        examples = self._order.indices(batch, batch_size=self._config.batch_size)
        return [{"id": place} for example in examples for place in self._examples.places(example)]

    def validate(self, model: Any) -> dict[str, float]:
        if self._config.objective.valid_file is None:
            return {}
        rows = self._valid_rows
        if self._with_policy is not None:
            rows = [self._with_policy(model, batch) for batch in rows]
        return self._summarize(self._evaluator.sums(model, rows), self._valid_batches)

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
        indices = padded_batches(len(examples), config.batch_size, config.eval_batches)
        read = np.concatenate(indices)
        examples = self._prepare_examples(examples, read[read >= 0])
        return [examples.batch(each) for each in indices]

    @functools.cached_property
    def _valid_rows(self) -> list[Batch]:
        """This process's rows of the validation batches."""
        return [_share(batch, self._rows) for batch in self._valid_batches]


def read_in_training(num_examples: int, config: TrainConfig) -> np.ndarray:
    """Indices, ascending, of the examples that the steps of a run read."""
    count = config.steps * config.batch_size
    if count >= num_examples:
        return np.arange(num_examples)
    return np.sort(EpochOrder(num_examples, seed=config.seed).indices(0, batch_size=count))


def first_examples(examples: Examples, config: TrainConfig, count: int) -> Batch:
    """The first `count` examples that training reads."""
    return examples.batch(first_indices(len(examples), config, count))


def first_indices(num_examples: int, config: TrainConfig, count: int) -> np.ndarray:
    """Indices of the first examples that training reads, at most `count`."""
    return EpochOrder(num_examples, seed=config.seed).indices(0, batch_size=min(count, num_examples))


def _share(batch: Batch, rows: RowShard) -> Batch:
    return jax.tree.map(lambda x: share_of(x, rows.index, rows.count), batch)
