"""Prefixes as Hugging Face's `peft` stores them: one array of the keys and values of all layers, in its order of heads.

There virtual tokens have the first positions, and the others come after them; their keys do not rotate. So the query of
token i rotates by P + i, and here by i: the products are equal if keys are rotated by -P when they are read.

Dimensions: P virtual tokens, N layers, K key-value heads, E head_dim, X = K * E.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from maxlm.config.adapters import PrefixConfig
from maxlm.config.layers import AttentionConfig
from maxlm.errors import CheckpointError
from maxlm.interop.huggingface import find_family
from maxlm.layers.stack import layer_indices
from maxlm.models.decoder import Decoder
from maxlm.models.virtual_tokens import position_obstacle
from maxlm.ops.rope import apply_rope, rope_angles

TENSOR = "prompt_embeddings"


@dataclass(frozen=True)
class _Layer:
    """A layer of attention: its stack and its place in that; for each of our channels of keys and values, theirs."""

    path: str
    place: tuple[int, ...]
    mixer: AttentionConfig
    channels: dict[str, np.ndarray]

    def rotated(self, keys_PX: np.ndarray, positions: int) -> np.ndarray:
        """Keys, in our order of channels, rotated by so many positions."""
        mixer = self.mixer
        if mixer.rope is None:
            return keys_PX
        cos, sin = rope_angles(jnp.full((1, len(keys_PX)), positions), mixer.rope, mixer.head_dim)
        # Without the factor of some settings on rotated queries and keys: these keys do not have it.
        length = jnp.hypot(cos, sin)
        keys_1PKE = jnp.asarray(keys_PX, jnp.float32).reshape(1, -1, mixer.num_kv_heads, mixer.head_dim)
        return np.asarray(apply_rope(keys_1PKE, (cos / length, sin / length))).reshape(keys_PX.shape)


def read_prefix(
    settings: dict[str, Any], tensors: dict[str, np.ndarray], base: Decoder, file: Path
) -> tuple[PrefixConfig, dict[str, dict[str, dict[tuple[int, ...], np.ndarray]]]]:
    """The configuration, and by path, name and place the keys and values.

    Raises:
      CheckpointError: they are not of this model, or it computes something else than peft does.
    """
    layers = _layers(base, file)
    tokens, size = settings.get("num_virtual_tokens"), layers[0].channels["key"].size
    if not isinstance(tokens, int) or tokens < 1:
        raise CheckpointError(
            f"{file.parent}: num_virtual_tokens is {tokens!r}, and must be a number from 1 on; copy the file again"
        )
    shape = [tokens, 2 * len(layers) * size]
    found = {name: list(x.shape) for name, x in tensors.items()}
    if found != {TENSOR: shape}:
        raise CheckpointError(
            f"{file}: has the tensors {found}, but the configuration and the model make them {{{TENSOR!r}: {shape}}};"
            " give the model and the adapter_config.json of this prefix"
        )
    values: dict[str, dict[str, dict[tuple[int, ...], np.ndarray]]] = {}
    for layer, pair in zip(layers, tensors[TENSOR].reshape(tokens, len(layers), 2, size).swapaxes(0, 1)):
        keys_PX, values_PX = (pair[:, i, layer.channels[name]] for i, name in enumerate(("key", "value")))
        for name, x in (("key", layer.rotated(keys_PX, -tokens)), ("value", values_PX)):
            values.setdefault(f"{layer.path}/virtual_{name}", {"new": {}})["new"][layer.place] = x
    return PrefixConfig(tokens=tokens), values


def written_prefix(
    base: Decoder, arrays: dict[str, np.ndarray], file: Path
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """peft's settings and tensors for keys and values by path.

    Raises:
      CheckpointError: peft would compute something else.
    """
    layers = _layers(base, file)
    mixer, parts = layers[0].mixer, []
    for layer in layers:
        keys_PX, values_PX = (
            np.asarray(arrays[f"{layer.path}/virtual_{name}"])[layer.place] for name in ("key", "value")
        )
        for name, x_PX in (("key", layer.rotated(keys_PX, len(keys_PX))), ("value", values_PX)):
            theirs_PX = np.empty(x_PX.shape, np.float32)
            theirs_PX[:, layer.channels[name]] = x_PX
            parts.append(theirs_PX)
    settings = {
        "peft_type": "PREFIX_TUNING",
        "num_virtual_tokens": len(parts[0]),
        "token_dim": parts[0].shape[1],
        "num_attention_heads": mixer.num_kv_heads,
        "num_layers": len(layers),
        "num_transformer_submodules": 1,
        "encoder_hidden_size": parts[0].shape[1],
        "prefix_projection": False,
    }
    return settings, {TENSOR: np.concatenate(parts, axis=1)}


def _layers(base: Decoder, file: Path) -> list[_Layer]:
    """The layers in order."""
    if obstacle := _obstacle(base):
        raise CheckpointError(
            f"{file}: peft gives virtual tokens the first positions, so that with {obstacle} they compute something"
            " else than here; train a prefix for the model with adapters: {kind: prefix}"
        )
    _, placed = find_family(base)
    rows = {(piece.path, piece.place): piece.rows for tensor in placed.values() for piece in tensor.pieces}
    layers = {}
    for group, positions in enumerate(layer_indices(base.config)):
        for position, numbers in enumerate(positions):
            mixer = base.config.layers[group].pattern[position].mixer
            assert isinstance(mixer, AttentionConfig)
            path = f"layers/{group}/{position}/mixer"
            for place, number in np.ndenumerate(numbers):
                channels = {name: np.argsort(np.argsort(rows[f"{path}/{name}", place])) for name in ("key", "value")}
                layers[int(number)] = _Layer(path, place, mixer, channels)
    return [layers[number] for number in sorted(layers)]


def _obstacle(base: Decoder) -> str | None:
    """Why prefixes compute something else in peft."""
    if obstacle := position_obstacle(base.config):
        return obstacle
    mixers = [layer.mixer for layer in base.config.each_layer()]
    if len({(mixer.num_kv_heads, mixer.head_dim) for mixer in mixers if isinstance(mixer, AttentionConfig)}) > 1:
        return "key-value heads that differ by layer"
    return None
