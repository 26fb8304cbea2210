"""Next-token prediction on packed rows."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput
from maxlm.data.held_out import HeldOutRows, open_held_out
from maxlm.data.loader import open_mixture
from maxlm.runtime.manifest import read_manifest
from maxlm.train.loss import language_model_loss
from maxlm.train.objective import RunContext
from maxlm.train.validate import (
    Evaluator,
    HeldOutBatch,
    cross_entropy_by_source,
    target_bytes,
    values_by_source,
)


class Pretrain:
    """Cross-entropy (and z-loss) over a mixture of packed sources; validation in bits per byte.

    A validation reads the same rows each time, `eval_batches` batches of those held out, spread evenly over the sources
    and over the rows of each.
    """

    needs_reference = False
    resume_multiple = 1

    def __init__(self, context: RunContext):
        config, objective = context.config, context.config.objective
        self._context = context
        self._mixture = open_mixture(
            [(source.path, source.weight) for source in objective.sources],
            seed=config.seed,
            batch_size=config.batch_size,
            expected_fingerprint=context.tokenizer.fingerprint,
            expected_row_length=config.row_length,
        )

    def prepare(self, frozen: dict[str, Any]) -> None:
        if self._held_out is not None:
            _ = self._valid_batches

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        return language_model_loss(model, batch, z_loss=self._context.config.objective.z_loss)

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        mine = self._context.rows
        return map(Batch.from_rows, self._mixture.iterate(start_step, shard=mine.index, num_shards=mine.count))

    def documents(self, batch: int) -> list[dict[str, Any]]:
        return [asdict(document) for document in self._mixture.documents(batch)]

    def validate(self, model: Any) -> dict[str, float]:
        if self._held_out is None:
            return {}
        sums = self._evaluator.sums(model, self._valid_batches)
        return values_by_source(sums, self._held_out.sources, self._valid_bytes)

    @functools.cached_property
    def _held_out(self) -> HeldOutRows | None:
        """The held-out rows that validations read; None where no source holds any out."""
        config = self._context.config
        paths = [source.path for source in config.objective.sources]
        paths = [path for path in paths if read_manifest(path)["metrics"]["splits"]["valid"]["rows"]]
        return open_held_out(paths, batch_size=config.batch_size, num_batches=config.eval_batches) if paths else None

    @functools.cached_property
    def _evaluator(self) -> Evaluator:
        loss = functools.partial(cross_entropy_by_source, num_sources=len(self._held_out.sources))
        return Evaluator(loss, self._context.mesh)

    @functools.cached_property
    def _valid_batches(self) -> list[HeldOutBatch]:
        """This process's rows of the validation."""
        mine = self._context.rows
        return [self._valid_batch(step, shard=mine.index, num_shards=mine.count) for step in self._valid_steps]

    @functools.cached_property
    def _valid_bytes(self) -> np.ndarray:
        """Bytes of text of each source in all processes' rows."""
        num_bytes = np.zeros(len(self._held_out.sources), np.int64)
        for step in self._valid_steps:
            batch = self._valid_batch(step)
            np.add.at(num_bytes, batch.source_ids, target_bytes(batch.rows, self._context.tokenizer.byte_lengths))
        return num_bytes

    @property
    def _valid_steps(self) -> range:
        return range(self._held_out.num_steps)

    def _valid_batch(self, step: int, **shard: int) -> HeldOutBatch:
        rows = self._held_out.batch(step, **shard)
        return HeldOutBatch(Batch.from_rows(rows), rows["source_ids"])
