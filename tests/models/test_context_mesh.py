"""Context parallelism of a whole decoder: loss and gradient of every weight as on one device."""

import jax
import numpy as np
import pytest
import same_gradient
from tiny_decoder import EXECUTION, VOCAB_SIZE, text_loss, tiny_config

from maxlm.config.execution import ExecutionConfig
from maxlm.config.mesh import MeshConfig
from maxlm.core.batch import Stream, put_batch
from maxlm.core.parameters import abstract, initialize, shardings
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import ConfigError
from maxlm.models.decoder import Decoder

CONFIG = tiny_config(attention_soft_cap=3.0)
CHUNKED = EXECUTION.model_copy(update={"loss_chunk_length": 5})
DOCUMENTS = (9, 7, 12)


def batch_of(length: int) -> Stream:
    """Consecutive documents, without the first in every second row, followed by padding."""
    random = np.random.default_rng(0)
    segment_ids, positions = np.zeros((2, 4, length), np.int32)
    for row in range(4):
        documents = DOCUMENTS[row % 2 :]
        used = sum(documents)
        segment_ids[row, :used] = np.repeat(np.arange(1, 1 + len(documents)), documents)
        positions[row, :used] = np.concatenate([np.arange(count) for count in documents])
    tokens, targets = random.integers(0, VOCAB_SIZE, (2, 4, length)).astype(np.int32)
    weights = np.where(segment_ids > 0, random.uniform(0.2, 2, segment_ids.shape), 0).astype(np.float32)
    return Stream(tokens, targets, weights, segment_ids, positions)


@jax.jit
def compute(model, batch):
    def loss(model):
        output = text_loss(model, batch, z_loss=0.1)
        return sum(term.mean() for term in output.terms.values()), output

    gradient, output = jax.grad(loss, has_aux=True)(model)
    return output, gradient


def terms_and_gradient(execution: ExecutionConfig, values, mesh=None):
    """Loss terms and gradient of a decoder with these weights."""
    plan, batch = Decoder(CONFIG, execution), batch_of(32)
    model = unflatten(values, abstract(plan))
    if mesh is None:
        output, gradient = compute(model, batch)
    else:
        with jax.set_mesh(mesh):
            output, gradient = compute(jax.device_put(model, shardings(plan, mesh)), put_batch(batch, mesh))
    return same_gradient.on_host(output.terms, gradient)


@pytest.fixture(scope="module")
def alone():
    """The weights, and the loss terms and gradient on one device."""
    values = flatten(jax.device_get(initialize(Decoder(CONFIG, CHUNKED), jax.random.key(0))))
    return values, terms_and_gradient(CHUNKED, values)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("sizes", "method"),
    [
        ({"context": 4}, "ring"),
        ({"context": 8}, "ring"),
        ({"context": 2, "tensor": 2, "fsdp": 2}, "ring"),
        ({"context": 2, "tensor": 2, "data": 2}, "all_to_all"),
    ],
    ids=str,
)
def test_context_parallelism_changes_nothing(sizes, method, alone):
    values, expected = alone
    execution = CHUNKED.model_copy(update={"context_attention": method})
    same_gradient.assert_same(
        terms_and_gradient(execution, values, make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))), expected
    )


def test_indivisible_rows_are_rejected():
    mesh = make_mesh(MeshConfig(context=8, fsdp=1))
    with pytest.raises(ConfigError, match=r"rows of 36 tokens are not divisible by mesh.context = 8; make them 40"):
        put_batch(batch_of(36), mesh)
