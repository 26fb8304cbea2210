"""Dropout and stochastic depth within a model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import EXECUTION, documents, pack, tiny_config

from maxlm.config.adapters import LoraConfig
from maxlm.config.regularization import RegularizationConfig
from maxlm.core.batch import Batch
from maxlm.core.parameters import initialize
from maxlm.layers.noise import Noise
from maxlm.models.adapters.apply import apply_adapters
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.models.regroup import unrolled
from maxlm.ops.dropout import InputDropout, hashed
from maxlm.ops.linear import AdaptedWeight, linear

TEXT = pack(documents(), rows=4, length=24, per_row=3)
BATCH = Batch({"text": TEXT}, row_seeds_B=np.arange(1, 5, dtype=np.uint32))
CONFIG = tiny_config(num_layers=4)
RATES = {
    "neftune_alpha": 5.0,
    "embedding_dropout": 0.2,
    "residual_dropout": 0.2,
    "attention_dropout": 0.2,
    "stochastic_depth": 0.5,
}


@pytest.fixture(scope="module")
def model():
    return initialize(Decoder(CONFIG, EXECUTION), jax.random.key(0))


def hidden(model, batch=BATCH, **rates) -> np.ndarray:
    applied = jax.jit(lambda model, batch: AppliedModel.of(model, batch, RegularizationConfig(**rates)).outputs)
    return np.asarray(applied(model, batch)["text"].hidden_BLD)


@pytest.mark.parametrize("kind", RATES)
def test_each_kind_changes_the_outputs_by_the_seed_of_the_row_only(model, kind):
    rates = {kind: RATES[kind]}
    quiet, noisy = hidden(model), hidden(model, **rates)
    assert np.abs(noisy - quiet).max() > 0.01
    np.testing.assert_array_equal(hidden(model, **rates), noisy)
    other = dataclasses.replace(BATCH, row_seeds_B=np.array([1, 2, 3, 9], np.uint32))
    changed = hidden(model, other, **rates)
    np.testing.assert_allclose(changed[:3], noisy[:3], rtol=1e-6, atol=1e-6)
    assert np.abs(changed[3] - noisy[3]).max() > 0.01


def test_masks_do_not_depend_on_how_layers_are_stacked(model):
    np.testing.assert_allclose(hidden(jax.jit(unrolled)(model), **RATES), hidden(model, **RATES), rtol=1e-5, atol=1e-5)


def test_nothing_is_random_without_seeds_or_rates(model):
    quiet = hidden(model)
    without_seeds = dataclasses.replace(BATCH, row_seeds_B=None)
    np.testing.assert_array_equal(hidden(model, without_seeds, residual_dropout=0.5), quiet)


@pytest.mark.parametrize("stream", ["text", "chosen", "rejected"])
def test_streams_of_any_name_have_masks_of_their_own(model, stream):
    batch = Batch({"text": TEXT, stream: TEXT}, row_seeds_B=BATCH.row_seeds_B)
    applied = AppliedModel.of(model, batch, RegularizationConfig(residual_dropout=0.4)).outputs
    difference = np.abs(np.asarray(applied[stream].hidden_BLD - applied["text"].hidden_BLD)).max()
    assert (difference == 0) == (stream == "text")


def test_without_noise_nothing_is_random():
    noisy = RegularizationConfig(**RATES, label_smoothing=0.1)
    assert noisy.is_random
    assert all(RegularizationConfig(**{kind: rate}).is_random for kind, rate in RATES.items())
    assert noisy.without_noise() == RegularizationConfig(label_smoothing=0.1)


def test_row_that_skips_every_layer_is_its_embedding(model):
    """Stochastic depth 0.999 at the last layer of a model of one layer: nearly all rows skip it."""
    single = initialize(Decoder(tiny_config(num_layers=1), EXECUTION), jax.random.key(0))
    got = hidden(single, stochastic_depth=0.999)
    expected = jax.vmap(jax.vmap(single.final_norm))(jnp.asarray(single.embedding)[TEXT.tokens])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_expected_output_of_a_linear_part_is_kept(model):
    """Embedding dropout keeps the mean: averaged over many seeds, the embedding is itself again."""
    rows = 512
    text = jax.tree.map(lambda x: np.repeat(x[:1], rows, axis=0), TEXT)
    seeds = np.random.default_rng(0).integers(2**32, size=rows, dtype=np.uint32)
    applied = AppliedModel.of(
        _EmbeddingOnly(model), Batch({"text": text}, row_seeds_B=seeds), RegularizationConfig(embedding_dropout=0.5)
    )
    x = np.asarray(applied.outputs["text"])
    table = np.asarray(model.embedding)[TEXT.tokens[0]]
    # Each mean of 512 values of 0 or 2 times the entry: six standard deviations.
    assert (np.abs(x.mean(axis=0) - table) <= 6 * np.abs(table) / np.sqrt(rows) + 1e-7).all()


@dataclasses.dataclass
class _EmbeddingOnly:
    """The input of the layers in place of a model's outputs."""

    model: Decoder

    def apply(self, stream, noise):
        return self.model.enter(stream.tokens, stream.positions, stream.segment_ids, noise)[0].x_BLD


def adapted(model, *, up: float):
    """The model with adapters of which `up` is the standard deviation of the second factors."""
    config, random = LoraConfig(rank=2), np.random.default_rng(0)
    adapters = initialize(declare_adapters(Decoder(CONFIG, EXECUTION), config), jax.random.key(1))
    for adapter in adapters.values():
        adapter["up"] = jnp.asarray(up * random.standard_normal(adapter["up"].shape), "float32")
    return apply_adapters(model, adapters, config)


def test_adapters_lose_channels_of_their_input_and_the_frozen_product_none():
    """x W + s (m x / (1 - p)) D U, in float64, with the mask m of a hash of row, place and channel."""
    random = np.random.default_rng(0)
    x, base, down, up = (random.standard_normal(shape) for shape in ((2, 5, 8), (8, 6), (8, 3), (3, 6)))
    seeds_B, columns_BL = np.array([7, 8], np.uint32), np.tile(np.arange(5), (2, 1))
    bits = hashed(hashed(seeds_B[:, None], columns_BL)[..., None], jnp.arange(8))
    kept = np.asarray(bits, np.float64) / 2**32 >= 0.5
    assert 0.3 < kept.mean() < 0.7
    expected = x @ base + 1.5 * (np.where(kept, x / 0.5, 0) @ down @ up)
    arrays = (jnp.asarray(each, "float32") for each in (base, down, up))
    dropout = InputDropout(jnp.asarray(seeds_B), jnp.asarray(columns_BL), 0.5)
    found = linear(jnp.asarray(x, "float32"), AdaptedWeight(*arrays, 1.5, dropout=dropout), "float32")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_dropout_of_adapters_depends_on_the_seed_of_the_row_only(model):
    rates, new, trained = {"adapter_dropout": 0.3}, adapted(model, up=0.0), adapted(model, up=0.5)
    np.testing.assert_allclose(hidden(new, **rates), hidden(model), rtol=1e-6, atol=1e-6)
    noisy = hidden(trained, **rates)
    assert np.abs(noisy - hidden(trained)).max() > 0.01
    np.testing.assert_allclose(hidden(unrolled(trained), **rates), noisy, rtol=1e-5, atol=1e-5)
    other = dataclasses.replace(BATCH, row_seeds_B=np.array([1, 2, 3, 9], np.uint32))
    changed = hidden(trained, other, **rates)
    np.testing.assert_allclose(changed[:3], noisy[:3], rtol=1e-6, atol=1e-6)
    assert np.abs(changed[3] - noisy[3]).max() > 0.01


def test_each_matrix_has_its_own_mask(model):
    [layer, *_] = adapted(model, up=0.5).layers[0]
    layer = jax.tree.map(lambda leaf: leaf[0], layer)
    noise = Noise(jnp.arange(2, dtype=jnp.uint32), RegularizationConfig(adapter_dropout=0.3)).at_layer(3)
    with_masks = noise.on_adapters(layer)
    is_weight = lambda node: isinstance(node, AdaptedWeight)  # noqa: E731
    seeds = [leaf.dropout.seeds_B for leaf in jax.tree.leaves(with_masks, is_leaf=is_weight) if is_weight(leaf)]
    assert len({tuple(each.tolist()) for each in seeds}) == len(seeds) == 7
