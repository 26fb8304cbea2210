"""Mixtral: Mistral with experts."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig, MoeConfig
from maxlm.families.common import TENSORS, read_attention, read_model, write_model
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import first_layer
from maxlm.families.settings import Settings

EXPERTS = (
    tensor("model.layers.{layer}.block_sparse_moe.gate.weight", "layer/mlp/router"),
    tensor("model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight", "layer/mlp/gate"),
    tensor("model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight", "layer/mlp/up"),
    tensor("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight", "layer/mlp/down"),
)


def _read_mixtral(settings: Settings) -> Description:
    mixer = AttentionConfig(
        **read_attention(settings, theta=1e6, num_kv_heads=8), window=settings.get("sliding_window", None)
    )
    settings.require("hidden_act", "silu", "swish")
    mlp = MoeConfig(
        kind="moe",
        num_experts=settings.size("num_local_experts", 8),
        experts_per_token=settings.size("num_experts_per_tok", 2),
        dim=settings.size("intermediate_size"),
    )
    return read_model(
        settings,
        [LayerConfig(mixer=mixer, mlp=mlp)] * settings.size("num_hidden_layers"),
        max_length=131072,
        epsilon=1e-5,
    )


def _write_mixtral(description: Description) -> dict[str, Any]:
    layer: Any = first_layer(description.model)
    return {
        **write_model(description),
        "intermediate_size": layer.mlp.dim,
        "hidden_act": "silu",
        "num_local_experts": layer.mlp.num_experts,
        "num_experts_per_tok": layer.mlp.experts_per_token,
        "sliding_window": layer.mixer.window,
    }


FAMILIES = (Family("mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral, (*TENSORS, *EXPERTS)),)
