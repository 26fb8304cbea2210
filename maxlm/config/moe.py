"""A layer of experts in the place of the MLP."""

from typing import Any, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from maxlm.config.base import Count, CountOrZero, Frozen


class BalanceConfig(Frozen):
    """What keeps the experts equally busy."""

    loss_weight: NonNegativeFloat = Field(
        0.01, description="Weight of the loss that is lowest when the tokens of each document spread over all experts."
    )
    bias: bool = Field(
        False,
        description="Learn a bias for each expert that counts in the choice of experts alone (arXiv:2408.15664).",
    )


class MoeConfig(Frozen):
    """Mixture of experts: a router sends each token to a few of many small MLPs."""

    num_experts: Count = 8
    experts_per_token: Count = 2
    mlp_dim: Count = Field(description="Channels of one expert.")
    num_shared_experts: CountOrZero = Field(
        0, description="Experts that every token passes; computed as one MLP that is so many times as wide."
    )
    scoring: Literal["softmax", "sigmoid"] = Field("softmax", description="What makes scores of the router's logits.")
    normalize_weights: bool = Field(True, description="Scale the scores of a token's experts so that they add up to 1.")
    routed_scaling: PositiveFloat = Field(1.0, description="Factor on what the routed experts add.")
    balance: BalanceConfig = BalanceConfig()
    router_z_loss: NonNegativeFloat = Field(
        0.0, description="Weight of the mean squared log of the normaliser of the router's softmax."
    )
    implementation: Literal["auto", "ragged", "padded", "reference"] = Field(
        "auto", description="How tokens reach their experts: see maxlm/ops/moe.py."
    )

    def function(self) -> dict[str, Any]:
        """Less what trains the router and how experts are reached: equal for two that the same weights fit."""
        how = {"router_z_loss": True, "implementation": True}
        return self.model_dump(exclude={**how, "balance": {"loss_weight"}})

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"experts_per_token ({self.experts_per_token}) exceeds num_experts ({self.num_experts});"
                f" make it {self.num_experts} or less"
            )
        return self
