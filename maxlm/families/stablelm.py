"""StableLM: Llama with LayerNorm, where some channels of a head rotate."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.config.model import ModelConfig, NormConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, write_gated_mlp
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import first_layer, grouped
from maxlm.families.rope import read_rope, write_rope
from maxlm.families.settings import Settings

STABLELM_TENSORS = (
    *TENSORS,
    tensor("model.layers.{layer}.input_layernorm.bias", "layer/mixer_norm/bias"),
    tensor("model.layers.{layer}.post_attention_layernorm.bias", "layer/mlp_norm/bias"),
    tensor("model.norm.bias", "final_norm/bias"),
)


def _read_stablelm(settings: Settings) -> Description:
    settings.require("qk_layernorm", False)
    rope = read_rope(settings, theta=10_000.0, share=0.25)
    sizes = read_attention(settings, num_kv_heads=32, rope=rope)
    mixer = AttentionConfig(**sizes, bias=settings.get("use_qkv_bias", False))
    layer = LayerConfig(mixer=mixer, mlp=read_gated_mlp(settings))
    model = ModelConfig(
        vocab_size=settings.size("vocab_size"),
        embed_dim=settings.size("hidden_size"),
        norm=NormConfig(kind="layer", epsilon=settings.get("layer_norm_eps", 1e-5)),
        layers=grouped([layer] * settings.size("num_hidden_layers")),
        residual="parallel_one_norm" if settings.get("use_parallel_residual", False) else "sequential",
        tie_embeddings=settings.get("tie_word_embeddings", False),
    )
    return Description(model, settings.size("max_position_embeddings", 4096))


def _write_stablelm(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": layer.mixer.num_heads,
        "num_key_value_heads": layer.mixer.num_kv_heads,
        "max_position_embeddings": description.max_length,
        "layer_norm_eps": model.norm.epsilon,
        "use_qkv_bias": layer.mixer.bias,
        "qk_layernorm": False,
        "use_parallel_residual": model.residual == "parallel_one_norm",
        "tie_word_embeddings": model.tie_embeddings,
        **write_gated_mlp(layer.mlp),
        **write_rope(layer.mixer.rope),
        "partial_rotary_factor": layer.mixer.rope.share,
    }


FAMILIES = (
    Family("stablelm", "StableLmForCausalLM", _read_stablelm, _write_stablelm, STABLELM_TENSORS, classifier=""),
)
