"""GLM-4.5: attention with partial rotary positions, and experts and prediction modules as DeepSeek V3 has them."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig, MoeConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_model
from maxlm.families.deepseek import (
    COPIES_IN_MODULES,
    EXPERTS_WITH_SHARED,
    TENSORS_OF_MODULES,
    read_experts,
    read_modules,
    write_experts,
)
from maxlm.families.family import Description, Family
from maxlm.families.layers import all_layers, first_layer
from maxlm.families.rope import read_rope
from maxlm.families.settings import Settings


def _read(settings: Settings) -> Description:
    rope = read_rope(settings, theta=10_000.0, share=0.5)
    mixer = AttentionConfig(
        **read_attention(settings, num_kv_heads=8, rope=rope),
        bias=settings.get("attention_bias", False),
        qk_norm=settings.get("use_qk_norm", False),
    )
    settings.require("hidden_act", "silu", "swish")
    defaults: dict[str, Any] = {"num_experts": 128, "dim": 1408, "num_groups": 1, "groups_per_token": 1}
    moe = MoeConfig(kind="moe", **read_experts(settings, **defaults, routed_scaling=1.0))
    dense, num_dense = read_gated_mlp(settings), settings.size("first_k_dense_replace", 1, least=0)
    layers = [
        LayerConfig(mixer=mixer, mlp=dense if number < num_dense else moe)
        for number in range(settings.size("num_hidden_layers"))
    ]
    return read_model(settings, layers, max_length=131072, epsilon=1e-5, multi_token=read_modules(settings))


def _write(description: Description) -> dict[str, Any]:
    model, layers = description.model, all_layers(description.model)
    mixer: Any = first_layer(model).mixer
    dense = [layer.mlp for layer in layers if layer.mlp.kind == "gated"]
    experts: Any = next(layer.mlp for layer in layers if layer.mlp.kind == "moe")
    return {
        **write_model(description),
        "hidden_act": "silu",
        "partial_rotary_factor": mixer.rope.share,
        "attention_bias": mixer.bias,
        "use_qk_norm": mixer.qk_norm,
        "intermediate_size": dense[0].dim if dense else experts.dim,
        "first_k_dense_replace": len(dense),
        **write_experts(experts),
        "num_nextn_predict_layers": model.num_modules,
    }


FAMILIES = (
    Family(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        _read,
        _write,
        (*TENSORS, *EXPERTS_WITH_SHARED, *TENSORS_OF_MODULES),
        copies=COPIES_IN_MODULES,
        ignores_later_layers=True,
    ),
)
