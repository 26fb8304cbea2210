"""The training loop, shared by all objectives."""

import contextlib
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from maxlm.checkpoint.lineage import Lineage
from maxlm.checkpoint.saving import RunCheckpoints
from maxlm.config.load import dump_yaml
from maxlm.core.hardware import peak_flops
from maxlm.optim.build import make_optimizer
from maxlm.optim.schedule import schedule_factor
from maxlm.runtime.distributed import is_primary, stop_on_signal
from maxlm.runtime.progress import console
from maxlm.runtime.storage import storage_path
from maxlm.train.faults import Quarantine
from maxlm.train.goodput import Goodput, GoodputLog, Stopwatch
from maxlm.train.metrics import MetricsLog, StepWindow
from maxlm.train.objective import TrainingData
from maxlm.train.segment import Segment
from maxlm.train.state import TrainState, abstract_state, create_state
from maxlm.train.step import LossFunction, train_step
from maxlm.train.trained_model import TrainedModel


@dataclass(frozen=True)
class TrainResult:
    """The outcome of a run.

    Attributes:
      start: the step that it was resumed at, or 0.
      record: provenance of the steps, as in the metadata of a checkpoint: `config`, `start`, `changes`.
      stopped: why the objective ended the run before its last step; None if it did not.
    """

    state: TrainState
    start: int
    steps: int
    record: dict[str, Any]
    interrupted: bool
    metrics: dict[str, float]
    goodput: Goodput
    tokens_per_second: float
    stopped: str | None = None


def fit(
    model: TrainedModel,
    data: TrainingData,
    loss_function: LossFunction,
    lineage: Lineage,
    *,
    mesh: Mesh,
    stopwatch: Stopwatch,
) -> TrainResult:
    """Train from the newest checkpoint of the run, or from the initial weights, to the last step.

    Args:
      model: the trained parameters, and how to assemble the model for the loss from them.
      data: batches, validation.
      loss_function: of the trained and the frozen weights of `model`.
      lineage: the resolved configuration, and what the run reads; a checkpoint of another run is rejected.
      mesh: the devices; must be set by the caller (`jax.set_mesh`).
      stopwatch: running since this attempt began.

    Raises:
      CheckpointError: the checkpoint in the folder has different arrays, or cannot be read.
      ConfigError: the checkpoint is of another run, or of a later step than the configured last one.
      TrainingError: too many steps were skipped, too often, or a checkpoint could not be saved.
    """
    config, folder = lineage.config, storage_path(lineage.config.output)
    optimizer = make_optimizer(config.optim, model.plan, width=config.model.width)
    schedule = partial(schedule_factor, config.optim.schedule, config.steps)
    step_function = jax.jit(
        partial(
            train_step,
            loss_function=loss_function,
            optimizer=optimizer,
            schedule=schedule,
            guard=config.guard,
            accumulate=config.accumulate,
            pipeline=config.execution.pipeline,
            ema_decay=config.optim.ema_decay,
            seed=config.seed if config.regularization.is_random else None,
        ),
        donate_argnums=0,
    )
    state_of = partial(create_state, optimizer=optimizer, keep_ema=config.optim.ema_decay is not None)
    state_like = abstract_state(state_of, model.like, mesh)
    config_yaml = dump_yaml(config)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(RunCheckpoints(folder, config.checkpoint))
        quarantine = Quarantine(folder, config)
        goodput = GoodputLog(folder, stopwatch)
        segment = Segment(
            config=config,
            mesh=mesh,
            data=data,
            model=lambda trainable: model.assemble(trainable, model.frozen),
            step_function=step_function,
            frozen=model.frozen,
            learning_rate=lambda step: config.optim.learning_rate * float(schedule(step)),
            checkpoints=checkpoints,
            quarantine=quarantine,
            goodput=goodput,
            stopwatch=stopwatch,
            window=StepWindow(
                model.active_parameters,
                goodput,
                peak=peak_flops(mesh.devices.flat[0]),
                num_devices=mesh.devices.size,
            ),
            stop_requested=stack.enter_context(stop_on_signal()),
        )
        record = lineage.metadata | {"config_yaml": config_yaml, "changes": []}
        first_step, beginning = None, "start_up"
        while True:
            with stopwatch.counting(beginning):
                if (restored := checkpoints.restore(state_like)) is None:
                    state = jax.jit(state_of, donate_argnums=0)(model.create())
                else:
                    state, saved = restored
                    changes = lineage.changes_since(saved)
                    quarantine.restore(saved["quarantine"])
                    # If no steps are left, the run's record is unchanged.
                    record = record | {"changes": changes} if saved["step"] < config.steps else saved
                step = int(state.step)
                if is_primary() and restored is not None:
                    console.print(f"resuming {folder} at step {step}", markup=False)
                    if first_step is None:
                        lineage.report_changes(saved)
                if is_primary() and (step < config.steps or not (folder / "config.yaml").exists()):
                    # Not earlier: a rejected run leaves the folder unchanged.
                    (folder / "config.yaml").write_text(record["config_yaml"], encoding="utf-8")
                if first_step is None:
                    first_step = step
                if step < config.steps:
                    goodput.begin(step)
            with MetricsLog(folder, start_step=step, total_steps=config.steps) as log, stopwatch.counting("step"):
                end = segment.train(state, log, record)
            if not end.bad_steps:
                break
            # The steps before them are repeated from the last checkpoint, as after a restart.
            beginning = "rolled_back"
            with stopwatch.counting(beginning):
                quarantine.add(end.bad_steps, data)
        if end.step == config.steps:
            checkpoints.remove_local(end.step)
        if first_step < config.steps:
            goodput.close(end.step)
        rate = segment.window.tokens_per_second_overall()
    if end.interrupted and is_primary():
        console.print(f"stopped by a signal: step {end.step} is saved; run the same command to resume", markup=False)
    if end.stopped and is_primary():
        console.print(f"stopped at step {end.step}, which is saved: {end.stopped}", markup=False)
    return TrainResult(
        end.state, first_step, end.step, record, end.interrupted, end.valid, goodput.goodput, rate, end.stopped
    )
