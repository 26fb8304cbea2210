"""A Llama in plain JAX, float32, without a line of maxlm: what the benchmarks compare with.

Layers are stacked and scanned; attention is a masked softmax over whole rows; decoding is greedy, with one cache array
for all layers, and the whole loop over tokens is one compiled program.

Dimensions: B batch, L length, D embed, H heads, E head_dim, F mlp, V vocab, T cache slots.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Shape:
    """Sizes; the defaults have 6.9 million parameters."""

    layers: int = 8
    embed: int = 256
    heads: int = 4
    head: int = 64
    mlp: int = 704
    vocab: int = 2048


def initialize(shape: Shape, key: jax.Array) -> dict[str, Any]:
    inner = shape.heads * shape.head
    sizes = {
        **dict.fromkeys(("query", "key", "value"), (shape.embed, inner)),
        "out": (inner, shape.embed),
        **dict.fromkeys(("gate", "up"), (shape.embed, shape.mlp)),
        "down": (shape.mlp, shape.embed),
    }
    keys = dict(zip(sizes, jax.random.split(key, len(sizes))))
    layers = {
        name: jax.random.normal(keys[name], (shape.layers, *size)) * size[0] ** -0.5 for name, size in sizes.items()
    }
    ones = jnp.ones((shape.layers, shape.embed))
    return {
        "embedding": 0.02 * jax.random.normal(key, (shape.vocab, shape.embed)),
        "layers": layers | {"attention_norm": ones, "mlp_norm": ones},
        "final_norm": jnp.ones(shape.embed),
    }


def loss(shape: Shape, weights: dict[str, Any], tokens_BL: jax.Array, targets_BL: jax.Array) -> jax.Array:
    """Mean cross-entropy of the targets."""
    positions_L = jnp.arange(tokens_BL.shape[1])
    mask_LL = positions_L[:, None] >= positions_L

    def layer(x_BLD, layer_weights):
        query, key, value = _project(shape, layer_weights, x_BLD, positions_L)
        return _finish(layer_weights, x_BLD, _attend(query, key, value, mask_LL)), None

    x_BLD, _ = jax.lax.scan(layer, weights["embedding"][tokens_BL], weights["layers"])
    logits = _norm(x_BLD, weights["final_norm"]) @ weights["embedding"].T
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets_BL[..., None], axis=-1))


@partial(jax.jit, static_argnums=(0, 3, 4))
def generate(shape: Shape, weights: dict[str, Any], tokens_B: jax.Array, count: int, slots: int) -> jax.Array:
    """Continue rows of one token by `count` tokens: [B, count]."""
    cache = jnp.zeros((2, shape.layers, tokens_B.shape[0], slots, shape.heads, shape.head))

    def step(carry, position):
        tokens_B, keys, values = carry

        def layer(carry, scanned):
            x_BLD, keys, values = carry
            layer_weights, index = scanned
            query, key, value = _project(shape, layer_weights, x_BLD, position[None])
            keys = jax.lax.dynamic_update_slice(keys, key[None], (index, 0, position, 0, 0))
            values = jax.lax.dynamic_update_slice(values, value[None], (index, 0, position, 0, 0))
            mixed = _attend(query, keys[index], values[index], jnp.arange(slots) <= position)
            return (_finish(layer_weights, x_BLD, mixed), keys, values), None

        start = weights["embedding"][tokens_B][:, None], keys, values
        (x_BLD, keys, values), _ = jax.lax.scan(layer, start, (weights["layers"], jnp.arange(shape.layers)))
        logits = _norm(x_BLD[:, 0], weights["final_norm"]) @ weights["embedding"].T
        tokens_B = jnp.argmax(logits, axis=-1)
        return (tokens_B, keys, values), tokens_B

    _, tokens = jax.lax.scan(step, (tokens_B, *cache), jnp.arange(count))
    return tokens.T


def _project(shape: Shape, weights: dict[str, jax.Array], x_BLD, positions_L):
    normed = _norm(x_BLD, weights["attention_norm"])
    heads = lambda name: (normed @ weights[name]).reshape(*x_BLD.shape[:2], shape.heads, shape.head)  # noqa: E731
    return _rope(heads("query"), positions_L), _rope(heads("key"), positions_L), heads("value")


def _attend(query_BLHE, key_BTHE, value_BTHE, mask):
    logits = jnp.einsum("blhe,bthe->bhlt", query_BLHE, key_BTHE) * query_BLHE.shape[-1] ** -0.5
    return jnp.einsum("bhlt,bthe->blhe", jax.nn.softmax(jnp.where(mask, logits, -1e30)), value_BTHE)


def _finish(weights: dict[str, jax.Array], x_BLD, mixed_BLHE):
    x_BLD = x_BLD + mixed_BLHE.reshape(*x_BLD.shape[:2], -1) @ weights["out"]
    normed = _norm(x_BLD, weights["mlp_norm"])
    return x_BLD + (jax.nn.silu(normed @ weights["gate"]) * (normed @ weights["up"])) @ weights["down"]


def _norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def _rope(x_BLHE, positions_L):
    half = x_BLHE.shape[-1] // 2
    angles = positions_L[:, None, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin, first, second = jnp.cos(angles), jnp.sin(angles), x_BLHE[..., :half], x_BLHE[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
