"""Advantages of the tokens of sampled answers, as settings of the policy objective.

Dimensions: N prompts, G answers per prompt, B = N * G rows, L length of prompt and answer.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat

from maxlm.config.base import Fraction, Frozen
from maxlm.ops import advantages

# Adds arrays of all processes.
SumOverProcesses = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class RewardedAnswers:
    """A process's answers of one round of sampling.

    rewards_NG: of whole answers; NaN if one has none.
    is_answer_BL: bool, tokens that the policy sampled in answers that have a reward.
    penalties_BL: subtracted from the reward of each token.
    add_up: for moments over the answers of all processes.
    greedy_N: rewards of greedy answers, if asked for. values_BL: of a critic, if there is one.
    """

    rewards_NG: np.ndarray
    is_answer_BL: np.ndarray
    penalties_BL: np.ndarray
    add_up: SumOverProcesses
    greedy_N: np.ndarray | None = None
    values_BL: np.ndarray | None = None

    @cached_property
    def token_rewards(self) -> np.ndarray:
        """The reward of each token, float64 [B, L]: that of the answer at its last one, less the penalties."""
        is_answer_BL = self.is_answer_BL
        last_B = is_answer_BL.shape[1] - 1 - np.argmax(is_answer_BL[:, ::-1], axis=1)
        rewards_BL = -self.penalties_BL.astype(np.float64)
        rewards_BL[np.arange(len(last_B)), last_B] += self.rewards_NG.reshape(-1)
        return rewards_BL * is_answer_BL

    @cached_property
    def penalized_rewards(self) -> np.ndarray:
        """The sum of the rewards of the tokens of each answer: [N, G]."""
        return self.token_rewards.sum(axis=1).reshape(self.rewards_NG.shape)

    def of_tokens(self, advantages_NG: np.ndarray) -> np.ndarray:
        """The advantage of an answer for each of its tokens: [B, L]."""
        return np.where(self.is_answer_BL, advantages_NG.reshape(-1, 1), 0.0).astype(np.float32)

    def whitened(self, x_BL: np.ndarray) -> np.ndarray:
        """Values of tokens with mean 0 and variance 1 over all processes."""
        mean, variance = advantages.mean_and_variance(self.add_up(advantages.moments(x_BL, self.is_answer_BL)))
        return advantages.whiten(x_BL, self.is_answer_BL, mean=mean, variance=variance)


class Advantage(Frozen):
    """Base class. `needs_greedy`: of greedy answers to the same prompts; `needs_critic`: of values of tokens."""

    needs_greedy: ClassVar[bool] = False
    needs_critic: ClassVar[bool] = False
    needs_groups: ClassVar[bool] = False

    kind: str

    @abstractmethod
    def __call__(self, answers: RewardedAnswers) -> tuple[np.ndarray, np.ndarray | None]:
        """Advantages [B, L], and what the critic should have predicted [B, L], if there is one."""


class GroupAdvantage(Advantage):
    """An answer's reward relative to the mean of its group (GRPO)."""

    needs_groups: ClassVar[bool] = True

    kind: Literal["group"] = "group"
    normalize_std: bool = Field(True, description="Divide by the group's standard deviation; false: Dr. GRPO.")
    population_std: bool = Field(False, description="Its variance is divided by G instead of G - 1.")
    std_epsilon: NonNegativeFloat = Field(advantages.STD_EPSILON, description="Added to it.")
    whiten: bool = Field(
        False, description="Then scale to mean 0 and variance 1 over the batch (REINFORCE++-baseline)."
    )

    def __call__(self, answers: RewardedAnswers) -> tuple[np.ndarray, np.ndarray | None]:
        advantages_NG = advantages.group_advantages(
            answers.penalized_rewards,
            normalize_std=self.normalize_std,
            epsilon=self.std_epsilon,
            degrees_of_freedom=0 if self.population_std else 1,
        )
        advantages_BL = answers.of_tokens(advantages_NG)
        return answers.whitened(advantages_BL) if self.whiten else advantages_BL, None


class LeaveOneOutAdvantage(Advantage):
    """An answer's reward relative to the mean of the other answers in its group (RLOO)."""

    needs_groups: ClassVar[bool] = True

    kind: Literal["leave_one_out"] = "leave_one_out"

    def __call__(self, answers: RewardedAnswers) -> tuple[np.ndarray, np.ndarray | None]:
        return answers.of_tokens(advantages.leave_one_out_advantages(answers.penalized_rewards)), None


class LengthWeightedAdvantage(Advantage):
    """An answer's reward relative to the mean of its group weighted by length (OPO)."""

    needs_groups: ClassVar[bool] = True

    kind: Literal["length_weighted"] = "length_weighted"

    def __call__(self, answers: RewardedAnswers) -> tuple[np.ndarray, np.ndarray | None]:
        lengths_NG = answers.is_answer_BL.sum(axis=1).reshape(answers.rewards_NG.shape)
        return answers.of_tokens(advantages.length_weighted_advantages(answers.penalized_rewards, lengths_NG)), None


class GreedyAdvantage(Advantage):
    """An answer's reward relative to that of the greedy answer to the same prompt (ReMax, arXiv:2310.10505)."""

    needs_greedy: ClassVar[bool] = True

    kind: Literal["greedy"] = "greedy"

    def __call__(self, answers: RewardedAnswers) -> tuple[np.ndarray, np.ndarray | None]:
        returns_BL = advantages.returns_to_go(answers.token_rewards, answers.is_answer_BL, discount=1.0)
        group_size = answers.rewards_NG.shape[1]
        baseline_B1 = np.repeat(answers.greedy_N, group_size)[:, None]
        return np.where(answers.is_answer_BL, returns_BL - baseline_B1, 0.0).astype(np.float32), None


class BatchAdvantage(Advantage):
    """The rewards from a token on, scaled to mean 0 and variance 1 over the tokens of the batch (REINFORCE++,
    arXiv:2501.03262)."""

    kind: Literal["batch"] = "batch"
    discount: Fraction = 1.0

    def __call__(self, answers: RewardedAnswers) -> tuple[np.ndarray, np.ndarray | None]:
        returns_BL = advantages.returns_to_go(answers.token_rewards, answers.is_answer_BL, discount=self.discount)
        return answers.whitened(returns_BL), None


class GeneralizedAdvantage(Advantage):
    """Generalized advantage estimation with the values of a critic (PPO)."""

    needs_critic: ClassVar[bool] = True

    kind: Literal["gae"] = "gae"
    discount: Fraction = 1.0
    trace_decay: Fraction = Field(0.95, description="Lambda: 0 trusts the critic, 1 only the rewards.")
    whiten: bool = Field(True, description="Scale to mean 0 and variance 1 over the batch.")

    def __call__(self, answers: RewardedAnswers) -> tuple[np.ndarray, np.ndarray | None]:
        assert answers.values_BL is not None
        advantages_BL, returns_BL = advantages.generalized_advantages(
            answers.token_rewards,
            answers.values_BL,
            answers.is_answer_BL,
            discount=self.discount,
            trace_decay=self.trace_decay,
        )
        return answers.whitened(advantages_BL) if self.whiten else advantages_BL, returns_BL


AnyAdvantage = Annotated[
    GroupAdvantage
    | LeaveOneOutAdvantage
    | LengthWeightedAdvantage
    | GreedyAdvantage
    | BatchAdvantage
    | GeneralizedAdvantage,
    Field(discriminator="kind"),
]
