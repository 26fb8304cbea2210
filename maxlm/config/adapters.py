"""Parameter-efficient fine-tuning: the few parameters that are trained next to a frozen model. A union by `kind`."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat

from maxlm.config.base import Count, Frozen

_TARGETS = (
    "a name such as `query`, a path such as `layers/1?/mixer/*` with the number of the layer, where * and ? match"
    " anything, or a role such as `role:norm`"
)
Targets = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]


class QuantizedBaseConfig(Frozen):
    """How the matrices of the frozen layers are stored (QLoRA, arXiv:2305.14314)."""

    kind: Literal["nf4", "int4", "int8"] = Field(
        description="nf4: quantiles of the normal distribution; int4 and int8: equal steps."
    )
    block_size: Annotated[int, Field(ge=2, le=4096, multiple_of=2)] = Field(
        64, description="Inputs of an output that share a scale."
    )
    double_quantization: bool = Field(True, description="Store the scales in 8 bits, not in 32.")

    def reduced(self) -> Self:
        """The same with blocks that fit small matrices."""
        return self.model_copy(update={"block_size": 2})


class _AdaptersConfig(Frozen):
    """What all kinds have."""

    base: QuantizedBaseConfig | None = Field(
        None, description="Quantize the matrices of the frozen layers; null: they stay as they are."
    )

    def reduced(self) -> Self:
        """The same with small sizes."""
        return self.model_copy(update={"base": self.base and self.base.reduced()})


class LoraConfig(_AdaptersConfig):
    """A low-rank update of each matrix (LoRA, arXiv:2106.09685)."""

    kind: Literal["lora"] = "lora"
    rank: Count = 8
    alpha: PositiveFloat = 16.0
    scaling: Literal["standard", "rank_stabilized"] = Field(
        "standard",
        description="The update is multiplied by alpha / rank, or by alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732).",
    )
    decomposed: bool = Field(
        False,
        description="Train the length of each output's weights apart from their direction (DoRA, arXiv:2402.09353).",
    )
    up_learning_rate_ratio: PositiveFloat = Field(
        1.0, description="Learning rate of the second factor over that of the first (LoRA+, arXiv:2402.12354)."
    )
    targets: Targets = Field(("role:matrix",), description=f"Matrices that get an update: each entry is {_TARGETS}.")

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / (self.rank if self.scaling == "standard" else math.sqrt(self.rank))

    def reduced(self) -> Self:
        """The same with a small rank, and an update of the same size."""
        alpha = 2 * self.alpha / self.rank if self.scaling == "standard" else self.alpha
        return super().reduced().model_copy(update={"rank": 2, "alpha": alpha})


class Ia3Config(_AdaptersConfig):
    """A factor for each channel of keys, values and hidden layers (IA3, arXiv:2205.05638)."""

    kind: Literal["ia3"] = "ia3"
    outputs: tuple[str, ...] = Field(
        ("key", "value"), description=f"Matrices whose outputs are multiplied: each entry is {_TARGETS}."
    )
    inputs: tuple[str, ...] = Field(
        ("*/mlp/down",), description="Matrices whose inputs are multiplied; as in `outputs`."
    )


class BitfitConfig(_AdaptersConfig):
    """All biases, and nothing else (BitFit, arXiv:2106.10199)."""

    kind: Literal["bitfit"] = "bitfit"


class ReparametrizationConfig(Frozen):
    """An MLP that makes keys and values of an embedding of each virtual token, in training only."""

    dim: Count = Field(512, description="Width of its hidden layer; that of the embeddings is the model's.")

    def reduced(self) -> Self:
        """The same with a small layer."""
        return self.model_copy(update={"dim": 5})


class PrefixConfig(_AdaptersConfig):
    """Keys and values in every layer of attention, which every token attends to besides its sequence: prefix tuning
    (arXiv:2101.00190), and P-tuning v2 (arXiv:2110.07602)."""

    kind: Literal["prefix"] = "prefix"
    tokens: Count = Field(16, description="Virtual tokens: keys and values of each head.")
    reparametrize: ReparametrizationConfig | None = Field(
        None, description="Train an MLP that makes the keys and values; null: they are trained themselves."
    )

    def reduced(self) -> Self:
        """The same with few tokens."""
        update = {"tokens": min(self.tokens, 3), "reparametrize": self.reparametrize and self.reparametrize.reduced()}
        return super().reduced().model_copy(update=update)


class PromptTuningConfig(_AdaptersConfig):
    """Embeddings of virtual tokens before each document: prompt tuning (arXiv:2104.08691)."""

    kind: Literal["prompt"] = "prompt"
    tokens: Count = Field(16, description="Virtual tokens.")
    initial_text: Annotated[str, Field(min_length=1)] | None = Field(
        None,
        description="Text whose embeddings they begin with, repeated or cut to their number; null: tokens drawn from"
        " the vocabulary.",
    )

    def reduced(self) -> Self:
        """The same with few tokens."""
        return super().reduced().model_copy(update={"tokens": min(self.tokens, 3)})


class LayersConfig(_AdaptersConfig):
    """Some of the parameters; all others are frozen."""

    kind: Literal["layers"] = "layers"
    targets: Targets = Field(description=f"Parameters that are trained: each entry is {_TARGETS}.")


AdaptersConfig = Annotated[
    LoraConfig | Ia3Config | BitfitConfig | PrefixConfig | PromptTuningConfig | LayersConfig,
    Field(discriminator="kind"),
]
