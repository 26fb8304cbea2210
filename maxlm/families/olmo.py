"""OLMo 2 and 3: norms after attention and MLP, and of the queries and keys of all heads together."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.config.rope import RopeConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_gated_mlp, write_model
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import all_layers, first_layer, read_kinds, read_window, write_windows
from maxlm.families.rope import read_rope, read_ropes_by_kind, write_ropes_by_kind
from maxlm.families.settings import Settings

_THETA_3 = 500_000.0
NORMS_AFTER = (
    *(each for each in TENSORS if "layernorm" not in each.name),
    tensor("model.layers.{layer}.post_attention_layernorm.weight", "layer/mixer_output_norm/scale"),
    tensor("model.layers.{layer}.post_feedforward_layernorm.weight", "layer/mlp_output_norm/scale"),
)


def _read_olmo2(settings: Settings) -> Description:
    mixer = _read_mixer(settings, theta=10_000.0)
    return _read_model(settings, [mixer] * settings.size("num_hidden_layers"))


def _read_mixer(settings: Settings, **rope: Any) -> AttentionConfig:
    sizes, bias = read_attention(settings, **rope), settings.get("attention_bias", False)
    return AttentionConfig(**sizes, bias=bias, out_bias=bias, qk_norm=True, qk_norm_over="all_heads")


def _read_model(settings: Settings, mixers: list[AttentionConfig]) -> Description:
    mlp = read_gated_mlp(settings)
    layers = [LayerConfig(mixer=mixer, mlp=mlp) for mixer in mixers]
    return read_model(settings, layers, max_length=2048, epsilon=1e-5, norm={"placement": "after"})


def _write_olmo2(description: Description) -> dict[str, Any]:
    layer = first_layer(description.model)
    return {**write_model(description), **write_gated_mlp(layer.mlp), "attention_bias": layer.mixer.bias}


def _read_olmo3(settings: Settings) -> Description:
    """Only layers without a window scale their rotary positions."""
    ropes = read_ropes_by_kind(settings, full_attention=_THETA_3, sliding_attention=_THETA_3)
    if ropes is None:
        # transformers 4 takes one rope_theta for all layers, and 5 for those without a window.
        settings.require("rope_theta", _THETA_3)
        ropes = {"full_attention": read_rope(settings, theta=_THETA_3), "sliding_attention": RopeConfig(theta=_THETA_3)}
    window = settings.get("sliding_window", 4096)
    kinds = read_kinds(settings, lambda number: "sliding_attention" if (number + 1) % 4 else "full_attention")
    mixer = _read_mixer(settings, rope=None)
    windows = [read_window(settings, kind, window) for kind in kinds]
    return _read_model(
        settings,
        [mixer.model_copy(update={"window": each, "rope": ropes[kind]}) for kind, each in zip(kinds, windows)],
    )


def _write_olmo3(description: Description) -> dict[str, Any]:
    ropes = {layer.mixer.window is not None: layer.mixer.rope for layer in all_layers(description.model)}
    whole, local = (ropes.get(has_window, RopeConfig(theta=_THETA_3)) for has_window in (False, True))
    written = {key: value for key, value in _write_olmo2(description).items() if not key.startswith("rope_")}
    return {
        **written,
        **write_windows(description.model),
        **write_ropes_by_kind(full_attention=whole, sliding_attention=local),
    }


FAMILIES = (
    Family("olmo2", "Olmo2ForCausalLM", _read_olmo2, _write_olmo2, NORMS_AFTER),
    Family("olmo3", "Olmo3ForCausalLM", _read_olmo3, _write_olmo3, NORMS_AFTER),
)
