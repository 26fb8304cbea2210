"""GLM-4 and GLM-4 0414 as transformers has them; `chatglm.py` has GLM-4 as its authors' code has it.

Half of a head's channels rotate, in pairs of neighbors.
"""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_gated_mlp, write_model
from maxlm.families.family import Description, Family, interleaved_rope, tensor
from maxlm.families.layers import first_layer
from maxlm.families.rope import read_rope
from maxlm.families.settings import Settings

GLM_TENSORS = (
    *(
        each
        for each in TENSORS
        if ".q_proj." not in each.name and ".k_proj." not in each.name and ".mlp." not in each.name
    ),
    tensor("model.layers.{layer}.self_attn.q_proj.weight", "layer/mixer/query", rows=interleaved_rope),
    tensor("model.layers.{layer}.self_attn.k_proj.weight", "layer/mixer/key", rows=interleaved_rope),
    tensor("model.layers.{layer}.self_attn.q_proj.bias", "layer/mixer/query_bias", rows=interleaved_rope),
    tensor("model.layers.{layer}.self_attn.k_proj.bias", "layer/mixer/key_bias", rows=interleaved_rope),
    tensor("model.layers.{layer}.mlp.gate_up_proj.weight", "layer/mlp/gate", "layer/mlp/up"),
    tensor("model.layers.{layer}.mlp.down_proj.weight", "layer/mlp/down"),
)
# What transformers calls glm4 has four norms in a layer.
GLM4_TENSORS = (
    *GLM_TENSORS,
    tensor("model.layers.{layer}.post_self_attn_layernorm.weight", "layer/mixer_output_norm/scale"),
    tensor("model.layers.{layer}.post_mlp_layernorm.weight", "layer/mlp_output_norm/scale"),
)


def _read_glm(settings: Settings, placement: str = "before") -> Description:
    rope = read_rope(settings, theta=10_000.0, share=0.5)
    sizes = read_attention(settings, num_kv_heads=2, head_dim=128, rope=rope)
    mixer = AttentionConfig(**sizes, bias=settings.get("attention_bias", True))
    layer = LayerConfig(mixer=mixer, mlp=read_gated_mlp(settings))
    layers, norm = [layer] * settings.size("num_hidden_layers"), {"placement": placement}
    return read_model(settings, layers, max_length=131072, epsilon=1.5625e-7, norm=norm)


def _read_glm4(settings: Settings) -> Description:
    return _read_glm(settings, placement="around")


def _write_glm(description: Description) -> dict[str, Any]:
    layer = first_layer(description.model)
    return {
        **write_model(description),
        **write_gated_mlp(layer.mlp),
        "attention_bias": layer.mixer.bias,
        "partial_rotary_factor": layer.mixer.rope.share,
    }


FAMILIES = (
    Family("glm", "GlmForCausalLM", _read_glm, _write_glm, GLM_TENSORS),
    Family("glm4", "Glm4ForCausalLM", _read_glm4, _write_glm, GLM4_TENSORS),
)
