"""Policy optimization: sample answers, reward them, and make the better ones more likely.

Dimensions: B rows (answers), L length of prompt and answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from maxlm.config.base import Count, CountOrZero, Frozen
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.objective import Input, PackedSource
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term, add
from maxlm.models.applied import AppliedModel
from maxlm.models.critic import values, with_critic
from maxlm.models.decoder import Decoder
from maxlm.objectives.sampling.answer_rewards import critic_start
from maxlm.objectives.sampling.environments import EnvironmentConfig
from maxlm.objectives.sampling.policy_advantages import AnyAdvantage, GroupAdvantage
from maxlm.objectives.sampling.policy_data import REPORTED, REWARD_PART, UNJUDGED, PolicyData
from maxlm.objectives.sampling.policy_losses import (
    AVERAGES,
    AnySurrogate,
    Average,
    ClippedSurrogate,
    ImportanceConfig,
    KlConfig,
    PolicyTokens,
    average,
    close_answers,
)
from maxlm.objectives.sampling.prompt_rounds import preview_prompts
from maxlm.objectives.sampling.rewarded_sampling import RewardedSampling, reward_inputs
from maxlm.objectives.sequences import is_real, target_log_probabilities, token_entropies
from maxlm.ops.policy_losses import value_loss
from maxlm.scoring.rewards import RewardSetting, judges_of
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext


class CriticConfig(Frozen):
    """The values of tokens for generalized advantage estimation."""

    kind: Literal["own", "shared"] = Field(
        "own", description="A model of its own that starts as a copy, or a head on the layers of the policy."
    )
    start: str | None = Field(
        None, description="A run folder or checkpoint of a reward model, whose weights an own critic begins with."
    )
    weight: PositiveFloat = Field(0.5, description="Weight of the value loss.")
    clip: PositiveFloat | None = Field(0.2, description="How far a value may move in an update; null: freely.")


class DynamicSampling(Frozen):
    """Replace groups with equal rewards by those of other prompts (DAPO)."""

    max_rounds: Annotated[int, Field(ge=2)] = Field(
        3, description="Rounds of sampling at most; then groups without a signal fill the batch."
    )


class PretrainingConfig(Frozen):
    """Text that is trained on beside the answers, so that the policy does not forget it (PPO-ptx, arXiv:2203.02155).

    A step has as many rows of text as of answers.
    """

    sources: tuple[PackedSource, ...] = Field(min_length=1)
    weight: PositiveFloat = Field(1.0, description="Weight of the next-token loss, on a mean token.")


class ConstraintConfig(Frozen):
    """A limit on the mean cost of answers (Safe RLHF, arXiv:2310.12773).

    The policy maximizes (reward - multiplier * cost) / (1 + multiplier). The multiplier grows while the mean cost of a
    round exceeds the limit.
    """

    cost: RewardSetting = Field(
        description="As objective.reward: mostly [{model: RUN}], a run of objective.kind=cost. Costs above 0 are harm."
    )
    limit: float = Field(0.0, description="The mean cost that is allowed.")
    multiplier: PositiveFloat = Field(1.0, description="Of the first round.")
    rate: PositiveFloat = Field(0.1, description="How fast the multiplier changes.")
    largest_multiplier: PositiveFloat = 10.0


class StopConfig(Frozen):
    """When to end a run before its last step; null: never."""

    largest_kl: PositiveFloat | None = Field(None, description="The divergence from the starting model exceeds this.")
    smallest_entropy: PositiveFloat | None = Field(None, description="The entropy falls below this, in nats.")
    reward_drop: PositiveFloat | None = Field(
        None, description="The mean reward is lower than the best one so far by more than this."
    )

    def reason(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Why to stop now, given the records so far."""
        last, best = records[-1], max(record["reward"] for record in records)
        if self.largest_kl is not None and last["kl"] > self.largest_kl:
            return f"kl is {last['kl']:.4g}, above objective.stop.largest_kl ({self.largest_kl:g})"
        if self.smallest_entropy is not None and last["entropy"] < self.smallest_entropy:
            return (
                f"entropy is {last['entropy']:.4g}, below objective.stop.smallest_entropy ({self.smallest_entropy:g})"
            )
        if self.reward_drop is not None and best - last["reward"] > self.reward_drop:
            return (
                f"reward fell from {best:.4g} to {last['reward']:.4g}, by more than objective.stop.reward_drop"
                f" ({self.reward_drop:g})"
            )
        return None


class PolicyOptimization(Objective, RewardedSampling):
    """Learn from sampled answers and their rewards."""

    samples: ClassVar[bool] = True

    kind: Literal["policy"] = "policy"
    advantage: AnyAdvantage = Field(GroupAdvantage(), description="How much better than expected an answer is.")
    surrogate: AnySurrogate = Field(
        ClippedSurrogate(), description="The loss of a token, given the advantage of its answer."
    )
    average: Average = Field("tokens", description=f"What the losses of tokens are divided by. {AVERAGES}")
    kl: KlConfig = KlConfig()
    entropy_weight: NonNegativeFloat = Field(0.0, description="Weight of the entropy, which keeps answers diverse.")
    critic: CriticConfig | None = Field(None, description="For advantage.kind=gae; null otherwise.")
    importance: ImportanceConfig | None = None
    largest_kl: NonNegativeFloat | None = Field(
        None, description="Bad answers that were sampled from a more distant policy are left out."
    )
    top_entropy_fraction: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None,
        description="Learn only from this share of the tokens of a step, those of the highest entropy when the answers"
        " were sampled; null: from all (arXiv:2506.01939).",
    )
    learn_truncated: bool = Field(
        True, description="false: answers that are cut off at max_new_tokens have no loss (DAPO's overlong filtering)."
    )
    dynamic_sampling: DynamicSampling | None = None
    environment: EnvironmentConfig | None = Field(
        None, description="Tools, and limits of conversations of several turns; null: one answer."
    )
    pretraining: PretrainingConfig | None = None
    constraint: ConstraintConfig | None = None
    stop: StopConfig = StopConfig()
    epochs_per_rollout: Count = Field(1, description="How often the answers of a round are trained on.")
    staleness: CountOrZero = Field(
        0,
        description="A round of sampling uses the weights of so many rounds earlier: its answers are rewarded while"
        " training goes on.",
    )

    @property
    def inputs(self) -> tuple[Input, ...]:
        found = super().inputs
        if self.critic is not None and self.critic.start is not None:
            found = (*found, Input("critic.start", "critic", self.critic.start, "weights"))
        if self.constraint is not None:
            found = (*found, *reward_inputs("constraint.cost", self.constraint.cost))
        if self.pretraining is not None:
            for index, source in enumerate(self.pretraining.sources):
                found = (*found, Input(f"pretraining.sources.{index}.path", f"data_{index}", source.path, "rows"))
        return found

    @property
    def needs_reference(self) -> bool:
        return self.kl.beta > 0

    @property
    def judges(self) -> bool:
        """Whether a judge rewards answers, and so may leave some without a reward."""
        return bool(judges_of(self.reward) or (self.constraint and judges_of(self.constraint.cost)))

    @property
    def longest_answer(self) -> int:
        """Tokens after a prompt at most."""
        return self.max_new_tokens if self.environment is None else self.environment.max_tokens

    @property
    def resume_multiple(self) -> int:
        return self.updates_per_rollout * self.epochs_per_rollout

    def problems(self, config: TrainConfig) -> list[str]:
        problems = super().problems(config)
        if self.environment is not None:
            problems += self.environment.problems()
        if self.advantage.needs_groups and self.group_size < 2:
            problems.append(
                f"objective.advantage.kind={self.advantage.kind} compares answers to the same prompt; set"
                " objective.group_size to at least 2"
            )
        if self.advantage.needs_greedy and any(
            part.measure == "wins_in_group" for part in judges_of(self.reward).values()
        ):
            problems.append(
                "objective.advantage.kind=greedy rewards single greedy answers, and measure=wins_in_group compares"
                " several; choose another advantage, or measure=rating"
            )
        if self.advantage.needs_critic != (self.critic is not None):
            problems.append("objective.critic and objective.advantage.kind=gae need one another; set both, or neither")
        if self.critic is not None and self.critic.start is not None and self.critic.kind == "shared":
            problems.append("objective.critic.start is for objective.critic.kind=own; a shared critic is a new head")
        if self.kl.beta and self.kl.within == "loss" and self.kl.estimator == "k1" and not self.kl.true_gradient:
            problems.append(
                "objective.kl.estimator=k1 has no useful gradient in a loss; choose k2 or k3, set"
                " objective.kl.true_gradient=true, or objective.kl.within=reward"
            )
        if self.stop.largest_kl is not None and not self.needs_reference:
            problems.append(
                "objective.stop.largest_kl needs the starting model, which is only kept if objective.kl.beta is above 0"
            )
        if self.staleness and self.dynamic_sampling is not None:
            problems.append(
                "objective.dynamic_sampling waits for the rewards of a round, and objective.staleness does not; set one"
                " of them to its default"
            )
        if self.kl.adaptive is not None and (self.kl.within != "reward" or not self.kl.beta):
            problems.append(
                "objective.kl.adaptive changes objective.kl.beta within rewards; set objective.kl.within=reward and a"
                " beta above 0 to begin with"
            )
        if self.constraint is not None and (self.advantage.needs_greedy or self.dynamic_sampling is not None):
            problems.append(
                "objective.constraint is for rewards of sampled answers; set neither objective.advantage.kind=greedy"
                " nor objective.dynamic_sampling"
            )
        return problems

    def stop_reason(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        return self.stop.reason(records)

    def declare(self, config: ModelConfig, execution: ExecutionConfig) -> Decoder:
        critic = None if self.critic is None else self.critic.kind
        return Decoder(config.model_copy(update={"critic": critic}), execution)

    def from_decoder(self, decoder: Decoder, key: jax.Array) -> Decoder:
        if self.critic is None:
            return decoder
        start = None if self.critic.start is None else critic_start(self.critic.start, decoder)
        return with_critic(decoder, self.critic.kind, key, start)

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        answers, given = batch["answers"], batch.values
        output, is_answer_BL = model.outputs["answers"], answers.loss_weights
        log_p_BL = target_log_probabilities(model.decoder, answers, output, temperature=self.temperature)
        old_BL = given.get("old_BL", given["sampled_BL"])
        tokens = PolicyTokens(log_p_BL, log_p_BL - old_BL, given["advantages_BL"], is_answer_BL)

        def mean(x_BL: jax.Array) -> Term:
            return Term(jnp.sum(is_answer_BL * x_BL), jnp.sum(is_answer_BL))

        loss_BL, is_clipped_BL = self.surrogate(tokens)
        if self.largest_kl is not None:
            loss_BL *= close_answers(tokens, self.largest_kl)
        if self.importance is not None:
            loss_BL *= self.importance.weights(old_BL - given["sampled_BL"], is_answer_BL)
        if "high_entropy_BL" in given:
            loss_BL *= given["high_entropy_BL"]
        terms = {"policy": average(loss_BL, is_answer_BL, self.average, longest=self.longest_answer)}
        metrics = {
            "clip_fraction": mean(is_clipped_BL),
            "ratio": mean(jnp.exp(tokens.log_ratio_BL)),
            "advantage_size": mean(jnp.abs(tokens.advantages_BL)),
            # Over answers of the policy, the mean of -log p is its entropy.
            "entropy": mean(-log_p_BL),
            "sampler_mismatch": mean(
                jnp.abs(old_BL - given["sampled_BL"] if "old_BL" in given else tokens.log_ratio_BL)
            ),
            **self._of_answers(batch),
        }
        if "high_entropy_BL" in given:
            metrics["high_entropy"] = mean(given["high_entropy_BL"])
        if "reference_BL" in given:
            kl_BL = self.kl.loss(tokens, given["reference_BL"])
            metrics["kl"] = mean(kl_BL)
            if self.kl.within == "loss":
                terms["kl_penalty"] = average(
                    self.kl.beta * kl_BL, is_answer_BL, self.average, longest=self.longest_answer
                )
        if self.entropy_weight:
            entropy_BL = token_entropies(model.decoder, output.hidden_BLD, temperature=self.temperature)
            bonus = mean(entropy_BL)
            terms["entropy_bonus"] = Term(-self.entropy_weight * bonus.sum, bonus.weight)
        result, auxiliary = LossOutput(terms, metrics), output.auxiliary
        if self.critic is not None:
            result = result.joined(_value_terms(model, batch, self.critic))
        if self.pretraining is not None:
            result = result.joined(_text_terms(model, batch, self.pretraining))
            auxiliary = add(auxiliary, model.outputs["text"].auxiliary)
        return result.joined(auxiliary)

    def _of_answers(self, batch: Batch) -> dict[str, Term]:
        """Metrics that do not depend on the model."""
        real_B = is_real(batch["answers"])
        num_rows = jnp.sum(real_B)
        values, rewarded_B, metrics = batch.values, real_B, {}
        if UNJUDGED in values:
            rewarded_B = real_B * (1 - values[UNJUDGED])
            metrics["unjudged"] = Term(jnp.sum(real_B * values[UNJUDGED]), num_rows)
        num_rewarded = jnp.sum(rewarded_B)
        return metrics | {
            "reward": Term(jnp.sum(rewarded_B * values["rewards_B"]), num_rewarded),
            "groups_with_signal": Term(jnp.sum(real_B * values["has_signal_B"]), num_rows),
            "completion_length": Term(jnp.sum(values["lengths_B"]), num_rows),
            "sync_difference": Term(jnp.sum(real_B * values["sync_difference_B"]), num_rows),
            "truncated": Term(jnp.sum(real_B * values["is_truncated_B"]), num_rows),
            **{
                name if name.startswith(REWARD_PART) else name.removesuffix("_B"): Term(
                    jnp.sum(rewarded_B * x), num_rewarded
                )
                for name, x in values.items()
                if name.startswith(REWARD_PART) or name in REPORTED
            },
        }

    def open_data(self, context: RunContext) -> PolicyData:
        return PolicyData(context)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        return preview_prompts(self, config, tokenizer, num_examples)

    def example(self, make: ExampleMaker) -> Batch:
        """Answers whose probabilities have changed since sampling, by less and by more than the clip allows."""
        answers = make.sequences(shared=5)
        log_p_BL, num_rows = make.log_probabilities(answers), len(answers.tokens)

        def moved(scale: float) -> np.ndarray:
            return ((log_p_BL + make.normal(log_p_BL.shape, scale=scale)) * answers.loss_weights).astype(np.float32)

        given = {
            "sampled_BL": moved(0.3),
            "advantages_BL": make.normal(log_p_BL.shape, mean=0.5) * answers.loss_weights,
            "rewards_B": make.normal((num_rows,)),
            "has_signal_B": (make.normal((num_rows,)) < 0.5).astype(np.float32),
            "lengths_B": answers.loss_weights.sum(axis=1),
            "is_truncated_B": (make.normal((num_rows,)) < 0.5).astype(np.float32),
            "sync_difference_B": np.abs(make.normal((num_rows,))),
        }
        if self.judges:
            given[UNJUDGED] = (make.normal((num_rows,)) < 0.0).astype(np.float32)
        if self.importance is not None:
            given["old_BL"] = given["sampled_BL"] + moved(0.3) - moved(0.3)
        if self.top_entropy_fraction is not None:
            is_high_BL = make.normal(log_p_BL.shape) < 0.5
            given["high_entropy_BL"] = (is_high_BL * answers.loss_weights).astype(np.float32)
        if self.needs_reference:
            given["reference_BL"] = moved(0.5)
        if self.critic is not None:
            given |= {name: make.normal(log_p_BL.shape) for name in ("values_BL", "returns_BL")}
        text = {} if self.pretraining is None else {"text": make.documents()}
        if self.constraint is not None:
            given |= {name: make.normal((num_rows,)) for name in ("cost_B", "harmful_B", "multiplier_B")}
        return Batch({"answers": answers} | text, given)

    def for_verification(self) -> Self:
        small = {"group_size": 2, "max_new_tokens": 8}
        at_once = {"updates_per_rollout": 1, "epochs_per_rollout": 1, "staleness": 0}
        kl = self.kl.model_copy(update={"beta": max(self.kl.beta, 0.1)})
        return self.model_copy(update={**small, **at_once, "kl": kl})


def _value_terms(model: AppliedModel, batch: Batch, config: CriticConfig) -> LossOutput:
    """The loss of the critic on the tokens of answers."""
    given, is_answer_BL, critic = batch.values, batch["answers"].loss_weights, model.others.get("critic")
    of_critic = None if critic is None else critic.outputs["answers"]
    values_BL = values(model.decoder, model.outputs["answers"], of_critic)
    error_BL = value_loss(values_BL, given["values_BL"], given["returns_BL"], clip=config.clip)
    count = jnp.sum(is_answer_BL)
    return LossOutput(
        {"value": Term(config.weight * jnp.sum(is_answer_BL * error_BL), count)},
        {
            "value_mean": Term(jnp.sum(is_answer_BL * values_BL), count),
            "return_mean": Term(jnp.sum(is_answer_BL * given["returns_BL"]), count),
        },
    )


def _text_terms(model: AppliedModel, batch: Batch, config: PretrainingConfig) -> LossOutput:
    """The next-token loss on the text of pretraining."""
    text = batch["text"]
    log_p_BL = target_log_probabilities(model.decoder, text, model.outputs["text"], smoothing=model.label_smoothing)
    loss = Term(-jnp.sum(text.loss_weights * log_p_BL), jnp.sum(text.loss_weights))
    return LossOutput({"pretraining": Term(config.weight * loss.sum, loss.weight)}, {"pretraining_cross_entropy": loss})


OBJECTIVE = PolicyOptimization
