"""Qwen 2 and 3, and their mixtures of experts."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig, MoeConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_gated_mlp, write_model
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import all_layers, first_layer, read_kinds, read_window, write_windows
from maxlm.families.settings import Settings

EXPERTS = (
    tensor("model.layers.{layer}.mlp.gate.weight", "layer/mlp/router"),
    tensor("model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight", "layer/mlp/gate"),
    tensor("model.layers.{layer}.mlp.experts.{expert}.up_proj.weight", "layer/mlp/up"),
    tensor("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight", "layer/mlp/down"),
)
SHARED_EXPERT = (
    tensor("model.layers.{layer}.mlp.shared_expert_gate.weight", "layer/mlp/shared_gate"),
    *(
        tensor(f"model.layers.{{layer}}.mlp.shared_expert.{name}_proj.weight", f"layer/mlp/shared/{name}")
        for name in ("gate", "up", "down")
    ),
)


def _read_qwen2(settings: Settings) -> Description:
    mixer = AttentionConfig(**read_attention(settings, theta=10_000.0, num_kv_heads=32), bias=True)
    return _read_qwen(settings, mixer)


def _read_qwen3(settings: Settings) -> Description:
    bias = settings.get("attention_bias", False)
    sizes = read_attention(settings, theta=10_000.0, num_kv_heads=32, head_dim=128)
    return _read_qwen(settings, AttentionConfig(**sizes, bias=bias, out_bias=bias, qk_norm=True))


def _read_qwen(settings: Settings, mixer: AttentionConfig) -> Description:
    mlp = read_gated_mlp(settings)
    layers = [
        LayerConfig(mixer=mixer.model_copy(update={"window": window}), mlp=mlp) for window in _qwen_windows(settings)
    ]
    return read_model(settings, layers, max_length=32768)


def _qwen_windows(settings: Settings) -> list[int | None]:
    full, window = settings.size("max_window_layers", 28, least=0), settings.get("sliding_window", 4096)
    has_windows = settings.get("use_sliding_window", False) and window is not None
    kinds = read_kinds(
        settings, lambda number: "sliding_attention" if has_windows and number >= full else "full_attention"
    )
    return [read_window(settings, kind, window if has_windows else None) for kind in kinds]


def _write_qwen2(description: Description) -> dict[str, Any]:
    layer: Any = first_layer(description.model)
    return {
        **write_model(description),
        **write_gated_mlp(layer.mlp),
        **write_windows(description.model),
        "use_sliding_window": any(each.mixer.window for each in all_layers(description.model)),
    }


def _write_qwen3(description: Description) -> dict[str, Any]:
    return {**_write_qwen2(description), "attention_bias": first_layer(description.model).mixer.bias}


def _read_qwen2_moe(settings: Settings) -> Description:
    # Which layers have windows depends on the version of transformers.
    settings.require("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers"):
        settings.get(name, None)
    for kind in read_kinds(settings, lambda number: "full_attention"):
        read_window(settings, kind, None)
    sizes = read_attention(settings, theta=10_000.0, num_kv_heads=16)
    return _read_moe(
        settings,
        AttentionConfig(**sizes, bias=settings.get("qkv_bias", True)),
        num_experts=settings.size("num_experts", 60),
        experts_per_token=settings.size("num_experts_per_tok", 4),
        dim=settings.size("moe_intermediate_size", 1408),
        num_shared_experts=1,
        shared_dim=settings.size("shared_expert_intermediate_size", 5632),
        shared_gate=True,
    )


def _read_qwen3_moe(settings: Settings) -> Description:
    bias = settings.get("attention_bias", False)
    sizes = read_attention(settings, theta=10_000.0, num_kv_heads=4)
    window = settings.get("sliding_window", 4096)
    if not settings.get("use_sliding_window", False):
        window = None
    settings.get("max_window_layers", None)
    return _read_moe(
        settings,
        AttentionConfig(**sizes, window=window, bias=bias, out_bias=bias, qk_norm=True),
        num_experts=settings.size("num_experts", settings.get("num_local_experts", 128)),
        experts_per_token=settings.size("num_experts_per_tok", 8),
        dim=settings.size("moe_intermediate_size", 768),
    )


def _read_moe(settings: Settings, mixer: AttentionConfig, **sizes: Any) -> Description:
    dense = read_gated_mlp(settings)
    settings.require("hidden_act", "silu", "swish")
    experts = MoeConfig(kind="moe", normalize_weights=settings.get("norm_topk_prob", False), **sizes)
    step, without = settings.size("decoder_sparse_step", 1), settings.items("mlp_only_layers") or []
    layers = [
        LayerConfig(mixer=mixer, mlp=dense if number in without or (number + 1) % step else experts)
        for number in range(settings.size("num_hidden_layers"))
    ]
    return read_model(settings, layers, max_length=32768)


def _write_moe(description: Description) -> dict[str, Any]:
    layers = all_layers(description.model)
    experts = next((layer.mlp for layer in layers if layer.mlp.kind == "moe"), layers[0].mlp)
    dense = [number for number, layer in enumerate(layers) if layer.mlp.kind != "moe"]
    return {
        **write_model(description),
        "intermediate_size": layers[dense[0]].mlp.dim if dense else experts.dim,
        "hidden_act": "silu",
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.dim,
        "norm_topk_prob": experts.normalize_weights,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
    }


def _write_qwen2_moe(description: Description) -> dict[str, Any]:
    layers = all_layers(description.model)
    experts = next(layer.mlp for layer in layers if layer.mlp.kind == "moe")
    return {
        **_write_moe(description),
        "shared_expert_intermediate_size": experts.shared_dim,
        "use_sliding_window": False,
        "qkv_bias": layers[0].mixer.bias,
    }


def _write_qwen3_moe(description: Description) -> dict[str, Any]:
    mixer = first_layer(description.model).mixer
    return {
        **_write_moe(description),
        "sliding_window": mixer.window,
        "use_sliding_window": mixer.window is not None,
        "attention_bias": mixer.bias,
    }


FAMILIES = (
    Family("qwen2", "Qwen2ForCausalLM", _read_qwen2, _write_qwen2, TENSORS),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen2_moe, (*TENSORS, *EXPERTS, *SHARED_EXPERT)),
    Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _write_qwen3, TENSORS),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, (*TENSORS, *EXPERTS)),
)
