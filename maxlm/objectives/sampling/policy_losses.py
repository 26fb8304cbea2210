"""Losses of the tokens of sampled answers, as settings of the policy objective: surrogates, averages, divergence.

Dimensions: B rows (answers), L length of prompt and answer.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, NonNegativeFloat, PositiveFloat

from maxlm.config.base import Fraction, Frozen
from maxlm.core.term import Term
from maxlm.ops import policy_losses as losses


@dataclass(frozen=True)
class PolicyTokens:
    """Tokens of sampled answers, each field [B, L].

    log_p_BL: under the trained policy; log_ratio_BL: that, less the log-probability when they were sampled.
    is_answer_BL: 1.0 for tokens that the policy sampled, 0.0 elsewhere.
    """

    log_p_BL: jax.Array
    log_ratio_BL: jax.Array
    advantages_BL: jax.Array
    is_answer_BL: jax.Array


class Surrogate(Frozen):
    """Base class: the loss of each token, and whether it is clipped."""

    kind: str

    @abstractmethod
    def __call__(self, tokens: PolicyTokens) -> tuple[jax.Array, jax.Array]:
        """The loss [B, L], and bool [B, L]."""


class ClippedSurrogate(Surrogate):
    """No gradient for a token whose probability ratio has left the bounds in the direction of its advantage (PPO)."""

    kind: Literal["clip"] = "clip"
    low: PositiveFloat = 0.2
    high: PositiveFloat = 0.28
    ratio: Literal["token", "answer"] = Field(
        "token", description="`answer`: the geometric mean over the tokens of an answer (GSPO)."
    )
    largest_ratio: PositiveFloat | None = Field(None, description="Bounds the ratio also without a clip (two-sided).")
    largest_loss_ratio: PositiveFloat | None = Field(
        None, description="Bounds the ratio of tokens with negative advantages (dual clip)."
    )

    def __call__(self, tokens: PolicyTokens) -> tuple[jax.Array, jax.Array]:
        log_ratio_BL = tokens.log_ratio_BL
        if self.ratio == "answer":
            log_ratio_BL = losses.answer_log_ratio(log_ratio_BL, tokens.is_answer_BL)
        return losses.clipped_surrogate(
            log_ratio_BL,
            tokens.advantages_BL,
            clip_low=self.low,
            clip_high=self.high,
            largest_ratio=self.largest_ratio,
            largest_loss_ratio=self.largest_loss_ratio,
        )


class ClippedImportance(Surrogate):
    """The importance weight of a token is clipped, and every token keeps a gradient (CISPO)."""

    kind: Literal["cispo"] = "cispo"
    low: Fraction = Field(1.0, description="A weight is at least 1 - low.")
    high: PositiveFloat = Field(4.0, description="A weight is at most 1 + high.")

    def __call__(self, tokens: PolicyTokens) -> tuple[jax.Array, jax.Array]:
        return losses.clipped_importance_loss(
            tokens.log_p_BL, tokens.log_ratio_BL, tokens.advantages_BL, clip_low=self.low, clip_high=self.high
        )


class SoftGate(Surrogate):
    """A smooth gate of the ratio in place of a clip (SAPO)."""

    kind: Literal["sapo"] = "sapo"
    positive_temperature: PositiveFloat = Field(1.0, description="Of tokens with positive advantages.")
    negative_temperature: PositiveFloat = 1.05

    def __call__(self, tokens: PolicyTokens) -> tuple[jax.Array, jax.Array]:
        loss_BL = losses.soft_gate_loss(
            tokens.log_ratio_BL,
            tokens.advantages_BL,
            positive_temperature=self.positive_temperature,
            negative_temperature=self.negative_temperature,
        )
        return loss_BL, jnp.zeros_like(loss_BL, bool)


class GammaWeight(Surrogate):
    """A smooth weight of the ratio of a whole answer (VESPO)."""

    kind: Literal["vespo"] = "vespo"
    positive_shape: tuple[PositiveFloat, PositiveFloat] = Field((2.0, 3.0), description="Power and decay.")
    negative_shape: tuple[PositiveFloat, PositiveFloat] = (3.0, 2.0)

    def __call__(self, tokens: PolicyTokens) -> tuple[jax.Array, jax.Array]:
        loss_BL = losses.gamma_weighted_loss(
            tokens.log_p_BL,
            tokens.log_ratio_BL,
            tokens.advantages_BL,
            tokens.is_answer_BL,
            positive_shape=self.positive_shape,
            negative_shape=self.negative_shape,
        )
        return loss_BL, jnp.zeros_like(loss_BL, bool)


class PolicyGradient(Surrogate):
    """The plain policy gradient, without a ratio: for one update for each round of sampling (REINFORCE)."""

    kind: Literal["reinforce"] = "reinforce"

    def __call__(self, tokens: PolicyTokens) -> tuple[jax.Array, jax.Array]:
        loss_BL = losses.policy_gradient_loss(tokens.log_p_BL, tokens.advantages_BL)
        return loss_BL, jnp.zeros_like(loss_BL, bool)


AnySurrogate = Annotated[
    ClippedSurrogate | ClippedImportance | SoftGate | GammaWeight | PolicyGradient, Field(discriminator="kind")
]

# What the losses of tokens are divided by.
Average = Literal["tokens", "answers", "answer_sums", "longest"]
AVERAGES = """\
`tokens`: the number of tokens of all answers, as in DAPO; `answers`: the length of each answer, then their number, as \
in GRPO; `answer_sums`: the number of answers, as in RLOO; `longest`: that times max_new_tokens, as in Dr. GRPO."""


def average(loss_BL: jax.Array, is_answer_BL: jax.Array, how: Average, *, longest: int) -> Term:
    """The losses of tokens as a sum and its weight, which depends only on which tokens are of answers."""
    length_B1 = jnp.sum(is_answer_BL, axis=1, keepdims=True)
    if how == "tokens":
        return Term(jnp.sum(is_answer_BL * loss_BL), jnp.sum(length_B1))
    num_answers = jnp.sum(length_B1 > 0).astype(jnp.float32)
    if how == "answers":
        return Term(jnp.sum(is_answer_BL * loss_BL / jnp.maximum(length_B1, 1)), num_answers)
    return Term(jnp.sum(is_answer_BL * loss_BL), num_answers * (longest if how == "longest" else 1))


class AdaptiveKl(Frozen):
    """A weight of the divergence that keeps it near a target (arXiv:1909.08593, section 2.2)."""

    target: PositiveFloat = Field(description="The divergence of an answer, the sum over its tokens, in nats.")
    rate: PositiveFloat = Field(0.1, description="How fast beta changes: by at most a fifth of this a round.")


class KlConfig(Frozen):
    """Penalty on the divergence from the starting model."""

    beta: NonNegativeFloat = Field(0.0, description="Its weight; 0: the starting model is not needed.")
    within: Literal["loss", "reward"] = Field(
        "loss", description="`reward` subtracts it from the reward of each token, as in InstructGPT."
    )
    adaptive: AdaptiveKl | None = Field(None, description="Change beta from round to round; for within=reward.")
    estimator: Literal["k1", "k2", "k3"] = Field("k3", description="See `maxlm.ops.policy_losses.kl_estimate`.")
    true_gradient: bool = Field(
        False,
        description="In the loss, keep the value of the estimator, with the gradient of k2: that of KL(p||p_ref).",
    )
    importance_weighted: bool = Field(
        False, description="In the loss, weight by the probability ratio, which corrects for an older sampling policy."
    )

    def loss(self, tokens: PolicyTokens, reference_BL: jax.Array) -> jax.Array:
        """The estimate for each token, with a gradient."""
        kl_BL = losses.kl_estimate(tokens.log_p_BL, reference_BL, estimator=self.estimator)
        if self.true_gradient:
            kl_BL = losses.with_gradient_of(kl_BL, losses.kl_estimate(tokens.log_p_BL, reference_BL, estimator="k2"))
        return kl_BL * losses.probability_ratio(tokens.log_ratio_BL) if self.importance_weighted else kl_BL


class ImportanceConfig(Frozen):
    """Correction for a sampler that computes other probabilities than training: a truncated importance weight.

    Then the ratios of the surrogate are those to the policy of training when the answers were sampled, which costs
    another forward pass.
    """

    level: Literal["token", "answer"] = Field("token", description="`answer`: one weight for a whole answer.")
    cap: PositiveFloat = Field(2.0, description="A weight is at most this.")

    def weights(self, log_ratio_BL: jax.Array, is_answer_BL: jax.Array) -> jax.Array:
        """min(cap, p_training / p_sampler) of each token, or of its answer: [B, L].

        Args:
          log_ratio_BL: of training to sampling, with the same weights.
        """
        if self.level == "answer":
            log_ratio_BL = jnp.sum(is_answer_BL * log_ratio_BL, axis=1, keepdims=True)
        return jnp.minimum(losses.probability_ratio(log_ratio_BL), self.cap) * jnp.ones_like(is_answer_BL)


def close_answers(tokens: PolicyTokens, largest_kl: float) -> jax.Array:
    """1.0 for tokens of answers to learn from, [B, 1]: those with a positive advantage, or close to the current policy.

    The mean of log p_sampled - log p over the tokens of a bad answer must be at most `largest_kl` (DeepSeek-V3.2,
    arXiv:2512.02556, equation 9).
    """
    distance_B1 = -losses.answer_log_ratio(jax.lax.stop_gradient(tokens.log_ratio_BL), tokens.is_answer_BL)[:, :1]
    is_good_B1 = jnp.max(jnp.where(tokens.is_answer_BL > 0, tokens.advantages_BL, -jnp.inf), axis=1, keepdims=True) >= 0
    return (is_good_B1 | (distance_B1 <= largest_kl)).astype(jnp.float32)
