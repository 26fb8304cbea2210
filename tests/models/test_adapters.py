"""Adapters: a frozen model with low-rank updates matches the model with merged weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import EXECUTION, VOCAB_SIZE, tiny_config

from maxlm.config.train import LoraConfig
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.models.adapters import apply_adapters, declare_adapters, merge_adapters
from maxlm.models.decoder import Decoder

PLAN = Decoder(tiny_config(), EXECUTION)
LORA = LoraConfig(rank=3, alpha=6.0)
TOKENS = np.random.default_rng(0).integers(0, VOCAB_SIZE, (2, 7)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return jax.tree.map(lambda leaf: leaf * 2, initialize(PLAN, jax.random.key(0)))


@pytest.fixture(scope="module")
def adapters():
    """Adapters with a nonzero `up`."""
    fresh = initialize(declare_adapters(PLAN, LORA), jax.random.key(1))
    random = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + 0.3 * random.standard_normal(leaf.shape).astype(np.float32), fresh)


def score(model):
    """A number that depends on all logits."""
    logits = model.logits(model(TOKENS).hidden_BLD)
    return (logits * np.random.default_rng(2).standard_normal(logits.shape)).sum()


def test_adapted_model_starts_as_the_base(model):
    fresh = initialize(declare_adapters(PLAN, LORA), jax.random.key(1))
    assert len(fresh) == 7
    assert all(np.any(adapter["down"]) and not np.any(adapter["up"]) for adapter in fresh.values())
    np.testing.assert_allclose(score(apply_adapters(model, fresh, LORA)), score(model), rtol=1e-6)


def test_merged_weights_match_adapted_weights(model, adapters):
    merged = merge_adapters(model, adapters, LORA)
    assert abs(score(merged) - score(model)) > 1
    np.testing.assert_allclose(score(apply_adapters(model, adapters, LORA)), score(merged), rtol=1e-4)
    weight, adapter = flatten(model)["layers/0/0/mlp/up"], adapters["layers/0/0/mlp/up"]
    expected = [w + 2.0 * (d @ u) for w, d, u in zip(weight, np.asarray(adapter["down"]), np.asarray(adapter["up"]))]
    np.testing.assert_allclose(flatten(merged)["layers/0/0/mlp/up"], expected, rtol=1e-5, atol=1e-6)


def test_merged_weights_keep_the_dtype_of_the_base_and_are_rounded_once(model, adapters):
    rough = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model)
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rough)
    exact = flatten(merge_adapters(same, adapters, LORA))
    for path, leaf in flatten(merge_adapters(rough, adapters, LORA)).items():
        assert leaf.dtype == jnp.bfloat16, path
        np.testing.assert_array_equal(leaf, exact[path].astype(jnp.bfloat16), err_msg=path)


def test_adapter_gradients_follow_from_merged_weights(model, adapters):
    """By the chain rule through W + scale * down @ up; the model itself has no gradient."""
    grads, frozen = jax.jit(
        jax.grad(lambda adapters, model: score(apply_adapters(model, adapters, LORA)), argnums=(0, 1))
    )(adapters, model)
    whole = flatten(jax.jit(jax.grad(score))(merge_adapters(model, adapters, LORA)))
    for path, adapter in adapters.items():
        down, up = np.asarray(adapter["down"]), np.asarray(adapter["up"])
        size = np.abs(whole[path]).max()
        np.testing.assert_allclose(
            grads[path]["down"], 2.0 * whole[path] @ up.swapaxes(1, 2), rtol=1e-3, atol=1e-4 * size
        )
        np.testing.assert_allclose(
            grads[path]["up"], 2.0 * down.swapaxes(1, 2) @ whole[path], rtol=1e-3, atol=1e-4 * size
        )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(frozen))


def test_unknown_target_is_rejected():
    with pytest.raises(ConfigError, match=r"lora.targets: 'norm' is not a weight; allowed: down, gate, key"):
        declare_adapters(PLAN, LoraConfig(targets=("query", "norm")))
