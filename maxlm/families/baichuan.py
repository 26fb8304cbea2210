"""Baichuan 7B, as its authors' code has it: Llama with one matrix for queries, keys and values."""

from typing import Any

from maxlm.config.layers import AttentionConfig, LayerConfig
from maxlm.families.common import TENSORS, read_attention, read_gated_mlp, read_model, write_gated_mlp, write_model
from maxlm.families.family import Description, Family, tensor
from maxlm.families.layers import first_layer
from maxlm.families.settings import Settings

_APART = (".q_proj.", ".k_proj.", ".v_proj.")
BAICHUAN_TENSORS = (
    *(each for each in TENSORS if not any(part in each.name for part in _APART)),
    tensor("model.layers.{layer}.self_attn.W_pack.weight", "layer/mixer/query", "layer/mixer/key", "layer/mixer/value"),
)


def _read_baichuan(settings: Settings) -> Description:
    mixer = AttentionConfig(**read_attention(settings, theta=10_000.0))
    layer = LayerConfig(mixer=mixer, mlp=read_gated_mlp(settings))
    return read_model(settings, [layer] * settings.size("num_hidden_layers"), max_length=4096)


def _write_baichuan(description: Description) -> dict[str, Any]:
    layer = first_layer(description.model)
    written = {**write_model(description), **write_gated_mlp(layer.mlp)}
    plain = layer.mixer.num_kv_heads == layer.mixer.num_heads and layer.mixer.rope.theta == 10_000
    if not plain or layer.mixer.head_dim * layer.mixer.num_heads != description.model.embed_dim:
        return {}
    return {key: value for key, value in written.items() if not key.startswith(("rope_", "head_dim", "num_key_"))}


FAMILIES = (
    Family(
        "baichuan",
        "BaiChuanForCausalLM",
        _read_baichuan,
        _write_baichuan,
        BAICHUAN_TENSORS,
        ignored=r".*\.rotary_emb\.inv_freq",
        is_in_transformers=False,
    ),
)
