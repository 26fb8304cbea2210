"""Virtual tokens: keys and values that layers of attention learn, and every token attends to (arXiv:2101.00190)."""

from typing import Any

from maxlm.config.layers import AttentionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.tree import unflatten
from maxlm.errors import ConfigError
from maxlm.models.adapters.frozen import weights_of
from maxlm.models.decoder import Decoder


def with_virtual_tokens(decoder: Decoder, tokens: int, values: dict[str, Any]) -> Decoder:
    """A decoder, of arrays or declarations, whose layers of attention have virtual tokens.

    Args:
      values: keys and values by path, in place of the declarations of `plan_with_virtual_tokens`.
    """
    return unflatten(weights_of(decoder) | values, plan_with_virtual_tokens(decoder, tokens))


def plan_with_virtual_tokens(decoder: Decoder, tokens: int) -> Decoder:
    """The declarations of a decoder whose layers of attention have virtual tokens.

    Raises:
      ConfigError: it has some already, or no layer of attention.
    """
    mixers = [layer.mixer for layer in decoder.config.each_layer()]
    if any(isinstance(mixer, AttentionConfig) and mixer.virtual_tokens is not None for mixer in mixers):
        raise ConfigError(
            [
                "adapters.kind: prefix adds virtual tokens, and the model has some already; train those with kind:"
                " layers and targets: [role:virtual]"
            ]
        )
    if not any(isinstance(mixer, AttentionConfig) for mixer in mixers):
        kinds = ", ".join(dict.fromkeys(mixer.kind for mixer in mixers))
        raise ConfigError(
            [f"adapters.kind: prefix is for mixers of kind attention, and the model has {kinds}; set lora"]
        )
    return Decoder(decoder.config.with_virtual_tokens(tokens), decoder.execution)


def position_obstacle(config: ModelConfig) -> str | None:
    """What of a model depends on the positions of virtual tokens in a way that their keys cannot make up for."""
    if config.learned_positions is not None:
        return "learned positions"
    for mixer in (layer.mixer for layer in config.each_layer()):
        if not isinstance(mixer, AttentionConfig):
            return f"mixers of kind {mixer.kind}"
        if mixer.window is not None:
            return "windows"
        if mixer.alibi or mixer.relative_bias is not None:
            return "biases by distance"
        if mixer.rope is not None and (mixer.rope.depends_on_length or mixer.rope.two_dimensional):
            return "rotary positions that depend on lengths"
    return None


def without_virtual_tokens(decoder: Decoder) -> Decoder:
    """A decoder without its virtual tokens."""
    plan = Decoder(decoder.config.with_virtual_tokens(None), decoder.execution)
    kept = weights_of(plan)
    return unflatten({path: x for path, x in weights_of(decoder).items() if path in kept}, plan)
