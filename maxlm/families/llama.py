"""Llama 1, 2 and 3, and Mistral."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_gated_mlp, write_model
from maxlm.families.family import Description, Family
from maxlm.families.layers import first_layer
from maxlm.families.settings import Settings


def _read_llama(settings: Settings) -> Description:
    bias = settings.get("attention_bias", False)
    settings.require("mlp_bias", False)
    mixer = AttentionConfig(**read_attention(settings, theta=10_000.0), bias=bias, out_bias=bias)
    layer = LayerConfig(mixer=mixer, mlp=read_gated_mlp(settings))
    return read_model(settings, [layer] * settings.size("num_hidden_layers"), max_length=2048)


def _write_llama(description: Description) -> dict[str, Any]:
    layer: Any = first_layer(description.model)
    return {
        **write_model(description),
        **write_gated_mlp(layer.mlp),
        "attention_bias": layer.mixer.bias,
        "mlp_bias": False,
    }


def _read_mistral(settings: Settings) -> Description:
    mixer = AttentionConfig(
        **read_attention(settings, theta=10_000.0, num_kv_heads=8), window=settings.get("sliding_window", 4096)
    )
    layer = LayerConfig(mixer=mixer, mlp=read_gated_mlp(settings))
    return read_model(settings, [layer] * settings.size("num_hidden_layers"), max_length=131072)


def _write_mistral(description: Description) -> dict[str, Any]:
    layer: Any = first_layer(description.model)
    return {**write_model(description), **write_gated_mlp(layer.mlp), "sliding_window": layer.mixer.window}


FAMILIES = (
    Family("llama", "LlamaForCausalLM", _read_llama, _write_llama, TENSORS, ignored=r".*\.rotary_emb\.inv_freq"),
    Family("mistral", "MistralForCausalLM", _read_mistral, _write_mistral, TENSORS),
)
