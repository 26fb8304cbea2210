"""Optimizers against formulas in numpy, on stacked layers and experts, on one device and on meshes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optim_reference import in_numpy, is_matrix, plan, random_tree, train
from tiny_run import tiny_model

from maxlm.config import ModelConfig
from maxlm.config.adapters import LayersConfig, LoraConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.optim import OptimConfig
from maxlm.core.parameters import Parameter, abstract, shardings
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.optim.build import gradient_norm, label, make_optimizer

PLAN = plan()
DECODER = Decoder(ModelConfig(**tiny_model(vocab_size=64, qk_norm=True)))
KINDS = ("adamw", "adam8bit", "adafactor", "lion", "sgd", "muon", "soap")
# adam8bit rounds its moments to codes 1 to 10 percent apart; its accuracy is tested in test_adam8bit.py.
EXACT = tuple(kind for kind in KINDS if kind != "adam8bit")


def config_of(kind, **settings):
    if kind == "soap":
        # Directions with almost no gradient contain rounding errors, which differ between processors:
        # with a small epsilon they would be divided by themselves.
        settings = {"epsilon": 1e-4, **settings}
    return OptimConfig(kind=kind, **{"learning_rate": 0.01, "precondition_every": 2, **settings})


def run(config, *, plan=PLAN, dtype="float32", mesh=None, steps=4):
    """Parameters and state after steps with given gradients, at the full learning rate."""
    optimizer = make_optimizer(config, plan)

    @jax.jit
    def step(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optimizer.apply_updates(params, updates, 1.0, 0), state

    trees = [random_tree(plan, seed, dtype) for seed in range(steps + 1)]
    if mesh is None:
        params, *gradients = trees
    else:
        layout = shardings(plan, mesh)
        params, *gradients = [jax.device_put(tree, layout) for tree in trees]
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        state = jax.jit(optimizer.init)(params)
        for grads in gradients:
            params, state = step(params, state, grads)
    return params, state


def in_reference(config, *, plan=PLAN, steps=4):
    gradients = [in_numpy(random_tree(plan, step + 1)) for step in range(steps)]
    return train(config, in_numpy(random_tree(plan, 0)), gradients)


def assert_moved_alike(got, expected, *, rtol, start=None):
    """Assert equality relative to how far each parameter moved."""
    start = start or in_numpy(random_tree(PLAN, 0))
    for path, value in expected.items():
        moved = np.abs(value - start[path]).max()
        assert moved > 0, path
        np.testing.assert_allclose(got[path], value, rtol=0, atol=rtol * moved + 1e-6, err_msg=path)


@pytest.fixture(scope="module")
def alone():
    """Parameters by path after steps on one device, for each kind."""
    return {kind: in_numpy(run(config_of(kind))[0]) for kind in KINDS}


@pytest.mark.parametrize("kind", EXACT)
def test_updates_match_formulas(kind, alone):
    assert_moved_alike(alone[kind], in_reference(config_of(kind)), rtol=1e-3)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("adamw", {"clip_norm": None}),
        ("adamw", {"clip_norm": 1e6}),
        ("muon", {"clip_norm": None, "muon_learning_rate": 0.1, "momentum": 0.5}),
        ("adamw", {"weight_decay": 0.0, "l2_penalty": 0.3}),
        ("adamw", {"clip_norm": None, "l1_penalty": 0.3, "l2_penalty": 0.1}),
        ("sgd", {"l1_penalty": 0.3, "momentum": 0.0}),
        ("soap", {"precondition_max_dim": 40, "clip_norm": None, "beta2": 0.8}),
        ("soap", {"precondition_max_dim": 4}),
    ],
    ids=str,
)
def test_settings_match_formulas(kind, settings):
    config = config_of(kind, **settings)
    assert_moved_alike(in_numpy(run(config)[0]), in_reference(config), rtol=2e-3)


def test_adafactor_factors_each_matrix_of_a_stack():
    """With more layers than a matrix has rows, and sides long enough to be factored."""
    wide = plan(num_layers=2, embed=128, mlp=136, experts=2, vocab=130)
    deep = plan(num_layers=130, embed=8, mlp=128, experts=2, vocab=16)
    for each in (wide, deep):
        config = config_of("adafactor")
        start = in_numpy(random_tree(each, 0))
        got = in_numpy(run(config, plan=each, steps=2)[0])
        assert_moved_alike(got, in_reference(config, plan=each, steps=2), rtol=1e-3, start=start)


MESHES = [{"data": 2, "fsdp": 2, "tensor": 2}, {"stage": 2, "expert": 2, "context": 2}]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("kind", "sizes"), [("muon", {"fsdp": 8}), *((kind, sizes) for kind in KINDS for sizes in MESHES)], ids=str
)
def test_updates_do_not_depend_on_mesh(kind, sizes, alone):
    """And a device's share of the state is like its share of the parameters."""
    mesh = make_mesh(MeshConfig(**{"fsdp": 1, **sizes}))
    params, state = run(config_of(kind), mesh=mesh)
    # If compilers order sums differently, a code of adam8bit may be rounded to its other neighbor.
    assert_moved_alike(in_numpy(params), alone[kind], rtol=0.03 if kind == "adam8bit" else 1e-3)
    assert part_of_a_device(state) < 1.15 * part_of_a_device(params)


def part_of_a_device(tree):
    """Fraction of a tree's bytes on one device."""
    leaves = jax.tree.leaves(tree)
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves) / sum(leaf.nbytes for leaf in leaves)


@pytest.mark.parametrize("kind", ["adamw", "adam8bit", "adafactor", "soap"])
def test_state_of_bfloat16_parameters_is_float32(kind):
    """The same updates as for float32 parameters of the same values, to the last place of bfloat16."""
    params, state = run(config_of(kind), dtype="bfloat16", steps=2)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state)} <= {"float32", "int32", "int8", "uint8"}
    optimizer = make_optimizer(config_of(kind), PLAN)
    small, whole = random_tree(PLAN, 0, "bfloat16"), random_tree(PLAN, 0, "bfloat16")
    whole = optax.tree.cast(whole, jnp.float32)
    grads = random_tree(PLAN, 1, "bfloat16")
    update = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params)[0])
    one, other = update(grads, small), update(optax.tree.cast(grads, jnp.float32), whole)
    for path, value in flatten(one).items():
        np.testing.assert_array_equal(value, flatten(other)[path], err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_decay_applies_only_to_matrices(kind):
    """With zero gradients, only decayed parameters change."""
    optimizer = make_optimizer(config_of(kind, learning_rate=0.1, muon_learning_rate=0.1, weight_decay=0.5), PLAN)
    params = random_tree(PLAN, 0)
    update = jax.jit(
        lambda params: optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    )
    updates, _ = update(params)
    before, moved = in_numpy(params), in_numpy(updates)
    for path in before:
        expected = -0.05 * before[path] if is_matrix(path) else np.zeros_like(before[path])
        np.testing.assert_allclose(moved[path], expected, rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_router_bias_moves_by_sign_of_its_error(kind):
    """For any optimizer, clipping and schedule, and any size of the error."""
    optimizer = make_optimizer(config_of(kind, clip_norm=0.1, router_bias_rate=0.25), PLAN)
    params, grads = random_tree(PLAN, 0), random_tree(PLAN, 1)
    bias, error = (
        params["layers"]["moe"]["router_bias"],
        jnp.array([[1e6, -3.0], [0.0, 1e-9], [-1e-30, 2.0], [1.0, 1.0]]),
    )
    grads["layers"]["moe"]["router_bias"] = error
    update = jax.jit(lambda grads: optimizer.update(grads, optimizer.init(params), params))
    updates, state = update(grads)
    moved = optimizer.apply_updates(params, updates, 0.1, 0)["layers"]["moe"]["router_bias"] - bias
    np.testing.assert_allclose(moved, -0.25 * np.sign(error), atol=1e-6)
    assert not [path for path in flatten(state) if "router_bias" in path]
    without = {**grads, "layers": {**grads["layers"], "moe": {**grads["layers"]["moe"], "router_bias": 0 * error}}}
    calm, _ = update(without)
    for path, value in flatten(calm).items():
        if "router_bias" not in path:
            np.testing.assert_array_equal(value, flatten(updates)[path], err_msg=path)


def test_gradient_norm_is_float32_and_excludes_router_biases():
    grads = random_tree(PLAN, 0, "bfloat16")
    squares = sum((leaf**2).sum() for path, leaf in in_numpy(grads).items() if "bias" not in path)
    assert float(gradient_norm(flatten(PLAN), grads)) == pytest.approx(np.sqrt(squares), rel=1e-5)


@pytest.mark.parametrize("kind", ["muon", "soap"])
def test_only_matrices_of_layers_use_the_matrix_optimizer(kind):
    assert {path for path, parameter in flatten(DECODER).items() if label(kind, parameter) == "main"} == {
        *(f"layers/0/0/mixer/{name}" for name in ("query", "key", "value", "out")),
        *(f"layers/0/0/mlp/{name}" for name in ("gate", "up", "down")),
    }
    adapters = flatten(declare_adapters(DECODER, LoraConfig(rank=2)))
    assert {label(kind, parameter) for parameter in adapters.values()} == {"adam"}, (
        "a low-rank factor is not a matrix to orthogonalize"
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("adamw", 8), ("adam8bit", 2.03), ("adafactor", 0.055), ("lion", 4), ("sgd", 4), ("muon", 4.99), ("soap", 11.97)],
)
def test_state_bytes_per_parameter(kind, expected):
    """For a model with a quarter of its parameters in the table. Muon keeps one number per parameter of the layers,
    soap two and, for each side of a matrix up to 256, two square matrices."""
    layers = plan(num_layers=4, embed=256, mlp=512, experts=2, vocab=2048)
    params = abstract(layers)
    optimizer = make_optimizer(OptimConfig(kind=kind, precondition_max_dim=256), layers)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params)))
    assert size / sum(leaf.size for leaf in jax.tree.leaves(params)) == pytest.approx(expected, rel=0.02)


def test_second_factors_of_adapters_have_their_own_learning_rate():
    """LoRA+: the same gradient changes `up` by the ratio more."""
    adapters = declare_adapters(DECODER, LoraConfig(rank=2, targets=("query",), up_learning_rate_ratio=4))
    change = first_change(adapters, OptimConfig(kind="lion", learning_rate=0.5, weight_decay=0))
    (path,) = adapters
    np.testing.assert_allclose(change[f"{path}/down"], -0.5)
    np.testing.assert_allclose(change[f"{path}/up"], -2.0)


def test_layers_that_are_not_chosen_keep_every_bit():
    """Of a stack of two layers, the second is trained; the first is neither in the norm of the gradient nor decayed."""
    trained = declare_adapters(DECODER, LayersConfig(targets=("layers/1/mixer/query",)))
    change = first_change(trained, OptimConfig(kind="adamw", learning_rate=0.5, weight_decay=0.1))
    (found,) = change.values()
    assert not found[0].any()
    assert found[1].all()
    optimizer = make_optimizer(OptimConfig(), trained)
    grads = jax.tree.map(lambda each: jnp.ones(each.shape), trained, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    norm = optimizer.gradient_norm(optimizer.of_trained(grads))
    assert float(norm) == pytest.approx(np.sqrt(found[1].size))


def first_change(declared, config):
    """How the first step changes weights at one for gradients of one, by path."""
    optimizer = make_optimizer(config, declared)
    ones = jax.tree.map(lambda each: jnp.ones(each.shape), declared, is_leaf=lambda leaf: isinstance(leaf, Parameter))
    updates, _ = optimizer.update(optimizer.of_trained(ones), optimizer.init(ones), ones)
    after = optimizer.apply_updates(ones, updates, 1.0, 0)
    return {path: np.asarray(leaf) - 1 for path, leaf in flatten(after).items()}
