"""Prompt tuning: the same as embeddings before each document, however documents are packed, cached or merged."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import logits_of_row
from tiny_decoder import EXECUTION, VOCAB_SIZE, drawn_model, tiny_config

from maxlm.config import ModelConfig
from maxlm.config.adapters import PromptTuningConfig, QuantizedBaseConfig
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import ConfigError
from maxlm.models.adapters.apply import apply_adapters, merge_adapters, unmerge_adapters
from maxlm.models.adapters.declare import create_adapters, declare_adapters
from maxlm.models.adapters.frozen import quantized_base
from maxlm.models.decoder import Decoder
from maxlm.models.regroup import unrolled

CONFIG = PromptTuningConfig(tokens=3)
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, 9)).astype(np.int32)
MODELS = {
    "plain": {},
    "scaled embeddings, norms of keys": {"embedding_scale": 2.0, "qk_norm": True},
}


def drawn(plan):
    """A prompt whose embeddings are as long as those of words."""
    shape = (CONFIG.tokens, plan.config.embed_dim)
    return {"virtual_tokens": {"prompt": jnp.asarray(np.random.default_rng(1).standard_normal(shape), "float32")}}


@pytest.fixture(scope="module")
def model():
    return drawn_model(tiny_config())


@jax.jit
def logits(model):
    return model.logits(model(TOKENS).hidden_BLD)


def with_prompt_as_words(model, prompt_PD):
    """The weights with the prompt as rows of the table, and the tokens after them."""
    flat = flatten(model)
    head = flat["head"] if "head" in flat else flat["embedding"]
    table = jnp.concatenate([flat["embedding"], prompt_PD])
    return flat | {"embedding": table, "head": head}, np.concatenate(
        [VOCAB_SIZE + np.arange(len(prompt_PD)), TOKENS[0]]
    )


@pytest.mark.parametrize("name", MODELS)
def test_it_computes_what_embeddings_before_the_text_do(name):
    model = drawn_model(tiny_config(**MODELS[name]))
    adapters = drawn(model)
    weights, tokens = with_prompt_as_words(model, adapters["virtual_tokens"]["prompt"])
    untied = model.config.model_copy(update={"tie_embeddings": False})
    weights = {path: np.asarray(x, np.float64) for path, x in weights.items()}
    expected = logits_of_row(untied, weights, tokens)[CONFIG.tokens :]
    assert np.abs(logits(model)[0] - expected).max() > 0.1
    merged = merge_adapters(model, adapters, CONFIG)
    for adapted in (apply_adapters(model, adapters, CONFIG), merged, unrolled(merged)):
        np.testing.assert_allclose(logits(adapted)[0], expected, rtol=2e-4, atol=2e-4)
    unmerged = unmerge_adapters(merged, adapters, CONFIG)
    assert unmerged.config == model.config
    jax.tree.map(np.testing.assert_array_equal, flatten(unmerged), flatten(model))


def test_gradient_is_that_of_the_embeddings_and_none_reaches_the_base(model):
    adapters = drawn(model)
    coefficients = np.random.default_rng(2).standard_normal((*TOKENS.shape, VOCAB_SIZE))

    def score(adapters, model):
        return (logits(apply_adapters(model, adapters, CONFIG)) * coefficients).sum()

    def score_of_words(prompt_PD):
        weights, tokens = with_prompt_as_words(model, prompt_PD)
        untied = Decoder(model.config.model_copy(update={"tie_embeddings": False}), model.execution)
        words = unflatten(weights, untied)
        found = words.logits(words(tokens[None]).hidden_BLD)[:, CONFIG.tokens :]
        return (found * coefficients).sum()

    grads, frozen = jax.jit(jax.grad(score, argnums=(0, 1)))(adapters, model)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    expected = jax.jit(jax.grad(score_of_words))(adapters["virtual_tokens"]["prompt"])
    bound = 1e-4 * np.abs(expected).max()
    np.testing.assert_allclose(grads["virtual_tokens"]["prompt"], expected, rtol=1e-3, atol=bound)


def test_every_document_of_a_packed_row_follows_it(model):
    adapted = merge_adapters(model, drawn(model), CONFIG)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]], np.int32)
    packed = adapted(TOKENS, positions_BL=positions, segment_ids_BL=segments).hidden_BLD
    for part in (slice(0, 4), slice(4, 7)):
        np.testing.assert_allclose(packed[:, part], adapted(TOKENS[:, part]).hidden_BLD, rtol=1e-5, atol=1e-5)


def test_base_may_be_quantized(model):
    config = CONFIG.model_copy(update={"base": QuantizedBaseConfig(kind="int8", block_size=8)})
    base, adapters = quantized_base(model, config.base, declare_adapters(model, config)), drawn(model)
    merged = merge_adapters(base, adapters, config)
    np.testing.assert_allclose(logits(apply_adapters(base, adapters, config)), logits(merged), rtol=1e-4, atol=1e-4)


def test_it_begins_with_words(model):
    plan, table = Decoder(model.config, model.execution), np.asarray(model.embedding)
    fresh = create_adapters(plan, CONFIG, model, jax.random.key(1), initial_ids=(7, 9))
    np.testing.assert_array_equal(fresh["virtual_tokens"]["prompt"], table[[7, 9, 7]])
    one, other = (
        np.asarray(create_adapters(plan, CONFIG, model, jax.random.key(seed))["virtual_tokens"]["prompt"])
        for seed in (1, 2)
    )
    assert not np.array_equal(one, other)
    assert all((table == row).all(axis=1).any() for row in one)


@pytest.mark.parametrize(
    ("layer", "changes", "what"),
    [
        ({"mixer": {"window": 4}}, {}, "windows"),
        ({"mixer": {"kind": "gru", "dim": 8}}, {}, "mixers of kind gru"),
        ({}, {"learned_positions": 32}, "learned positions"),
        ({}, {"prefix_attention": True}, "prefix_attention"),
        ({}, {"critic": "own"}, "a critic with layers of its own"),
    ],
)
def test_models_without_a_place_are_refused(layer, changes, what):
    config = ModelConfig(vocab_size=VOCAB_SIZE, embed_dim=16, layers={"repeat": 1, **layer}, **changes)
    with pytest.raises(
        ConfigError, match=f"causal attention to all earlier tokens, and the model has {what}; set lora"
    ):
        declare_adapters(Decoder(config, EXECUTION), CONFIG)
