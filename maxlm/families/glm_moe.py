"""GLM-4.5: attention with partial rotary positions, and experts and prediction modules as DeepSeek V3 has them."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig, MoeConfig
from maxlm.config.model import MultiTokenConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_model
from maxlm.families.deepseek import COPIES_IN_MODULES, EXPERTS_WITH_SHARED, TENSORS_OF_MODULES
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
    moe = MoeConfig(
        kind="moe",
        num_experts=settings.size("n_routed_experts", 128),
        experts_per_token=settings.size("num_experts_per_tok", 8),
        dim=settings.size("moe_intermediate_size", 1408),
        num_shared_experts=settings.size("n_shared_experts", 1),
        num_groups=settings.size("n_group", 1),
        groups_per_token=settings.size("topk_group", 1),
        group_score="best_two",
        scoring="sigmoid",
        normalize_weights=settings.get("norm_topk_prob", True),
        routed_scaling=settings.number("routed_scaling_factor", 1.0),
        router_bias=True,
    )
    dense, num_dense = read_gated_mlp(settings), settings.size("first_k_dense_replace", 1, least=0)
    layers = [
        LayerConfig(mixer=mixer, mlp=dense if number < num_dense else moe)
        for number in range(settings.size("num_hidden_layers"))
    ]
    modules = settings.size("num_nextn_predict_layers", 1, least=0)
    multi_token = MultiTokenConfig(modules=modules) if modules else None
    return read_model(settings, layers, max_length=131072, epsilon=1e-5, multi_token=multi_token)


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
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.num_shared_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.dim,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
        "norm_topk_prob": experts.normalize_weights,
        "routed_scaling_factor": experts.routed_scaling,
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
