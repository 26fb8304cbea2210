"""Distillation: the student learns the teacher's next-token distribution.

Dimensions: B batch, L length, D embed of the student or the teacher.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import Field, PositiveFloat

from maxlm.config.base import Fraction
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.objective import Input, PackedRowsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, put_batch
from maxlm.core.term import LossOutput, Term
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.objectives.packed_rows import PackedRowsData, as_batch, preview_rows
from maxlm.objectives.teacher import check_teacher, declare_teacher, load_teacher, token_divergence
from maxlm.ops.divergences import kl_divergence
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext


class Distillation(Objective, PackedRowsConfig):
    """Learn the teacher's next-token distribution, on packed rows.

        alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy

    with both softmaxes at temperature T in the divergence; T^2 keeps the scale of its gradient. Validation is as in
    pretraining.
    """

    needs_start: ClassVar[bool] = False
    learns_text: ClassVar[bool] = True

    kind: Literal["distill"] = "distill"
    teacher: str = Field(description="A run folder or checkpoint of a model with the same tokenizer.")
    temperature: PositiveFloat = Field(1.0, description="Divides the logits of both; above 1 small ones count more.")
    alpha: Fraction = Field(0.5, description="Weight of the teacher's probabilities; cross-entropy has the rest.")

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (*super().inputs, Input("teacher", "teacher", self.teacher, "weights"))

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        text, output = batch["text"], model.outputs["text"]
        teacher = model.others["teacher"]
        hidden_BLD, taught_BLD = output.hidden_BLD, teacher.outputs["text"].hidden_BLD
        divergence_BL = token_divergence(
            model.decoder, hidden_BLD, teacher.decoder, taught_BLD, kl_divergence, temperature=self.temperature
        )
        log_probability_BL, _ = model.decoder.log_probabilities(
            hidden_BLD, text.targets, smoothing=model.label_smoothing
        )

        weights_BL = text.loss_weights
        weight = jnp.sum(weights_BL)
        divergence = jnp.sum(weights_BL * divergence_BL)
        cross_entropy = -jnp.sum(weights_BL * log_probability_BL)
        terms = {"distillation": Term(self.alpha * self.temperature**2 * divergence, weight)}
        if self.alpha < 1:
            terms["cross_entropy"] = Term((1 - self.alpha) * cross_entropy, weight)
        metrics = {"divergence": Term(divergence, weight), "student_cross_entropy": Term(cross_entropy, weight)}
        return LossOutput(terms, metrics).joined(output.auxiliary)

    def open_data(self, context: RunContext) -> "_DistillationData":
        return _DistillationData(context)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        return preview_rows(config, tokenizer, num_examples)

    def example(self, make: ExampleMaker) -> Batch:
        return Batch({"text": make.documents()})

    def for_verification(self) -> Self:
        return self.model_copy(update={"alpha": min(max(self.alpha, 0.1), 0.9)})

    def declare_teacher(self, config: ModelConfig, execution: ExecutionConfig) -> Decoder:
        return declare_teacher(config, execution)

    def load_teacher(self, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Decoder:
        return load_teacher(self.teacher, config, tokenizer, mesh)


class _DistillationData(PackedRowsData):
    """Packed rows, on the first of which the teacher is tested."""

    def prepare(self, frozen: dict[str, Any]) -> None:
        super().prepare(frozen)
        mine = self._context.rows
        rows = as_batch(self._mixture.batch(0, shard=mine.index, num_shards=mine.count))
        text = put_batch(rows, self._context.mesh)["text"]
        check_teacher(self._context.config.objective.teacher, frozen["teacher"], text)


OBJECTIVE = Distillation
