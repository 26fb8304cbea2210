"""What the settings and tensors of most families have in common: they follow Llama's."""

from typing import Any

from maxlm.config.layers import GatedMlpConfig, LayerConfig
from maxlm.config.model import ModelConfig, NormConfig
from maxlm.config.rope import DynamicScaling
from maxlm.families.family import Description, Tensor, tensor
from maxlm.families.layers import first_layer, grouped
from maxlm.families.rope import read_rope, write_rope
from maxlm.families.settings import Settings

# Names of activations: theirs to ours. The first name of each is written.
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}

TENSORS = (
    tensor("model.embed_tokens.weight", "embedding"),
    tensor("model.layers.{layer}.input_layernorm.weight", "layer/mixer_norm/scale"),
    tensor("model.layers.{layer}.self_attn.q_proj.weight", "layer/mixer/query"),
    tensor("model.layers.{layer}.self_attn.k_proj.weight", "layer/mixer/key"),
    tensor("model.layers.{layer}.self_attn.v_proj.weight", "layer/mixer/value"),
    tensor("model.layers.{layer}.self_attn.o_proj.weight", "layer/mixer/out"),
    tensor("model.layers.{layer}.self_attn.q_proj.bias", "layer/mixer/query_bias"),
    tensor("model.layers.{layer}.self_attn.k_proj.bias", "layer/mixer/key_bias"),
    tensor("model.layers.{layer}.self_attn.v_proj.bias", "layer/mixer/value_bias"),
    tensor("model.layers.{layer}.self_attn.o_proj.bias", "layer/mixer/out_bias"),
    tensor("model.layers.{layer}.self_attn.q_norm.weight", "layer/mixer/query_norm/scale"),
    tensor("model.layers.{layer}.self_attn.k_norm.weight", "layer/mixer/key_norm/scale"),
    tensor("model.layers.{layer}.post_attention_layernorm.weight", "layer/mlp_norm/scale"),
    tensor("model.layers.{layer}.mlp.gate_proj.weight", "layer/mlp/gate"),
    tensor("model.layers.{layer}.mlp.up_proj.weight", "layer/mlp/up"),
    tensor("model.layers.{layer}.mlp.down_proj.weight", "layer/mlp/down"),
    tensor("model.norm.weight", "final_norm/scale"),
    tensor("lm_head.weight", "head"),
)


def layer_norm(name: str, ours: str, **layout: Any) -> tuple[Tensor, Tensor]:
    """The two tensors of a LayerNorm."""
    return tensor(f"{name}.weight", f"{ours}/scale", **layout), tensor(f"{name}.bias", f"{ours}/bias", **layout)


def read_model(
    settings: Settings,
    layers: list[LayerConfig],
    *,
    max_length: int,
    epsilon: float = 1e-6,
    tied: bool = False,
    norm: dict[str, Any] | None = None,
    **more: Any,
) -> Description:
    """The model of these layers, with the settings that all these families have.

    Args:
      max_length, epsilon, tied: where they are missing, as transformers has them.
      norm: other settings of the norms; more: of the model.
    """
    model = ModelConfig(
        vocab_size=settings.size("vocab_size"),
        embed_dim=settings.size("hidden_size"),
        norm=NormConfig(kind="rms", epsilon=settings.get("rms_norm_eps", epsilon), **(norm or {})),
        layers=grouped(layers),
        tie_embeddings=settings.get("tie_word_embeddings", tied),
        **more,
    )
    longest = settings.size("max_position_embeddings", max_length)
    rotary = layers[0].mixer.rotary
    if rotary and isinstance(scaling := rotary[0].scaling, DynamicScaling):
        longest = int(scaling.factor * longest)
    return Description(model, longest)


def read_attention(
    settings: Settings,
    *,
    theta: float | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    **more: Any,
) -> dict[str, Any]:
    """The settings of attention.

    Args:
      theta: of rotary positions, where it is missing; None: they are in `more`.
      num_kv_heads: where they are missing; None, as null in the file: as many as heads.
      head_dim: where it is missing; None, as null in the file: the width divided by the heads.
    """
    heads = settings.size("num_attention_heads")
    has_kv_heads = settings.get("num_key_value_heads", num_kv_heads) is not None
    has_head_dim = settings.get("head_dim", head_dim) is not None
    return {
        "num_heads": heads,
        "num_kv_heads": settings.size("num_key_value_heads", num_kv_heads) if has_kv_heads else heads,
        "head_dim": settings.size("head_dim", head_dim) if has_head_dim else settings.size("hidden_size") // heads,
        **({} if theta is None else {"rope": read_rope(settings, theta=theta)}),
        **more,
    }


def read_gated_mlp(settings: Settings, activation: Any = None) -> GatedMlpConfig:
    """`activation`: None: `hidden_act`."""
    dim = settings.size("intermediate_size")
    return GatedMlpConfig(dim=dim, activation=read_activation(settings) if activation is None else activation)


def read_activation(settings: Settings, key: str = "hidden_act", default: str = "silu") -> Any:
    settings.require(key, default, *ACTIVATIONS)
    return ACTIVATIONS[settings.get(key, default)]


def write_model(description: Description) -> dict[str, Any]:
    """The settings that all these families have."""
    model = description.model
    mixer: Any = first_layer(model).mixer
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": mixer.num_heads,
        "num_key_value_heads": mixer.num_kv_heads,
        "head_dim": mixer.head_dim,
        "rms_norm_eps": model.norm.epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": longest_unscaled(description),
        **write_rope(mixer.rope),
    }


def longest_unscaled(description: Description) -> int:
    """The longest text, without dynamic scaling."""
    rotary = first_layer(description.model).mixer.rotary
    is_dynamic = rotary and isinstance(rotary[0].scaling, DynamicScaling)
    return rotary[0].scaling.original_length if is_dynamic else description.max_length


def write_gated_mlp(mlp: Any) -> dict[str, Any]:
    return {"intermediate_size": mlp.dim, "hidden_act": write_activation(mlp.activation)}


def write_activation(activation: str) -> str:
    return next(theirs for theirs, ours in ACTIVATIONS.items() if ours == activation)
