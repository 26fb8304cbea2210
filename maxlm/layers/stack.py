"""Stacked layers: groups of layers, each a pattern that is repeated under a scan.

A position of a pattern is one stack: its weights and its caches have a leading axis over the repeats, and another if
the position holds several equal layers in a row (`times`). The weights of all layers together are a tuple of groups,
each a tuple of positions; so are the caches.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config.execution import ExecutionConfig
from maxlm.config.layers import PatternLayerConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import stack
from maxlm.core.remat import rematerialize
from maxlm.core.sharding import is_explicit, shard
from maxlm.core.term import LossOutput, unite
from maxlm.layers.cache import Cache
from maxlm.layers.context import TokenContext
from maxlm.layers.layer import Layer

# Stacked layers of each position of a pattern.
Group = tuple[Layer, ...]


def declare_layers(config: ModelConfig, execution: ExecutionConfig) -> tuple[Group, ...]:
    """The declarations of all layers. Only the longest group is sharded over pipeline stages."""
    groups = []
    for number, indices in enumerate(layer_indices(config)):
        axis = "layers" if number == config.longest_group else "unstaged_layers"
        groups.append(
            tuple(
                stack(Layer(config, layer, execution), each, axes=(axis, "times")[: each.ndim], name="layers")
                for layer, each in zip(config.layers[number].pattern, indices)
            )
        )
    return tuple(groups)


def layer_indices(config: ModelConfig) -> list[list[np.ndarray]]:
    """The number of each layer, counted from the input, by group and position: [repeat] or [repeat, times]."""
    groups, first = [], 0
    for group in config.layers:
        numbers = first + np.arange(group.num_layers).reshape(group.repeat, -1)
        parts = np.split(numbers, np.cumsum([layer.times for layer in group.pattern])[:-1], axis=1)
        groups.append([part[:, 0] if part.shape[1] == 1 else part for part in parts])
        first += group.num_layers
    return groups


def apply_group(
    group: Group,
    pattern: tuple[PatternLayerConfig, ...],
    execution: ExecutionConfig,
    x: Any,
    context: TokenContext,
    caches: Any = None,
    *,
    first: int | jax.Array,
) -> tuple[Any, LossOutput, Any]:
    """Apply a group's layers, or some repeats of them: the stream, auxiliary losses, and caches.

    Args:
      group: the stacked layers of each position of `pattern`.
      x: the stream between layers.
      caches: of each position, stacked as its layers; None to attend to the tokens of `x` only.
      first: the number of the first layer, counted from the model's input.
    """

    def apply_layer(layer, number, x, cache):
        if cache is not None and is_explicit():
            # Weights are gathered when the layer before is computed. Without a gradient, nothing else keeps the
            # compiler from gathering those of all layers at once, or before a loop over tokens.
            layer, x = jax.lax.optimization_barrier((layer, x))
        if context.noise is None:
            return layer(x, context, cache)
        noise = context.noise.at_layer(number)
        return noise.on_adapters(layer)(x, replace(context, noise=noise), cache)

    apply_layer = rematerialize(apply_layer, execution.remat)

    def apply_pattern(layers, number, x, caches):
        auxiliary, new_caches = [], []
        for position, layer, cache in zip(pattern, layers, caches or [None] * len(layers)):
            if position.times == 1:
                x, added, cache = apply_layer(layer, number, x, cache)
            else:
                x, added, cache = _repeat(apply_layer, layer, number, 1, x, cache, unroll=execution.unroll)
            number = number + position.times
            auxiliary.append(added)
            new_caches.append(cache)
        return x, unite(auxiliary), caches and tuple(new_caches)

    step = sum(position.times for position in pattern)
    return _repeat(apply_pattern, group, first, step, x, caches, unroll=execution.unroll)


def create_caches(layers: tuple[Group, ...], config: ModelConfig, batch_size: int, max_length: int, dtype: Any) -> Any:
    """Empty caches for all layers, stacked like their weights."""

    def create(layer: Layer, indices: np.ndarray) -> Any:
        cache = layer.mixer.create_cache(batch_size, max_length, dtype)
        axes = (*[None] * indices.ndim, *cache.axes)
        return jax.tree.map(lambda leaf: shard(jnp.broadcast_to(leaf, (*indices.shape, *leaf.shape)), *axes), cache)

    return tuple(
        tuple(create(layer, each) for layer, each in zip(group, numbers))
        for group, numbers in zip(layers, layer_indices(config))
    )


def write_row(caches: Any, other: Any, row: jax.Array) -> Any:
    """The caches with the row of other ones, whose batch is one."""
    is_cache = lambda node: isinstance(node, Cache)  # noqa: E731
    return jax.tree.map(lambda cache, part: cache.write_row(part, row), caches, other, is_leaf=is_cache)


def take_rows(caches: Any, rows: jax.Array) -> Any:
    """The caches with these of their rows, in this order."""
    return jax.tree.map(lambda cache: cache.take(rows), caches, is_leaf=lambda node: isinstance(node, Cache))


def each_layer(layers: tuple[Group, ...], config: ModelConfig) -> Iterator[Layer]:
    """The layers in order, each with its own weights."""
    for group, numbers in zip(layers, layer_indices(config)):
        places = {
            number: (position, place) for position, each in enumerate(numbers) for place, number in np.ndenumerate(each)
        }
        for number in sorted(places):
            position, place = places[number]
            yield jax.tree.map(lambda leaf, place=place: leaf[place], group[position])


def _repeat(function: Any, stacked: Any, first: Any, step: int, x: Any, caches: Any, *, unroll: bool):
    """Apply `function` to each of the stacked layers, in order; their numbers are first, first + step, ..."""

    def body(x, scanned):
        layer, number, cache = scanned
        x, auxiliary, cache = function(layer, number, x, cache)
        return x, (auxiliary, cache)

    length = jax.tree.leaves(stacked)[0].shape[0]
    if length == 1:
        # Without a loop there is nothing to copy out of the stacks and back.
        layer, cache = jax.tree.map(lambda leaf: leaf[0], (stacked, caches))
        x, auxiliary, cache = function(layer, first, x, cache)
        return x, auxiliary, jax.tree.map(lambda leaf: leaf[None], cache)
    numbers = first + step * jnp.arange(length)
    x, (auxiliary, caches) = jax.lax.scan(body, x, (stacked, numbers, caches), unroll=unroll)
    return x, jax.tree.map(lambda parts: jnp.sum(parts, axis=0), auxiliary), caches
