"""Data of objectives on packed rows: a mixture of sources, and bits per byte on their held-out rows."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, Stream
from maxlm.data.held_out import HeldOutRows, open_held_out
from maxlm.data.loader import PackedRows, open_mixture
from maxlm.objectives.validation import Evaluator, cross_entropy_by_source, target_bytes, values_by_source
from maxlm.runtime.manifest import read_manifest
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import PreviewRow, RunContext


class PackedRowsData:
    """A mixture of packed sources.

    Every validation reads the same rows: `eval_batches` batches of held-out rows, spread evenly over the sources
    and within each.
    """

    def __init__(self, context: RunContext):
        self._context = context
        self._mixture = open_rows(context.config, context.tokenizer)

    def prepare(self, frozen: dict[str, Any]) -> None:
        if self._held_out is not None:
            _ = self._valid_batches

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        return map(as_batch, self.rows_of_steps(start_step))

    def rows_of_steps(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """This process's rows of each step from `start_step` on, as the loader's arrays."""
        mine = self._context.rows
        return self._mixture.iterate(start_step, shard=mine.index, num_shards=mine.count)

    def documents(self, batch: int) -> list[dict[str, Any]]:
        return [asdict(document) for document in self._mixture.documents(batch)]

    def validate(self, model: Any) -> dict[str, float]:
        if self._held_out is None:
            return {}
        sums = self._evaluator.sums(model, self._valid_batches)
        return values_by_source(sums, self._held_out.sources, self._valid_bytes)

    @functools.cached_property
    def _held_out(self) -> HeldOutRows | None:
        """The held-out rows that validations read; None if no source has any."""
        config = self._context.config
        paths = [source.path for source in config.objective.sources]
        paths = [path for path in paths if read_manifest(path)["metrics"]["splits"]["valid"]["rows"]]
        return open_held_out(paths, batch_size=config.batch_size, num_batches=config.eval_batches) if paths else None

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        loss = functools.partial(cross_entropy_by_source, num_sources=len(self._held_out.sources))
        return Evaluator(loss, self._context.mesh)

    @functools.cached_property
    def _valid_batches(self) -> list[Batch]:
        """This process's validation rows."""
        mine = self._context.rows
        return [self._valid_batch(step, shard=mine.index, num_shards=mine.count) for step in self._valid_steps]

    @functools.cached_property
    def _valid_bytes(self) -> np.ndarray:
        """Bytes of text of each source, over the rows of all processes."""
        num_bytes = np.zeros(len(self._held_out.sources), np.int64)
        for step in self._valid_steps:
            batch = self._valid_batch(step)
            of_targets = target_bytes(batch["text"], self._context.tokenizer.byte_lengths)
            np.add.at(num_bytes, batch.values["source_ids_BL"], of_targets)
        return num_bytes

    @property
    def _valid_steps(self) -> range:
        return range(self._held_out.num_steps)

    def _valid_batch(self, step: int, **shard: int) -> Batch:
        rows = self._held_out_rows(step, **shard)
        return replace(as_batch(rows), values={"source_ids_BL": rows["source_ids"]})

    def _held_out_rows(self, step: int, **shard: int) -> dict[str, np.ndarray]:
        return self._held_out.batch(step, **shard)


def preview_rows(config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
    """The first rows of the mixture."""
    mixture = open_rows(config, tokenizer)
    for number in range(num_examples):
        step, row = divmod(number, config.batch_size)
        rows = {name: values[row : row + 1] for name, values in mixture.batch(step).items()}
        yield PreviewRow(f"row {number + 1}", Stream.from_rows(rows))


def open_rows(config: TrainConfig, tokenizer: Tokenizer) -> PackedRows:
    """The mixture of a run."""
    return open_mixture(
        [(source.path, source.weight) for source in config.objective.sources],
        seed=config.seed,
        batch_size=config.batch_size,
        expected_fingerprint=tokenizer.fingerprint,
        expected_row_length=config.row_length,
    )


def as_batch(rows: dict[str, np.ndarray]) -> Batch:
    """A batch with the stream `text`, from the arrays of the loader."""
    return Batch({"text": Stream.from_rows(rows)})
