"""The moving average of the weights: formula, validation, saving, resuming and loading."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from declared import declared
from tiny_run import tiny_config

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.folder import find_checkpoint
from maxlm.checkpoint.restore import restore_ema
from maxlm.config.fault import GuardConfig
from maxlm.config.optim import OptimConfig
from maxlm.core.parameters import initialize
from maxlm.core.term import LossOutput, Term
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.interop.load import load_model
from maxlm.models.decoder import Decoder
from maxlm.optim.build import make_optimizer
from maxlm.optim.ema import create_ema, ema_as, update_ema
from maxlm.train.metrics import read_metrics
from maxlm.train.run import train
from maxlm.train.state import create_state
from maxlm.train.step import train_step


def test_average_matches_formula():
    values = np.random.default_rng(0).standard_normal((40, 5))
    mean, ema = values[0], create_ema({"w": jnp.asarray(values[0], jnp.bfloat16)})
    mean = np.float64(jnp.asarray(mean, jnp.bfloat16))
    for step, value in enumerate(values[1:]):
        decay = min(0.7, (1 + step) / (10 + step))
        rounded = jnp.asarray(value, jnp.bfloat16)
        mean = decay * mean + (1 - decay) * np.float64(rounded)
        ema = update_ema(ema, {"w": rounded}, 0.7, jnp.int32(step))
    assert ema["w"].dtype == jnp.float32
    np.testing.assert_allclose(ema["w"], mean, atol=1e-5)
    assert ema_as(ema, {"w": rounded})["w"].dtype == jnp.bfloat16


def loaded(path, **settings):
    model, _ = load_model(path, **settings)
    return model, {path: np.asarray(leaf) for path, leaf in flatten(model).items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_data_folder):
    """The configuration of a run of two and then two more steps, with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("ema") / "run"
    optim = {"learning_rate": 1e-2, "ema_decay": 0.25, "schedule": {"warmup_steps": 1, "kind": "constant"}}
    settings = {"optim": optim, "checkpoint": {"every": 1, "keep": 4}, "eval_every": 0}
    for steps in (2, 4):
        config = tiny_config(folder, tiny_data_folder, steps=steps, **settings)
        train(config)
    return config


def test_run_saves_validates_resumes_and_loads_average(run):
    model, last = loaded(run.output)
    start = initialize(Decoder(model.config, model.execution), jax.random.key(run.seed))
    mean = {path: np.float64(leaf) for path, leaf in flatten(start).items()}
    for step, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.25)):
        _, weights = loaded(f"{run.output}/checkpoints/{step + 1}")
        mean = {path: decay * value + (1 - decay) * weights[path] for path, value in mean.items()}
    _, ema = loaded(run.output, ema=True)
    for path, value in mean.items():
        np.testing.assert_allclose(ema[path], value, atol=1e-6, err_msg=path)
    assert any(np.abs(ema[path] - last[path]).max() > 1e-4 for path in ema)

    record = read_metrics(run.output)[-1]
    assert record["valid_ema_loss"] != record["valid_loss"]
    assert record["valid_ema_loss"] == pytest.approx(record["valid_loss"], rel=0.1)


def test_loading_average_of_run_without_one_is_an_error(tmp_path):
    weights = {"w": jnp.ones(3)}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        checkpointer.save(create_state(weights, make_optimizer(OptimConfig(), declared(weights))), {})
    with pytest.raises(CheckpointError, match=r"has no EMA weights; train with optim\.ema_decay"):
        restore_ema(find_checkpoint(tmp_path), weights)


def test_skipped_step_does_not_change_average():
    def loss(trainable, frozen, batch):
        return LossOutput({"loss": Term(jnp.sum(trainable["w"] * batch), jnp.float32(1))}, {})

    weights = {"w": jnp.ones(3)}
    optimizer = make_optimizer(OptimConfig(), declared(weights))
    step = partial(
        train_step,
        loss_function=loss,
        optimizer=optimizer,
        schedule=lambda step: 1.0,
        guard=GuardConfig(),
        accumulate=1,
        ema_decay=0.9,
    )
    start = create_state(weights, optimizer, keep_ema=True)
    good, _ = step(start, None, jnp.ones(3))
    skipped, _ = step(good, None, jnp.full(3, jnp.nan))
    assert not np.array_equal(start.ema["w"], good.ema["w"])
    np.testing.assert_array_equal(good.ema["w"], skipped.ema["w"])
