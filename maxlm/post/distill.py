"""Distillation: a student learns the probabilities that a teacher gives to every token (arXiv:1503.02531).

Dimensions: B rows, L length, D embed, V vocab.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxlm.checkpoint.folder import check_fingerprint, find_checkpoint, read_metadata, trained_as
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, put_batch
from maxlm.core.term import LossOutput, Term
from maxlm.errors import CheckpointError, ConfigError
from maxlm.interop.load import load_model
from maxlm.models.decoder import Decoder, with_config
from maxlm.ops.loss import in_chunks
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.layout import check_layout
from maxlm.train.objective import StudentAndTeacher
from maxlm.train.pretrain import Pretrain


class Distill(Pretrain):
    """Pretraining whose targets are a teacher's probabilities, the cross-entropy of the text beside them.

        alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy

    with both softmaxes at temperature T in the divergence; T^2 keeps the size of its gradient. Validation is that of
    pretraining.
    """

    def prepare(self, frozen: dict[str, Any]) -> None:
        super().prepare(frozen)
        config, mine = self._context.config, self._context.rows
        rows = put_batch(
            Batch.from_rows(self._mixture.batch(0, shard=mine.index, num_shards=mine.count)), self._context.mesh
        )
        if not bool(_is_finite(frozen["teacher"], rows)):
            raise CheckpointError(
                f"objective.teacher: {config.objective.teacher} gives logits that are not finite for the first rows of"
                " the data; give another checkpoint"
            )

    def loss(self, model: StudentAndTeacher, batch: Batch) -> LossOutput:
        objective = self._context.config.objective
        student, teacher = model.student, model.teacher
        where = {"positions_BL": batch.positions, "segment_ids_BL": batch.segment_ids}
        output = student(batch.tokens, **where)
        taught_BLD = teacher(batch.tokens, **where).hidden_BLD
        divergence_BL = token_divergence(
            student, output.hidden_BLD, teacher, taught_BLD, temperature=objective.temperature
        )
        log_probability_BL, _ = student.log_probabilities(output.hidden_BLD, batch.targets)

        weights_BL = batch.loss_weights
        weight = jnp.sum(weights_BL)
        divergence = jnp.sum(weights_BL * divergence_BL)
        cross_entropy = -jnp.sum(weights_BL * log_probability_BL)
        terms = {"distillation": Term(objective.alpha * objective.temperature**2 * divergence, weight)}
        if objective.alpha < 1:
            terms["cross_entropy"] = Term((1 - objective.alpha) * cross_entropy, weight)
        metrics = {"divergence": Term(divergence, weight), "student_cross_entropy": Term(cross_entropy, weight)}
        return LossOutput(terms, metrics).joined(output.auxiliary)

    def validate(self, model: StudentAndTeacher) -> dict[str, float]:
        return super().validate(model.student)


@jax.jit
def _is_finite(teacher: Decoder, rows: Batch) -> jax.Array:
    """Whether the teacher gives each token of the text a finite probability."""
    hidden_BLD = teacher(rows.tokens, positions_BL=rows.positions, segment_ids_BL=rows.segment_ids).hidden_BLD
    log_probability_BL, _ = teacher.log_probabilities(hidden_BLD, rows.targets)
    return jnp.all(jnp.isfinite(log_probability_BL) | (rows.loss_weights == 0))


def token_divergence(
    student: Decoder, hidden_BLD: jax.Array, teacher: Decoder, taught_BLD: jax.Array, *, temperature: float
) -> jax.Array:
    """KL(teacher || student) over the vocabulary for each token, in nats: float32 [B, L].

        sum_v p_v (log p_v - log q_v),   p = softmax(teacher's logits / T), q = softmax(student's logits / T)

    Neither model's logits are ever held whole.

    Args:
      hidden_BLD, taught_BLD: final hidden states of both; their widths may differ.
    """

    def chunk(models, hidden, taught):
        student, teacher = models
        log_q_BCV = jax.nn.log_softmax(student.logits(hidden) / temperature)
        log_p_BCV = jax.nn.log_softmax(teacher.logits(taught) / temperature)
        return (jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1),)

    chunk_length = student.config.loss_chunk_length
    (divergence_BL,) = in_chunks(chunk, (student, teacher), hidden_BLD, taught_BLD, chunk_length=chunk_length)
    return divergence_BL


def load_teacher(config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Any:
    """The teacher's weights, cut over the mesh like the student's.

    Raises:
      CheckpointError: there is no such model, or it has another tokenizer.
      ConfigError: it does not fit the mesh or the rows.
    """
    path = config.objective.teacher
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    check_fingerprint(metadata["fingerprint"], tokenizer.fingerprint, path)
    # The student's step computes both: how the layers are spread over stages is its own to say.
    model = trained_as(metadata, where=checkpoint)[0].model_copy(update={"pipeline": config.model.pipeline})
    if model.vocab_size != tokenizer.vocab_size:
        raise CheckpointError(
            f"objective.teacher: {path} has {model.vocab_size} tokens, and the tokenizer {tokenizer.vocab_size};"
            " give a teacher with the student's tokenizer"
        )
    if config.row_length > model.max_length:
        raise ConfigError(
            [f"row_length: {config.row_length} exceeds the max_length of {model.max_length} of the teacher {path}"]
        )
    try:
        check_layout(config.model_copy(update={"model": model}), mesh.shape)
    except ConfigError as error:
        raise ConfigError([f"{path} (the teacher): {problem}" for problem in error.problems]) from None
    teacher, _ = load_model(path, mesh)
    return with_config(teacher, model)
