"""A cost model of harm, trained on pairs of answers of which one is safer (Safe RLHF, arXiv:2310.12773).

Dimensions: B pairs.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term, add
from maxlm.data.safety import SafetyPairs
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.models.scores import sequence_scores, with_labels
from maxlm.objectives.pairs import example_pairs
from maxlm.objectives.record_data import RecordData, first_examples
from maxlm.objectives.sequences import is_real, rows_of
from maxlm.ops.preference_losses import cost_loss
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext

LABELS = ("cost",)


class CostModeling(Objective, RecordsConfig):
    """A scalar head that is higher for more harmful answers, and above 0 for harmful ones."""

    kind: Literal["cost"] = "cost"
    train_file: str = Field(
        description="Pairs as in PKU-SafeRLHF: JSON, JSONL or Parquet with `prompt`, `response_0`, `response_1`,"
        " `safer_response_id`, `is_response_0_safe`, `is_response_1_safe`."
    )

    def declare(self, config: ModelConfig, execution: ExecutionConfig) -> Decoder:
        return Decoder(config.model_copy(update={"labels": LABELS}), execution)

    def from_decoder(self, decoder: Decoder, key: jax.Array) -> Decoder:
        return with_labels(decoder, LABELS, key)

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        real_B = is_real(batch["chosen"])
        costs, safe, outputs = {}, {}, model.outputs
        for name in ("chosen", "rejected"):
            places = {"positions_BL": batch[name].positions, "segment_ids_BL": batch[name].segment_ids}
            costs[name] = sequence_scores(model.decoder, outputs[name], **places)[:, 0]
            safe[name] = batch.values[f"{name}_safe_B"]
        loss_B = cost_loss(costs["chosen"], costs["rejected"], safe["chosen"], safe["rejected"])
        weight = jnp.sum(real_B)
        signs = jnp.stack([(costs[name] > 0) == (safe[name] == 0) for name in costs])
        metrics = {
            "accuracy": Term(jnp.sum(real_B * (costs["rejected"] > costs["chosen"])), weight),
            "sign_accuracy": Term(jnp.sum(real_B * signs), 2 * weight),
        }
        auxiliary = add(outputs["chosen"].auxiliary, outputs["rejected"].auxiliary)
        return LossOutput({"cost": Term(jnp.sum(real_B * loss_B), weight)}, metrics).joined(auxiliary)

    def open_data(self, context: RunContext) -> RecordData:
        def summarize(sums: dict[str, Term], batches: list[Batch]) -> dict[str, float]:
            del batches
            means = {name: float(np.asarray(term.mean())) for name, term in sums.items()}
            return {"loss": means["cost"], "accuracy": means["accuracy"], "sign_accuracy": means["sign_accuracy"]}

        row_length = context.config.row_length
        read = partial(self._read, tokenizer=context.tokenizer, row_length=row_length, parts=context.row_parts)
        return RecordData(context, read, loss=self.compute_loss, summarize=summarize)

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
