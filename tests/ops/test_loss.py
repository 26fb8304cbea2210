"""Log-probabilities of targets: equal to log_softmax, in chunks, without materializing all logits."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import logical_to_spec, make_mesh
from maxlm.ops.loss import Head, log_probabilities_in_chunks

B, L, D, V = 2, 12, 6, 31


HEAD = Head("float32", 0.5, lambda logits: 3 * jnp.tanh(logits))


@pytest.fixture(scope="module")
def inputs():
    random = np.random.default_rng(0)
    hidden, table = 0.5 * random.standard_normal((B, L, D)), random.standard_normal((V, D))
    return np.float32(hidden), np.float32(table), random.integers(0, V, (B, L)).astype(np.int32)


def loss_of(chunk_length, targets, weights, squares, head=HEAD):
    """A loss in which log p and log Z of every token have their own weights."""

    def loss(hidden, table):
        log_p, log_z = log_probabilities_in_chunks(head, table, hidden, targets, chunk_length=chunk_length)
        return jnp.sum(weights * log_p) + jnp.sum(squares * log_z**2)

    return loss


@pytest.mark.parametrize(
    ("chunk_length", "smoothing"), [(1, 0.0), (4, 0.0), (5, 0.2), (12, 0.0), (100, 0.0), (100, 0.2)]
)
def test_values_and_gradients_match_log_softmax(chunk_length, smoothing, inputs):
    hidden, table, targets = inputs
    head = replace(HEAD, smoothing=smoothing)
    random = np.random.default_rng(1)
    weights, squares = random.standard_normal((2, B, L))
    log_p, log_z = log_probabilities_in_chunks(head, table, hidden, targets, chunk_length=chunk_length)

    x, w = hidden.astype(np.float64) / HEAD.width, table.astype(np.float64).T
    logits = 3 * np.tanh(x @ w)
    expected_z = np.log(np.exp(logits).sum(-1))
    onehot = (1 - smoothing) * np.eye(V)[targets] + smoothing / V
    np.testing.assert_allclose(log_p, (onehot * logits).sum(-1) - expected_z, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(log_z, expected_z, rtol=1e-5)
    assert log_p.shape == log_z.shape == (B, L)

    got = jax.jit(jax.grad(loss_of(chunk_length, targets, weights, squares, head), argnums=(0, 1)))(hidden, table)
    probabilities = np.exp(logits - expected_z[..., None])
    d_logits = weights[..., None] * (onehot - probabilities) + (2 * squares * expected_z)[..., None] * probabilities
    d_product = d_logits * 3 * (1 - np.tanh(x @ w) ** 2)
    np.testing.assert_allclose(got[0], d_product @ w.T / HEAD.width, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got[1], np.einsum("bld,blv->vd", x, d_product), rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow():
    hidden, table = np.full((1, 2, 1), 1.0, np.float32), np.array([[1e4], [-1e4], [9e3]], np.float32)
    targets = np.array([[0, 2]], np.int32)
    for chunk_length in (1, 2):
        log_p, log_z = log_probabilities_in_chunks(Head("float32"), table, hidden, targets, chunk_length=chunk_length)
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
    hidden, table, targets = inputs
    ones = np.ones((B, L), np.float32)

    def largest(chunk_length):
        gradient = jax.grad(loss_of(chunk_length, targets, ones, ones), argnums=(0, 1))
        shapes = shapes_in(jax.make_jaxpr(gradient)(hidden, table).jaxpr)
        return max(shape[1] for shape in shapes if len(shape) == 3 and shape[2] == V)

    assert largest(L) == L, "the search finds what it looks for"
    assert largest(4) == 4
    assert largest(5) == 4, "three equal chunks"
    assert largest(7) == 6
    text = jax.jit(jax.grad(loss_of(4, targets, ones, ones), argnums=(0, 1))).lower(hidden, table).compile().as_text()
    assert f"[{B},{L},{V}]" not in text
    assert f"[{B},4,{V}]" in text


@pytest.mark.parametrize(
    "sizes",
    [
        {"tensor": 2},
        {"data": 2, "tensor": 4},
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"fsdp": 2, "expert": 2, "stage": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("chunk_length", [5, 100])
def test_results_do_not_depend_on_mesh(sizes, chunk_length):
    random = np.random.default_rng(0)
    hidden, table = random.standard_normal((8, L, 8)), random.standard_normal((32, 8))
    targets, (weights, squares) = random.integers(0, 32, (8, L)), random.standard_normal((2, 8, L))
    arrays = (hidden, table, targets, weights, squares)
    arrays = [np.asarray(x, np.float32 if x.dtype == np.float64 else np.int32) for x in arrays]

    @jax.jit
    def gradient(hidden, table, targets, weights, squares):
        return jax.grad(loss_of(chunk_length, targets, weights, squares), argnums=(0, 1))(hidden, table)

    expected = gradient(*arrays)
    tokens, mesh = ("batch", "length"), make_mesh(MeshConfig(**{"fsdp": 1} | sizes))
    axes = [(*tokens, None), ("vocab", "embed"), tokens, tokens, tokens]
    with jax.set_mesh(mesh):
        placed = [jax.device_put(x, logical_to_spec(each)) for x, each in zip(arrays, axes)]
        got = gradient(*placed)
        gathers = str(jax.make_jaxpr(gradient)(*placed)).count("all_gather[")
    assert got[1].sharding.spec == placed[1].sharding.spec
    # With several chunks, if the table is sharded along its width: once for all of them, forward and backward.
    assert gathers == (chunk_length == 5 and not sizes.keys().isdisjoint({"fsdp", "expert", "context"}))
    for a, b in zip(got, expected):
        # Devices add in a different order: the rounding error is that of the largest terms.
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())


def test_gradient_of_the_table_is_summed_in_float32():
    """In bfloat16, 256 + 1 is 256: a bfloat16 sum of a one from each of 1,024 chunks would stop there."""
    hidden, targets = jnp.ones((1, 1024, 1)), jnp.zeros((1, 1024), int)
    # With logits 0 and -1000, d log Z / d logits is exactly 1 and 0.
    head = Head("bfloat16")
    loss = lambda table: log_probabilities_in_chunks(head, table, hidden, targets, chunk_length=1)[1].sum()  # noqa: E731
    grad = jax.jit(jax.grad(loss))(jnp.asarray([[0.0], [-1000.0]]))
    assert grad.tolist() == [[1024.0], [0.0]]
