"""The decoder against an independent one in numpy, and invariances of its results."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import log_softmax, logits_of_row
from tiny_decoder import EXECUTION, VOCAB_SIZE, tiny_config

from maxlm.config.execution import ExecutionConfig
from maxlm.core.batch import Stream
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten, unflatten
from maxlm.models.cache import KVCache
from maxlm.models.decoder import Decoder
from maxlm.objectives.language_model import language_model_loss

VARIANTS = {
    "plain": {},
    "multi-head": {"num_kv_heads": 4},
    "one key-value head, head_dim * heads not embed_dim": {"num_kv_heads": 1, "head_dim": 8},
    "untied": {"tie_embeddings": False},
    "qk_norm": {"qk_norm": True},
    "soft caps": {"attention_soft_cap": 1.5, "logit_soft_cap": 2.0},
    "windows": {"num_layers": 4, "window_pattern": (3, None)},
    "one window": {"window_pattern": (2,), "rope_theta": 500.0, "norm_epsilon": 1e-2},
    "all": {
        "num_layers": 3,
        "window_pattern": (4, None, 2),
        "qk_norm": True,
        "attention_soft_cap": 3.0,
        "logit_soft_cap": 5.0,
        "tie_embeddings": False,
    },
}


def make(execution=EXECUTION, **changes) -> Decoder:
    """Random weights, including norm scales, that are large enough to expose any difference."""
    return drawn(tiny_config(**changes), execution)


@cache
def drawn(config, execution) -> Decoder:
    model = initialize(Decoder(config, execution), jax.random.key(0))
    flat = flatten(model)
    random = np.random.default_rng(0)
    for path, leaf in flat.items():
        if "norm" in path:
            flat[path] = jnp.asarray(random.uniform(0.5, 1.5, leaf.shape), "float32")
        elif path in ("embedding", "head"):
            flat[path] = leaf * 30
        else:
            flat[path] = leaf * 1.5
    return unflatten(flat, model)


def tokens_of(shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB_SIZE, shape).astype(np.int32)


@jax.jit
def logits(model, tokens, **arguments):
    return model.logits(model(tokens, **arguments).hidden_BLD)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_match_formula(name):
    model, tokens = make(**VARIANTS[name]), tokens_of((2, 9))
    expected = np.stack([logits_of_row(model.config, flatten(model), row) for row in tokens])
    assert np.ptp(expected) > 1, "trivial weights would pass any test"
    np.testing.assert_allclose(logits(model, tokens), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["windows", "all"])
def test_packed_rows_match_formula(name):
    model, tokens = make(**VARIANTS[name]), tokens_of((1, 12))
    segments = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 2, 0, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 0, 0]], np.int32)
    expected = logits_of_row(model.config, flatten(model), tokens[0], positions[0], segments[0])
    got = logits(model, tokens, positions_BL=positions, segment_ids_BL=segments)
    np.testing.assert_allclose(got[0, :9], expected[:9], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_gradient_matches_finite_differences(name):
    """Finite differences of the float64 formula, along random directions through all weights at once."""
    model, tokens = make(**VARIANTS[name]), tokens_of((1, 7))
    targets, weights = tokens_of((1, 7), seed=1), np.array([[1, 1, 0, 1, 0.5, 1, 1]], np.float32)
    ones = np.ones_like(tokens)
    batch = Stream(tokens, targets, weights, ones, np.arange(7, dtype=np.int32)[None])

    def loss(model):
        term = language_model_loss(model, batch).terms["cross_entropy"]
        return term.sum / term.weight

    value, gradient = jax.jit(jax.value_and_grad(loss))(model)
    gradient = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(gradient).items()}
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in flatten(model).items()}

    def reference(moved):
        scores = log_softmax(logits_of_row(model.config, moved, tokens[0]))
        return -(weights[0] * scores[np.arange(7), targets[0]]).sum() / weights.sum()

    np.testing.assert_allclose(value, reference(flat), rtol=1e-5)
    for seed, paths in enumerate([list(flat), *[[path] for path in flat]]):
        random = np.random.default_rng(seed)
        direction = {path: random.standard_normal(flat[path].shape) * (path in paths) for path in flat}
        step = 1e-5
        ahead, behind = ({p: flat[p] + sign * step * direction[p] for p in flat} for sign in (1, -1))
        slope = (reference(ahead) - reference(behind)) / (2 * step)
        along = sum((gradient[path] * direction[path]).sum() for path in paths)
        np.testing.assert_allclose(along, slope, rtol=2e-3, atol=2e-4, err_msg=str(paths))


@jax.jit
def log_probabilities(model, batch: Stream):
    hidden = model(batch.tokens, positions_BL=batch.positions, segment_ids_BL=batch.segment_ids).hidden_BLD
    return model.log_probabilities(hidden, batch.targets)[0]


@pytest.mark.parametrize("name", ["plain", "windows", "all"])
def test_packing_changes_nothing(name):
    """A document has the same log-probabilities alone, after another document, and before padding."""
    model = make(**VARIANTS[name])
    lengths = (5, 8, 3)
    documents = [tokens_of(length + 1, seed) for seed, length in enumerate(lengths)]
    packed = Stream(
        tokens=np.concatenate([d[:-1] for d in documents])[None],
        targets=np.concatenate([d[1:] for d in documents])[None],
        loss_weights=np.ones((1, 16), np.float32),
        segment_ids=np.repeat([1, 2, 3], lengths)[None].astype(np.int32),
        positions=np.concatenate([np.arange(n) for n in lengths])[None].astype(np.int32),
    )
    together = np.split(np.asarray(log_probabilities(model, packed)[0]), np.cumsum(lengths)[:-1])
    for document, scores in zip(documents, together):
        length = len(document) - 1
        for junk in (0, 7):
            row = np.full((1, 16), junk, np.int32)
            targets, segments, positions = row.copy(), np.zeros_like(row), np.zeros_like(row)
            row[0, :length], targets[0, :length] = document[:-1], document[1:]
            segments[0, :length], positions[0, :length] = 1, np.arange(length)
            alone = log_probabilities(model, Stream(row, targets, np.ones((1, 16), np.float32), segments, positions))
            np.testing.assert_allclose(alone[0, :length], scores, rtol=1e-5, atol=2e-5)


@jax.jit
def decode(model, tokens, cache, positions):
    return model.decode(tokens, cache, positions)


@pytest.mark.parametrize("name", ["plain", "qk_norm", "windows", "all"])
def test_decoding_with_cache_matches_full_forward(name):
    """Prompts of different lengths, padded on the right, then one token at a time."""
    model = make(**VARIANTS[name])
    length, prompts = 14, np.array([6, 3, 9])
    tokens = tokens_of((3, length))
    expected = np.asarray(logits(model, tokens))
    cache = KVCache.create(model.config, 3, 16)
    # Previous contents of the cache must be ignored.
    cache = jax.tree.map(lambda leaf: leaf + 7.0, cache)
    places = np.arange(9)[None]
    positions = np.where(places < prompts[:, None], places, -1).astype(np.int32)
    hidden, cache = decode(model, tokens[:, :9], cache, positions)
    got = np.asarray(model.logits(hidden))
    for row, prompt in enumerate(prompts):
        np.testing.assert_allclose(got[row, :prompt], expected[row, :prompt], rtol=1e-4, atol=1e-4)
    for step in range(5):
        at = prompts + step
        hidden, cache = decode(model, tokens[np.arange(3), at][:, None], cache, at[:, None].astype(np.int32))
        got = np.asarray(model.logits(hidden))[:, 0]
        np.testing.assert_allclose(got, expected[np.arange(3), at], rtol=1e-4, atol=1e-4)


def test_rematerialization_does_not_change_gradient():
    tokens = tokens_of((2, 9))

    def gradient(remat):
        model = make(EXECUTION.model_copy(update={"remat": remat}), **VARIANTS["all"])
        return flatten(jax.jit(jax.grad(lambda model: jnp.sum(model.logits(model(tokens).hidden_BLD) ** 2)))(model))

    kept = gradient("none")
    for policy in ("dots", "full"):
        again = gradient(policy)
        for path, value in kept.items():
            atol = 1e-5 * np.abs(value).max()
            np.testing.assert_allclose(again[path], value, rtol=1e-5, atol=atol, err_msg=f"{policy}: {path}")


def test_all_attention_implementations_agree():
    tokens = tokens_of((2, 9))
    xla, reference = (
        logits(make(EXECUTION.model_copy(update={"attention": name}), **VARIANTS["all"]), tokens)
        for name in ("xla", "reference")
    )
    np.testing.assert_allclose(xla, reference, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_close():
    tokens = tokens_of((2, 9))
    exact = np.asarray(logits(make(), tokens))
    rough = np.asarray(logits(make(ExecutionConfig(activation_dtype="bfloat16", matmul_dtype="bfloat16")), tokens))
    assert rough.dtype == np.float32
    assert np.sqrt(np.mean((rough - exact) ** 2)) < 0.02 * exact.std()


def test_tied_weights_are_shared():
    assert "head" not in flatten(Decoder(tiny_config()))
    assert "head" in flatten(Decoder(tiny_config(tie_embeddings=False)))
