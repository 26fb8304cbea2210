"""Distillation: the student learns the teacher's next-token distribution.

Dimensions: B batch, L length, D embed of the student or the teacher, C tokens in a chunk, V vocabulary.
"""

from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from pydantic import Field, PositiveFloat

from maxlm.checkpoint.folder import check_fingerprint, find_checkpoint, read_metadata, trained_as
from maxlm.config.base import Fraction
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.objective import Input, PackedRowsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.core.term import LossOutput, Term
from maxlm.errors import CheckpointError, ConfigError
from maxlm.interop.load import load_model
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder, with_execution
from maxlm.models.multi_token import without_modules
from maxlm.objectives.packed_rows import PackedRowsData, as_batch, preview_rows
from maxlm.ops.loss import in_chunks
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.layout import check_layout
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
            model.decoder, hidden_BLD, teacher.decoder, taught_BLD, temperature=self.temperature
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
        return Decoder(config.model_copy(update={"embed_dim": 2 * config.embed_dim}), execution)

    def load_teacher(self, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Decoder:
        """The teacher's weights, sharded over the mesh like the student's.

        Raises:
          CheckpointError: the model does not exist, or has a different tokenizer.
          ConfigError: it does not fit the mesh or the rows.
        """
        path = self.teacher
        checkpoint = find_checkpoint(path)
        metadata = read_metadata(checkpoint)
        check_fingerprint(metadata["fingerprint"], tokenizer.fingerprint, path)
        # The student's step runs both models, so the student's pipeline settings apply to the teacher too.
        trained = trained_as(metadata, where=checkpoint)
        model, execution = trained.merged, trained.execution
        model = model.main_model
        execution = execution.model_copy(update={"pipeline": config.execution.pipeline})
        if problems := self.model_problems(model):
            raise ConfigError([f"{path} (the teacher): {problem}" for problem in problems])
        if model.vocab_size != config.model.vocab_size:
            raise CheckpointError(
                f"objective.teacher: {path} has tables of {model.vocab_size} tokens, and the student of"
                f" {config.model.vocab_size}; give the student model.vocab_size={model.vocab_size}"
            )
        if config.row_length > execution.max_length:
            longest = execution.max_length
            raise ConfigError(
                [f"row_length: {config.row_length} exceeds the max_length of {longest} of the teacher {path}"]
            )
        try:
            check_layout(config.model_copy(update={"model": model, "execution": execution}), mesh.shape)
        except ConfigError as error:
            raise ConfigError([f"{path} (the teacher): {problem}" for problem in error.problems]) from None
        teacher, _ = load_model(path, mesh)
        return with_execution(without_modules(teacher), execution)


class _DistillationData(PackedRowsData):
    """Packed rows, on the first of which the teacher is tested."""

    def prepare(self, frozen: dict[str, Any]) -> None:
        super().prepare(frozen)
        mine = self._context.rows
        rows = as_batch(self._mixture.batch(0, shard=mine.index, num_shards=mine.count))
        if not bool(_is_finite(frozen["teacher"], put_batch(rows, self._context.mesh)["text"])):
            raise CheckpointError(
                f"objective.teacher: {self._context.config.objective.teacher} gives non-finite logits for the"
                " first rows of the data; give another checkpoint"
            )


@jax.jit
def _is_finite(teacher: Decoder, text: Stream) -> jax.Array:
    """Whether the teacher gives every token of the text a finite log-probability."""
    log_probability_BL, _ = teacher.log_probabilities(teacher.apply(text).hidden_BLD, text.targets)
    return jnp.all(jnp.isfinite(log_probability_BL) | (text.loss_weights == 0))


def token_divergence(
    student: Decoder, hidden_BLD: jax.Array, teacher: Decoder, taught_BLD: jax.Array, *, temperature: float
) -> jax.Array:
    """KL(teacher || student) over the vocabulary for each token, in nats: float32 [B, L].

        sum_v p_v (log p_v - log q_v),   p = softmax(teacher's logits / T), q = softmax(student's logits / T)

    The full logits of neither model are ever materialized.

    Args:
      hidden_BLD, taught_BLD: final hidden states of both; their widths may differ.
    """

    def chunk(models, hidden, taught):
        student, teacher = models
        log_q_BCV = jax.nn.log_softmax(student.logits(hidden) / temperature)
        log_p_BCV = jax.nn.log_softmax(teacher.logits(taught) / temperature)
        return (jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1),)

    chunk_length = student.execution.loss_chunk_length
    (divergence_BL,) = in_chunks(chunk, (student, teacher), hidden_BLD, taught_BLD, chunk_length=chunk_length)
    return divergence_BL


OBJECTIVE = Distillation
