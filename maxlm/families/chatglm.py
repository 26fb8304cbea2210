"""ChatGLM as its authors' code has it: the first, a prefix language model, and ChatGLM 2 and 3 with GLM-4, causal ones.

Of ChatGLM 2 and later, half of a head's channels rotate, in pairs of neighbors. Of the first, each half of a head's
channels rotates by its own position: channel i with channel i + E / 4.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm.config.layers import AttentionConfig, GatedMlpConfig, LayerConfig, PlainMlpConfig
from maxlm.config.model import ModelConfig, NormConfig
from maxlm.config.rope import RopeConfig
from maxlm.errors import CheckpointError
from maxlm.families.common import layer_norm
from maxlm.families.family import Description, Family, interleaved_rope, tensor
from maxlm.families.gpt import by_head, with_bias
from maxlm.families.layers import first_layer, grouped
from maxlm.families.settings import Settings

# sqrt(2 * 28), for the 28 layers of ChatGLM-6B: their code has it for any number of layers.
_RESIDUAL_FACTOR = 56**0.5
# Of ChatGLM 2 and 3, which only their names tell apart.
_VOCABULARY_3, _NAME_3 = 65024, "chatglm3"
_QKV = ("layer/mixer/query", "layer/mixer/key", "layer/mixer/value")


def _rows_of_first(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """Query, key and value of a head, then those of the next one; our first half of a head has both positions."""
    head_dim = first_layer(model).mixer.head_dim
    order = np.arange(head_dim).reshape(2, 2, head_dim // 4).swapaxes(0, 1).ravel()
    query, key, value = by_head(model, sizes)
    return query.reshape(-1, head_dim)[:, order].ravel(), key.reshape(-1, head_dim)[:, order].ravel(), value


def _fused_rows(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """Queries, keys and values in one matrix."""
    (query, key), value = interleaved_rope(model, sizes[:2]), np.arange(sizes[2])
    return query, sizes[0] + key, sizes[0] + sizes[1] + value


def _is_first(model: ModelConfig) -> bool:
    return model.prefix_attention


def _is_later(model: ModelConfig) -> bool:
    return not model.prefix_attention


_FIRST, _LATER = "transformer.layers.{layer}", "transformer.encoder.layers.{layer}"
TENSORS = (
    tensor("transformer.word_embeddings.weight", "embedding", only=_is_first),
    *layer_norm(f"{_FIRST}.input_layernorm", "layer/mixer_norm", only=_is_first),
    *with_bias(f"{_FIRST}.attention.query_key_value", *_QKV, rows=_rows_of_first, only=_is_first),
    *with_bias(f"{_FIRST}.attention.dense", "layer/mixer/out", only=_is_first),
    *layer_norm(f"{_FIRST}.post_attention_layernorm", "layer/mlp_norm", only=_is_first),
    *with_bias(f"{_FIRST}.mlp.dense_h_to_4h", "layer/mlp/up", only=_is_first),
    *with_bias(f"{_FIRST}.mlp.dense_4h_to_h", "layer/mlp/down", only=_is_first),
    *layer_norm("transformer.final_layernorm", "final_norm", only=_is_first),
    tensor("lm_head.weight", "head", only=_is_first),
    tensor("transformer.embedding.word_embeddings.weight", "embedding", only=_is_later),
    tensor(f"{_LATER}.input_layernorm.weight", "layer/mixer_norm/scale", only=_is_later),
    *with_bias(f"{_LATER}.self_attention.query_key_value", *_QKV, rows=_fused_rows, only=_is_later),
    tensor(f"{_LATER}.self_attention.dense.weight", "layer/mixer/out", only=_is_later),
    tensor(f"{_LATER}.post_attention_layernorm.weight", "layer/mlp_norm/scale", only=_is_later),
    tensor(f"{_LATER}.mlp.dense_h_to_4h.weight", "layer/mlp/gate", "layer/mlp/up", only=_is_later),
    tensor(f"{_LATER}.mlp.dense_4h_to_h.weight", "layer/mlp/down", only=_is_later),
    tensor("transformer.encoder.final_layernorm.weight", "final_norm/scale", only=_is_later),
    tensor("transformer.output_layer.weight", "head", only=_is_later),
)


def _read(settings: Settings) -> Description:
    # The first one alone has a setting of this name.
    return _read_later(settings) if settings.get("position_encoding_2d", None) is None else _read_first(settings)


def _write(description: Description) -> dict[str, Any]:
    return _write_first(description) if description.model.prefix_attention else _write_later(description)


def _read_first(settings: Settings) -> Description:
    settings.require("position_encoding_2d", True)
    settings.require("quantization_bit", 0)
    settings.require("pre_seq_len", None)
    settings.get("prefix_projection", None)
    embed_dim, heads = settings.size("hidden_size", 4096), settings.size("num_attention_heads", 32)
    num_layers = settings.size("num_layers", 28)
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed_dim // heads,
        rope=RopeConfig(two_dimensional=True, half_frequencies=True),
        bias=True,
        out_bias=True,
    )
    mlp = PlainMlpConfig(kind="plain", dim=settings.size("inner_hidden_size", 16384), activation="gelu_tanh")
    model = ModelConfig(
        vocab_size=settings.size("vocab_size", 150528),
        embed_dim=embed_dim,
        norm=NormConfig(kind="layer", epsilon=settings.get("layernorm_epsilon", 1e-5)),
        layers=grouped([LayerConfig(mixer=mixer, mlp=mlp)] * num_layers),
        residual="normalized",
        residual_factor=_RESIDUAL_FACTOR,
        prefix_attention=True,
        tie_embeddings=settings.get("tie_word_embeddings", True),
    )
    return Description(model, settings.size("max_sequence_length", 2048))


def _write_first(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_layers": model.num_layers,
        "num_attention_heads": layer.mixer.num_heads,
        "inner_hidden_size": layer.mlp.dim,
        "layernorm_epsilon": model.norm.epsilon,
        "max_sequence_length": description.max_length,
        "position_encoding_2d": True,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _read_later(settings: Settings) -> Description:
    heads, head_dim = settings.size("num_attention_heads"), settings.size("kv_channels", 128)
    if not settings.get("multi_query_attention", False):
        raise CheckpointError(
            f"{settings.where}: multi_query_attention is not set, so tensors have an order of rows that no published"
            " model has and maxlm does not support"
        )
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=settings.size("multi_query_group_num", 1),
        head_dim=head_dim,
        rope=RopeConfig(theta=10_000.0 * _read_rope_ratio(settings), share=0.5),
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
        "prefix_projection",
        "tie_word_embeddings",
        "vocab_size",
    ):
        settings.get(key, None)
    mlp, num_layers = GatedMlpConfig(dim=settings.size("ffn_hidden_size", 13696)), settings.size("num_layers", 28)
    # Some files have it under both names.
    settings.require("num_hidden_layers", num_layers)
    model = ModelConfig(
        vocab_size=settings.size("padded_vocab_size", _VOCABULARY_3),
        embed_dim=settings.size("hidden_size", 4096),
        norm=NormConfig(kind="rms", epsilon=settings.get("layernorm_epsilon", 1e-5)),
        layers=grouped([LayerConfig(mixer=mixer, mlp=mlp)] * num_layers),
        tie_embeddings=False,
    )
    return Description(model, settings.size("seq_length", 2048))


def _read_rope_ratio(settings: Settings) -> float:
    """The factor on the base of rotary positions for longer texts. ChatGLM 2, alone, divides positions by it."""
    ratio = settings.number("rope_ratio", 1.0, above=0)
    is_2_or_3 = settings.get("padded_vocab_size", _VOCABULARY_3) == _VOCABULARY_3
    if ratio != 1 and is_2_or_3 and _NAME_3 not in str(settings.get("_name_or_path", "")):
        raise CheckpointError(
            f"{settings.where}: rope_ratio is {ratio:g}, which ChatGLM 2 and 3 use differently, and maxlm supports that"
            f" of 3; if this is ChatGLM 3, set _name_or_path to {_NAME_3}"
        )
    return ratio


def _write_later(description: Description) -> dict[str, Any]:
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
        "_name_or_path": _NAME_3 if model.vocab_size == _VOCABULARY_3 else "",
        "tie_word_embeddings": False,
    }


FAMILIES = (
    Family(
        "chatglm",
        "ChatGLMForConditionalGeneration",
        _read,
        _write,
        TENSORS,
        ignored=r"transformer\.(rotary_pos_emb|layers\.\d+\.attention\.rotary_emb)\.inv_freq",
        is_in_transformers=False,
    ),
)
