"""Prefix language models against the decoder in numpy: rows, gradients, packing, and decoding with caches."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import log_softmax, logits_of_row
from tiny_decoder import VOCAB_SIZE, drawn_model, text_loss

from maxlm.config import ModelConfig
from maxlm.core.batch import Stream
from maxlm.core.tree import flatten
from maxlm.models.decoder import Decoder

SIZES = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
LATENT = {"kind": "mla", "num_heads": 4, "latent_dim": 8, "content_dim": 6, "rope_dim": 4, "value_dim": 5}
LAYERS = {
    "windows, ALiBi, sinks, relative bias": {
        "repeat": 1,
        "pattern": [
            {"mixer": SIZES | {"window": 4, "sinks": True}, "mlp": {"dim": 24}},
            {"mixer": SIZES | {"rope": None, "alibi": True, "soft_cap": 3.0}, "mlp": {"dim": 24}},
            {"mixer": SIZES | {"relative_bias": {"buckets": 6, "max_distance": 10}}, "mlp": {"dim": 24}},
        ],
    },
    "two-dimensional RoPE": {
        "repeat": 2,
        "mixer": SIZES | {"rope": {"two_dimensional": True, "theta": 100.0}},
        "mlp": {"dim": 24},
    },
    "latent attention": {"repeat": 2, "mixer": LATENT, "mlp": {"dim": 24}},
}

# Three documents, the last without a prefix, and padding.
SEGMENTS = np.array([[1] * 6 + [2] * 5 + [3] * 3 + [0] * 2], np.int32)
POSITIONS = np.array([[*range(6), *range(5), *range(3), 0, 0]], np.int32)
PREFIXES = np.array([[4] * 6 + [2] * 5 + [0] * 5], np.int32)
REAL = 14


@cache
def make(name: str) -> Decoder:
    config = {"vocab_size": VOCAB_SIZE, "embed_dim": 16, "prefix_attention": True, "layers": LAYERS[name]}
    return drawn_model(ModelConfig.model_validate(config))


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, shape).astype(np.int32)


@jax.jit
def extend(model, tokens, positions, prefixes, caches):
    output = model(tokens, positions_BL=positions, prefix_lengths_BL=prefixes, caches=caches)
    return model.logits(output.hidden_BLD), output.caches


@jax.jit
def logits(model, tokens, **arguments):
    return model.logits(model(tokens, **arguments).hidden_BLD)


@pytest.mark.parametrize("name", LAYERS)
def test_rows_match_formula(name):
    model, tokens = make(name), tokens_of((1, 16))
    expected = logits_of_row(model.config, flatten(model), tokens[0], POSITIONS[0], SEGMENTS[0], PREFIXES[0])
    places = {"positions_BL": POSITIONS, "segment_ids_BL": SEGMENTS}
    got = logits(model, tokens, **places, prefix_lengths_BL=PREFIXES)
    np.testing.assert_allclose(got[0, :REAL], expected[:REAL], rtol=2e-4, atol=2e-4)
    causal = logits(model, tokens, **places)
    assert np.abs(causal - got)[0, :3].max() > 0.01
    np.testing.assert_allclose(causal[0, 11:REAL], got[0, 11:REAL], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_gradient_matches_finite_differences(name):
    """Finite differences of the float64 formula, along a random direction through all weights at once."""
    model, tokens, targets = make(name), tokens_of((1, 16)), tokens_of((1, 16), seed=1)
    weights = np.where(POSITIONS >= PREFIXES - 1, SEGMENTS > 0, 0).astype(np.float32)
    batch = Stream(tokens, targets, weights, SEGMENTS, POSITIONS, PREFIXES)

    def loss(model):
        return text_loss(model, batch).terms["cross_entropy"].sum

    gradient = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(jax.jit(jax.grad(loss))(model)).items()}
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(model).items()}

    def reference(moved):
        scores = log_softmax(logits_of_row(model.config, moved, tokens[0], POSITIONS[0], SEGMENTS[0], PREFIXES[0]))
        return -(weights[0] * scores[np.arange(16), targets[0]]).sum()

    random = np.random.default_rng(0)
    direction = {path: random.standard_normal(leaf.shape) for path, leaf in flat.items()}
    ahead, behind = ({path: flat[path] + step * direction[path] for path in flat} for step in (1e-5, -1e-5))
    slope = (reference(ahead) - reference(behind)) / 2e-5
    along = sum((gradient[path] * direction[path]).sum() for path in flat)
    np.testing.assert_allclose(along, slope, rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_decoding_with_cache_matches_full_forward(name):
    """Prompts of different lengths and prefixes, padded on the right, then one token at a time."""
    model = make(name)
    length, prompts, prefix_lengths = 14, np.array([6, 3, 9]), np.array([5, 0, 8])
    tokens, prefixes = tokens_of((3, length)), np.repeat(prefix_lengths[:, None], 14, axis=1).astype(np.int32)
    expected = np.asarray(logits(model, tokens, prefix_lengths_BL=prefixes))
    caches = jax.tree.map(lambda leaf: leaf + 7.0, model.create_caches(3, 16, jnp.float32))
    places = np.arange(9)[None]
    positions = np.where(places < prompts[:, None], places, -1).astype(np.int32)
    got, caches = extend(model, tokens[:, :9], positions, prefixes[:, :9], caches)
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[row, :prompt], expected[row, :prompt], rtol=1e-4, atol=1e-4)
    for step in range(5):
        at = prompts + step
        token, position = tokens[np.arange(3), at][:, None], at[:, None].astype(np.int32)
        got, caches = extend(model, token, position, prefixes[:, :1], caches)
        np.testing.assert_allclose(got[:, 0], expected[np.arange(3), at], rtol=1e-4, atol=1e-4)
