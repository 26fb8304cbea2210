"""The training loop: one for every objective."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from maxlm.checkpoint.lineage import Lineage
from maxlm.checkpoint.saving import RunCheckpoints
from maxlm.config.load import dump_yaml
from maxlm.config.train import TrainConfig
from maxlm.core.batch import num_tokens, put_batch
from maxlm.core.hardware import peak_flops
from maxlm.core.term import LossOutput
from maxlm.errors import MaxlmError
from maxlm.optim.build import make_optimizer
from maxlm.optim.ema import ema_as
from maxlm.optim.schedule import schedule_factor
from maxlm.runtime.distributed import is_primary, stop_on_signal
from maxlm.runtime.progress import console
from maxlm.runtime.storage import storage_path
from maxlm.train.faults import BadStep, GuardWatch, Quarantine
from maxlm.train.goodput import Goodput, GoodputLog, Stopwatch
from maxlm.train.metrics import MetricsLog, StepWindow
from maxlm.train.objective import TrainingData
from maxlm.train.state import TrainState, abstract_state, create_state
from maxlm.train.step import train_step


@dataclass(frozen=True)
class TrainResult:
    """How a run ended.

    Attributes:
      start: the step that it began at: where it was resumed, or 0.
      record: of the steps that were run, as in the metadata of a checkpoint: `config`, `start`, `changes`.
    """

    state: TrainState
    start: int
    steps: int
    record: dict[str, Any]
    interrupted: bool
    metrics: dict[str, float]
    goodput: Goodput
    tokens_per_second: float


def run(
    *,
    mesh: Mesh,
    data: TrainingData,
    compute_loss: Callable[..., LossOutput],
    like: Any,
    create: Callable[[], Any],
    frozen: Any,
    assemble: Callable[[Any, Any], Any],
    lineage: Lineage,
    stopwatch: Stopwatch,
) -> TrainResult:
    """Train from the newest checkpoint of the run, or from what `create` gives, to the last step of its configuration.

    Args:
      mesh: where the arrays lie; must be set by the caller (`jax.set_mesh`).
      data: batches, validation.
      compute_loss: (model, batch, key) -> the terms of the loss.
      like: shapes and shardings of what is trained.
      create: its initial values; called only where no checkpoint is there to go on, or back to.
      frozen: weights that do not change, or None.
      assemble: (trainable, frozen) -> the model that the objective's loss takes.
      lineage: the resolved configuration, and what the run reads; a checkpoint of another run is refused.
      stopwatch: has run since this attempt began.

    Raises:
      CheckpointError: the checkpoint in the folder has other arrays, or cannot be read.
      ConfigError: it is of another run, or of a later step than the last one that is asked for.
      TrainingError: too many steps were skipped, too often, or a checkpoint could not be saved.
    """
    config, folder = lineage.config, storage_path(lineage.config.output)
    # Adapters are as wide as their rank.
    optimizer = make_optimizer(config.optim, width=config.model.width if config.lora is None else 1.0)
    schedule = partial(schedule_factor, config.optim.schedule, config.steps)
    step_function = jax.jit(
        partial(
            train_step,
            loss_function=lambda trainable, frozen, batch, key: compute_loss(assemble(trainable, frozen), batch, key),
            optimizer=optimizer,
            schedule=schedule,
            guard=config.guard,
            accumulate=config.accumulate,
            pipeline=config.model.pipeline,
            ema_decay=config.optim.ema_decay,
            seed=config.seed,
        ),
        donate_argnums=0,
    )
    state_of = partial(create_state, optimizer=optimizer, keep_ema=config.optim.ema_decay is not None)
    state_like = abstract_state(state_of, like, mesh)
    config_yaml = dump_yaml(config)

    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(RunCheckpoints(folder, config.checkpoint))
        quarantine = Quarantine(folder, config)
        goodput = GoodputLog(folder, stopwatch)
        leg = Leg(
            config=config,
            mesh=mesh,
            data=data,
            model=lambda trainable: assemble(trainable, frozen),
            step_function=lambda state, batch: step_function(state, frozen, batch),
            learning_rate=lambda step: config.optim.learning_rate * float(schedule(step)),
            checkpoints=checkpoints,
            quarantine=quarantine,
            goodput=goodput,
            stopwatch=stopwatch,
            window=StepWindow(
                (like, frozen),
                goodput,
                moe=config.model.moe,
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
                    state = jax.jit(state_of, donate_argnums=0)(create())
                else:
                    state, saved = restored
                    changes = lineage.changes_since(saved)
                    quarantine.restore(saved["quarantine"])
                    # Where nothing is left to do, the run is what it was.
                    record = record | {"changes": changes} if saved["step"] < config.steps else saved
                step = int(state.step)
                if is_primary() and restored is not None:
                    console.print(f"resuming {folder} at step {step}", markup=False)
                    if first_step is None:
                        lineage.tell_changes(saved)
                if is_primary() and (step < config.steps or not (folder / "config.yaml").exists()):
                    # Not before: a run that is refused leaves the folder as it was.
                    (folder / "config.yaml").write_text(record["config_yaml"], encoding="utf-8")
                if first_step is None:
                    first_step = step
                if step < config.steps:
                    goodput.begin(step)
            with MetricsLog(folder, start_step=step, total_steps=config.steps) as log, stopwatch.counting("step"):
                end = leg.train(state, log, record)
            if not end.bad_steps:
                break
            # Those before them are done again from the last checkpoint, as after a restart.
            beginning = "rolled_back"
            with stopwatch.counting(beginning):
                quarantine.add(end.bad_steps, data)
        if end.step == config.steps:
            checkpoints.remove_local(end.step)
        if first_step < config.steps:
            goodput.close(end.step)
        rate = leg.window.tokens_per_second_overall()
    if end.interrupted and is_primary():
        console.print(f"stopped by a signal: step {end.step} is saved; run the same command to go on", markup=False)
    return TrainResult(end.state, first_step, end.step, record, end.interrupted, end.valid, goodput.goodput, rate)


@dataclass(frozen=True)
class LegEnd:
    """Why a leg has ended: the last step, a signal, or steps that went wrong, after which there is no state."""

    state: TrainState | None
    step: int
    interrupted: bool = False
    valid: dict[str, float] | None = None
    bad_steps: tuple[BadStep, ...] = ()


@dataclass(frozen=True)
class Leg:
    """What training takes from a checkpoint on, to the end of the run or to where it must go back."""

    config: TrainConfig
    mesh: Mesh
    data: TrainingData
    model: Callable[[Any], Any]
    step_function: Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]
    learning_rate: Callable[[int], float]
    checkpoints: RunCheckpoints
    quarantine: Quarantine
    goodput: GoodputLog
    stopwatch: Stopwatch
    window: StepWindow
    stop_requested: Callable[[int], bool]

    def train(self, state: TrainState, log: MetricsLog, metadata: dict[str, Any]) -> LegEnd:
        """Train from `state`; what is saved gets `metadata` beside it."""
        config, data, counting = self.config, self.data, self.stopwatch.counting
        resume_multiple = config.objective.resume_multiple
        first = step = int(state.step)
        interrupted, valid = False, {}
        watch = GuardWatch(config.guard, step, lambda bad: self.quarantine.note(bad, data))
        self.window.reset()
        # The batch builder of an objective that samples needs the weights of the moment.
        current = {"state": state}
        batches = self.quarantine.batches_from(step, data, lambda: self.model(current["state"].trainable))

        def report():
            record = self.window.close(step, learning_rate=self.learning_rate(step - 1))
            log.train({**record, "goodput": self.goodput.goodput.productive})

        def save(*, is_end: bool):
            saved = {**metadata, "step": step, "quarantine": self.quarantine.saved()}
            with counting("checkpoint"):
                self.checkpoints.save(current["state"], saved, is_end=is_end)

        def keep():
            watch.settle()
            if watch.is_amid_refused or watch.bad_steps(current["state"], check_state=True):
                return
            if not self.window.is_empty:
                report()
            save(is_end=True)
            console.print(f"step {step} is saved; the same command goes on from there", markup=False)

        @contextlib.contextmanager
        def losing_no_step(part: str):
            """What fails in here is no fault of the steps before: their state is saved before it is told."""
            try:
                with counting(part):
                    yield
            except Exception:
                # Several processes do not fail alike, and cannot save one without the others.
                if jax.process_count() == 1 and step > first and step % resume_multiple == 0:
                    with contextlib.suppress(MaxlmError):
                        keep()
                raise

        while step < config.steps:
            with losing_no_step("data_wait"):
                batch = put_batch(next(batches), self.mesh)
            state, metrics = self.step_function(current["state"], batch)
            current["state"] = state
            watch.add(step, metrics)
            self.window.add(metrics, num_tokens=num_tokens(batch))
            step += 1

            last = step == config.steps
            is_due, stopping = self.checkpoints.is_due(step), self.stop_requested(step)
            saves = last or ((is_due or stopping) and step % resume_multiple == 0)
            if saves:
                watch.settle()
                # Amid refused steps it would be too late to go back to before them.
                saves = last or not watch.is_amid_refused
            if bad_steps := watch.bad_steps(state, check_state=saves):
                self.goodput.close(step)
                return LegEnd(None, step, bad_steps=tuple(bad_steps))
            # A window ends at each checkpoint too: a run that goes on from one logs what an unbroken one would.
            if saves or step % config.log_every == 0:
                report()
                self.checkpoints.look_after()
            if last:
                # Whatever fails after training finds it saved, and another start does the rest.
                save(is_end=True)
            if last or (config.eval_every and step % config.eval_every == 0):
                with losing_no_step("validation"):
                    valid = validate(data, state, self.model)
                log.valid(step, valid)
            if saves and not last:
                interrupted = stopping
                save(is_end=interrupted)
            if interrupted:
                break
        if first == config.steps:
            # As one that ended before it was validated, its local checkpoints removed, or its manifest written.
            with counting("validation"):
                valid = validate(data, state, self.model)
            if not log.has_valid(step):
                log.valid(step, valid)
        return LegEnd(current["state"], step, interrupted, valid)


def validate(data: TrainingData, state: TrainState, model: Callable[[Any], Any]) -> dict[str, float]:
    """The numbers on held-out data for the model and, named `ema_...`, for the running mean of its weights."""
    values = data.validate(model(state.trainable))
    if state.ema is None:
        return values
    of_ema = data.validate(model(ema_as(state.ema, state.trainable)))
    return {**values, **{f"ema_{name}": value for name, value in of_ema.items()}}
