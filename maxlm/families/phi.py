"""Phi-3: Llama with fused matrices."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_gated_mlp, write_model
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import first_layer
from maxlm.families.rope import read_rope
from maxlm.families.settings import Settings

_APART = (".q_proj.", ".k_proj.", ".v_proj.", ".gate_proj.", ".up_proj.")
PHI3_TENSORS = (
    *(each for each in TENSORS if not any(part in each.name for part in _APART)),
    tensor(
        "model.layers.{layer}.self_attn.qkv_proj.weight", "layer/mixer/query", "layer/mixer/key", "layer/mixer/value"
    ),
    tensor("model.layers.{layer}.mlp.gate_up_proj.weight", "layer/mlp/gate", "layer/mlp/up"),
)


def _read_phi3(settings: Settings) -> Description:
    rope = read_rope(settings, theta=10_000.0, share=1.0, original_length=4096)
    settings.get("original_max_position_embeddings", None)
    # Settings of the authors' own code, at the values that change nothing.
    for key, value in {
        "attention_bias": False,
        "mlp_bias": False,
        "lm_head_bias": False,
        "full_attn_mod": 1,
        "interpolate_factor": 1,
    }.items():
        settings.require(key, value)
    mixer = AttentionConfig(**read_attention(settings, rope=rope), window=settings.get("sliding_window", None))
    layer = LayerConfig(mixer=mixer, mlp=read_gated_mlp(settings))
    return read_model(settings, [layer] * settings.size("num_hidden_layers"), max_length=4096, epsilon=1e-5)


def _write_phi3(description: Description) -> dict[str, Any]:
    layer = first_layer(description.model)
    return {**write_model(description), **write_gated_mlp(layer.mlp), "sliding_window": layer.mixer.window}


FAMILIES = (Family("phi3", "Phi3ForCausalLM", _read_phi3, _write_phi3, PHI3_TENSORS),)
