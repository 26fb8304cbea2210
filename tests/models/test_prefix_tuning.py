"""Prefix tuning and P-tuning v2: what is trained, merged models, and models that have no place for it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy_decoder import logits_of_row
from tiny_decoder import EXECUTION, VOCAB_SIZE, drawn_model, tiny_config

from maxlm.config import ModelConfig
from maxlm.config.adapters import PrefixConfig, QuantizedBaseConfig
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.models.adapters.apply import apply_adapters, merge_adapters, unmerge_adapters
from maxlm.models.adapters.declare import create_adapters, declare_adapters
from maxlm.models.adapters.frozen import quantized_base
from maxlm.models.decoder import Decoder
from maxlm.models.regroup import unrolled

PLAN = Decoder(tiny_config(), EXECUTION)
PLAIN, MLP = PrefixConfig(tokens=3), PrefixConfig(tokens=3, reparametrize={"dim": 7})
KINDS = {"prefix": PLAIN, "mlp": MLP}
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (1, 9)).astype(np.int32)
KEY, VALUE = "layers/0/0/mixer/virtual_key", "layers/0/0/mixer/virtual_value"
VIRTUAL = {"vocab_size": VOCAB_SIZE, "embed_dim": 16, "layers": {"repeat": 1, "mixer": {"virtual_tokens": 2}}}
RECURRENT = {"vocab_size": VOCAB_SIZE, "embed_dim": 16, "layers": {"repeat": 1, "mixer": {"kind": "gru", "dim": 8}}}


@pytest.fixture(scope="module")
def model():
    return drawn_model(tiny_config())


def drawn(config):
    random = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32),
        initialize(declare_adapters(PLAN, config), jax.random.key(1)),
    )


@jax.jit
def logits(model):
    return model.logits(model(TOKENS).hidden_BLD)


def keys_and_values(adapters, config):
    """In float64: tanh(E A + a) B + b, or what is trained itself."""
    arrays = {path: {name: np.asarray(x, np.float64) for name, x in each.items()} for path, each in adapters.items()}
    if config.reparametrize is None:
        return {path: each["new"] for path, each in arrays.items()}
    shared = arrays.pop("virtual_tokens")
    hidden = np.tanh(shared["embedding"] @ shared["widen"] + shared["widen_bias"])
    return {path: hidden @ each["project"] + each["project_bias"][:, None] for path, each in arrays.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_adapted_and_merged_models_match_the_formula(model, kind):
    config, adapters = KINDS[kind], drawn(KINDS[kind])
    merged = merge_adapters(model, adapters, config)
    wanted = keys_and_values(adapters, config)
    assert set(wanted) == {KEY, VALUE} == flatten(merged).keys() - flatten(model).keys()
    for path, value in wanted.items():
        np.testing.assert_allclose(flatten(merged)[path], value, rtol=1e-5, atol=1e-5)
    weights = {path: np.asarray(x, np.float64) for path, x in flatten(model).items()} | wanted
    expected = logits_of_row(merged.config, weights, TOKENS[0])
    assert np.abs(logits(model)[0] - expected).max() > 0.1
    for adapted in (merged, apply_adapters(model, adapters, config), unrolled(merged)):
        np.testing.assert_allclose(logits(adapted)[0], expected, rtol=2e-4, atol=2e-4)
    unmerged = unmerge_adapters(merged, adapters, config)
    assert unmerged.config == model.config
    jax.tree.map(np.testing.assert_array_equal, flatten(unmerged), flatten(model))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_follow_from_keys_and_values_and_none_reaches_the_base(model, kind):
    """By the chain rule through the MLP."""
    config, adapters = KINDS[kind], drawn(KINDS[kind])
    coefficients = np.random.default_rng(2).standard_normal((*TOKENS.shape, VOCAB_SIZE))
    score = lambda model: (logits(model) * coefficients).sum()  # noqa: E731
    grads, frozen = jax.jit(
        jax.grad(lambda adapters, model: score(apply_adapters(model, adapters, config)), argnums=(0, 1))
    )(adapters, model)
    whole = flatten(jax.jit(jax.grad(score))(merge_adapters(model, adapters, config)))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen))
    wanted = {path: {"new": whole[path]} for path in (KEY, VALUE)}
    if config.reparametrize is not None:
        of = {name: np.asarray(x, np.float64) for name, x in adapters["virtual_tokens"].items()}
        hidden = np.tanh(of["embedding"] @ of["widen"] + of["widen_bias"])
        upstream, wanted = 0.0, {}
        for path in (KEY, VALUE):
            gradient = np.asarray(whole[path], np.float64)
            wanted[path] = {"project": hidden.T @ gradient, "project_bias": gradient.sum(1)}
            upstream = upstream + np.einsum("lpx,lwx->pw", gradient, adapters[path]["project"])
        inner = upstream * (1 - hidden**2)
        wanted["virtual_tokens"] = {
            "embedding": inner @ of["widen"].T,
            "widen": of["embedding"].T @ inner,
            "widen_bias": inner.sum(0),
        }
    for path, by_name in wanted.items():
        assert grads[path].keys() == by_name.keys()
        for name, value in by_name.items():
            np.testing.assert_allclose(grads[path][name], value, rtol=1e-3, atol=1e-4 * np.abs(value).max())


def test_every_document_of_a_packed_row_sees_them(model):
    adapted = merge_adapters(model, drawn(PLAIN), PLAIN)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]], np.int32)
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]], np.int32)
    packed = adapted(TOKENS, positions_BL=positions, segment_ids_BL=segments).hidden_BLD
    for part in (slice(0, 4), slice(4, 7)):
        np.testing.assert_allclose(packed[:, part], adapted(TOKENS[:, part]).hidden_BLD, rtol=1e-5, atol=1e-5)


def test_base_may_be_quantized(model):
    config = PLAIN.model_copy(update={"base": QuantizedBaseConfig(kind="int8", block_size=8)})
    base, adapters = quantized_base(model, config.base, declare_adapters(PLAN, config)), drawn(config)
    merged = merge_adapters(base, adapters, config)
    np.testing.assert_allclose(logits(apply_adapters(base, adapters, config)), logits(merged), rtol=1e-4, atol=1e-4)
    assert flatten(merged)[KEY].dtype == jnp.float32


def test_initial_tokens_are_small_and_differ_by_layer(model):
    fresh = create_adapters(PLAN, PLAIN, model, jax.random.key(1))
    for path in (KEY, VALUE):
        array = np.asarray(fresh[path]["new"])
        assert 0.01 < array.std() < 0.03
        assert not np.array_equal(array[0], array[1])
    assert not np.array_equal(fresh[KEY]["new"], fresh[VALUE]["new"])


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (
            VIRTUAL,
            "prefix adds virtual tokens, and the model has some already; train those with kind: layers and targets",
        ),
        (RECURRENT, "prefix is for mixers of kind attention, and the model has gru; set lora"),
    ],
)
def test_models_without_a_place_are_refused(model, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("[", r"\[")):
        declare_adapters(Decoder(ModelConfig(**model), EXECUTION), PLAIN)
