"""Prefix language modeling (arXiv:1910.10683, section 3.2.1): continue a text that is read in both directions."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from maxlm.config.base import Fraction
from maxlm.config.model import ModelConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, Stream
from maxlm.data.prefixes import with_prefixes
from maxlm.objectives.packed_rows import PackedRowsData, as_batch, open_rows
from maxlm.objectives.pretrain import Pretraining
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, PreviewRow, RunContext


class PrefixLanguageModeling(Pretraining):
    """Next-token prediction after a prefix of each document, whose tokens attend to one another in both directions."""

    marks_prefixes: ClassVar[bool] = True

    kind: Literal["prefix_lm"] = "prefix_lm"  # type: ignore[assignment]
    rate: Fraction = Field(1.0, description="Share of the documents with a prefix, of a length drawn evenly.")

    def model_problems(self, model: ModelConfig) -> list[str]:
        problems = super().model_problems(model)
        if not model.prefix_attention:
            problems.append(
                f"objective.kind={self.kind} trains prefix language models, and this one is causal; set"
                " model.prefix_attention=true, or choose objective.kind=pretrain"
            )
        return problems

    def open_data(self, context: RunContext) -> "PrefixRowsData":
        return PrefixRowsData(context)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        mixture = open_rows(config, tokenizer)
        for number in range(num_examples):
            step, row = divmod(number, config.batch_size)
            rows = {name: values[row : row + 1] for name, values in mixture.batch(step).items()}
            rows = with_prefixes(rows, (config.seed, step), first_row=row, rate=self.rate)
            yield PreviewRow(f"row {number + 1}", Stream.from_rows(rows))

    def example(self, make: ExampleMaker) -> Batch:
        # Packed or not, a document has the same prefix: it depends on the document's length only.
        rows = asdict(make.documents())
        sizes = [np.bincount(segments)[segments] for segments in rows["segment_ids"]]
        prefix_lengths = np.where(rows["segment_ids"] > 0, np.stack(sizes) * 2 // 3, 0).astype(np.int32)
        loss_weights = np.where(rows["positions"] >= prefix_lengths - 1, rows["loss_weights"], 0).astype(np.float32)
        return as_batch(rows | {"prefix_lengths": prefix_lengths, "loss_weights": loss_weights})


class PrefixRowsData(PackedRowsData):
    """Packed rows with prefixes; those of held-out documents are the same in every run."""

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        mine, config = self._context.rows, self._context.config
        first_row = mine.index * (config.batch_size // mine.count)
        for step, rows in enumerate(self.rows_of_steps(start_step), start_step):
            key, rate = (config.seed, step), config.objective.rate
            yield as_batch(with_prefixes(rows, key, first_row=first_row, rate=rate))

    def _held_out_rows(self, step: int, **shard: int) -> dict[str, np.ndarray]:
        config, rows = self._context.config, super()._held_out_rows(step, **shard)
        first_row = shard.get("shard", 0) * (config.batch_size // shard.get("num_shards", 1))
        return with_prefixes(rows, (step,), first_row=first_row)


OBJECTIVE = PrefixLanguageModeling
