"""Mixture-of-experts layers instead of the MLP."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from maxlm.config.base import Count, CountOrZero, Frozen


class BalanceConfig(Frozen):
    """Load balancing of the experts."""

    loss_weight: NonNegativeFloat = Field(
        0.01,
        description="Weight of the load-balancing loss, lowest if each document's tokens use all experts.",
    )
    bias: bool = Field(
        False,
        description="Learn a bias per expert that only affects which experts are chosen (arXiv:2408.15664).",
    )


class MoeConfig(Frozen):
    """Mixture of experts: a router sends each token to a few of many small MLPs."""

    num_experts: Count = 8
    experts_per_token: Count = 2
    mlp_dim: Count = Field(description="Channels of one expert.")
    num_shared_experts: CountOrZero = Field(
        0, description="Experts that every token passes through; computed as one MLP that is this many times as wide."
    )
    scoring: Literal["softmax", "sigmoid"] = Field("softmax", description="Function from router logits to scores.")
    normalize_weights: bool = Field(True, description="Scale the scores of a token's experts to sum to 1.")
    routed_scaling: PositiveFloat = Field(1.0, description="Factor on the output of the routed experts.")
    balance: BalanceConfig = BalanceConfig()
    router_z_loss: NonNegativeFloat = Field(
        0.0, description="Weight of the router z-loss: mean squared log-sum-exp of the router logits."
    )

    def function(self) -> dict[str, Any]:
        """Settings without router losses: equal for two configurations that the same weights fit."""
        return self.model_dump(exclude={"router_z_loss": True, "balance": {"loss_weight"}})

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts});"
                f" make it {self.num_experts} or less"
            )
        return self
