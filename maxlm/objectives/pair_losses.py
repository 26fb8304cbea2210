"""Losses of preference pairs, as settings of `objective.loss`.

Dimensions: B pairs.
"""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from pydantic import Field, NonNegativeFloat, PositiveFloat

from maxlm.config.base import Fraction, Frozen
from maxlm.core.sharding import shard
from maxlm.ops import preference_losses as losses

LabelSmoothing = Annotated[float, Field(ge=0, lt=0.5)]


@dataclass(frozen=True)
class Answers:
    """One answer of each pair.

    log_p_B, reference_B: its log-probability under the trained and the starting model; lengths_B: its tokens.
    """

    log_p_B: jax.Array
    reference_B: jax.Array
    lengths_B: jax.Array

    @property
    def gains(self) -> jax.Array:
        return self.log_p_B - self.reference_B

    @property
    def gains_per_token(self) -> jax.Array:
        return self.gains / jnp.maximum(self.lengths_B, 1)

    @property
    def log_p_per_token(self) -> jax.Array:
        return self.log_p_B / jnp.maximum(self.lengths_B, 1)


class PairLoss(Frozen):
    """Base class: the loss of each pair; a value for padding is ignored.

    sft_weight: weight of the next-token loss on chosen answers in the method's paper.
    """

    sft_weight: ClassVar[float] = 0.0

    kind: str
    beta: PositiveFloat = 0.1

    @property
    def needs_reference(self) -> bool:
        """Whether it compares with the starting model."""
        return True

    @property
    def names_of_matches(self) -> tuple[str, ...]:
        """The values of `match`."""
        return ()

    def match(self, chosen: Answers, rejected: Answers, real_B: jax.Array) -> dict[str, jax.Array]:
        """What the loss of a pair needs of the whole batch, with the weights before a step: [B] by name."""
        del chosen, rejected, real_B
        return {}

    @abstractmethod
    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        """The loss of each pair.

        Args:
          matched: the values of `match`.
        """


class MarginLoss(PairLoss):
    """Base class of losses of the margin: the gain of the chosen answer less that of the rejected one."""

    @abstractmethod
    def of_margin(self, margin_B: jax.Array) -> jax.Array:
        """The loss of each pair."""

    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        return self.of_margin(chosen.gains - rejected.gains)


class GainsLoss(PairLoss):
    """Base class of losses of both gains."""

    @abstractmethod
    def of_gains(self, chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
        """The loss of each pair."""

    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        return self.of_gains(chosen.gains, rejected.gains)


class DpoLoss(PairLoss):
    """Direct preference optimization."""

    kind: Literal["dpo"] = "dpo"
    label_smoothing: LabelSmoothing = 0.0
    divergence: Literal["reverse_kl", "jensen_shannon", "alpha"] = Field(
        "reverse_kl", description="From the starting model (arXiv:2309.16240)."
    )
    alpha: Fraction = Field(1.0, description="Of the alpha-divergence: 1 is the forward KL divergence, 0 the reverse.")
    reference_free: bool = Field(False, description="Compare with equal probabilities of both answers.")
    per_token: bool = Field(False, description="Divide the gain of an answer by its length.")

    @property
    def needs_reference(self) -> bool:
        return not self.reference_free

    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        gains = [each.gains_per_token if self.per_token else each.gains for each in (chosen, rejected)]
        if self.divergence == "jensen_shannon":
            gains = [losses.jensen_shannon_score(gain_B) for gain_B in gains]
        elif self.divergence == "alpha":
            gains = [losses.divergence_score(gain_B, alpha=self.alpha) for gain_B in gains]
        return losses.dpo_loss(gains[0] - gains[1], beta=self.beta, label_smoothing=self.label_smoothing)


class RobustLoss(MarginLoss):
    """DPO, corrected for a known share of mislabeled pairs."""

    kind: Literal["robust"] = "robust"
    label_smoothing: LabelSmoothing = Field(0.1, description="The share of mislabeled pairs.")

    def of_margin(self, margin_B: jax.Array) -> jax.Array:
        return losses.robust_loss(margin_B, beta=self.beta, label_smoothing=self.label_smoothing)


class HingeLoss(MarginLoss):
    """Hinge loss: zero once the margin of a pair reaches 1 / beta."""

    kind: Literal["hinge"] = "hinge"

    def of_margin(self, margin_B: jax.Array) -> jax.Array:
        return losses.hinge_loss(margin_B, beta=self.beta)


class IpoLoss(PairLoss):
    """Identity preference optimization: the margin of a pair approaches 1 / (2 beta)."""

    kind: Literal["ipo"] = "ipo"
    per_token: bool = Field(False, description="Divide the gain of an answer by its length, which the paper does not.")

    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        gains = [each.gains_per_token if self.per_token else each.gains for each in (chosen, rejected)]
        return losses.ipo_loss(gains[0] - gains[1], beta=self.beta)


class ExoLoss(MarginLoss):
    """Efficient exact optimization: the reverse KL divergence from the labels."""

    kind: Literal["exo"] = "exo"
    label_smoothing: Annotated[float, Field(gt=0, lt=0.5)] = 0.001

    def of_margin(self, margin_B: jax.Array) -> jax.Array:
        return losses.exo_loss(margin_B, beta=self.beta, label_smoothing=self.label_smoothing)


class DiscoPopLoss(MarginLoss):
    """A loss that was discovered by a language model."""

    kind: Literal["discopop"] = "discopop"
    temperature: PositiveFloat = 0.05

    def of_margin(self, margin_B: jax.Array) -> jax.Array:
        return losses.discopop_loss(margin_B, beta=self.beta, temperature=self.temperature)


class NcaLoss(GainsLoss):
    """Noise contrastive alignment: the chosen answer does not become less likely."""

    kind: Literal["nca"] = "nca"

    def of_gains(self, chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
        return losses.nca_loss(chosen_B, rejected_B, beta=self.beta)


class BcoLoss(GainsLoss):
    """Binary classifier optimization: each answer is classified as good or bad."""

    kind: Literal["bco"] = "bco"

    def of_gains(self, chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
        return losses.bco_loss(chosen_B, rejected_B, beta=self.beta)


class SppoLoss(GainsLoss):
    """Self-play preference optimization: the gains approach 1 / (2 beta) and -1 / (2 beta)."""

    kind: Literal["sppo"] = "sppo"

    def of_gains(self, chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
        return losses.sppo_loss(chosen_B, rejected_B, beta=self.beta)


class ApoLoss(GainsLoss):
    """Anchored preference optimization, for chosen answers that are better or worse than the model's own."""

    kind: Literal["apo"] = "apo"
    chosen: Literal["better", "worse"] = Field(
        "better", description="`better` makes chosen answers more likely (APO-zero), `worse` less (APO-down)."
    )

    def of_gains(self, chosen_B: jax.Array, rejected_B: jax.Array) -> jax.Array:
        loss = losses.apo_zero_loss if self.chosen == "better" else losses.apo_down_loss
        return loss(chosen_B, rejected_B, beta=self.beta)


class SimpoLoss(PairLoss):
    """Simple preference optimization: mean log-probabilities of tokens, a target margin, no reference
    (arXiv:2405.14734)."""

    kind: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    gamma: NonNegativeFloat = Field(1.0, description="The target margin of beta times the mean log-probabilities.")
    label_smoothing: LabelSmoothing = 0.0

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        margin_B = chosen.log_p_per_token - rejected.log_p_per_token
        return losses.logistic_loss(self.beta * margin_B - self.gamma, label_smoothing=self.label_smoothing)


class CpoLoss(PairLoss):
    """Contrastive preference optimization: DPO without a reference, and the next-token loss on chosen answers
    (arXiv:2401.08417)."""

    sft_weight: ClassVar[float] = 1.0

    kind: Literal["cpo"] = "cpo"
    label_smoothing: LabelSmoothing = 0.0

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        margin_B = chosen.log_p_B - rejected.log_p_B
        return losses.dpo_loss(margin_B, beta=self.beta, label_smoothing=self.label_smoothing)


class OrpoLoss(PairLoss):
    """Odds ratio preference optimization: no reference, and the next-token loss on chosen answers. beta is the weight
    of the odds ratio, lambda in the paper."""

    sft_weight: ClassVar[float] = 1.0

    kind: Literal["orpo"] = "orpo"

    @property
    def needs_reference(self) -> bool:
        return False

    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        return self.beta * losses.odds_ratio_loss(chosen.log_p_per_token, rejected.log_p_per_token)


class AotLoss(PairLoss):
    """Alignment by optimal transport: the k-th smallest of one sample exceeds the k-th smallest of another, over the
    whole batch (arXiv:2406.05882).

    Which value has which rank is computed with the weights before a step, so that the loss does not depend on how a
    batch is split; this costs a forward pass.
    """

    kind: Literal["aot"] = "aot"
    paired: bool = Field(
        True,
        description="Compare log-ratios of chosen to rejected answers with those of the starting model; false: gains of"
        " chosen with those of rejected answers.",
    )
    label_smoothing: LabelSmoothing = 0.0

    @property
    def names_of_matches(self) -> tuple[str, ...]:
        return ("matched_reference_B",) if self.paired else ("matched_rejected_B", "matched_chosen_B")

    def match(self, chosen: Answers, rejected: Answers, real_B: jax.Array) -> dict[str, jax.Array]:
        if self.paired:
            reference_B = chosen.reference_B - rejected.reference_B
            return {"matched_reference_B": _of_same_rank(chosen.log_p_B - rejected.log_p_B, reference_B, real_B)}
        return {
            "matched_rejected_B": _of_same_rank(chosen.gains, rejected.gains, real_B),
            "matched_chosen_B": _of_same_rank(rejected.gains, chosen.gains, real_B),
        }

    def __call__(self, chosen: Answers, rejected: Answers, matched: Mapping[str, jax.Array]) -> jax.Array:
        def loss(margin_B: jax.Array) -> jax.Array:
            return losses.dpo_loss(margin_B, beta=self.beta, label_smoothing=self.label_smoothing)

        if self.paired:
            return loss(chosen.log_p_B - rejected.log_p_B - matched["matched_reference_B"])
        # The pair of a chosen answer, and the gradient, without the value, of the pair of the rejected one.
        of_rejected_B = loss(matched["matched_chosen_B"] - rejected.gains)
        of_rejected_B -= jax.lax.stop_gradient(of_rejected_B)
        return loss(chosen.gains - matched["matched_rejected_B"]) + of_rejected_B


def _of_same_rank(x_B: jax.Array, others_B: jax.Array, real_B: jax.Array) -> jax.Array:
    """For each value the one of the others with the same rank, among real ones; 0 for padding."""
    # Sorting needs the whole batch on each device.
    x_B, others_B, real_B = (shard(values_B, None) for values_B in (x_B, others_B, real_B))
    x_B, others_B = (jnp.where(real_B > 0, values_B, jnp.inf) for values_B in (x_B, others_B))
    # Equal values have different ranks, as in sorting.
    ranks_B = jnp.argsort(jnp.argsort(x_B))
    return shard(jnp.where(real_B > 0, jnp.sort(others_B)[ranks_B], 0.0), "batch")


AnyPairLoss = Annotated[
    DpoLoss
    | RobustLoss
    | HingeLoss
    | IpoLoss
    | ExoLoss
    | DiscoPopLoss
    | NcaLoss
    | BcoLoss
    | SppoLoss
    | ApoLoss
    | SimpoLoss
    | CpoLoss
    | OrpoLoss
    | AotLoss,
    Field(discriminator="kind"),
]
