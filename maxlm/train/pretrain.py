"""Next-token prediction on packed rows."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from maxlm.core.batch import Batch
from maxlm.core.manifest import read_manifest
from maxlm.core.term import LossOutput
from maxlm.data.loader import open_in_order, open_mixture
from maxlm.train.loss import language_model_loss
from maxlm.train.objective import RunContext
from maxlm.train.validate import Evaluator, language_model_values, target_bytes


class Pretrain:
    """Cross-entropy (and z-loss) over a mixture of packed sources; validation in bits per byte."""

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
        self._evaluator = Evaluator(language_model_loss, context.mesh)

    def loss(self, model: Any, batch: Batch) -> LossOutput:
        return language_model_loss(model, batch, z_loss=self._context.config.objective.z_loss)

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        mine = self._context.rows
        return map(Batch.from_rows, self._mixture.iterate(start_step, shard=mine.index, num_shards=mine.count))

    def documents(self, batch: int) -> list[dict[str, Any]]:
        return [asdict(document) for document in self._mixture.documents(batch)]

    def validate(self, model: Any) -> dict[str, float]:
        batches, num_bytes = self._valid_batches
        return language_model_values(self._evaluator.sums(model, batches), num_bytes) if batches else {}

    @functools.cached_property
    def _valid_batches(self) -> tuple[list[Batch], int]:
        """This process's rows of the first `eval_batches` batches that are held out, and the bytes of text in all rows.

        No batches where no source holds any out.
        """
        config = self._context.config
        paths = [source.path for source in config.objective.sources]
        paths = [path for path in paths if read_manifest(path)["metrics"]["splits"]["valid"]["rows"]]
        if not paths:
            return [], 0
        rows = open_in_order(paths, batch_size=config.batch_size)
        steps = range(min(rows.num_steps, config.eval_batches))
        mine = self._context.rows
        batches = [Batch.from_rows(rows.batch(step, shard=mine.index, num_shards=mine.count)) for step in steps]
        whole = batches if mine.count == 1 else [Batch.from_rows(rows.batch(step)) for step in steps]
        return batches, sum(target_bytes(batch, self._context.tokenizer.byte_lengths) for batch in whole)
