"""Preference optimization on the model's own answers: the best and the worst of a group are a pair.

Online DPO (arXiv:2402.04792) with any loss of pairs; with many updates per rollout it is iterative DPO. Where the
rewards of all answers to a prompt are equal there is no preference: the pair is padding, with weight 0.

Dimensions: N prompts, G answers per prompt, B pairs, L length.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field

from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, Stream, put_batch
from maxlm.core.term import LossOutput, Term
from maxlm.models.applied import AppliedModel
from maxlm.objectives.pair_objective import PairObjective
from maxlm.objectives.sampling.answer_rewards import AnswerRewards
from maxlm.objectives.sampling.policy_data import share_of_tree
from maxlm.objectives.sampling.prompt_rounds import PromptRounds, preview_prompts
from maxlm.objectives.sampling.rewarded_sampling import RewardedSampling
from maxlm.objectives.sampling.rollouts import policy_rows
from maxlm.objectives.sampling.sample_log import LOGGED_ANSWERS, SampleLog
from maxlm.objectives.sampling.sampler import Answers
from maxlm.objectives.sequences import local_rows, whole_rows
from maxlm.scoring.rewards import judges_of
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, PreviewRow, RunContext


class OnlinePreferenceOptimization(PairObjective, RewardedSampling):
    """Learn from the best and the worst of sampled answers."""

    samples: ClassVar[bool] = True

    kind: Literal["online_preference"] = "online_preference"
    group_size: Annotated[int, Field(ge=2)] = Field(
        2,
        description="Answers sampled per prompt; those with the highest and the lowest reward are a pair.",
    )

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        output = super().compute_loss(model, batch)
        values, num_prompts = batch.values, jnp.sum(jnp.ones_like(batch.values["rewards_B"]))
        metrics = {
            "reward": Term(jnp.sum(values["rewards_B"]), num_prompts - jnp.sum(values.get("unjudged_B", 0.0))),
            "reward_gap": Term(jnp.sum(values["gaps_B"]), num_prompts),
            "groups_with_signal": Term(jnp.sum(values["gaps_B"] > 0), num_prompts),
            "completion_length": Term(jnp.sum(values["lengths_B"]), num_prompts),
        }
        if "unjudged_B" in values:
            metrics["unjudged"] = Term(jnp.sum(values["unjudged_B"]), num_prompts)
        return output.joined(LossOutput({}, metrics))

    def open_data(self, context: RunContext) -> "OnlinePairs":
        return OnlinePairs(context)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        return preview_prompts(self, config, tokenizer, num_examples)

    def example(self, make: ExampleMaker) -> Batch:
        pairs = super().example(make)
        count = len(pairs["chosen"].tokens)
        names = ("rewards_B", "gaps_B", "lengths_B", *(["unjudged_B"] if judges_of(self.reward) else []))
        drawn = {name: np.abs(make.normal((count,))) for name in names}
        return replace(pairs, values={**pairs.values, **drawn})

    def for_verification(self) -> Self:
        small = {"group_size": 2, "max_new_tokens": 8, "updates_per_rollout": 1}
        return super().for_verification().model_copy(update=small)


class OnlinePairs:
    """Samples groups of answers to the prompts of a file, and pairs the best with the worst of each."""

    def __init__(self, context: RunContext):
        objective = context.config.objective
        self._context = context
        self._rounds = PromptRounds(context)
        self._reward = AnswerRewards(context, objective.reward)
        self._reference = context.reference() if objective.loss.needs_reference else None
        self._reference_sums = jax.jit(
            lambda model, batch: {name: whole_rows(x) for name, x in objective.reference_sums(model, batch).items()}
        )
        self._with_matches = objective.matcher(context.mesh) if objective.loss.names_of_matches else None

    def prepare(self, frozen: dict[str, Any]) -> None:
        self._reward.try_out([*self._rounds.prompts, *self._rounds.valid_prompts])

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        objective = self._context.config.objective
        number, log = start_step // objective.updates_per_rollout, SampleLog(self._context, start_step)
        while True:
            prompts_R, answers, _ = self._rounds.sample(current_model(), number)
            rewards_R = self._reward.at_once(self._rounds.asked(prompts_R), answers).total
            if log.is_due(step := number * objective.updates_per_rollout):
                log.write(self._samples(step, prompts_R, answers, rewards_R))
            for batch in self._pairs(answers, rewards_R):
                yield batch if self._with_matches is None else self._with_matches(current_model(), batch)
            number += 1

    def documents(self, batch: int) -> list[dict[str, Any]]:
        return self._rounds.documents(batch)

    def validate(self, model: Any) -> dict[str, float]:
        return self._rounds.validate(
            model, lambda prompts, answers: {"reward": self._reward.at_once(prompts, answers).total}
        )

    def _pairs(self, answers: Answers, rewards_R: np.ndarray) -> list[Batch]:
        """The batches of a round of sampling, one for each of its steps."""
        objective = self._context.config.objective
        num_steps, group_size = objective.updates_per_rollout, objective.group_size
        best_B, worst_B, gaps_B = best_and_worst(rewards_R.reshape(-1, group_size))
        streams, values = {}, {}
        for name, rows_B in (("chosen", best_B), ("rejected", worst_B)):
            stream, sampled_BL = policy_rows(answers.taken(rows_B))
            streams[name], values[f"sampled_{name}_BL"] = jax.tree.map(
                lambda x: np.where(gaps_B[:, None] > 0, x, np.zeros_like(x)), (stream, sampled_BL)
            )
        values["rewards_B"] = np.nan_to_num(rewards_R).reshape(-1, group_size).mean(axis=1)
        if judges_of(objective.reward):
            values["unjudged_B"] = np.isnan(rewards_R).reshape(-1, group_size).mean(axis=1).astype(np.float32)
        values["gaps_B"] = gaps_B
        values["lengths_B"] = answers.lengths_R.reshape(-1, group_size).mean(axis=1).astype(np.float32)
        batches = [share_of_tree(Batch(streams, values), n, num_steps) for n in range(num_steps)]
        return [self._with_reference(batch) for batch in batches]

    def _with_reference(self, batch: Batch) -> Batch:
        if self._reference is None:
            return batch
        pairs: dict[str, Stream] = dict(batch.streams)
        sums = self._reference_sums(self._reference, put_batch(Batch(pairs), self._context.mesh))
        return replace(batch, values={**batch.values, **{name: local_rows(x) for name, x in sums.items()}})

    def _samples(
        self, step: int, prompts_R: np.ndarray, answers: Answers, rewards_R: np.ndarray
    ) -> Iterator[dict[str, Any]]:
        """The best and the worst answers to the first prompts of a round, as `samples.jsonl` has them."""
        rewards_NG = rewards_R.reshape(-1, self._context.config.objective.group_size)
        best_N, worst_N, _ = best_and_worst(rewards_NG)
        mean_N = np.nansum(rewards_NG, axis=1) / np.maximum(np.isfinite(rewards_NG).sum(axis=1), 1)
        for best, worst, mean in list(zip(best_N, worst_N, mean_N))[: LOGGED_ANSWERS // 2]:
            for row in (best, worst):
                if np.isnan(rewards_R[row]):  # so are all of its group
                    continue
                prompt = self._rounds.prompts[prompts_R[row]]
                yield {
                    "step": step,
                    "id": prompt.place,
                    "prompt": self._context.tokenizer.decode(prompt.ids),
                    "answer": answers.texts[row],
                    "reward": float(rewards_R[row]),
                    "advantage": float(rewards_R[row] - mean),
                }


def best_and_worst(rewards_NG: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows N * G of the answers with the highest and lowest rewards, the first ones of equals, and by how much they
    differ: each [N]. Answers with NaN have no reward, and the gap of a group without any is 0."""
    first_N, has_reward_NG = np.arange(len(rewards_NG)) * rewards_NG.shape[1], np.isfinite(rewards_NG)
    best_N = np.where(has_reward_NG, rewards_NG, -np.inf).argmax(axis=1)
    worst_N = np.where(has_reward_NG, rewards_NG, np.inf).argmin(axis=1)
    gaps_N = np.nan_to_num(np.fmax.reduce(rewards_NG, axis=1) - np.fmin.reduce(rewards_NG, axis=1))
    return first_N + best_N, first_N + worst_N, gaps_N.astype(np.float32)


OBJECTIVE = OnlinePreferenceOptimization
