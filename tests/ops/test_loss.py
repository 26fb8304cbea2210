"""Log-probabilities of targets: equal to log_softmax, in chunks, without materializing all logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import PartitionSpec as P

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh
from maxlm.ops.loss import log_probabilities_in_chunks

B, L, D, V = 2, 12, 6, 31


def project(head, hidden):
    return 3 * jnp.tanh(hidden @ head)


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    hidden, head = random.standard_normal((B, L, D)), random.standard_normal((D, V))
    return np.float32(hidden), np.float32(head), random.integers(0, V, (B, L)).astype(np.int32)


def loss_of(chunk_length, targets, weights, squares):
    """A loss in which log p and log Z of every token have their own weights."""

    def loss(hidden, head):
        log_p, log_z = log_probabilities_in_chunks(hidden, project, head, targets, chunk_length=chunk_length)
        return jnp.sum(weights * log_p) + jnp.sum(squares * log_z**2)

    return loss


@pytest.mark.parametrize("chunk_length", [1, 4, 5, 12, 100])
def test_values_and_gradients_match_log_softmax(chunk_length, inputs):
    hidden, head, targets = inputs
    random = np.random.default_rng(1)
    weights, squares = random.standard_normal((2, B, L))
    log_p, log_z = log_probabilities_in_chunks(hidden, project, head, targets, chunk_length=chunk_length)

    x, w = hidden.astype(np.float64), head.astype(np.float64)
    logits = 3 * np.tanh(x @ w)
    expected_z = np.log(np.exp(logits).sum(-1))
    onehot = np.eye(V)[targets]
    np.testing.assert_allclose(log_p, (onehot * logits).sum(-1) - expected_z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_z, expected_z, rtol=1e-5)
    assert log_p.shape == log_z.shape == (B, L)

    got = jax.jit(jax.grad(loss_of(chunk_length, targets, weights, squares), argnums=(0, 1)))(hidden, head)
    probabilities = np.exp(logits - expected_z[..., None])
    d_logits = weights[..., None] * (onehot - probabilities) + (2 * squares * expected_z)[..., None] * probabilities
    d_product = d_logits * 3 * (1 - np.tanh(x @ w) ** 2)
    np.testing.assert_allclose(got[0], d_product @ w.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], np.einsum("bld,blv->dv", x, d_product), rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, head = np.full((1, 2, 1), 1.0, np.float32), np.array([[1e4, -1e4, 9e3]], np.float32)
    targets = np.array([[0, 2]], np.int32)
    log_p, log_z = log_probabilities_in_chunks(hidden, lambda head, x: x @ head, head, targets, chunk_length=2)
    np.testing.assert_allclose(log_p, [[0.0, -1e3]])
    np.testing.assert_allclose(log_z, [[1e4, 1e4]])


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all values in a jaxpr and its nested ones."""
    shapes = set()
    for equation in jaxpr.eqns:
        shapes |= {tuple(variable.aval.shape) for variable in equation.outvars if hasattr(variable.aval, "shape")}
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)):
            if isinstance(parameter, ClosedJaxpr | Jaxpr):
                shapes |= shapes_in(getattr(parameter, "jaxpr", parameter))
    return shapes


def test_no_array_holds_all_logits(inputs):
    hidden, head, targets = inputs
    ones = np.ones((B, L), np.float32)

    def largest(chunk_length):
        gradient = jax.grad(loss_of(chunk_length, targets, ones, ones), argnums=(0, 1))
        shapes = shapes_in(jax.make_jaxpr(gradient)(hidden, head).jaxpr)
        return max(shape[1] for shape in shapes if len(shape) == 3 and shape[2] == V)

    assert largest(L) == L, "the search finds what it looks for"
    assert largest(4) == 4
    assert largest(5) == 5
    text = jax.jit(jax.grad(loss_of(4, targets, ones, ones), argnums=(0, 1))).lower(hidden, head).compile().as_text()
    assert f"[{B},{L},{V}]" not in text
    assert f"[{B},4,{V}]" in text


def test_vocabulary_may_be_sharded(inputs):
    hidden, head, targets = inputs
    head = np.concatenate([head, head[:, :1]], axis=1)
    ones = np.ones((B, L), np.float32)
    expected = jax.grad(loss_of(5, targets, ones, ones), argnums=(0, 1))(hidden, head)
    with jax.set_mesh(make_mesh(MeshConfig(data=2, fsdp=1, tensor=4))):
        arguments = jax.device_put(hidden, P("data")), jax.device_put(head, P(None, "tensor"))
        sharded = jax.device_put(targets, P("data"))
        got = jax.jit(jax.grad(loss_of(5, sharded, jax.device_put(ones, P("data")), 1.0), argnums=(0, 1)))(*arguments)
    for a, b in zip(got, expected):
        # Devices add in a different order: the rounding error is that of the largest terms, near 10.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
