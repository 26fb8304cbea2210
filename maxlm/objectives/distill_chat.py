"""Distillation for chat: the student learns the teacher's distribution on the tokens of answers, also of its own.

Answers of the teacher, and those of a file in general, show the student only prefixes that others wrote; on its own
answers it learns what the teacher would do after its own mistakes (GKD, arXiv:2306.13649).

Dimensions: B rows (answers), L length of prompt and answer.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from pydantic import Field, PositiveFloat

from maxlm.config.base import Count, Fraction, Frozen
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.objective import Input, RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, put_batch
from maxlm.core.term import LossOutput, Term
from maxlm.data.examples.answers import PromptsWithAnswers
from maxlm.data.examples.chat import share_of
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.objectives.record_data import RecordData, first_examples
from maxlm.objectives.sampling.rollouts import policy_rows
from maxlm.objectives.sampling.sampler import Sampler
from maxlm.objectives.sampling.weight_sync import WeightSync
from maxlm.objectives.sequences import is_real, rows_of, target_log_probabilities
from maxlm.objectives.teacher import Divergence, check_teacher, declare_teacher, load_teacher, token_divergence
from maxlm.objectives.validation import language_model_values
from maxlm.ops import divergences
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext


class DivergenceConfig(Frozen):
    """How far the student is from the teacher at a token."""

    kind: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = Field(
        "forward_kl",
        description="KL(teacher || student), which covers all that the teacher does; KL(student || teacher), which does"
        " only what the teacher does; or in between.",
    )
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="Of jensen_shannon: close to 0 its gradient is that of forward_kl, close to 1 of reverse_kl."
    )
    temperature: PositiveFloat = Field(1.0, description="Divides the logits of both; above 1 small ones count more.")

    @property
    def function(self) -> Divergence:
        if self.kind == "jensen_shannon":
            return partial(divergences.jensen_shannon_divergence, beta=self.beta)
        return divergences.kl_divergence if self.kind == "forward_kl" else divergences.reverse_kl_divergence


class ChatDistillation(Objective, RecordsConfig):
    """Learn the teacher's next-token distribution on answers to the prompts of chats.

        sum over the tokens of answers of T^2 divergence(teacher, student), divided by their number

    Validation is the next-token loss on the answers of a file.
    """

    samples: ClassVar[bool] = True

    kind: Literal["distill_chat"] = "distill_chat"
    teacher: str = Field(description="A run folder or checkpoint of a model with the same tokenizer.")
    train_file: str = Field(
        description="Chats: JSON, JSONL or Parquet with `messages`, or `prompt` and `completion`; what is learned from"
        " are their last answers. Prompts are enough if on_policy is 1."
    )
    divergence: DivergenceConfig = DivergenceConfig()
    on_policy: Fraction = Field(
        0.5, description="The share of steps that learn from answers of the student, not of the file."
    )
    max_new_tokens: Count = 32
    temperature: PositiveFloat = Field(1.0, description="Of sampling.")

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (*super().inputs, Input("teacher", "teacher", self.teacher, "weights"))

    def problems(self, config: TrainConfig) -> list[str]:
        if self.on_policy and self.max_new_tokens >= config.row_length:
            return [
                f"objective.max_new_tokens ({self.max_new_tokens}) leaves no room for a prompt in"
                f" row_length ({config.row_length})"
            ]
        return []

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        answers, output, teacher = batch["answers"], model.outputs["answers"], model.others["teacher"]
        weights_BL, temperature = answers.loss_weights, self.divergence.temperature
        divergence_BL = token_divergence(
            model.decoder,
            output.hidden_BLD,
            teacher.decoder,
            teacher.outputs["answers"].hidden_BLD,
            self.divergence.function,
            temperature=temperature,
        )
        log_p_BL = target_log_probabilities(model.decoder, answers, output, temperature=self.temperature)
        divergence = Term(jnp.sum(weights_BL * divergence_BL), jnp.sum(weights_BL))
        # 1.0 for the rows of sampled answers.
        sampled_B, real_B = batch.values["is_sampled_B"], is_real(answers)
        sampled_BL = sampled_B[:, None] * weights_BL
        mismatch_BL = jnp.abs(log_p_BL - batch.values["sampled_BL"])
        metrics = {
            "divergence": divergence,
            "student_cross_entropy": Term(-jnp.sum(weights_BL * log_p_BL), divergence.weight),
            "on_policy": Term(jnp.sum(sampled_B * real_B), jnp.sum(real_B)),
            "answer_length": Term(divergence.weight, jnp.sum(real_B)),
            "sampler_mismatch": Term(jnp.sum(sampled_BL * mismatch_BL), jnp.sum(sampled_BL)),
        }
        terms = {"distillation": Term(temperature**2 * divergence.sum, divergence.weight)}
        return LossOutput(terms, metrics).joined(output.auxiliary)

    def open_data(self, context: RunContext) -> "ChatDistillationData":
        return ChatDistillationData(context)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        examples = self.read(self.train_file, tokenizer, row_length=config.row_length)
        for number, row in enumerate(rows_of(first_examples(examples, config, num_examples)["answers"]), 1):
            yield PreviewRow(f"answer {number}" if self.on_policy < 1 else f"prompt {number}", row)

    def read(self, path: str, tokenizer: Tokenizer, *, row_length: int, parts: int = 1) -> PromptsWithAnswers:
        """The examples of the training file, or the validation file, which always has answers."""
        return PromptsWithAnswers.read(
            path,
            tokenizer,
            row_length=row_length,
            parts=parts,
            form=self,
            room=self.max_new_tokens if self.on_policy else 0,
            prompts_alone=self.on_policy == 1 and path != self.valid_file,
        )

    def example(self, make: ExampleMaker) -> Batch:
        answers = make.sequences(shared=5)
        log_p_BL, num_rows = make.log_probabilities(answers), len(answers.tokens)
        sampled_BL = (log_p_BL + make.normal(log_p_BL.shape, scale=0.3)) * answers.loss_weights
        is_sampled_B = (make.normal((num_rows,)) < 0.5).astype(np.float32)
        return Batch({"answers": answers}, {"sampled_BL": sampled_BL.astype("float32"), "is_sampled_B": is_sampled_B})

    def for_verification(self) -> Self:
        return self.model_copy(update={"on_policy": 1.0, "max_new_tokens": 8})

    def declare_teacher(self, config: ModelConfig, execution: ExecutionConfig) -> Decoder:
        return declare_teacher(config, execution)

    def load_teacher(self, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Decoder:
        return load_teacher(self.teacher, config, tokenizer, mesh)


class ChatDistillationData(RecordData):
    """Batches of answers of the file, or of the student; which of them depends only on the seed and the step."""

    _examples: PromptsWithAnswers

    def __init__(self, context: RunContext):
        config, objective = context.config, context.config.objective
        self._context = context
        super().__init__(
            context,
            partial(objective.read, tokenizer=context.tokenizer, row_length=config.row_length, parts=context.row_parts),
            loss=_next_token_loss,
            summarize=lambda sums, _: language_model_values(sums["cross_entropy"], 0),
        )
        self._sampler = Sampler(
            context.tokenizer,
            context.mesh,
            prompt_length=self._examples.row_length - objective.max_new_tokens,
            max_new_tokens=objective.max_new_tokens,
            seed=config.seed,
        )
        self._sync = WeightSync(context.mesh)

    def prepare(self, frozen: dict[str, Any]) -> None:
        super().prepare(frozen)
        rows = put_batch(self._examples.batch(self._indices(0)), self._context.mesh)["answers"]
        check_teacher(self._context.config.objective.teacher, frozen["teacher"], rows)

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        for step in itertools.count(start_step):
            yield self._sampled(current_model(), step) if self._samples(step) else self._given(step)

    def _samples(self, step: int) -> bool:
        config = self._context.config
        return bool(np.random.default_rng([config.seed, step]).random() < config.objective.on_policy)

    def _given(self, step: int) -> Batch:
        batch = self._examples.batch(self._indices(step))
        shape = batch["answers"].tokens.shape
        values = {"sampled_BL": np.zeros(shape, np.float32), "is_sampled_B": np.zeros(shape[0], np.float32)}
        return replace(batch, values=values)

    def _sampled(self, model: Any, step: int) -> Batch:
        config, rows = self._context.config, self._context.rows
        answers = self._sampler(
            model,
            self._examples.prompts(self._indices(step)),
            share_of(np.arange(config.batch_size), rows.index, rows.count),
            stream=step,
            temperature=config.objective.temperature,
        )
        self._sync.check(model, answers, temperature=config.objective.temperature)
        stream, sampled_BL = policy_rows(answers)
        return Batch(
            {"answers": stream}, {"sampled_BL": sampled_BL, "is_sampled_B": np.ones(len(sampled_BL), np.float32)}
        )

    def _indices(self, step: int) -> np.ndarray:
        """This process's examples of a step."""
        rows = self._context.rows
        size = self._context.config.batch_size
        return self._order.indices(step, batch_size=size, shard=rows.index, num_shards=rows.count)


def _next_token_loss(model: AppliedModel, batch: Batch) -> LossOutput:
    answers = batch["answers"]
    log_p_BL = target_log_probabilities(model.decoder, answers, model.outputs["answers"])
    return LossOutput({"cross_entropy": Term(-jnp.sum(log_p_BL), jnp.sum(answers.loss_weights))}, {})


OBJECTIVE = ChatDistillation
