"""Gemma 1, 2 and 3 (text)."""

import math
from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.config.rope import RopeConfig
from maxlm.families.common import (
    ACTIVATIONS,
    TENSORS,
    read_activation,
    read_attention,
    read_gated_mlp,
    read_model,
    write_activation,
    write_gated_mlp,
    write_model,
)
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import all_layers, first_layer, read_kinds, read_window, write_windows
from maxlm.families.rope import read_rope, read_ropes_by_kind, write_rope, write_ropes_by_kind
from maxlm.families.settings import Settings

# Four norms in a layer. What other families call post_attention_layernorm is before the MLP there.
NORMS_AROUND = (
    *(each for each in TENSORS if "layernorm" not in each.name),
    tensor("model.layers.{layer}.input_layernorm.weight", "layer/mixer_norm/scale"),
    tensor("model.layers.{layer}.post_attention_layernorm.weight", "layer/mixer_output_norm/scale"),
    tensor("model.layers.{layer}.pre_feedforward_layernorm.weight", "layer/mlp_norm/scale"),
    tensor("model.layers.{layer}.post_feedforward_layernorm.weight", "layer/mlp_output_norm/scale"),
)


def _read_gemma(settings: Settings) -> Description:
    bias = settings.get("attention_bias", False)
    sizes = read_attention(settings, theta=10_000.0, num_kv_heads=16, head_dim=256)
    mixer = AttentionConfig(**sizes, bias=bias, out_bias=bias)
    # transformers 4 takes hidden_activation and 5 hidden_act: for an exact "gelu" they would differ.
    settings.require("hidden_activation", None, *(name for name in ACTIVATIONS if name != "gelu"))
    if settings.get("hidden_activation", None) is not None:
        activation = read_activation(settings, "hidden_activation")
        settings.get("hidden_act", None)
    else:
        # "gelu" in the files of the first release means the approximation by tanh.
        activation = read_activation(settings, "hidden_act", "gelu_pytorch_tanh")
        activation = "gelu_tanh" if activation == "gelu" else activation
    mlp = read_gated_mlp(settings, activation=activation)
    layers = [LayerConfig(mixer=mixer, mlp=mlp)] * settings.size("num_hidden_layers")
    settings.require("use_bidirectional_attention", None, False)
    return _read_model(settings, layers, max_length=8192)


def _read_model(settings: Settings, layers: list[LayerConfig], placement: str = "before", **more: Any) -> Description:
    scale = math.sqrt(settings.size("hidden_size"))
    norm = {"unit_offset": True, "placement": placement}
    return read_model(settings, layers, tied=True, norm=norm, embedding_scale=scale, **more)


def _write_gemma(description: Description) -> dict[str, Any]:
    layer = first_layer(description.model)
    activation = write_activation(layer.mlp.activation)
    return {
        **write_model(description),
        **write_gated_mlp(layer.mlp),
        "hidden_act": activation,
        "hidden_activation": activation,
        "attention_bias": layer.mixer.bias,
    }


def _read_gemma2(settings: Settings) -> Description:
    soft_cap = settings.get("attn_logit_softcapping", 50.0)
    mixer = _windowed_attention(settings, theta=10_000.0, soft_cap=soft_cap)
    return _read_windowed(settings, mixer, mixer.rope, pattern=2, final_soft_cap=30.0, max_length=8192)


def _read_gemma3(settings: Settings) -> Description:
    # Two bases of rotary positions, for global layers and for windows.
    by_kind = read_ropes_by_kind(settings, full_attention=1e6, sliding_attention=1e4)
    if by_kind is not None:
        whole, local = by_kind["full_attention"], by_kind["sliding_attention"]
    else:
        whole = read_rope(settings, theta=1e6)
        local = RopeConfig(theta=settings.number("rope_local_base_freq", 1e4))
    # transformers does not apply it, whatever this is.
    settings.require("attn_logit_softcapping", None)
    mixer = _windowed_attention(settings, rope=whole, qk_norm=True)
    pattern = settings.size("sliding_window_pattern", 6)
    return _read_windowed(settings, mixer, local, pattern=pattern, final_soft_cap=None, max_length=131072)


def _windowed_attention(settings: Settings, **more: Any) -> AttentionConfig:
    """Attention over whole texts."""
    settings.require("use_bidirectional_attention", None, False)
    bias = settings.get("attention_bias", False)
    scale = settings.number("query_pre_attn_scalar", 256, above=0) ** -0.5
    sizes = read_attention(settings, num_kv_heads=4, head_dim=256, **more)
    return AttentionConfig(**sizes, scale=scale, bias=bias, out_bias=bias)


def _read_windowed(
    settings: Settings,
    mixer: AttentionConfig,
    local_rope: RopeConfig | None,
    *,
    pattern: int,
    final_soft_cap: float | None,
    max_length: int,
) -> Description:
    """Gemma 2 and 3. `pattern`: without a list of layers, each such layer is global."""
    window = settings.size("sliding_window", 4096)
    kinds = read_kinds(settings, lambda number: "sliding_attention" if (number + 1) % pattern else "full_attention")
    local = mixer.model_copy(update={"window": window, "rope": local_rope})
    mlp = read_gated_mlp(settings, activation=read_activation(settings, "hidden_activation", "gelu_pytorch_tanh"))
    layers = [LayerConfig(mixer=local if read_window(settings, kind, window) else mixer, mlp=mlp) for kind in kinds]
    soft_cap = settings.get("final_logit_softcapping", final_soft_cap)
    return _read_model(settings, layers, placement="around", logit_soft_cap=soft_cap, max_length=max_length)


def _write_windowed(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    # transformers wants a window even if no layer has one: its default.
    windows = {key: value for key, value in write_windows(model).items() if value is not None}
    return {
        **write_model(description),
        "intermediate_size": layer.mlp.dim,
        "hidden_activation": write_activation(layer.mlp.activation),
        **windows,
        "attention_bias": layer.mixer.bias,
        "query_pre_attn_scalar": _whole((layer.mixer.scale or layer.mixer.head_dim**-0.5) ** -2),
        "attn_logit_softcapping": layer.mixer.soft_cap,
        "final_logit_softcapping": model.logit_soft_cap,
    }


def _whole(number: float) -> float:
    """The whole number that this one is up to rounding, if it is."""
    return round(number) if math.isclose(number, round(number), rel_tol=1e-9) else number


def _write_gemma3(description: Description) -> dict[str, Any]:
    by_window = {layer.mixer.window is not None: layer.mixer.rope for layer in all_layers(description.model)}
    local, whole = by_window.get(True, RopeConfig()), by_window.get(False, RopeConfig(theta=1e6))
    if local.scaling is None:
        ropes = {**write_rope(whole), "rope_local_base_freq": local.theta}
    else:
        ropes = write_ropes_by_kind(full_attention=whole, sliding_attention=local)
    written = _write_windowed(description)
    return {**{key: value for key, value in written.items() if not key.startswith("rope_")}, **ropes}


FAMILIES = (
    Family("gemma", "GemmaForCausalLM", _read_gemma, _write_gemma, TENSORS),
    Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _write_windowed, NORMS_AROUND),
    Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _read_gemma3,
        _write_gemma3,
        NORMS_AROUND,
        classifier="Gemma3TextForSequenceClassification",
    ),
)
