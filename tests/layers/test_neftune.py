"""NEFTune: uniform noise on embeddings, scaled by the length of each document (arXiv:2310.05914)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_decoder import EXECUTION, documents, pack, tiny_config

from maxlm.config.regularization import RegularizationConfig
from maxlm.core.batch import Batch, document_lengths
from maxlm.core.parameters import initialize
from maxlm.models.applied import AppliedModel, noise_of
from maxlm.models.decoder import Decoder

TEXT = pack(documents(), rows=4, length=24, per_row=3)
BATCH = Batch({"text": TEXT}, row_seeds_B=np.arange(1, 5, dtype=np.uint32))
ALPHA = RegularizationConfig(neftune_alpha=5.0)


def reference_lengths(segment_ids):
    return np.array([[np.sum(row == segment) for segment in row] for row in segment_ids])


def test_lengths_are_those_of_each_document():
    lengths = np.asarray(document_lengths(jnp.asarray(TEXT.segment_ids)))
    np.testing.assert_array_equal(lengths, reference_lengths(TEXT.segment_ids))
    assert len({*lengths[TEXT.segment_ids > 0].tolist()}) > 2


@pytest.fixture(scope="module")
def embedded():
    """The input of the first layer, without and with noise: float64 [rows, length, channels]."""
    model = initialize(Decoder(tiny_config(num_layers=1), EXECUTION), jax.random.key(0))

    def enter(rates):
        noise = noise_of(BATCH, "text", rates)
        places = (jnp.asarray(TEXT.tokens), jnp.asarray(TEXT.positions), jnp.asarray(TEXT.segment_ids))
        return np.asarray(model.enter(*places, noise=noise)[0].x_BLD, np.float64)

    return enter(None), enter(ALPHA)


def test_noise_is_uniform_within_the_bound_of_the_paper(embedded):
    quiet, noisy = embedded
    channels = quiet.shape[-1]
    bound = 5.0 / np.sqrt(reference_lengths(TEXT.segment_ids) * channels)
    uniform = (noisy - quiet) / bound[..., None]
    assert np.abs(uniform).max() <= 1 + 1e-5
    # Over all of n values: mean 0, variance 1/3, and as many in each tenth, within five standard deviations.
    n = uniform.size
    assert abs(uniform.mean()) < 5 * np.sqrt(1 / 3 / n)
    assert abs((uniform**2).mean() - 1 / 3) < 5 * np.sqrt(4 / 45 / n)
    counts, _ = np.histogram(uniform, bins=10, range=(-1, 1))
    assert np.abs(counts - n / 10).max() < 5 * np.sqrt(0.09 * n)
    # Tokens and channels are independent of their neighbors.
    for axis in (1, 2):
        pairs = uniform.take(range(uniform.shape[axis] - 1), axis) * uniform.take(range(1, uniform.shape[axis]), axis)
        assert abs(pairs.mean()) < 5 / 3 / np.sqrt(pairs.size)


def test_noise_depends_on_the_seed_of_the_row_and_validation_has_none():
    model = initialize(Decoder(tiny_config(num_layers=1), EXECUTION), jax.random.key(0))

    def hidden(seeds, rates):
        batch = Batch({"text": TEXT}, row_seeds_B=seeds)
        return np.asarray(AppliedModel.of(model, batch, rates).outputs["text"].hidden_BLD)

    noisy = hidden(BATCH.row_seeds_B, ALPHA)
    np.testing.assert_array_equal(hidden(BATCH.row_seeds_B, ALPHA), noisy)
    changed = hidden(np.array([1, 2, 3, 9], np.uint32), ALPHA)
    np.testing.assert_allclose(changed[:3], noisy[:3], rtol=1e-6, atol=1e-6)
    assert np.abs(changed[3] - noisy[3]).max() > 0.01
    np.testing.assert_array_equal(hidden(BATCH.row_seeds_B, ALPHA.without_noise()), hidden(BATCH.row_seeds_B, None))


def test_gradient_is_that_of_shifted_embeddings():
    """The noise is a constant: the gradient of the embeddings is the one at the noisy ones."""
    noise = noise_of(BATCH, "text", ALPHA)
    columns = jnp.broadcast_to(jnp.arange(24), TEXT.tokens.shape)
    noise = noise.in_model(columns, document_lengths(jnp.asarray(TEXT.segment_ids)), (None, None, None), 1)
    x_BLD = jax.random.normal(jax.random.key(3), (*TEXT.tokens.shape, 8))
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(noise.embedding(x))))(x_BLD)
    np.testing.assert_allclose(gradient, 2 * noise.embedding(x_BLD), rtol=1e-6, atol=1e-6)
