"""A model with experts, from training on a mesh to generation, and validation of its configuration."""

import numpy as np
import pytest
from tiny_run import tiny_config, tiny_model

from maxlm.cli import main
from maxlm.core.sharding import mesh_sizes
from maxlm.errors import CheckpointError, ConfigError
from maxlm.interop.load import load_model
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.layout import check_layout
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train
from maxlm.train.setup import resolve_model

pytestmark = pytest.mark.slow

MOE = {"num_experts": 8, "experts_per_token": 2, "dim": 16, "router_bias": True}


def moe_config(output, data, *, moe=MOE, **settings):
    settings = {"regularization": {"router_balance": 0.01}, **settings}
    return tiny_config(output, data, model=tiny_model(moe=moe), **settings)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_data_folder):
    folder = tmp_path_factory.mktemp("moe") / "run"
    config = moe_config(folder, tiny_data_folder, mesh={"fsdp": 1, "expert": 2}, steps=4, eval_every=0)
    train(config)
    return folder


def test_run_reports_expert_load_and_moves_bias_by_whole_steps(run_folder):
    record = read_metrics(run_folder)[0]
    assert record["router_bias"] == 0
    assert 1 <= record["max_expert_load"] <= 4
    assert record["moe_balance"] >= 0.01 * 0.9
    model, _ = load_model(run_folder)
    steps = np.asarray(model.layers[0][0].mlp.router_bias) / 0.001
    np.testing.assert_allclose(steps, steps.round(), atol=1e-3)
    assert 0 < np.abs(steps).max() <= 4


def test_moe_model_generates_like_any_other(run_folder, capsys):
    assert main(["generate", str(run_folder), "The", "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out.strip()


def test_run_may_start_from_moe_model_with_other_balance_but_not_other_experts(run_folder, tiny_data_folder):
    tokenizer = Tokenizer.load(run_folder / "tokenizer")
    regularization = {"router_balance": 0.5, "router_z_loss": 0.1}
    config = moe_config("x", tiny_data_folder, regularization=regularization, init_from=str(run_folder))
    assert resolve_model(config, tokenizer).model.layers == config.model.layers
    config = moe_config("x", tiny_data_folder, moe={**MOE, "experts_per_token": 1}, init_from=str(run_folder))
    with pytest.raises(CheckpointError, match=r"model\.layers\.mlp\.experts_per_token is 1"):
        resolve_model(config, tokenizer)


def test_indivisible_experts_are_rejected(tiny_data_folder):
    config = moe_config("x", tiny_data_folder, moe={**MOE, "num_experts": 6}, mesh={"fsdp": 1, "expert": 4})
    with pytest.raises(
        ConfigError, match=r"model.layers.mlp.num_experts: 6 .* mesh.expert = 4; set it to 8, or mesh.expert=3"
    ):
        check_layout(config, mesh_sizes(config.mesh, 8))
    config = moe_config("x", tiny_data_folder, moe={**MOE, "dim": 18}, mesh={"fsdp": 1, "tensor": 4})
    with pytest.raises(
        ConfigError, match=r"model.layers.mlp.dim: 18 .* mesh.tensor = 4; set it to 16, or mesh.tensor=3"
    ):
        check_layout(config, mesh_sizes(config.mesh, 8))
