"""Teachers of distillation: loading, and how far a student's next-token distribution is from a teacher's.

Dimensions: B batch, L length, D embed of the student or the teacher, C tokens in a chunk, V vocabulary.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Stream
from maxlm.errors import CheckpointError
from maxlm.interop.load import load_model
from maxlm.models.decoder import Decoder, with_execution
from maxlm.models.multi_token import without_modules
from maxlm.objectives.beside import check_beside
from maxlm.ops.loss import in_chunks
from maxlm.tokenizer.codec import Tokenizer

# (the teacher's log-probabilities, the student's), float32 [..., V] -> a divergence [...].
Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def token_divergence(
    student: Decoder,
    hidden_BLD: jax.Array,
    teacher: Decoder,
    taught_BLD: jax.Array,
    divergence: Divergence,
    *,
    temperature: float,
) -> jax.Array:
    """A divergence of softmax(teacher's logits / T) and softmax(student's logits / T) at each token: float32 [B, L].

    It is over the whole vocabulary; the full logits of neither model are ever materialized.

    Args:
      hidden_BLD, taught_BLD: final hidden states of both; their widths may differ.
    """

    def chunk(models, hidden, taught):
        student, teacher = models
        student_BCV = jax.nn.log_softmax(student.logits(hidden) / temperature)
        teacher_BCV = jax.nn.log_softmax(teacher.logits(taught) / temperature)
        return (divergence(teacher_BCV, student_BCV),)

    chunk_length = student.execution.loss_chunk_length
    (divergence_BL,) = in_chunks(chunk, (student, teacher), hidden_BLD, taught_BLD, chunk_length=chunk_length)
    return divergence_BL


def declare_teacher(config: ModelConfig, execution: ExecutionConfig) -> Decoder:
    """A teacher of twice the width of a student, for verification."""
    return Decoder(config.model_copy(update={"embed_dim": 2 * config.embed_dim}), execution)


def load_teacher(path: str, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Decoder:
    """The teacher's weights, sharded over the mesh like the student's.

    Raises:
      CheckpointError: the model does not exist, or has another tokenizer or size of the vocabulary.
      ConfigError: it does not fit the mesh or the rows.
    """
    remedy = (
        "give a teacher with the same one, or let it write answers (maxlm feedback with task.kind=answer) and train on"
        " those with objective.kind=sft"
    )
    model, execution = check_beside(path, config, tokenizer, mesh, key="objective.teacher", remedy=remedy)
    if model.vocab_size != config.model.vocab_size:
        raise CheckpointError(
            f"objective.teacher: {path} has tables of {model.vocab_size} tokens, and the student of"
            f" {config.model.vocab_size}; give the student model.vocab_size={model.vocab_size}"
        )
    teacher, _ = load_model(path, mesh)
    return with_execution(without_modules(teacher), execution)


def check_teacher(path: str, teacher: Decoder, rows: Stream) -> None:
    """Test a teacher on the first rows of the data.

    Raises:
      CheckpointError: a target has no finite log-probability.
    """
    if not bool(_is_finite(teacher, rows)):
        raise CheckpointError(
            f"objective.teacher: {path} gives non-finite logits for the first rows of the data; give another checkpoint"
        )


@jax.jit
def _is_finite(teacher: Decoder, rows: Stream) -> jax.Array:
    log_probability_BL, _ = teacher.log_probabilities(teacher.apply(rows).hidden_BLD, rows.targets)
    return jnp.all(jnp.isfinite(log_probability_BL) | (rows.loss_weights == 0))
