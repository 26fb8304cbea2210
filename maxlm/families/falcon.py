"""Falcon: attention and MLP side by side, with one key-value head or groups of them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm.config.layers import AttentionConfig, LayerConfig, PlainMlpConfig
from maxlm.config.model import ModelConfig, NormConfig
from maxlm.errors import CheckpointError
from maxlm.families.common import layer_norm, read_activation, write_activation
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import first_layer, grouped
from maxlm.families.rope import read_rope, write_rope
from maxlm.families.settings import Settings


def _by_group(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """The queries of a key-value head, its key and its value, then those of the next one."""
    mixer = first_layer(model).mixer
    group = mixer.num_heads // mixer.num_kv_heads
    rows = np.arange(sum(sizes)).reshape(mixer.num_kv_heads, group + 2, mixer.head_dim)
    return rows[:, :group].ravel(), rows[:, group].ravel(), rows[:, group + 1].ravel()


def _has_two_norms(model: ModelConfig) -> bool:
    return model.residual == "parallel"


_LAYER = "transformer.h.{layer}"
FALCON_TENSORS = (
    tensor("transformer.word_embeddings.weight", "embedding"),
    *layer_norm(f"{_LAYER}.ln_attn", "layer/mixer_norm", only=_has_two_norms),
    *layer_norm(f"{_LAYER}.ln_mlp", "layer/mlp_norm", only=_has_two_norms),
    *layer_norm(f"{_LAYER}.input_layernorm", "layer/mixer_norm", only=lambda model: not _has_two_norms(model)),
    *layer_norm(f"{_LAYER}.post_attention_layernorm", "layer/mlp_norm", only=lambda model: not _has_two_norms(model)),
    *layer_norm("transformer.ln_f", "final_norm"),
    *(
        each
        for kind, suffix in (("weight", ""), ("bias", "_bias"))
        for each in (
            tensor(
                f"{_LAYER}.self_attention.query_key_value.{kind}",
                *(f"layer/mixer/{name}{suffix}" for name in ("query", "key", "value")),
                rows=_by_group,
            ),
            tensor(f"{_LAYER}.self_attention.dense.{kind}", f"layer/mixer/out{suffix}"),
            tensor(f"{_LAYER}.mlp.dense_h_to_4h.{kind}", f"layer/mlp/up{suffix}"),
            tensor(f"{_LAYER}.mlp.dense_4h_to_h.{kind}", f"layer/mlp/down{suffix}"),
        )
    ),
    tensor("lm_head.weight", "head"),
)


def _read_falcon(settings: Settings) -> Description:
    embed_dim, heads = settings.size("hidden_size", 4544), settings.size("num_attention_heads", 71)
    is_new = settings.get("new_decoder_architecture", False)
    alibi, head_dim = settings.get("alibi", False), embed_dim // heads
    settings.require("alibi", False, True)
    if embed_dim % heads:
        raise CheckpointError(
            f"{settings.where}: hidden_size is {embed_dim}, and must be a multiple of num_attention_heads, {heads}"
        )
    settings.require("apply_residual_connection_post_layernorm", False)
    if alibi:
        for name in ("rope_theta", "rope_scaling", "rope_parameters"):
            settings.get(name, None)
    bias = settings.get("bias", False)
    settings.require("parallel_attn", True, *([] if is_new else [False]))
    norms = settings.get("num_ln_in_parallel_attn", None)
    settings.require("num_ln_in_parallel_attn", None, 1, *([2] if is_new else []))
    if not settings.get("parallel_attn", True):
        residual = "sequential"
    else:
        residual = "parallel" if is_new and norms != 1 else "parallel_one_norm"
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=_read_kv_heads(settings, heads),
        head_dim=head_dim,
        rope=None if alibi else read_rope(settings, theta=10_000.0),
        alibi=alibi,
        # The slopes are scaled with the logits.
        alibi_scale=1 / math.sqrt(head_dim) if alibi else 1.0,
        bias=bias,
        out_bias=bias,
    )
    mlp = PlainMlpConfig(
        kind="plain",
        dim=settings.size("ffn_hidden_size", 4 * embed_dim),
        activation=read_activation(settings, "activation", "gelu"),
        bias=bias,
    )
    model = ModelConfig(
        vocab_size=settings.size("vocab_size"),
        embed_dim=embed_dim,
        norm=NormConfig(kind="layer", epsilon=settings.get("layer_norm_epsilon", 1e-5)),
        layers=grouped([LayerConfig(mixer=mixer, mlp=mlp)] * settings.size("num_hidden_layers", 32)),
        residual=residual,  # type: ignore[arg-type]
        tie_embeddings=settings.get("tie_word_embeddings", True),
    )
    return Description(model, settings.size("max_position_embeddings", 2048))


def _read_kv_heads(settings: Settings, heads: int) -> int:
    if settings.get("new_decoder_architecture", False):
        settings.get("multi_query", None)
        return settings.size("num_kv_heads", heads)
    if settings.get("multi_query", True):
        settings.get("num_kv_heads", None)
        return 1
    # Only the new architecture has groups of heads.
    settings.require("num_kv_heads", heads, None)
    return heads


def _write_falcon(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    kv_heads = layer.mixer.num_kv_heads
    is_new = model.residual == "parallel" or kv_heads not in (1, layer.mixer.num_heads)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": layer.mixer.num_heads,
        "num_kv_heads": kv_heads,
        "multi_query": kv_heads == 1,
        "new_decoder_architecture": is_new,
        "parallel_attn": model.residual != "sequential",
        "num_ln_in_parallel_attn": (2 if model.residual == "parallel" else 1) if is_new else None,
        "alibi": layer.mixer.alibi,
        "bias": layer.mixer.bias,
        "ffn_hidden_size": layer.mlp.dim,
        "activation": write_activation(layer.mlp.activation),
        "layer_norm_epsilon": model.norm.epsilon,
        "max_position_embeddings": description.max_length,
        "tie_word_embeddings": model.tie_embeddings,
        **write_rope(layer.mixer.rope),
    }


FAMILIES = (Family("falcon", "FalconForCausalLM", _read_falcon, _write_falcon, FALCON_TENSORS),)
