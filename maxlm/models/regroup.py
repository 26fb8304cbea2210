"""Stack the layers of a model in other groups: another layout of the same weights for the same function."""

from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config.layers import LayerGroup, PatternLayerConfig
from maxlm.core.tree import path_of
from maxlm.layers.layer import Layer
from maxlm.layers.stack import each_layer, layer_indices
from maxlm.models.decoder import Decoder
from maxlm.ops.qtensor import QTensor


def regroup(model: Decoder, layers: tuple[LayerGroup, ...]) -> Decoder:
    """The model with its layers in these groups, which must hold the same layers in the same order."""
    config = model.config.model_copy(update={"layers": layers})
    if list(config.each_layer()) != list(model.config.each_layer()):
        raise ValueError("the groups hold other layers than the model")
    by_number = list(each_layer(model.layers, model.config))

    def stacked(numbers: Any) -> Any:
        parts = [by_number[number] for number in numbers.ravel()]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves).reshape(*numbers.shape, *leaves[0].shape), *parts)

    new_layers = iter([stacked(numbers) for group in layer_indices(config) for numbers in group])
    is_part = lambda node: isinstance(node, Layer | QTensor)  # noqa: E731
    is_stack = lambda path: path_of(path).startswith("layers/")  # noqa: E731
    parts = jax.tree_util.tree_leaves_with_path(model, is_leaf=is_part)
    others = iter([part for path, part in parts if not is_stack(path)])
    plan = type(model)(config, model.execution)
    places, structure = jax.tree_util.tree_flatten_with_path(plan, is_leaf=is_part)
    return jax.tree.unflatten(structure, [next(new_layers if is_stack(path) else others) for path, _ in places])


def unrolled(model: Decoder) -> Decoder:
    """The model with each layer stacked alone, so that its loop over layers is unrolled when it is compiled.

    Decoding is faster so: weights and caches are used where they are, and not copied out of a stack and back.
    """
    layers = [PatternLayerConfig(mixer=layer.mixer, mlp=layer.mlp) for layer in model.config.each_layer()]
    return regroup(model, (LayerGroup(pattern=tuple(layers)),))
