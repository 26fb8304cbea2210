"""SmolLM 3: Llama, where some layers have no positions."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.errors import CheckpointError
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_gated_mlp, write_model
from maxlm.families.family import Description, Family
from maxlm.families.layers import all_layers, first_layer, read_kinds, read_window, write_windows
from maxlm.families.rope import write_rope
from maxlm.families.settings import Settings


def _read_smollm3(settings: Settings) -> Description:
    settings.require("mlp_bias", False)
    bias = settings.get("attention_bias", False)
    sizes = read_attention(settings, theta=2_000_000.0, num_kv_heads=4)
    mixer, mlp = AttentionConfig(**sizes, bias=bias, out_bias=bias), read_gated_mlp(settings)
    has_rope = _read_positions(settings)
    layers = [
        LayerConfig(mixer=mixer.model_copy(update={"window": window, "rope": mixer.rope if rotates else None}), mlp=mlp)
        for rotates, window in zip(has_rope, _read_windows(settings, has_rope))
    ]
    return read_model(settings, layers, max_length=32768, tied=True)


def _read_positions(settings: Settings) -> list[bool]:
    """Whether each layer has rotary positions."""
    interval, num_layers = settings.size("no_rope_layer_interval", 4), settings.size("num_hidden_layers")
    given = settings.items("no_rope_layers")
    if given is None:
        return [(number + 1) % interval != 0 for number in range(num_layers)]
    if len(given) < num_layers:
        raise CheckpointError(f"{settings.where}: no_rope_layers has {len(given)} of {num_layers} layers; restore it")
    # In spite of the name, 1 is a layer with them.
    return [bool(each) for each in given[:num_layers]]


def _read_windows(settings: Settings, has_rope: list[bool]) -> list[int | None]:
    """The window of each layer; where they are not listed, layers without rotary positions have one."""
    settings.get("max_window_layers", None)
    window = settings.get("sliding_window", None)
    if not settings.get("use_sliding_window", False):
        window = None
    kinds = read_kinds(
        settings, lambda number: "full_attention" if has_rope[number] or window is None else "sliding_attention"
    )
    return [read_window(settings, kind, window) for kind in kinds]


def _write_smollm3(description: Description) -> dict[str, Any]:
    mixers = [layer.mixer for layer in all_layers(description.model)]
    rope = next((mixer.rope for mixer in mixers if mixer.rope is not None), None)
    return {
        **write_model(description),
        **write_gated_mlp(first_layer(description.model).mlp),
        **write_rope(rope),
        **write_windows(description.model),
        "use_sliding_window": any(mixer.window is not None for mixer in mixers),
        "no_rope_layers": [int(mixer.rope is not None) for mixer in mixers],
        "attention_bias": mixers[0].bias,
    }


FAMILIES = (Family("smollm3", "SmolLM3ForCausalLM", _read_smollm3, _write_smollm3, TENSORS),)
