"""gpt-oss: attention with sinks and alternating windows, and experts with biases."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm.config.layers import AttentionConfig, LayerConfig, MoeConfig
from maxlm.config.model import ModelConfig
from maxlm.families.common import TENSORS, read_attention, read_model, write_model
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import first_layer, read_kinds, read_window, write_windows
from maxlm.families.rope import read_rope
from maxlm.families.settings import Settings

# Where the file says nothing of rotary positions.
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _alternating(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """A channel of gate, one of up, the next one of gate, ..."""
    return np.arange(0, sum(sizes), 2), np.arange(1, sum(sizes), 2)


_MLP = "model.layers.{layer}.mlp"
_ALTERNATING = {"all_experts": True, "rows": _alternating}
GPT_OSS_TENSORS = (
    *(each for each in TENSORS if ".mlp." not in each.name),
    tensor("model.layers.{layer}.self_attn.sinks", "layer/mixer/sinks"),
    tensor(f"{_MLP}.router.weight", "layer/mlp/router"),
    tensor(f"{_MLP}.router.bias", "layer/mlp/router_logit_bias"),
    tensor(f"{_MLP}.experts.gate_up_proj", "layer/mlp/gate", "layer/mlp/up", input_first=True, **_ALTERNATING),
    tensor(f"{_MLP}.experts.gate_up_proj_bias", "layer/mlp/gate_bias", "layer/mlp/up_bias", **_ALTERNATING),
    tensor(f"{_MLP}.experts.down_proj", "layer/mlp/down", input_first=True, all_experts=True),
    tensor(f"{_MLP}.experts.down_proj_bias", "layer/mlp/down_bias", all_experts=True),
)


def _read(settings: Settings) -> Description:
    for name in ("experts_per_token", "initial_context_length"):
        settings.get(name, None)
    settings.require("hidden_act", "silu")
    settings.require("swiglu_alpha", 1.702)
    bias = settings.get("attention_bias", True)
    sizes = read_attention(settings, num_kv_heads=8, head_dim=64, rope=_read_rope(settings))
    mixer = AttentionConfig(**sizes, bias=bias, out_bias=bias, sinks=True)
    experts = MoeConfig(
        kind="moe",
        num_experts=settings.size("num_local_experts", 128),
        experts_per_token=settings.size("num_experts_per_tok", 4),
        dim=settings.size("intermediate_size", 2880),
        bias=True,
        # Here null is without this activation.
        swiglu_limit=settings.get("swiglu_limit", 7.0) or 0.0,
        router_logit_bias=True,
    )
    window = settings.get("sliding_window", 128)
    kinds = read_kinds(settings, lambda number: "full_attention" if number % 2 else "sliding_attention", 36)
    windows = [read_window(settings, kind, window) for kind in kinds]
    layers = [LayerConfig(mixer=mixer.model_copy(update={"window": each}), mlp=experts) for each in windows]
    return read_model(settings, layers, max_length=131072, epsilon=1e-5)


def _read_rope(settings: Settings) -> Any:
    if settings.section("rope_parameters") or settings.section("rope_scaling"):
        return read_rope(settings, theta=150_000.0)
    theta = settings.get("rope_theta", 150_000.0)
    return read_rope(Settings({"rope_scaling": _ROPE, "max_position_embeddings": 4096}, settings.where), theta=theta)


def _write(description: Description) -> dict[str, Any]:
    layer = first_layer(description.model)
    written = write_model(description)
    # Without scaling, which null does not say here.
    scaling = written["rope_scaling"] or {"rope_type": "default"}
    return {
        **written,
        **write_windows(description.model),
        "rope_scaling": scaling,
        "attention_bias": layer.mixer.bias,
        "hidden_act": "silu",
        "intermediate_size": layer.mlp.dim,
        "num_local_experts": layer.mlp.num_experts,
        "num_experts_per_tok": layer.mlp.experts_per_token,
        "swiglu_limit": layer.mlp.swiglu_limit,
    }


FAMILIES = (Family("gpt_oss", "GptOssForCausalLM", _read, _write, GPT_OSS_TENSORS),)
