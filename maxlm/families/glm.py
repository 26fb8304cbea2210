"""GLM-4 and GLM-4 0414 as transformers has them, and ChatGLM 2 and 3 with GLM-4 as their authors' code has them.

Half of a head's channels rotate, in pairs of neighbors.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm.config.layers import AttentionConfig, GatedMlpConfig, LayerConfig
from maxlm.config.model import ModelConfig, NormConfig
from maxlm.config.rope import RopeConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_gated_mlp, write_model
from maxlm.families.family import Description, Family, interleaved_rope, tensor
from maxlm.families.layers import first_layer, grouped
from maxlm.families.rope import read_rope
from maxlm.families.settings import Settings


def _fused_rows(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """Queries, keys and values in one matrix."""
    (query, key), value = interleaved_rope(model, sizes[:2]), np.arange(sizes[2])
    return query, sizes[0] + key, sizes[0] + sizes[1] + value


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
_LAYER = "transformer.encoder.layers.{layer}"
CHATGLM_TENSORS = (
    tensor("transformer.embedding.word_embeddings.weight", "embedding"),
    tensor(f"{_LAYER}.input_layernorm.weight", "layer/mixer_norm/scale"),
    *(
        tensor(
            f"{_LAYER}.self_attention.query_key_value.{kind}",
            *(f"layer/mixer/{name}{suffix}" for name in ("query", "key", "value")),
            rows=_fused_rows,
        )
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
    ),
    tensor(f"{_LAYER}.self_attention.dense.weight", "layer/mixer/out"),
    tensor(f"{_LAYER}.post_attention_layernorm.weight", "layer/mlp_norm/scale"),
    tensor(f"{_LAYER}.mlp.dense_h_to_4h.weight", "layer/mlp/gate", "layer/mlp/up"),
    tensor(f"{_LAYER}.mlp.dense_4h_to_h.weight", "layer/mlp/down"),
    tensor("transformer.encoder.final_layernorm.weight", "final_norm/scale"),
    tensor("transformer.output_layer.weight", "head"),
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


def _read_chatglm(settings: Settings) -> Description:
    heads, head_dim = settings.size("num_attention_heads"), settings.size("kv_channels", 128)
    grouped_heads = settings.get("multi_query_attention", False)
    # The length that rotary positions are scaled for; 1 in the first release.
    ratio = float(settings.get("rope_ratio", 1))
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=settings.size("multi_query_group_num", 1) if grouped_heads else heads,
        head_dim=head_dim,
        rope=RopeConfig(theta=10_000.0 * ratio, share=0.5),
        bias=settings.get("add_qkv_bias", False) or settings.get("add_bias_linear", False),
    )
    for key, value in {
        "rmsnorm": True,
        "post_layer_norm": True,
        "apply_residual_connection_post_layernorm": False,
        "add_bias_linear": False,
        "original_rope": True,
        "quantization_bit": 0,
        "pre_seq_len": None,
    }.items():
        settings.require(key, value)
    # How logits are scaled and rounded, not what they are.
    for key in (
        "apply_query_key_layer_scaling",
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "fp32_residual_connection",
        "multi_query_group_num",
        "prefix_projection",
        "tie_word_embeddings",
        "vocab_size",
    ):
        settings.get(key, None)
    mlp = GatedMlpConfig(dim=settings.size("ffn_hidden_size", 13696))
    model = ModelConfig(
        vocab_size=settings.size("padded_vocab_size", 65024),
        embed_dim=settings.size("hidden_size", 4096),
        norm=NormConfig(kind="rms", epsilon=settings.get("layernorm_epsilon", 1e-5)),
        layers=grouped([LayerConfig(mixer=mixer, mlp=mlp)] * settings.size("num_layers", 28)),
        tie_embeddings=False,
    )
    return Description(model, settings.size("seq_length", 2048))


def _write_chatglm(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    return {
        "num_layers": model.num_layers,
        "vocab_size": model.vocab_size,
        "padded_vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "ffn_hidden_size": layer.mlp.dim,
        "kv_channels": layer.mixer.head_dim,
        "num_attention_heads": layer.mixer.num_heads,
        "seq_length": description.max_length,
        "layernorm_epsilon": model.norm.epsilon,
        "rmsnorm": True,
        "apply_residual_connection_post_layernorm": False,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "add_qkv_bias": layer.mixer.bias,
        "multi_query_attention": True,
        "multi_query_group_num": layer.mixer.num_kv_heads,
        "original_rope": True,
        "rope_ratio": layer.mixer.rope.theta / 10_000,
        "tie_word_embeddings": False,
    }


FAMILIES = (
    Family("glm", "GlmForCausalLM", _read_glm, _write_glm, GLM_TENSORS),
    Family("glm4", "Glm4ForCausalLM", _read_glm4, _write_glm, GLM4_TENSORS),
    Family(
        "chatglm",
        "ChatGLMForConditionalGeneration",
        _read_chatglm,
        _write_chatglm,
        CHATGLM_TENSORS,
        ignored=r"transformer\.rotary_pos_emb\.inv_freq",
        is_in_transformers=False,
    ),
)
