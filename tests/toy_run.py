"""The training loop on a tiny model: nothing to trace or compile, so a run takes a fraction of a second."""

import json
import os
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
from declared import declared
from tiny_run import tiny_config

from maxlm.checkpoint.lineage import Lineage
from maxlm.config.train import TrainConfig
from maxlm.core.sharding import make_mesh
from maxlm.core.term import LossOutput, Term
from maxlm.runtime.distributed import initialize_distributed
from maxlm.train.goodput import Stopwatch
from maxlm.train.loop import TrainResult, fit
from maxlm.train.trained_model import TrainedModel


class ToyData:
    """A linear model fitted to noise; a batch is a pure function of its number."""

    def __init__(self, *, poison=(), leave_out=(), at_batch=lambda number: None):
        self.poison, self.leave_out, self.at_batch = set(poison), set(leave_out), at_batch

    def compute_loss(self, model, frozen, batch):
        error_B = batch["x"] @ model["w"] - batch["y"]
        return LossOutput({"squares": Term(jnp.sum(error_B**2), jnp.asarray(float(error_B.size)))}, {})

    def batches(self, start_step, current_model):
        for number in (n for n in count() if n not in self.leave_out):
            if number >= start_step:
                self.at_batch(number)
                random = np.random.default_rng(number)
                x_B4, y_B = random.normal(size=(8, 4)).astype(np.float32), random.normal(size=8).astype(np.float32)
                mine = np.split(np.arange(8), jax.process_count())[jax.process_index()]
                yield {"x": x_B4[mine] * (np.nan if number in self.poison else 1), "y": y_B[mine]}

    def documents(self, batch):
        return [{"id": f"document {batch}"}]

    def validate(self, model):
        return {"norm": float(jnp.sum(model["w"] ** 2))}


def toy_config(folder, **settings) -> TrainConfig:
    guard = {"max_skipped_in_a_row": 3, "max_rollbacks": 2}
    optim = {"learning_rate": 0.1, "schedule": {"warmup_steps": 0}}
    return tiny_config(folder, "x", **{"guard": guard, "optim": optim, "eval_every": 0, **settings})


def toy_run(folder, *, data=None, accept_changes=False, **settings) -> TrainResult:
    """A run of 12 steps with a checkpoint every 4; `settings` replace top-level keys of the configuration."""
    config = toy_config(folder, **settings)
    mesh = make_mesh(config.mesh)
    everywhere = jax.NamedSharding(mesh, jax.P(None))
    os.makedirs(folder, exist_ok=True)
    data = data or ToyData()
    model = TrainedModel(
        plan=declared({"w": jnp.zeros(4)}),
        active_parameters=4,
        like={"w": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=everywhere)},
        create=lambda: {"w": jax.device_put(jnp.arange(4.0), everywhere)},
        frozen={},
        assemble=lambda trainable, frozen: trainable,
        reference=lambda: None,
    )
    lineage = Lineage(config, "toy", accept_changes=accept_changes)
    with jax.set_mesh(mesh), Stopwatch() as stopwatch:
        return fit(model, data, data.compute_loss, lineage, mesh=mesh, stopwatch=stopwatch)


def weights(result: TrainResult) -> bytes:
    """All numbers of the state, bit for bit, except the counters of skipped steps."""
    state = jax.device_get(result.state)
    return b"".join(
        np.asarray(leaf).tobytes() for leaf in jax.tree.leaves((state.step, state.trainable, state.optimizer))
    )


def main(folder: str, settings: str) -> None:
    """Run with these settings, as JSON, as one of several processes if the environment says so.

    The setting `data` has the arguments of ToyData.
    """
    initialize_distributed()
    settings = json.loads(settings)
    data = ToyData(**settings.pop("data", {}))
    result = toy_run(folder, data=data, **settings)
    print(json.dumps({"weights": weights(result).hex(), "start": result.start, "steps": result.steps}))
