"""Model architecture."""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from maxlm.config.base import Count, CountOrZero, Frozen
from maxlm.config.moe import MoeConfig
from maxlm.config.pipeline import PipelineConfig


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
    max_length: Count = Field(256, description="Longest sequence, in tokens, for training and serving.")
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
    activation_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    matmul_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "bfloat16",
        description="Operands of matrix products; they always accumulate in float32. auto: bfloat16 where the hardware"
        " multiplies it natively (TPUs, GPUs, CPUs with AVX512-BF16 or AMX), else float32.",
    )
    eight_bit: Literal["int8", "fp8"] | None = Field(
        None,
        description="Quantize both operands of products with the layers' weights to 8 bits; straight-through gradients."
        " Routed experts, embedding and output head keep matmul_dtype, adapters use bfloat16.",
    )
    parameter_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Storage dtype of matrices; bfloat16 updates use stochastic rounding."
    )
    remat: Literal["none", "dots", "full"] = Field(
        "none", description="What the backward pass recomputes: nothing, all but matrix products, whole layers."
    )
    unroll: bool = Field(False, description="Compile each layer separately, not one loop over all: slow to compile.")
    pipeline: PipelineConfig = Field(PipelineConfig(), description="How the stages of `mesh.stage` share their work.")
    loss_chunk_length: Count = Field(
        512, description="Tokens of a row whose logits are in memory at a time; a whole batch's are the largest array."
    )
    attention: Literal["auto", "pallas_tpu", "cudnn", "xla", "reference"] = "auto"
    context_attention: Literal["ring", "all_to_all"] = Field(
        "ring",
        description="With mesh.context > 1: pass keys around a ring, or exchange heads for whole rows.",
    )

    @property
    def width(self) -> float:
        """How many times wider this model is than the one that its learning rate was tuned for."""
        return self.embed_dim / (self.base_embed_dim or self.embed_dim)

    @property
    def layer_matmul_dtype(self) -> str:
        """Dtype of the operands of matrix products within the layers."""
        return self.eight_bit or self.matmul_dtype

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
