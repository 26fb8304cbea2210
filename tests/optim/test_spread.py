"""Muon and soap on whole matrices: singular vectors, eigenbases, and distribution of the work."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config.mesh import MeshConfig
from maxlm.core.sharding import make_mesh
from maxlm.optim.muon import orthogonalize, scale_by_muon
from maxlm.optim.soap import scale_by_soap
from maxlm.optim.spread import on_whole_matrices


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 24, 8), (3, 2, 8, 40)])
def test_orthogonalized_matrices_keep_their_singular_vectors(shape):
    matrices = random(*shape)
    orthogonal = np.float64(orthogonalize(jnp.asarray(matrices * 1e-3)))
    for matrix, got in zip(np.float64(matrices).reshape(-1, *shape[-2:]), orthogonal.reshape(-1, *shape[-2:])):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ got @ vt.T
        singular = np.diag(inside)
        np.testing.assert_allclose(inside - np.diag(singular), 0, atol=1e-3)
        np.testing.assert_allclose(u @ inside @ vt, got, atol=1e-3)
        usual = singular[s > 0.05 * s.max()]
        assert usual.min() > 0.65
        assert usual.max() < 1.25


def test_muon_matches_optax():
    """Its orthogonalization and momentum, with the same choice of scale and bias correction."""
    grads = {"w": jnp.asarray(random(2, 32, 48))}
    dimensions = {"w": optax.contrib.MuonDimensionNumbers((1,), (2,))}
    theirs = optax.contrib.scale_by_muon(beta=0.95, nesterov=True, weight_dimension_numbers=dimensions)
    ours = scale_by_muon(0.95)
    mine, _ = ours.update(grads, ours.init(grads))
    other, _ = theirs.update(grads, theirs.init(grads))
    np.testing.assert_allclose(mine["w"], other["w"] * np.sqrt(48 / 32), rtol=1e-3, atol=2e-4)


def test_soap_bases_converge_to_eigenvectors():
    """For gradients whose left factor has well separated singular values, along no axis."""
    steps, turn = 120, np.linalg.qr(random(8, 8, seed=1))[0]
    optimizer = scale_by_soap(0.9, 0.95, 1e-8, every=2, max_dim=8)
    state = optimizer.init({"w": jnp.zeros((1, 8, 12))})
    update = jax.jit(optimizer.update)
    for step in range(steps):
        grad = turn @ np.diag(2.0 ** -np.arange(8)) @ random(8, 12, seed=step + 2)
        _, state = update({"w": jnp.asarray(grad[None], jnp.float32)}, state)
    matrix = state["matrices"]["w"]
    assert "columns" not in matrix, "a side of 12 is too long"
    eigenvectors = np.linalg.eigh(np.float64(matrix["rows"][0]))[1][:, ::-1]
    aligned = np.abs(np.sum(eigenvectors * np.float64(matrix["rows_basis"][0]), axis=0))
    assert aligned[:5].min() > 0.99


SPECS = [
    ({"fsdp": 8}, P(None, "fsdp", None)),
    ({"data": 2, "fsdp": 2, "tensor": 2}, P(None, "tensor", "fsdp")),
    ({"stage": 2, "fsdp": 2, "context": 2}, P("stage", ("fsdp", "context"), None)),
    ({"fsdp": 2, "expert": 2, "tensor": 2}, P(None, None, ("fsdp", "expert", "tensor"))),
]


@pytest.mark.parametrize(("sizes", "spec"), SPECS, ids=str)
def test_each_device_gets_its_share_of_whole_matrices(sizes, spec):
    """Six matrices on eight devices: at most one each, and none twice."""
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    num_stages = sizes.get("stage", 1)
    matrices, vectors = random(6, 16, 24), random(6, 16, 8, seed=1)
    seen = []

    def function(count, x, y):
        seen.append((x.shape, y.shape))
        return jnp.cumsum(x, axis=1) + count, y * jnp.linalg.norm(x, axis=(1, 2), keepdims=True)

    with jax.set_mesh(mesh):
        x = jax.device_put(matrices, NamedSharding(mesh, spec))
        y = jax.device_put(vectors, NamedSharding(mesh, P(*spec[:1], spec[1], None)))
        sums, scaled = jax.jit(lambda *stacks: on_whole_matrices(function, *stacks, count=jnp.int32(3)))(x, y)
    share = -(-6 // num_stages // (8 // num_stages))
    assert seen[-1] == ((share, 16, 24), (share, 16, 8))
    assert (sums.sharding.spec, scaled.sharding.spec) == (x.sharding.spec, y.sharding.spec)
    np.testing.assert_allclose(sums, np.cumsum(matrices, axis=1) + 3, atol=1e-5)
    norms = np.linalg.norm(matrices, axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(scaled, vectors * norms, rtol=1e-5)
