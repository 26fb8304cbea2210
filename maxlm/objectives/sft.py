"""Supervised fine-tuning: next-token prediction on the assistant's tokens of packed chats."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat

from maxlm.config.data import ChatConfig
from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term
from maxlm.data.examples.chat import PackedChats
from maxlm.models.applied import AppliedModel
from maxlm.objectives.language_model import language_model_loss
from maxlm.objectives.record_data import RecordData, first_indices
from maxlm.objectives.sequences import rows_of
from maxlm.objectives.validation import language_model_values, target_bytes
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext


class SupervisedFineTuning(Objective, RecordsConfig, ChatConfig):
    """Next-token prediction on the assistant's tokens of chats."""

    learns_text: ClassVar[bool] = True
    marks_prefixes: ClassVar[bool] = True

    kind: Literal["sft"] = "sft"
    train_file: str = Field(
        description="Chats: JSON, JSONL or Parquet with `messages`, `conversations`, or instruction and output."
    )
    z_loss: NonNegativeFloat = 0.0

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        return language_model_loss(model, batch, z_loss=self.z_loss)

    def open_data(self, context: RunContext) -> RecordData:
        def summarize(sums: dict[str, Term], batches: list[Batch]) -> dict[str, float]:
            byte_lengths = context.tokenizer.byte_lengths
            num_bytes = sum(int(target_bytes(batch["text"], byte_lengths).sum()) for batch in batches)
            return language_model_values(sums["cross_entropy"], num_bytes)

        return RecordData(
            context,
            partial(self._read, config=context.config, tokenizer=context.tokenizer),
            loss=_unweighted_loss,
            summarize=summarize,
        )

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        chats = self._read(self.train_file, config=config, tokenizer=tokenizer)
        indices = first_indices(len(chats), config, num_examples)
        for number, (index, row) in enumerate(zip(indices, rows_of(chats.batch(indices)["text"])), 1):
            yield PreviewRow(f"row {number}", row, places=tuple(chats.places(index)))

    def example(self, make: ExampleMaker) -> Batch:
        return Batch({"text": make.documents()})

    def for_verification(self) -> Self:
        return self.model_copy(update={"z_loss": max(self.z_loss, 0.1)})

    def _read(self, path: str, *, config: TrainConfig, tokenizer: Tokenizer) -> PackedChats:
        prefixes = config.model is not None and config.model.prefix_attention
        return PackedChats.read(path, tokenizer, row_length=config.row_length, form=self, prefixes=prefixes)


def _unweighted_loss(model: AppliedModel, batch: Batch) -> LossOutput:
    """The loss with weight 1 for each learned token, so that figures of runs with other weights compare."""
    text = batch["text"]
    weights = (text.loss_weights > 0).astype(text.loss_weights.dtype)
    return language_model_loss(model, replace(batch, streams={"text": replace(text, loss_weights=weights)}))


OBJECTIVE = SupervisedFineTuning
