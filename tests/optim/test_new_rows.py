"""The first steps change the rows of new tokens only, on any mesh and for any dtype; then everything is trained."""

import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optim_reference import plan, random_tree
from tiny_run import tiny_config

from maxlm.config.adapters import LoraConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.optim import OptimConfig
from maxlm.core.parameters import shardings
from maxlm.core.sharding import make_mesh
from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.decoder import Decoder
from maxlm.optim.build import make_optimizer

PLAN = plan()
FIRST, STEPS = 40, 2


def states(config, dtype, mesh=None):
    """Parameters before each of four steps, and after the last."""
    optimizer = make_optimizer(config, PLAN)

    @jax.jit
    def update(params, state, grads, step):
        updates, state = optimizer.update(grads, state, params)
        return optimizer.apply_updates(params, updates, 1.0, step), state

    params, *gradients = [random_tree(PLAN, seed, dtype) for seed in range(5)]
    # Zeros of both signs stay what they are.
    params["embedding"] = params["embedding"].at[0, :2].set(jnp.array([0.0, -0.0], dtype))
    if mesh is not None:
        layout = shardings(PLAN, mesh)
        params, *gradients = [jax.device_put(tree, layout) for tree in (params, *gradients)]
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        state, found = jax.jit(optimizer.init)(params), [params]
        for step, grads in enumerate(gradients):
            params, state = update(params, state, grads, step)
            found.append(params)
    return [{path: np.asarray(x) for path, x in flatten(each).items()} for each in found]


def assert_trains_new_rows_first(found):
    for step, (before, after) in enumerate(itertools.pairwise(found)):
        for path, x in before.items():
            is_new = (np.arange(len(x)) >= FIRST) & (path == "embedding") | (step >= STEPS)
            unchanged = x.view(np.uint8).reshape(len(x), -1) == after[path].view(np.uint8).reshape(len(x), -1)
            assert unchanged[~is_new].all(), path
            assert not unchanged[is_new].all() or not is_new.any(), path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["adamw", "muon", "lion"])
def test_old_rows_keep_their_bits_until_everything_is_trained(kind, dtype):
    config = OptimConfig(kind=kind, learning_rate=0.1, new_rows={"first": FIRST, "steps": STEPS})
    assert_trains_new_rows_first(states(config, dtype))


def test_sharded_rows_are_the_same():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, tensor=4))
    config = OptimConfig(learning_rate=0.1, new_rows={"first": FIRST, "steps": STEPS})
    sharded, whole = states(config, "float32", mesh), states(config, "float32")
    assert_trains_new_rows_first(sharded)
    for path, x in whole[-1].items():
        np.testing.assert_allclose(sharded[-1][path], x, rtol=1e-4, atol=1e-5, err_msg=path)


def test_new_rows_that_do_not_exist_are_refused():
    with pytest.raises(ConfigError, match=r"optim\.new_rows\.first: 64 is not a row of the embedding, which has 64"):
        make_optimizer(OptimConfig(new_rows={"first": 64, "steps": 1}), PLAN)
    adapters = declare_adapters(Decoder(tiny_config("run", "data").model), LoraConfig(targets=("query",)))
    with pytest.raises(ConfigError, match=r"optim\.new_rows: adapters have no rows of tokens; leave out adapters"):
        make_optimizer(OptimConfig(new_rows={"first": 64, "steps": 1}), adapters)
