"""Prompt tuning (arXiv:2104.08691): trained embeddings of virtual tokens before each document.

In a causal decoder no virtual token depends on what follows it, so their keys and values in each layer depend on their
embeddings and the frozen weights only. They are computed once, for all documents of all rows, and then are virtual
tokens of the layers, as those of a prefix are.

Dimensions: P virtual tokens, D embed, N copies, K key-value heads, E head_dim; `...` axes over the layers of a stack.
"""

import jax
import jax.numpy as jnp

from maxlm.config.layers import AttentionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.sharding import is_explicit, logical_to_spec, shard, sharded_count
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import ConfigError
from maxlm.layers.attend import reshape
from maxlm.models.adapters.frozen import weights_of
from maxlm.models.decoder import Decoder
from maxlm.models.virtual_tokens import plan_with_virtual_tokens, position_obstacle
from maxlm.ops.linear import embed
from maxlm.ops.rope import apply_rope, rope_angles


def check_prompt(config: ModelConfig) -> None:
    """Raise ConfigError if keys and values of the layers cannot take the place of a prompt in this model."""
    obstacle = position_obstacle(config)
    if obstacle is None and config.prefix_attention:
        obstacle = "prefix_attention"
    if obstacle is None and config.critic == "own":
        obstacle = "a critic with layers of its own"
    if obstacle is not None:
        raise ConfigError(
            [
                f"adapters.kind: prompt is for causal attention to all earlier tokens, and the model has {obstacle};"
                " set lora"
            ]
        )


def keys_and_values(model: Decoder, prompt_PD: jax.Array) -> dict[str, jax.Array]:
    """Keys and values of virtual tokens, by path, that these embeddings have in the layers of a model.

    The tokens of a document count from 0 and the virtual ones up to it: from -P to -1.
    """
    tokens, plan = prompt_PD.shape[0], Decoder(model.config, model.execution)
    # The same computation as of words, whose table has other rows.
    reading = unflatten(weights_of(model) | {"embedding": prompt_PD}, plan)
    # On a mesh, a copy for each device that has rows or a part of rows: tokens attend to a cache without exchange.
    copies, parts = (sharded_count(logical_to_spec((axis,))) if is_explicit() else 1 for axis in ("batch", "length"))
    numbers_NL = jnp.tile(jnp.arange(tokens), (copies, parts))
    caches = reading.create_caches(copies, tokens, jnp.dtype(model.execution.activation_dtype))
    caches = reading(numbers_NL, positions_BL=numbers_NL, caches=caches).caches
    declared = flatten(plan_with_virtual_tokens(model, tokens))
    values: dict[str, jax.Array] = {}
    for group, positions in enumerate(caches):
        for position, cache in enumerate(positions):
            mixer = model.config.layers[group].pattern[position].mixer
            assert isinstance(mixer, AttentionConfig)
            path = f"layers/{group}/{position}/mixer/virtual"
            for name, x, moves in (("key", cache.keys_BKSE, -tokens), ("value", cache.values_BKSE, 0)):
                found = _as_weight(jnp.mean(x.astype(jnp.float32), axis=-4), mixer, moves)
                values[f"{path}_{name}"] = shard(found, *declared[f"{path}_{name}"].axes)
    return values


def _as_weight(x: jax.Array, mixer: AttentionConfig, positions: int) -> jax.Array:
    """[..., K, P, E], rotated by so many positions, as [..., P, K * E]."""
    *lead, heads, tokens, size = x.shape
    flat_XPKE = jnp.swapaxes(x.reshape(-1, heads, tokens, size), 1, 2)
    if mixer.rope is not None and positions:
        cos, sin = rope_angles(jnp.full((1, tokens), positions), mixer.rope, mixer.head_dim)
        # Rotated keys have the factor of some settings already.
        factor = jnp.hypot(cos, sin)
        flat_XPKE = apply_rope(flat_XPKE, (cos / factor, sin / factor))
    return reshape(flat_XPKE, (*lead, tokens, heads * size), (*[None] * (len(lead) + 1), "kv_heads"))


def initial_prompt(model: Decoder, tokens: int, key: jax.Array, initial_ids: tuple[int, ...] | None) -> jax.Array:
    """Embeddings [P, D] of these tokens, repeated or cut; None: of tokens drawn from the vocabulary."""
    if initial_ids is None:
        ids_P = jax.random.randint(key, (tokens,), 0, model.config.vocab_size)
    else:
        ids_P = jnp.resize(jnp.asarray(initial_ids, jnp.int32), (tokens,))
    return embed(model.embedding, ids_P[None], "float32")[0]
