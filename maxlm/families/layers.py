"""Lists of layers, as config.json has them, and groups of layers, as a model has them."""

import itertools
from collections.abc import Callable
from typing import Any

from maxlm.config.layers import LayerConfig, LayerGroup, PatternLayerConfig
from maxlm.config.model import ModelConfig
from maxlm.errors import CheckpointError
from maxlm.families.settings import Settings


def grouped(layers: list[LayerConfig]) -> tuple[LayerGroup, ...]:
    """Groups of these layers: as few different layers as possible in a loop, as many in loops as possible."""
    groups = []
    while layers:
        # Of all patterns that the layers begin with, the one whose repeats cover most layers; the shortest of those.
        lengths = range(1, len(layers) // 2 + 1)
        repeats = {length: _repeats(layers, length) for length in lengths}
        length = max(lengths, key=lambda each: (each * repeats[each] * (repeats[each] > 1), -each), default=1)
        repeat = repeats.get(length, 1)
        if repeat == 1:
            length = 1
        runs = [(layer, len(list(equal))) for layer, equal in itertools.groupby(layers[:length])]
        pattern = tuple(PatternLayerConfig(mixer=each.mixer, mlp=each.mlp, times=times) for each, times in runs)
        groups.append(LayerGroup(repeat=repeat, pattern=pattern))
        layers = layers[length * repeat :]
    return tuple(groups)


def _repeats(layers: list[LayerConfig], length: int) -> int:
    """How many times the first `length` layers are repeated at the beginning of the list."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(layers, layers[length:]))
    return 1 + len(list(same)) // length


def all_layers(model: ModelConfig) -> list[Any]:
    """The layers in order, of whatever kinds."""
    return list(model.each_layer())


def first_layer(model: ModelConfig) -> Any:
    """The first layer: the settings that all layers share."""
    return all_layers(model)[0]


def read_kinds(settings: Settings, default: Callable[[int], str], num_layers: int | None = None) -> list[str]:
    """`layer_types`: the kind of each layer, by default that of its number.

    num_layers: where it is missing.
    """
    num_layers = settings.size("num_hidden_layers", *([] if num_layers is None else [num_layers]))
    kinds = settings.items("layer_types")
    if kinds is None:
        return [default(number) for number in range(num_layers)]
    if len(kinds) != num_layers:
        raise CheckpointError(
            f"{settings.where}: layer_types has {len(kinds)} layers, and num_hidden_layers {num_layers}"
        )
    return kinds


def read_window(settings: Settings, kind: str, window: int | None) -> int | None:
    """The window of a layer of this kind in `layer_types`."""
    if kind == "full_attention":
        return None
    if kind != "sliding_attention" or window is None:
        reason = "without a sliding_window" if kind == "sliding_attention" else "which maxlm does not know"
        raise CheckpointError(f"{settings.where}: layer_types has {kind!r}, {reason}")
    return window


def write_windows(model: ModelConfig) -> dict[str, Any]:
    """The settings of windows, which must be the same in all layers that have one."""
    windows = [layer.mixer.window for layer in all_layers(model)]
    return {
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
        "sliding_window": next((window for window in windows if window is not None), None),
    }
