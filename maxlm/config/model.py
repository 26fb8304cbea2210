"""Model architecture: two equal sections are the same function of the same weights, up to router losses."""

from typing import Self

from pydantic import Field, PositiveFloat, model_validator

from maxlm.config.base import Count, CountOrZero, Frozen
from maxlm.config.moe import MoeConfig


class ModelConfig(Frozen):
    """A Llama-style decoder: pre-norm, RMSNorm, RoPE, grouped-query attention, SwiGLU."""

    vocab_size: CountOrZero = Field(0, description="Number of token ids; 0 uses the tokenizer's.")
    num_layers: Count = 4
    embed_dim: Count = 256
    base_embed_dim: Count | None = Field(
        None,
        description="Width that the learning rate was tuned at: logits and learning rates are scaled to transfer to"
        " embed_dim. Keep head_dim and the ratios of the widths.",
    )
    mlp_dim: Count = 704
    moe: MoeConfig | None = Field(None, description="Experts instead of each layer's MLP; mlp_dim is then unused.")
    num_heads: Count = 4
    num_kv_heads: Count = 2
    head_dim: Count = 64
    rope_theta: PositiveFloat = 10_000.0
    norm_epsilon: PositiveFloat = 1e-6
    tie_embeddings: bool = True
    qk_norm: bool = Field(False, description="RMSNorm on each query and key head before RoPE.")
    attention_soft_cap: PositiveFloat | None = Field(None, description="Attention logits become c * tanh(logits / c).")
    logit_soft_cap: PositiveFloat | None = Field(None, description="Output logits become c * tanh(logits / c).")
    window_pattern: tuple[Count | None, ...] = Field(
        (None,),
        min_length=1,
        description="Sliding window of each layer, in tokens, repeated over the layers; null is full causal attention.",
    )

    @property
    def width(self) -> float:
        """How many times wider this model is than the one that its learning rate was tuned for."""
        return self.embed_dim / (self.base_embed_dim or self.embed_dim)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})")
        if self.num_layers % len(self.window_pattern):
            raise ValueError(
                f"num_layers ({self.num_layers}) must be a multiple of the length of window_pattern"
                f" ({len(self.window_pattern)})"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: RoPE rotates pairs of channels")
        return self
