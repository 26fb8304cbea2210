"""Optimizers and schedules against formulas in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_run import MODEL

from maxlm.config import ModelConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.optim import OptimConfig, ScheduleConfig
from maxlm.config.train import LoraConfig
from maxlm.core.parameters import shardings
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.models.adapters import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.train.optim import make_optimizer, muon_labels, orthogonalize, scale_by_muon, schedule_factor

pytestmark = pytest.mark.usefixtures("quick_compile")

PLAN = Decoder(ModelConfig(**{**MODEL, "vocab_size": 64, "qk_norm": True}))


def random_tree(plan, seed):
    """An array in the place of each declaration."""
    random = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(random.standard_normal(p.shape), "float32"), plan, is_leaf=lambda x: hasattr(x, "axes")
    )


def in_numpy(tree):
    return {path: np.asarray(leaf, np.float64) for path, leaf in flatten(tree).items()}


def run(config, plan=PLAN, steps=3):
    """Parameters after steps with given gradients, at the full learning rate."""
    optimizer = make_optimizer(config)
    params = random_tree(plan, 0)
    state = optimizer.init(params)
    for step in range(steps):
        updates, state = jax.jit(optimizer.update)(random_tree(plan, step + 1), state, params)
        params = optax.apply_updates(params, updates)
    return in_numpy(params)


def gradients(plan, step, clip_norm):
    grads = in_numpy(random_tree(plan, step + 1))
    norm = np.sqrt(sum((g * g).sum() for g in grads.values()))
    factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
    return {path: factor * g for path, g in grads.items()}


def is_matrix(path):
    return "norm" not in path


class AdamW:
    """Of one array (arXiv:1711.05101)."""

    def __init__(self, config):
        self.config, self.m, self.v, self.step = config, 0.0, 0.0, 0

    def __call__(self, value, grad, decays):
        c = self.config
        self.step += 1
        self.m = c.beta1 * self.m + (1 - c.beta1) * grad
        self.v = c.beta2 * self.v + (1 - c.beta2) * grad**2
        update = (self.m / (1 - c.beta1**self.step)) / (np.sqrt(self.v / (1 - c.beta2**self.step)) + c.epsilon)
        return value - c.learning_rate * (update + c.weight_decay * decays * value)


class Muon:
    """Of stacked matrices [layers, in, out]: Nesterov momentum, orthogonalised by five quintic steps."""

    def __init__(self, config):
        self.config, self.trace = config, 0.0

    def __call__(self, value, grad, decays):
        c, beta = self.config, self.config.muon_momentum
        self.trace = beta * self.trace + (1 - beta) * grad
        nesterov = beta * self.trace + (1 - beta) * grad
        updates = []
        for matrix in nesterov:
            # A polynomial of the matrix acts on its singular values alone.
            u, s, vt = np.linalg.svd(matrix / np.linalg.norm(matrix), full_matrices=False)
            for _ in range(5):
                s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
            updates.append(u @ np.diag(s) @ vt * np.sqrt(max(1, matrix.shape[1] / matrix.shape[0])))
        return value - c.muon_learning_rate * (np.stack(updates) + c.weight_decay * decays * value)


@pytest.mark.parametrize("clip_norm", [None, 1.0, 1e6])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_updates_are_those_of_the_formulas(kind, clip_norm):
    config = OptimConfig(kind=kind, learning_rate=0.01, weight_decay=0.1, clip_norm=clip_norm)
    got = run(config)
    params = in_numpy(random_tree(PLAN, 0))
    rules = {
        path: (Muon if kind == "muon" and path.startswith("layers/") and is_matrix(path) else AdamW)(config)
        for path in params
    }
    for step in range(3):
        grads = gradients(PLAN, step, clip_norm)
        params = {path: rules[path](value, grads[path], is_matrix(path)) for path, value in params.items()}
    for path, value in params.items():
        np.testing.assert_allclose(got[path], value, rtol=1e-4, atol=2e-5, err_msg=path)


def test_decay_is_for_matrices_alone():
    """With gradients of zero, only what decays moves."""
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.5))
    params = random_tree(PLAN, 0)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    before, moved = in_numpy(params), in_numpy(updates)
    for path in before:
        expected = -0.05 * before[path] if is_matrix(path) else np.zeros_like(before[path])
        np.testing.assert_allclose(moved[path], expected, rtol=1e-5, err_msg=path)


def test_muon_is_for_the_matrices_of_layers():
    labels = flatten(muon_labels(random_tree(PLAN, 0)))
    assert {path for path, label in labels.items() if label == "muon"} == {
        *(f"layers/attention/{name}" for name in ("query", "key", "value", "out")),
        *(f"layers/mlp/{name}" for name in ("gate", "up", "down")),
    }
    adapters = random_tree(declare_adapters(PLAN, LoraConfig(rank=2)), 0)
    assert set(jax.tree.leaves(muon_labels(adapters))) == {"adamw"}, "a product of two is no matrix to orthogonalise"


@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 24, 8), (3, 8, 40)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    matrices = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    got = np.float64(orthogonalize(jnp.asarray(matrices * 1e-3)))
    for matrix, orthogonal in zip(np.float64(matrices), got):
        u, s, vt = np.linalg.svd(matrix, full_matrices=False)
        inside = u.T @ orthogonal @ vt.T
        singular = np.diag(inside)
        np.testing.assert_allclose(inside - np.diag(singular), 0, atol=1e-3)
        np.testing.assert_allclose(u @ inside @ vt, orthogonal, atol=1e-3)
        usual = singular[s > 0.05 * s.max()]
        assert usual.min() > 0.65
        assert usual.max() < 1.25


def test_muon_is_that_of_optax():
    """Its orthogonalisation and momentum; the scale and bias correction are chosen alike."""
    plan = {"w": random_tree(PLAN, 0).layers.mlp.gate}
    ours, theirs = (
        scale_by_muon(0.95),
        optax.contrib.scale_by_muon(
            beta=0.95, nesterov=True, weight_dimension_numbers={"w": optax.contrib.MuonDimensionNumbers((1,), (2,))}
        ),
    )
    grads = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(plan["w"].shape), "float32")}
    mine, _ = ours.update(grads, ours.init(plan))
    other, _ = theirs.update(grads, theirs.init(plan))
    scale = np.sqrt(max(1, plan["w"].shape[2] / plan["w"].shape[1]))
    np.testing.assert_allclose(mine["w"], other["w"] * scale, rtol=1e-3, atol=2e-4)


def test_a_mesh_changes_no_update():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer = make_optimizer(OptimConfig(kind="muon"))

    def step(params, grads):
        return optimizer.update(grads, optimizer.init(params), params)[0]

    params, grads = random_tree(PLAN, 0), random_tree(PLAN, 1)
    alone = in_numpy(jax.jit(step)(params, grads))
    layout = shardings(PLAN, mesh)
    with jax.set_mesh(mesh):
        cut = in_numpy(jax.jit(step)(jax.device_put(params, layout), jax.device_put(grads, layout)))
    for path, value in alone.items():
        np.testing.assert_allclose(cut[path], value, rtol=1e-4, atol=1e-6, err_msg=path)


def factor(step, *, steps=100, **settings):
    return float(schedule_factor(ScheduleConfig(**settings), steps, step))


def test_schedules_at_their_corners():
    cosine = {"kind": "cosine", "warmup_steps": 10, "final_factor": 0.1}
    assert [factor(step, **cosine) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert factor(55, **cosine) == pytest.approx(0.55)
    assert factor(100, **cosine) == factor(500, **cosine) == pytest.approx(0.1)

    wsd = {"kind": "wsd", "warmup_steps": 4, "decay_fraction": 0.2, "final_factor": 0.0}
    assert [factor(step, **wsd) for step in (0, 3, 4, 50, 80)] == pytest.approx([0.25, 1, 1, 1, 1])
    assert [factor(step, **wsd) for step in (90, 99, 100)] == pytest.approx([0.5, 0.05, 0.0], abs=1e-6)

    assert [factor(step, kind="constant", warmup_steps=2) for step in (0, 1, 99)] == pytest.approx([0.5, 1, 1])
    assert factor(0, kind="constant", warmup_steps=0) == 1
    assert factor(7, steps=5, kind="cosine", warmup_steps=10) <= 1, "a run may end within its warm-up"
