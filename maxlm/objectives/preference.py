"""Preference optimization: make the chosen answer of a pair more likely than the rejected one."""

from collections.abc import Iterator
from typing import Literal

import numpy as np
from pydantic import Field

from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.objectives.pair_objective import PairObjective
from maxlm.objectives.pairs import open_pairs, preview_pairs
from maxlm.objectives.record_data import Examples, RecordData
from maxlm.objectives.reference import with_reference
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import PreviewRow, RunContext


class PreferenceOptimization(PairObjective, RecordsConfig):
    """Learn from pairs of answers."""

    kind: Literal["preference"] = "preference"
    train_file: str = Field(
        description="Pairs: JSON, JSONL or Parquet with `prompt` (messages or text), `chosen` and `rejected`."
    )

    def open_data(self, context: RunContext) -> RecordData:
        def prepare(examples: Examples, indices: np.ndarray) -> Examples:
            if not self.loss.needs_reference:
                return examples
            key = f"pairs, tail_weight {self.tail_weight}"
            return with_reference(examples, context, indices, self.reference_sums, key=key)

        return open_pairs(
            context,
            self.compute_loss,
            term=self.loss.kind,
            prepare_examples=prepare,
            with_policy=self.matcher(context.mesh) if self.loss.names_of_matches else None,
        )

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        return preview_pairs(self, config, tokenizer, num_examples)


OBJECTIVE = PreferenceOptimization
