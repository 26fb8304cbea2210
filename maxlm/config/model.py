"""Model architecture: two equal sections are the same function of the same weights."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, PositiveFloat, ValidationInfo, field_validator, model_validator

from maxlm.config.base import Count, CountOrZero, Frozen
from maxlm.config.layers import (
    AttentionConfig,
    LayerConfig,
    LayerGroup,
    LayersField,
    PartConfig,
    PatternLayerConfig,
    RelativeBiasConfig,
    UniformGroup,
)


class NormConfig(Frozen):
    """Normalization of the residual stream, around each mixer and each MLP, and before the output head."""

    kind: Literal["rms", "layer"] = Field("rms", description="RMSNorm, or LayerNorm with a bias.")
    epsilon: PositiveFloat = 1e-6
    placement: Literal["before", "after", "around"] = Field(
        "before", description="Normalize the input of each mixer and MLP, its output, or both."
    )
    unit_offset: bool = Field(False, description="Multiply by 1 + weight, with weights that start at 0.")
    bias: bool = Field(True, description="LayerNorm only: add a learned vector.")


class TokenIds(Frozen):
    """Ids of special tokens in a model that was imported."""

    bos: int | None = None
    eos: int | tuple[int, ...] | None = None
    pad: int | None = None
    mask: int | None = None
    gmask: int | None = Field(None, description="Where the answer to a prompt belongs, in ChatGLM-6B.")


class MultiTokenConfig(Frozen):
    """Modules that predict tokens further ahead, each from the one before it (arXiv:2412.19437, section 2.2)."""

    modules: Count = Field(1, description="How many tokens after the next one are predicted.")
    layer: LayerConfig | None = Field(None, description="The layer of each module; null is one like the model's last.")


class ModelConfig(Frozen):
    """A decoder: groups of residual layers between an embedding and an output head."""

    vocab_size: CountOrZero = Field(0, description="Number of token ids; 0 uses the tokenizer's.")
    embed_dim: Count = 256
    base_embed_dim: Count | None = Field(
        None,
        description="Width that the learning rate was tuned at: logits and learning rates are scaled to transfer to"
        " embed_dim. Keep head_dim and the ratios of the widths.",
    )
    norm: NormConfig = NormConfig()
    if TYPE_CHECKING:
        layers: tuple[LayerGroup, ...] = ()
    else:
        layers: LayersField = Field(
            UniformGroup(),
            description="Equal layers (repeat, mixer, mlp), a repeated pattern of layers (repeat, pattern), or a list"
            " of such groups.",
        )
    residual: Literal["sequential", "normalized", "parallel", "parallel_one_norm"] = Field(
        "sequential",
        description="The MLP reads the sum of the stream and the mixer's output, or what the mixer reads, through its"
        " own norm or the mixer's. If normalized, the output of each norm goes on as the stream.",
    )
    residual_factor: PositiveFloat = Field(
        1.0, description="Factor on the stream where an output is added to it (DeepNorm, arXiv:2203.00555)."
    )
    prefix_attention: bool = Field(
        False,
        description="A prefix language model: the tokens of a prompt attend to one another in both directions, those of"
        " the answer to what is before them. objective.kind=prefix_lm trains one.",
    )
    embedding_scale: PositiveFloat | None = Field(None, description="Factor on the embeddings of tokens.")
    embedding_norm: bool = Field(False, description="Normalize the embeddings.")
    learned_positions: Count | None = Field(
        None, description="Add a learned vector for each position, up to this many: the longest text."
    )
    tie_embeddings: bool = True
    normalized_head: bool = Field(False, description="Divide each row of the output head by its L2 norm.")
    labels: tuple[str, ...] | None = Field(
        None, description="Score whole sequences, for these classes or one reward, instead of predicting tokens."
    )
    multi_token: MultiTokenConfig | None = Field(
        None,
        description="Modules that predict tokens after the next one. objective.kind=multi_token trains them; generation"
        " does not use them.",
    )
    critic: Literal["shared", "own"] | None = Field(
        None, description="Values of tokens, by a head on the same layers or a model of its own; set by the objective."
    )
    logit_soft_cap: PositiveFloat | None = Field(None, description="Output logits become c * tanh(logits / c).")
    family: str | None = Field(
        None, description="The model_type that Hugging Face's format is written with; null is the first one that fits."
    )
    token_ids: TokenIds | None = Field(
        None, description="Special tokens that Hugging Face's format is written with; null takes the tokenizer's."
    )

    @field_validator("multi_token")
    @classmethod
    def _with_layer(cls, given: MultiTokenConfig | None, info: ValidationInfo) -> MultiTokenConfig | None:
        """The modules with their layer, so that equal models have equal sections."""
        if given is None or "layers" not in info.data:
            return given
        *_, last = (layer for group in info.data["layers"] for layer in group.each_layer())
        return given.model_copy(update={"layer": given.layer or last})

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for key, part in self.each_part() if self.prefix_attention else ():
            if part.kind == "gru":
                raise ValueError(f"prefix_attention needs attention, and {key} is a gru, which reads tokens in order")
        if self.residual == "normalized" and self.norm.placement == "after":
            raise ValueError("residual: normalized needs a norm before each mixer and MLP, not norm.placement: after")
        if self.residual_factor != 1 and self.residual.startswith("parallel"):
            raise ValueError(f"residual_factor needs residual: sequential or normalized, not {self.residual}")
        if self.prefix_attention and self.labels is not None:
            raise ValueError("prefix_attention is of models that answer prompts, and labels of those that score texts")
        if self.multi_token is not None and self.labels is not None:
            raise ValueError("multi_token is of models that predict tokens, and labels of those that score texts")
        return self

    @model_validator(mode="after")
    def _shares_one_table(self) -> Self:
        of_layers = {layer.mixer.bias_table for layer in self.each_layer()} | {None}
        if len(of_layers) > 2:
            raise ValueError(
                "layers: those with a relative_bias share one table, so their buckets, max_distance and num_heads must"
                " be equal"
            )
        if any(layer.mixer.bias_table not in of_layers for layer in self.module_layers):
            raise ValueError("multi_token.layer.mixer.relative_bias: must be that of a layer of the model, or null")
        return self

    @property
    def main_model(self) -> Self:
        """The model without what only training uses: prediction modules, and a critic."""
        return self.model_copy(update={"multi_token": None, "critic": None})

    def with_virtual_tokens(self, tokens: int | None) -> Self:
        """The model with so many virtual tokens in each layer of attention."""

        def of_layer(layer: PatternLayerConfig) -> PatternLayerConfig:
            if not isinstance(layer.mixer, AttentionConfig):
                return layer
            return layer.model_copy(update={"mixer": layer.mixer.model_copy(update={"virtual_tokens": tokens})})

        groups = [group.model_copy(update={"pattern": tuple(map(of_layer, group.pattern))}) for group in self.layers]
        return self.model_copy(update={"layers": tuple(groups)})

    @property
    def width(self) -> float:
        """How many times wider this model is than the one that its learning rate was tuned for."""
        return self.embed_dim / (self.base_embed_dim or self.embed_dim)

    @property
    def num_layers(self) -> int:
        return sum(group.num_layers for group in self.layers)

    @property
    def longest_group(self) -> int:
        """The index of the group with the most layers: only its layers are sharded over pipeline stages."""
        return max(range(len(self.layers)), key=lambda index: self.layers[index].num_layers)

    @property
    def bias_table(self) -> tuple[RelativeBiasConfig, int] | None:
        """The learned bias by distance that layers share, and the number of heads that have one."""
        return next((table for layer in self.each_layer() if (table := layer.mixer.bias_table) is not None), None)

    def each_part(self) -> Iterator[tuple[str, PartConfig]]:
        """Every mixer and MLP, with its dotted key as one would write it: `layers.mixer` in a uniform model."""
        for number, group in enumerate(self.layers):
            for position, layer in enumerate(group.pattern):
                key = "layers" if len(self.layers) == 1 else f"layers.{number}"
                key = key if len(group.pattern) == 1 else f"{key}.pattern.{position}"
                yield f"{key}.mixer", layer.mixer
                yield f"{key}.mlp", layer.mlp
        for layer in self.module_layers:
            if layer not in self.each_layer():
                yield "multi_token.layer.mixer", layer.mixer
                yield "multi_token.layer.mlp", layer.mlp

    def each_layer(self) -> Iterator[LayerConfig]:
        """The layers in order."""
        for group in self.layers:
            yield from group.each_layer()

    @property
    def num_modules(self) -> int:
        return 0 if self.multi_token is None else self.multi_token.modules

    @property
    def module_layers(self) -> tuple[LayerConfig, ...]:
        """The layer of the prediction modules, if there are any."""
        return () if self.multi_token is None or self.multi_token.layer is None else (self.multi_token.layer,)
