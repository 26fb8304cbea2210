"""A cost model of harm, trained on pairs of answers of which one is safer (Safe RLHF, arXiv:2310.12773).

Dimensions: B pairs.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from pydantic import Field

from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term, add
from maxlm.data.examples.safety import SafetyPairs
from maxlm.models.applied import AppliedModel
from maxlm.objectives.pairs import example_pairs
from maxlm.objectives.record_data import RecordData, first_examples
from maxlm.objectives.scalar_head import ScalarHead, pair_scores
from maxlm.objectives.sequences import is_real, rows_of
from maxlm.objectives.validation import means_of
from maxlm.ops.preference_losses import cost_loss
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, PreviewRow, RunContext


class CostModeling(ScalarHead, RecordsConfig):
    """A scalar head that is higher for more harmful answers, and above 0 for harmful ones."""

    label: ClassVar[str] = "cost"

    kind: Literal["cost"] = "cost"
    train_file: str = Field(
        description="Pairs as in PKU-SafeRLHF: JSON, JSONL or Parquet with `prompt`, `response_0`, `response_1`,"
        " `safer_response_id`, `is_response_0_safe`, `is_response_1_safe`."
    )

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        real_B, outputs = is_real(batch["chosen"]), model.outputs
        chosen_B, rejected_B = pair_scores(model, batch)
        chosen_safe_B, rejected_safe_B = batch.values["chosen_safe_B"], batch.values["rejected_safe_B"]
        loss_B = cost_loss(chosen_B, rejected_B, chosen_safe_B, rejected_safe_B)
        weight = jnp.sum(real_B)
        has_right_sign = jnp.stack([(chosen_B > 0) == (chosen_safe_B == 0), (rejected_B > 0) == (rejected_safe_B == 0)])
        metrics = {
            "accuracy": Term(jnp.sum(real_B * (rejected_B > chosen_B)), weight),
            "sign_accuracy": Term(jnp.sum(real_B * has_right_sign), 2 * weight),
        }
        auxiliary = add(outputs["chosen"].auxiliary, outputs["rejected"].auxiliary)
        return LossOutput({"cost": Term(jnp.sum(real_B * loss_B), weight)}, metrics).joined(auxiliary)

    def open_data(self, context: RunContext) -> RecordData:
        row_length = context.config.row_length
        read = partial(self._read, tokenizer=context.tokenizer, row_length=row_length, parts=context.row_parts)
        return RecordData(
            context, read, loss=self.compute_loss, summarize=means_of("cost", "accuracy", "sign_accuracy")
        )

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        pairs = self._read(self.train_file, tokenizer=tokenizer, row_length=config.row_length)
        batch = first_examples(pairs, config, num_examples)
        for index, rows in enumerate(zip(rows_of(batch["chosen"]), rows_of(batch["rejected"]))):
            for row, name, title in zip(rows, ("chosen", "rejected"), ("safer", "other")):
                harm = "safe" if batch.values[f"{name}_safe_B"][index] else "harmful"
                yield PreviewRow(f"pair {index + 1}, {title}", row, harm)

    def example(self, make: ExampleMaker) -> Batch:
        pairs = example_pairs(make)
        count = len(pairs["chosen"].tokens)
        # Few are safe: gradients of opposite signs would cancel, and leave those of rounding.
        safe = {f"{name}_safe_B": (make.normal((count,)) > 1).astype(np.float32) for name in ("chosen", "rejected")}
        return replace(pairs, values=safe)

    def _read(self, path: str, *, tokenizer: Tokenizer, row_length: int, parts: int = 1) -> SafetyPairs:
        return SafetyPairs.read_safety(path, tokenizer, row_length=row_length, parts=parts, form=self)


OBJECTIVE = CostModeling
