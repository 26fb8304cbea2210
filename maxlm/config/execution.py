"""How a model is computed, which changes speed, memory and rounding, but not the function."""

from typing import Literal

from pydantic import Field

from maxlm.config.base import Count, Frozen
from maxlm.config.pipeline import PipelineConfig


class ExecutionConfig(Frozen):
    """How a model is computed: dtypes, kernels, recomputation, pipeline schedule, lengths."""

    max_length: Count = Field(256, description="Longest sequence, in tokens, for training and serving.")
    activation_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    matmul_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Operands of matrix products; they always accumulate in float32. auto: bfloat16 where the hardware"
        " multiplies it natively (TPUs, GPUs, CPUs with AVX512-BF16 or AMX), else float32.",
    )
    eight_bit: Literal["int8", "fp8"] | None = Field(
        None,
        description="Quantize both operands of products with the layers' weights to 8 bits; straight-through gradients."
        " Routed experts, embedding and output head keep matmul_dtype, adapters use bfloat16.",
    )
    gradient_sum_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="In which gradients of matrices are summed over devices. bfloat16 halves the bytes sent and rounds"
        " each device's part; on one device nothing changes.",
    )
    parameter_dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Storage dtype of matrices; bfloat16 updates use stochastic rounding."
    )
    remat: Literal["auto", "none", "dots", "full"] = Field(
        "auto",
        description="What the backward pass recomputes: nothing, all but matrix products, whole layers. auto: full if"
        " the hardware multiplies bfloat16 natively (on a CPU it is then the fastest), else dots.",
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
    experts: Literal["auto", "ragged", "padded", "reference"] = Field(
        "auto", description="How tokens are dispatched to experts: see maxlm/ops/moe/experts.py."
    )

    @property
    def layer_matmul_dtype(self) -> str:
        """Dtype of the operands of matrix products within the layers."""
        return self.eight_bit or self.matmul_dtype


DEFAULT_EXECUTION = ExecutionConfig()
