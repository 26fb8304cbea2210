"""GPT-2, GPT-NeoX with Pythia, and Bloom: LayerNorm with biases, and MLPs without gates."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm.config.layers import AttentionConfig, LayerConfig, PlainMlpConfig
from maxlm.config.model import ModelConfig, NormConfig
from maxlm.config.rope import RopeConfig
from maxlm.families.common import layer_norm, read_activation, write_activation
from maxlm.families.family import Description, Family, Tensor, tensor
from maxlm.families.layers import first_layer, grouped
from maxlm.families.rope import read_rope, write_rope
from maxlm.families.settings import Settings


def by_head(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """Query, key and value of a head, then those of the next one."""
    head_dim = first_layer(model).mixer.head_dim
    rows = np.arange(sum(sizes)).reshape(-1, len(sizes), head_dim)
    return [rows[:, part].ravel() for part in range(len(sizes))]


QKV = ("query", "key", "value")


def with_bias(name: str, *holds: str, **layout: Any) -> tuple[Tensor, Tensor]:
    """A matrix and its bias."""
    of_bias = {key: value for key, value in layout.items() if key != "input_first"}
    return tensor(f"{name}.weight", *holds, **layout), tensor(
        f"{name}.bias", *(f"{each}_bias" for each in holds), **of_bias
    )


_ATTENTION = tuple(f"layer/mixer/{name}" for name in QKV)
GPT2_TENSORS = (
    tensor("transformer.wte.weight", "embedding"),
    tensor("transformer.wpe.weight", "positions"),
    *layer_norm("transformer.h.{layer}.ln_1", "layer/mixer_norm"),
    *with_bias("transformer.h.{layer}.attn.c_attn", *_ATTENTION, input_first=True),
    *with_bias("transformer.h.{layer}.attn.c_proj", "layer/mixer/out", input_first=True),
    *layer_norm("transformer.h.{layer}.ln_2", "layer/mlp_norm"),
    *with_bias("transformer.h.{layer}.mlp.c_fc", "layer/mlp/up", input_first=True),
    *with_bias("transformer.h.{layer}.mlp.c_proj", "layer/mlp/down", input_first=True),
    *layer_norm("transformer.ln_f", "final_norm"),
    tensor("lm_head.weight", "head"),
)
NEOX_TENSORS = (
    tensor("gpt_neox.embed_in.weight", "embedding"),
    *layer_norm("gpt_neox.layers.{layer}.input_layernorm", "layer/mixer_norm"),
    *with_bias("gpt_neox.layers.{layer}.attention.query_key_value", *_ATTENTION, rows=by_head),
    *with_bias("gpt_neox.layers.{layer}.attention.dense", "layer/mixer/out"),
    *layer_norm("gpt_neox.layers.{layer}.post_attention_layernorm", "layer/mlp_norm"),
    *with_bias("gpt_neox.layers.{layer}.mlp.dense_h_to_4h", "layer/mlp/up"),
    *with_bias("gpt_neox.layers.{layer}.mlp.dense_4h_to_h", "layer/mlp/down"),
    *layer_norm("gpt_neox.final_layer_norm", "final_norm"),
    tensor("embed_out.weight", "head"),
)
BLOOM_TENSORS = (
    tensor("transformer.word_embeddings.weight", "embedding"),
    *layer_norm("transformer.word_embeddings_layernorm", "embedding_norm"),
    *layer_norm("transformer.h.{layer}.input_layernorm", "layer/mixer_norm"),
    *with_bias("transformer.h.{layer}.self_attention.query_key_value", *_ATTENTION, rows=by_head),
    *with_bias("transformer.h.{layer}.self_attention.dense", "layer/mixer/out"),
    *layer_norm("transformer.h.{layer}.post_attention_layernorm", "layer/mlp_norm"),
    *with_bias("transformer.h.{layer}.mlp.dense_h_to_4h", "layer/mlp/up"),
    *with_bias("transformer.h.{layer}.mlp.dense_4h_to_h", "layer/mlp/down"),
    *layer_norm("transformer.ln_f", "final_norm"),
    tensor("lm_head.weight", "head"),
)


def _attention(embed_dim: int, num_heads: int, **more: Any) -> AttentionConfig:
    head_dim = embed_dim // num_heads
    return AttentionConfig(num_heads=num_heads, num_kv_heads=num_heads, head_dim=head_dim, **more)


def _model(settings: Settings, layer: LayerConfig, num_layers: int, *, embed_dim: int, tied: bool, **more: Any):
    return ModelConfig(
        vocab_size=settings.size("vocab_size"),
        embed_dim=embed_dim,
        layers=grouped([layer] * num_layers),
        tie_embeddings=settings.get("tie_word_embeddings", tied),
        **more,
    )


def _norm_config(epsilon: float) -> NormConfig:
    return NormConfig(kind="layer", epsilon=epsilon)


def _read_gpt2(settings: Settings) -> Description:
    embed_dim, heads = settings.size("n_embd", 768), settings.size("n_head", 12)
    settings.require("scale_attn_weights", True)
    settings.require("scale_attn_by_inverse_layer_idx", False)
    # Of other heads, and how products are rounded.
    for key in (
        "n_ctx",
        "reorder_and_upcast_attn",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ):
        settings.get(key, None)
    mlp = PlainMlpConfig(
        kind="plain",
        dim=settings.size("n_inner", 4 * embed_dim),
        activation=read_activation(settings, "activation_function", "gelu_new"),
    )
    mixer = _attention(embed_dim, heads, rope=None, bias=True, out_bias=True)
    length = settings.size("n_positions", 1024)
    model = _model(
        settings,
        LayerConfig(mixer=mixer, mlp=mlp),
        settings.size("n_layer", 12),
        embed_dim=embed_dim,
        tied=True,
        norm=_norm_config(settings.get("layer_norm_epsilon", 1e-5)),
        learned_positions=length,
    )
    return Description(model, length)


def _write_gpt2(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    return {
        "vocab_size": model.vocab_size,
        "n_positions": model.learned_positions,
        "n_embd": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": layer.mixer.num_heads,
        "n_inner": layer.mlp.dim,
        "activation_function": "gelu_new" if layer.mlp.activation == "gelu_tanh" else layer.mlp.activation,
        "layer_norm_epsilon": model.norm.epsilon,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _read_neox(settings: Settings) -> Description:
    embed_dim, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    bias, parallel = settings.get("attention_bias", True), settings.get("use_parallel_residual", True)
    theta, share = settings.number("rotary_emb_base", 10_000.0), settings.number("rotary_pct", 0.25)
    # Some files repeat them under the names of other families, which transformers overlooks here.
    settings.require("rope_theta", theta, None)
    settings.require("partial_rotary_factor", share, None)
    rope: RopeConfig = read_rope(settings, theta=theta, share=share)
    mixer = _attention(embed_dim, heads, rope=rope, bias=bias, out_bias=bias)
    mlp = PlainMlpConfig(
        kind="plain",
        dim=settings.size("intermediate_size"),
        activation=read_activation(settings, "hidden_act", "gelu"),
    )
    model = _model(
        settings,
        LayerConfig(mixer=mixer, mlp=mlp),
        settings.size("num_hidden_layers"),
        embed_dim=embed_dim,
        tied=False,
        norm=_norm_config(settings.get("layer_norm_eps", 1e-5)),
        residual="parallel" if parallel else "sequential",
    )
    return Description(model, settings.size("max_position_embeddings", 2048))


def _write_neox(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    rope = write_rope(layer.mixer.rope)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": layer.mixer.num_heads,
        "intermediate_size": layer.mlp.dim,
        "hidden_act": write_activation(layer.mlp.activation),
        "rotary_pct": layer.mixer.rope.share,
        "rotary_emb_base": layer.mixer.rope.theta,
        "rope_scaling": rope["rope_scaling"],
        "max_position_embeddings": description.max_length,
        "layer_norm_eps": model.norm.epsilon,
        "use_parallel_residual": model.residual == "parallel",
        "attention_bias": layer.mixer.bias,
        "tie_word_embeddings": model.tie_embeddings,
    }


def _read_bloom(settings: Settings) -> Description:
    # Attributes of old files have other names.
    embed_dim = settings.size("hidden_size", settings.get("n_embed", 64))
    heads = settings.size("n_head", settings.get("num_attention_heads", 8))
    normalized = settings.get("apply_residual_connection_post_layernorm", False)
    # How a matrix was cut over devices in training, and how products are rounded.
    for key in (
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "offset_alibi",
        "seq_length",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "slow_but_exact",
        "unk_token_id",
    ):
        settings.get(key, None)
    mixer = _attention(embed_dim, heads, rope=None, alibi=True, bias=True, out_bias=True)
    mlp = PlainMlpConfig(kind="plain", dim=4 * embed_dim, activation="gelu_tanh")
    model = _model(
        settings,
        LayerConfig(mixer=mixer, mlp=mlp),
        settings.size("n_layer", settings.get("num_hidden_layers", 2)),
        embed_dim=embed_dim,
        tied=True,
        norm=_norm_config(settings.get("layer_norm_epsilon", 1e-5)),
        embedding_norm=True,
        residual="normalized" if normalized else "sequential",
    )
    # Distances have no limit; the models were trained with 2,048 tokens.
    return Description(model, 2048)


def _write_bloom(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "n_layer": model.num_layers,
        "n_head": layer.mixer.num_heads,
        "layer_norm_epsilon": model.norm.epsilon,
        "apply_residual_connection_post_layernorm": model.residual == "normalized",
        "tie_word_embeddings": model.tie_embeddings,
    }


FAMILIES = (
    Family(
        "gpt2",
        "GPT2LMHeadModel",
        _read_gpt2,
        _write_gpt2,
        GPT2_TENSORS,
        ignored=r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",
    ),
    Family(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        _read_neox,
        _write_neox,
        NEOX_TENSORS,
        ignored=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    ),
    Family("bloom", "BloomForCausalLM", _read_bloom, _write_bloom, BLOOM_TENSORS),
)
