"""Pipeline stages: the same loss and gradients as one device, whatever the schedule."""

import jax
import numpy as np
import pytest

from maxlm.config import ModelConfig
from maxlm.config.mesh import MeshConfig
from maxlm.core.batch import Batch, put_batch
from maxlm.core.parameters import initialize
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.models.decoder import Decoder
from maxlm.train.loss import language_model_loss
from maxlm.train.step import loss_and_gradient

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = ModelConfig(
    vocab_size=48,
    num_layers=8,
    embed_dim=16,
    mlp_dim=24,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    max_length=32,
    activation_dtype="float32",
    matmul_dtype="float32",
)
ROWS, LENGTH = 16, 12


def packed_rows(seed=0) -> Batch:
    """Two documents and some padding in each row, of which two are padding alone."""
    random = np.random.default_rng(seed)
    tokens, targets = random.integers(0, 48, (2, ROWS, LENGTH)).astype(np.int32)
    first, second = random.integers(2, 6, (2, ROWS, 1))
    place = np.arange(LENGTH)
    segments = np.where(place < first, 1, np.where(place < first + second, 2, 0)).astype(np.int32)
    segments[[3, 11]] = 0
    positions = np.where(segments == 2, place - first, place * (segments > 0)).astype(np.int32)
    weights = (random.uniform(0.2, 2, (ROWS, LENGTH)) * (segments > 0)).astype(np.float32)
    return Batch(tokens, targets, weights, segments, positions)


BATCH = packed_rows()


def language_model(model, frozen, batch):
    return language_model_loss(model, batch, z_loss=0.1)


def configured(**settings) -> ModelConfig:
    pipeline = {name: settings.pop(name) for name in ("schedule", "microbatches", "repeats") if name in settings}
    return ModelConfig(**{**CONFIG.model_dump(), **settings, "pipeline": pipeline})


def terms_and_gradient(config, mesh_sizes=None, *, batch=BATCH, loss_function=language_model, accumulate=1):
    def compute(model, batch):
        return loss_and_gradient(
            model, None, batch, loss_function=loss_function, accumulate=accumulate, pipeline=config.pipeline
        )

    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **(mesh_sizes or {})}))
    with jax.set_mesh(mesh):
        model = jax.tree.map(lambda leaf: leaf * 1.5, initialize(Decoder(config), jax.random.key(0), mesh))
        output, gradient = jax.jit(compute)(model, put_batch(batch, mesh))
    terms = {name: (float(term.sum), float(term.weight)) for name, term in output.terms.items()}
    return terms, flatten(jax.device_get(gradient))


def assert_same(left, right):
    assert left[0].keys() == right[0].keys()
    for name in left[0]:
        np.testing.assert_allclose(left[0][name], right[0][name], rtol=1e-5, err_msg=name)
    for path, value in right[1].items():
        scale = np.abs(value).max()
        assert scale > 0, path
        np.testing.assert_allclose(left[1][path], value, rtol=1e-4, atol=4e-5 * scale, err_msg=path)


@pytest.fixture(scope="module")
def alone():
    """Terms and gradient on one device."""
    return terms_and_gradient(CONFIG)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ({"stage": 2}, {"microbatches": 2}),
        ({"stage": 2, "data": 2, "fsdp": 2}, {"microbatches": 4}),
        ({"stage": 4, "tensor": 2}, {"microbatches": 8}),
        ({"stage": 2, "fsdp": 2}, {"microbatches": 2, "repeats": 2}),
    ],
    ids=str,
)
def test_gpipe(sizes, settings, alone):
    assert_same(terms_and_gradient(configured(**settings), sizes), alone)


@pytest.mark.parametrize(
    ("sizes", "settings"),
    [
        ({"stage": 2}, {"microbatches": 2}),
        ({"stage": 2, "data": 2, "fsdp": 2}, {"microbatches": 4}),
        ({"stage": 4, "tensor": 2}, {"microbatches": 8}),
        ({"stage": 2, "fsdp": 2}, {"microbatches": 2, "repeats": 2}),
    ],
    ids=str,
)
def test_1f1b(sizes, settings, alone):
    assert_same(terms_and_gradient(configured(schedule="1f1b", **settings), sizes), alone)
