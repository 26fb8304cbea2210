"""Baichuan and Baichuan 2, as their authors' code has them: Llama with one matrix for queries, keys and values.

Their settings do not say two things. Models of 13B have biases by distance (ALiBi) instead of rotary positions, and no
`max_position_embeddings`. Baichuan 2 normalizes its output head: it has another vocabulary, or the weight of a loss
that the first generation did not have.
"""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.config.rope import RopeConfig
from maxlm.families.common import TENSORS, read_gated_mlp, read_model, write_gated_mlp
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import first_layer
from maxlm.families.settings import Settings

_VOCABULARY_2 = 125_696
_APART = (".q_proj.", ".k_proj.", ".v_proj.")
BAICHUAN_TENSORS = (
    *(each for each in TENSORS if not any(part in each.name for part in _APART)),
    tensor("model.layers.{layer}.self_attn.W_pack.weight", "layer/mixer/query", "layer/mixer/key", "layer/mixer/value"),
)


def _read_baichuan(settings: Settings) -> Description:
    embed_dim, heads = settings.size("hidden_size"), settings.size("num_attention_heads")
    has_rope = settings.get("max_position_embeddings", None) is not None
    is_second = settings.size("vocab_size") == _VOCABULARY_2 or settings.get("z_loss_weight", None) is not None
    for name in ("z_loss_weight", "gradient_checkpointing"):
        settings.get(name, None)
    mixer = AttentionConfig(
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=embed_dim // heads,
        rope=RopeConfig() if has_rope else None,
        alibi=not has_rope,
    )
    layer = LayerConfig(mixer=mixer, mlp=read_gated_mlp(settings))
    return read_model(
        settings,
        [layer] * settings.size("num_hidden_layers"),
        max_length=settings.size("model_max_length", *([4096] if has_rope else [])),
        normalized_head=is_second,
    )


def _write_baichuan(description: Description) -> dict[str, Any]:
    model, layer = description.model, first_layer(description.model)
    has_rope = layer.mixer.rope is not None
    # The class of 7B models of the first generation has another name.
    is_first = has_rope and not model.normalized_head
    return {
        "architectures": ["BaiChuanForCausalLM" if is_first else "BaichuanForCausalLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": layer.mixer.num_heads,
        "rms_norm_eps": model.norm.epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings" if has_rope else "model_max_length": description.max_length,
        **({"z_loss_weight": 0} if model.normalized_head else {}),
        **write_gated_mlp(layer.mlp),
    }


FAMILIES = (
    Family(
        "baichuan",
        "BaichuanForCausalLM",
        _read_baichuan,
        _write_baichuan,
        BAICHUAN_TENSORS,
        ignored=r".*\.rotary_emb\.inv_freq",
        is_in_transformers=False,
    ),
)
