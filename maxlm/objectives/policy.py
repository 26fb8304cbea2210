"""Policy optimization: sample groups of answers, reward them, and make the better ones of each group more likely.

Dimensions: B rows (answers), L length of prompt and answer, N prompts, G answers per prompt.
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from maxlm.config.base import Count, Frozen
from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term
from maxlm.data.preference import pad
from maxlm.models.applied import AppliedModel
from maxlm.objectives.policy_data import PolicyData, read_policy_prompts
from maxlm.objectives.record_data import first_indices
from maxlm.objectives.sequences import target_log_probabilities
from maxlm.ops.advantages import group_advantages, leave_one_out_advantages
from maxlm.ops.policy_losses import clipped_importance_loss, clipped_surrogate, kl_to_reference
from maxlm.prompts.chat_template import ChatTokens
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext


class GroupAdvantage(Frozen):
    """An answer's reward relative to the mean of its group (GRPO)."""

    kind: Literal["group"] = "group"
    normalize_std: bool = Field(True, description="Divide by the group's standard deviation.")

    def __call__(self, rewards_NG: np.ndarray) -> np.ndarray:
        return group_advantages(rewards_NG, normalize_std=self.normalize_std)


class LeaveOneOutAdvantage(Frozen):
    """An answer's reward relative to the mean of the other answers in its group (RLOO)."""

    kind: Literal["leave_one_out"] = "leave_one_out"

    def __call__(self, rewards_NG: np.ndarray) -> np.ndarray:
        return leave_one_out_advantages(rewards_NG)


class ClippedSurrogate(Frozen):
    """No gradient for a token whose probability ratio has left the bounds in the direction of its advantage (PPO)."""

    kind: Literal["clip"] = "clip"
    low: PositiveFloat = 0.2
    high: PositiveFloat = 0.28

    def __call__(
        self, log_p_BL: jax.Array, log_ratio_BL: jax.Array, advantages_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return clipped_surrogate(log_ratio_BL, advantages_B, clip_low=self.low, clip_high=self.high)


class ClippedImportance(Frozen):
    """The importance weight of a token is clipped, and every token keeps a gradient (CISPO)."""

    kind: Literal["cispo"] = "cispo"
    high: PositiveFloat = Field(4.0, description="A weight is at most 1 + high.")

    def __call__(
        self, log_p_BL: jax.Array, log_ratio_BL: jax.Array, advantages_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return clipped_importance_loss(log_p_BL, log_ratio_BL, advantages_B, clip_high=self.high)


class PolicyOptimization(Objective, RecordsConfig):
    """Learn from sampled answers with verifiable rewards.

    The loss is the mean over the tokens of all answers, so that a token counts the same in a short answer as in a
    long one.
    """

    samples: ClassVar[bool] = True

    kind: Literal["policy"] = "policy"
    train_file: str = Field(
        description="Prompts: JSON, JSONL or Parquet with `prompt` (messages or text) and `answer`."
    )
    reward: str = Field(
        "exact_match",
        description="A reward function of `maxlm.scoring.rewards`, or your own as package.module:function.",
    )
    group_size: Annotated[int, Field(ge=2)] = Field(8, description="Answers sampled per prompt.")
    max_new_tokens: Count = 32
    temperature: PositiveFloat = 1.0
    advantage: Annotated[GroupAdvantage | LeaveOneOutAdvantage, Field(discriminator="kind")] = Field(
        GroupAdvantage(), description="How much better than expected an answer is."
    )
    surrogate: Annotated[ClippedSurrogate | ClippedImportance, Field(discriminator="kind")] = Field(
        ClippedSurrogate(), description="The loss of a token, given the advantage of its answer."
    )
    kl_beta: NonNegativeFloat = Field(0.0, description="Weight of the KL divergence from the starting model.")
    updates_per_rollout: Count = Field(
        1, description="Training steps per round of sampling, each on different answers."
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_beta > 0

    @property
    def resume_multiple(self) -> int:
        """Answers are sampled every `updates_per_rollout` steps, so a run can only resume at such a step."""
        return self.updates_per_rollout

    def problems(self, config: TrainConfig) -> list[str]:
        problems = []
        if self.max_new_tokens >= config.row_length:
            problems.append(
                f"objective.max_new_tokens ({self.max_new_tokens}) leaves no room for a prompt in"
                f" row_length ({config.row_length})"
            )
        multiple = self.updates_per_rollout
        for name, value in (("steps", config.steps), ("checkpoint.every", config.checkpoint.every)):
            if value % multiple:
                problems.append(f"{name} ({value}) must be a multiple of updates_per_rollout ({multiple})")
        return problems

    def compute_loss(self, model: AppliedModel, batch: Batch, teacher: AppliedModel | None = None) -> LossOutput:
        answers, values = batch["answers"], batch.values
        weights_BL = answers.loss_weights
        num_tokens, num_rows = jnp.sum(weights_BL), jnp.sum(jnp.ones_like(values["rewards_B"]))

        output = model.outputs["answers"]
        log_p_BL = target_log_probabilities(model.decoder, answers, output, temperature=self.temperature)
        log_ratio_BL = log_p_BL - values["sampled_BL"]
        loss_BL, is_clipped_BL = self.surrogate(log_p_BL, log_ratio_BL, values["advantages_B"])
        terms = {"policy": Term(jnp.sum(weights_BL * loss_BL), num_tokens)}
        metrics = {
            "reward": Term(jnp.sum(values["rewards_B"]), num_rows),
            "groups_with_signal": Term(jnp.sum(values["has_signal_B"]), num_rows),
            "completion_length": Term(num_tokens, num_rows),
            "clip_fraction": Term(jnp.sum(weights_BL * is_clipped_BL), num_tokens),
        }
        if self.kl_beta:
            kl_BL = kl_to_reference(log_p_BL, values["reference_BL"])
            terms["kl_penalty"] = Term(self.kl_beta * jnp.sum(weights_BL * kl_BL), num_tokens)
            metrics["kl"] = Term(jnp.sum(weights_BL * kl_BL), num_tokens)
        return LossOutput(terms, metrics).joined(output.auxiliary)

    def open_data(self, context: RunContext) -> PolicyData:
        return PolicyData(context, advantages=self.advantage, needs_reference=self.needs_reference)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        prompts = read_policy_prompts(self.train_file, self, tokenizer, row_length=config.row_length)
        for number, index in enumerate(first_indices(len(prompts), config, num_examples), 1):
            ids = prompts[index].ids
            note = f"answer: {prompts[index].record['answer']}   reward: {self.reward}"
            yield PreviewRow(f"prompt {number}", pad([ChatTokens(ids, [0.0] * len(ids))], len(ids)), note)

    def example(self, make: ExampleMaker) -> Batch:
        """Answers whose probabilities have changed since sampling, by less and by more than the clip allows."""
        answers = make.sequences(shared=5)
        log_p_BL, num_rows = make.log_probabilities(answers), len(answers.tokens)

        def moved(scale: float) -> np.ndarray:
            return ((log_p_BL + make.normal(log_p_BL.shape, scale=scale)) * answers.loss_weights).astype(np.float32)

        values = {
            "sampled_BL": moved(0.3),
            "reference_BL": moved(0.5),
            "advantages_B": make.normal((num_rows,), mean=0.5),
            "rewards_B": make.normal((num_rows,)),
            "has_signal_B": (make.normal((num_rows,)) < 0.5).astype(np.float32),
        }
        return Batch({"answers": answers}, values)

    def for_verification(self) -> Self:
        small = {"group_size": 2, "max_new_tokens": 8, "updates_per_rollout": 1}
        return self.model_copy(update={**small, "kl_beta": max(self.kl_beta, 0.1)})


OBJECTIVE = PolicyOptimization
