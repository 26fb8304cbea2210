"""DeepSeek V2 and V3: latent attention, and experts in groups with shared ones.

The prediction modules of V3 follow its layers in published files; files that transformers wrote do not have them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from maxlm.config.layers import LatentAttentionConfig, LayerConfig, MoeConfig
from maxlm.config.model import ModelConfig, MultiTokenConfig
from maxlm.config.rope import RopeConfig, YarnScaling
from maxlm.families.common import TENSORS, read_gated_mlp, read_model
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import all_layers, first_layer
from maxlm.families.qwen import EXPERTS
from maxlm.families.rope import mscale, read_rope, write_rope
from maxlm.families.settings import Settings


def _interleaved(channels: int) -> np.ndarray:
    """Theirs in our order: channel 2i rotates with 2i + 1, and ours i with i + R / 2."""
    return np.concatenate([np.arange(0, channels, 2), np.arange(1, channels, 2)])


def _query_rows(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """Of each head, its content, and then the channels that rotate."""
    mixer: Any = first_layer(model).mixer
    head = np.concatenate([np.arange(mixer.content_dim), mixer.content_dim + _interleaved(mixer.rope_dim)])
    return [(np.arange(mixer.num_heads)[:, None] * len(head) + head).ravel()]


def _latent_rows(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    return np.arange(sizes[0]), sizes[0] + _interleaved(sizes[1])


def _key_value_rows(model: ModelConfig, sizes: Sequence[int]) -> Sequence[np.ndarray]:
    """Of each head, the key's content, and then the value."""
    mixer: Any = first_layer(model).mixer
    rows = np.arange(sum(sizes)).reshape(mixer.num_heads, -1)
    return rows[:, : mixer.content_dim].ravel(), rows[:, mixer.content_dim :].ravel()


def _compresses_queries(model: ModelConfig) -> bool:
    return first_layer(model).mixer.query_rank is not None


EXPERTS_WITH_SHARED = (
    *EXPERTS,
    tensor("model.layers.{layer}.mlp.gate.e_score_correction_bias", "layer/mlp/router_bias"),
    *(
        tensor(f"model.layers.{{layer}}.mlp.shared_experts.{name}_proj.weight", f"layer/mlp/shared/{name}")
        for name in ("gate", "up", "down")
    ),
)
_ATTENTION = "model.layers.{layer}.self_attn"
_QUERY = {"rows": _query_rows}
TENSORS_OF_BOTH = (
    *(each for each in TENSORS if ".self_attn." not in each.name or ".o_proj." in each.name),
    tensor(
        f"{_ATTENTION}.q_proj.weight", "layer/mixer/query", only=lambda model: not _compresses_queries(model), **_QUERY
    ),
    tensor(f"{_ATTENTION}.q_a_proj.weight", "layer/mixer/query_down"),
    tensor(f"{_ATTENTION}.q_a_proj.bias", "layer/mixer/query_down_bias"),
    tensor(f"{_ATTENTION}.q_a_layernorm.weight", "layer/mixer/query_norm/scale"),
    tensor(f"{_ATTENTION}.q_b_proj.weight", "layer/mixer/query", only=_compresses_queries, **_QUERY),
    tensor(f"{_ATTENTION}.kv_a_proj_with_mqa.weight", "layer/mixer/latent", "layer/mixer/rope_key", rows=_latent_rows),
    tensor(
        f"{_ATTENTION}.kv_a_proj_with_mqa.bias",
        "layer/mixer/latent_bias",
        "layer/mixer/rope_key_bias",
        rows=_latent_rows,
    ),
    tensor(f"{_ATTENTION}.kv_a_layernorm.weight", "layer/mixer/latent_norm/scale"),
    tensor(f"{_ATTENTION}.kv_b_proj.weight", "layer/mixer/key", "layer/mixer/value", rows=_key_value_rows),
    *EXPERTS_WITH_SHARED,
)

_MODULE = "model.layers.{layer}"
# The order of the inputs of `eh_proj` is ours: the embedding, then the hidden state.
TENSORS_OF_MODULES = (
    tensor(f"{_MODULE}.enorm.weight", "layer/embedding_norm/scale"),
    tensor(f"{_MODULE}.hnorm.weight", "layer/hidden_norm/scale"),
    tensor(f"{_MODULE}.eh_proj.weight", "layer/project"),
    tensor(f"{_MODULE}.shared_head.norm.weight", "layer/final_norm/scale"),
)
COPIES_IN_MODULES = ((f"{_MODULE}.embed_tokens.weight", "embedding"), (f"{_MODULE}.shared_head.head.weight", "head"))


def _read_v2(settings: Settings) -> Description:
    method = settings.get("topk_method", "greedy")
    settings.require("topk_method", "greedy", "group_limited_greedy")
    # transformers does not normalize them, whatever this is.
    settings.require("norm_topk_prob", False)
    settings.require("scoring_func", "softmax")
    settings.require("moe_layer_freq", 1)
    settings.require("mlp_bias", False)
    for name in ("aux_loss_alpha", "seq_aux"):
        settings.get(name, None)
    is_limited = method == "group_limited_greedy"
    groups: dict[str, Any] = {
        "num_groups": settings.size("n_group") if is_limited else 1,
        "groups_per_token": settings.size("topk_group") if is_limited else 1,
    }
    for name in ("n_group", "topk_group"):
        settings.get(name, None)
    return _read(
        settings,
        query_rank=1536,
        max_length=2048,
        num_dense=settings.size("first_k_dense_replace", 0, least=0),
        num_experts=settings.size("n_routed_experts", 64),
        experts_per_token=settings.size("num_experts_per_tok"),
        dim=settings.size("moe_intermediate_size", 1407),
        num_shared_experts=settings.get("n_shared_experts", 2) or 0,
        normalize_weights=False,
        routed_scaling=settings.get("routed_scaling_factor", 1.0),
        **groups,
    )


def _read_v3(settings: Settings) -> Description:
    settings.require("rope_interleave", True)
    settings.require("topk_method", "noaux_tc")
    settings.require("scoring_func", "sigmoid")
    settings.require("moe_layer_freq", 1)
    for name in ("aux_loss_alpha", "seq_aux"):
        settings.get(name, None)
    return _read(
        settings,
        query_rank=1536,
        max_length=4096,
        multi_token=read_modules(settings),
        num_dense=settings.size("first_k_dense_replace", 3, least=0),
        **read_experts(settings, num_experts=256, dim=2048, num_groups=8, groups_per_token=4, routed_scaling=2.5),
    )


def read_modules(settings: Settings) -> MultiTokenConfig | None:
    """The prediction modules of V3 and of models like it."""
    modules = settings.size("num_nextn_predict_layers", 1, least=0)
    return MultiTokenConfig(modules=modules) if modules else None


def read_experts(
    settings: Settings, *, num_experts: int, dim: int, num_groups: int, groups_per_token: int, routed_scaling: float
) -> dict[str, Any]:
    """The experts of V3 and of models like it; the arguments are taken where settings are missing."""
    return {
        "num_experts": settings.size("n_routed_experts", num_experts),
        "experts_per_token": settings.size("num_experts_per_tok", 8),
        "dim": settings.size("moe_intermediate_size", dim),
        "num_shared_experts": settings.size("n_shared_experts", 1),
        "num_groups": settings.size("n_group", num_groups),
        "groups_per_token": settings.size("topk_group", groups_per_token),
        "group_score": "best_two",
        "scoring": "sigmoid",
        "normalize_weights": settings.get("norm_topk_prob", True),
        "routed_scaling": settings.number("routed_scaling_factor", routed_scaling),
        "router_bias": True,
    }


def _read(
    settings: Settings,
    *,
    query_rank: int,
    max_length: int,
    num_dense: int,
    multi_token: MultiTokenConfig | None = None,
    **experts: Any,
) -> Description:
    content, rotary = settings.size("qk_nope_head_dim", 128), settings.size("qk_rope_head_dim", 64)
    heads = settings.size("num_attention_heads")
    # Files repeat other settings.
    for name, value in {"head_dim": rotary, "num_key_value_heads": heads, "qk_head_dim": content + rotary}.items():
        settings.require(name, value, None)
    rope = read_rope(settings, theta=10_000.0)
    mixer = LatentAttentionConfig(
        kind="mla",
        num_heads=heads,
        query_rank=settings.get("q_lora_rank", query_rank),
        latent_dim=settings.size("kv_lora_rank", 512),
        content_dim=content,
        rope_dim=rotary,
        value_dim=settings.size("v_head_dim", 128),
        rope=rope,
        scale=_scale(content + rotary, rope, _mscale_all_dim(settings)),
        bias=settings.get("attention_bias", False),
    )
    settings.require("hidden_act", "silu", "swish")
    dense, moe = read_gated_mlp(settings), MoeConfig(kind="moe", **experts)
    layers = [
        LayerConfig(mixer=mixer, mlp=dense if number < num_dense else moe)
        for number in range(settings.size("num_hidden_layers"))
    ]
    return read_model(settings, layers, max_length=max_length, multi_token=multi_token)


def _mscale_all_dim(settings: Settings) -> float:
    section = settings.section("rope_parameters") or settings.section("rope_scaling")
    return section.number("mscale_all_dim", 0) if section else 0


def _scale(channels: int, rope: RopeConfig, mscale_all_dim: float) -> float | None:
    """The factor on the logits; longer texts have a larger one (arXiv:2309.00071)."""
    if not mscale_all_dim or not isinstance(rope.scaling, YarnScaling):
        return None
    return mscale(rope.scaling.factor, mscale_all_dim) ** 2 / math.sqrt(channels)


def write_experts(experts: MoeConfig) -> dict[str, Any]:
    return {
        "n_routed_experts": experts.num_experts,
        "n_shared_experts": experts.num_shared_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.dim,
        "n_group": experts.num_groups,
        "topk_group": experts.groups_per_token,
        "norm_topk_prob": experts.normalize_weights,
        "routed_scaling_factor": experts.routed_scaling,
    }


def _write(description: Description) -> dict[str, Any]:
    model, layers = description.model, all_layers(description.model)
    mixer: Any = layers[0].mixer
    dense = [layer.mlp for layer in layers if layer.mlp.kind == "gated"]
    # A model without experts has settings of some.
    experts = next(
        (layer.mlp for layer in layers if layer.mlp.kind == "moe"),
        MoeConfig(kind="moe", dim=1, num_shared_experts=1, normalize_weights=False),
    )
    rope = write_rope(mixer.rope)
    if mixer.scale is not None:
        factor = mixer.rope.scaling.factor
        root = math.sqrt(mixer.scale * math.sqrt(mixer.content_dim + mixer.rope_dim))
        # Published numbers have few digits.
        rope["rope_scaling"]["mscale_all_dim"] = round((root - 1) / (0.1 * math.log(factor)), 9)
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_heads,
        "q_lora_rank": mixer.query_rank,
        "kv_lora_rank": mixer.latent_dim,
        "qk_nope_head_dim": mixer.content_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "attention_bias": mixer.bias,
        "rms_norm_eps": model.norm.epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": description.max_length,
        "intermediate_size": dense[0].dim if dense else experts.dim,
        "hidden_act": "silu",
        "first_k_dense_replace": len(dense),
        **write_experts(experts),
        **rope,
    }


def _write_v2(description: Description) -> dict[str, Any]:
    written = _write(description)
    method = "group_limited_greedy" if written["n_group"] > 1 else "greedy"
    return {**written, "topk_method": method}


def _write_v3(description: Description) -> dict[str, Any]:
    return {**_write(description), "num_nextn_predict_layers": description.model.num_modules}


FAMILIES = (
    Family("deepseek_v2", "DeepseekV2ForCausalLM", _read_v2, _write_v2, TENSORS_OF_BOTH, ignores_later_layers=True),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        _read_v3,
        _write_v3,
        (*TENSORS_OF_BOTH, *TENSORS_OF_MODULES),
        copies=COPIES_IN_MODULES,
        ignores_later_layers=True,
    ),
)
