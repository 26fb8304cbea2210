"""Learning rates and decays by path, and errors for patterns that match nothing."""

import jax
import numpy as np
import pytest
from optim_reference import in_numpy, plan, random_tree
from tiny_run import tiny_config

from maxlm.config.optim import OptimConfig
from maxlm.errors import ConfigError
from maxlm.optim.build import make_optimizer
from maxlm.train.run import train

PLAN = plan()


def updates_of(groups, grads=None, **settings):
    optimizer = make_optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.5, groups=groups, **settings), PLAN)
    params = random_tree(PLAN, 0)
    grads = random_tree(PLAN, 1) if grads is None else grads
    return in_numpy(jax.jit(lambda: optimizer.update(grads, optimizer.init(params), params)[0])())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_first_matching_group_sets_rate_and_decay(kind):
    groups = [
        {"match": "layers/mlp/*", "learning_rate_factor": 0.5},
        {"match": "*norm*", "weight_decay": 0.2},
        {"match": "embedding", "learning_rate_factor": 0},
        {"match": "layers/*", "learning_rate_factor": 3, "weight_decay": 0.0},
    ]
    usual, params = updates_of([], kind=kind), in_numpy(random_tree(PLAN, 0))
    got = updates_of(groups, kind=kind)
    rate = {"adamw": 0.1, "muon": 0.02}[kind]
    for path, value in got.items():
        if path.startswith("layers/mlp/"):
            expected = 0.5 * usual[path]
        elif "norm" in path:
            expected = usual[path] - 0.1 * 0.2 * params[path]
        elif path == "embedding":
            expected = 0 * usual[path]
        elif "router_bias" in path:
            expected = usual[path]
        else:
            expected = 3 * (usual[path] + rate * 0.5 * params[path])
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-7, err_msg=path)


def test_patterns_that_match_nothing_are_reported_together():
    groups = [
        {"match": "layers/mpl/down"},
        {"match": "layers/*"},
        {"match": "layers/mlp/down", "weight_decay": 0},
        {"match": "*router_bias"},
    ]
    with pytest.raises(ConfigError) as error:
        updates_of(groups)
    first, second, third = error.value.problems
    assert first.startswith("optim.groups.0.match: 'layers/mpl/down' matches no parameter; the nearest are ")
    assert "layers/mlp/down" in first
    assert second.startswith("optim.groups.2.match: 'layers/mlp/down' matches only parameters of earlier groups")
    assert third.startswith("optim.groups.3.match: '*router_bias' matches no parameter; the nearest are ")


def test_run_is_rejected_before_anything_is_created(tmp_path, tiny_data_folder):
    with pytest.raises(ConfigError, match=r"'layers/mpl/[*]' matches no parameter"):
        train(tiny_config(tmp_path / "run", tiny_data_folder, optim={"groups": [{"match": "layers/mpl/*"}]}))
    assert not (tmp_path / "run" / "config.yaml").exists()
