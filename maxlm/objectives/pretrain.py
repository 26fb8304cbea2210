"""Next-token prediction on packed rows."""

from collections.abc import Iterator
from typing import ClassVar, Literal, Self

from pydantic import Field, NonNegativeFloat

from maxlm.config.objective import PackedRowsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput
from maxlm.models.applied import AppliedModel
from maxlm.objectives.language_model import language_model_loss
from maxlm.objectives.packed_rows import PackedRowsData, preview_rows
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext


class Pretraining(Objective, PackedRowsConfig):
    """Next-token prediction on packed rows."""

    needs_start: ClassVar[bool] = False
    learns_text: ClassVar[bool] = True

    kind: Literal["pretrain"] = "pretrain"
    z_loss: NonNegativeFloat = Field(0.0, description="Weight of the mean squared log of the softmax normalizer.")

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        return language_model_loss(model, batch, z_loss=self.z_loss)

    def open_data(self, context: RunContext) -> PackedRowsData:
        return PackedRowsData(context)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        return preview_rows(config, tokenizer, num_examples)

    def example(self, make: ExampleMaker) -> Batch:
        return Batch({"text": make.documents()})

    def for_verification(self) -> Self:
        return self.model_copy(update={"z_loss": max(self.z_loss, 0.1)})


OBJECTIVE = Pretraining
