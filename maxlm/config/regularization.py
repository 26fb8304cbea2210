"""What a run adds to its loss against overfitting, and the balance of experts."""

from typing import Annotated, Self

from pydantic import Field, NonNegativeFloat

from maxlm.config.base import Frozen

Rate = Annotated[float, Field(ge=0, lt=1)]

# What is random in a step.
_NOISE = (
    "neftune_alpha",
    "embedding_dropout",
    "residual_dropout",
    "attention_dropout",
    "stochastic_depth",
    "adapter_dropout",
)


class RegularizationConfig(Frozen):
    """Noise and terms of the loss that belong to the run, not to the model. Validation and inference have none."""

    neftune_alpha: NonNegativeFloat = Field(
        0.0,
        description="NEFTune: uniform noise on embeddings, at most this / sqrt(tokens of the document * embed_dim);"
        " 5 to 15 in its paper.",
    )
    embedding_dropout: Rate = Field(0.0, description="Share of the embeddings' channels that are zeroed.")
    residual_dropout: Rate = Field(0.0, description="The same of what each mixer and MLP adds to the stream.")
    attention_dropout: Rate = Field(
        0.0, description="Share of the keys that each query of a head loses, after the softmax."
    )
    stochastic_depth: Rate = Field(
        0.0, description="Share of rows that skip the last layer; for others it grows linearly with depth."
    )
    adapter_dropout: Rate = Field(
        0.0, description="Share of the channels that the input of each low-rank update loses (adapters.kind=lora)."
    )
    label_smoothing: Rate = Field(
        0.0,
        description="Share of a target's probability that is spread evenly over the vocabulary in cross-entropies.",
    )
    router_balance: NonNegativeFloat = Field(
        0.01,
        description="Weight of the load-balancing loss of experts, lowest if each document's tokens use all of them.",
    )
    router_z_loss: NonNegativeFloat = Field(
        0.0, description="Weight of the router z-loss: mean squared log-sum-exp of the router logits."
    )

    def without_noise(self) -> Self:
        """The same, with nothing random."""
        return self.model_copy(update=dict.fromkeys(_NOISE, 0.0))

    @property
    def is_random(self) -> bool:
        """Whether a step depends on random numbers."""
        return any(getattr(self, name) for name in _NOISE)
