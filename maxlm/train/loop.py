"""The training loop: one for every objective."""

import collections
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh

from maxlm.config.load import dump_yaml
from maxlm.config.train import TrainConfig
from maxlm.core.batch import num_tokens, put_batch
from maxlm.core.distributed import is_primary, stop_on_signal
from maxlm.core.hardware import peak_flops
from maxlm.core.progress import console
from maxlm.core.storage import storage_path
from maxlm.errors import CheckpointError, TrainingError
from maxlm.train.checkpoint import Checkpointer
from maxlm.train.metrics import MetricsLog, StepWindow
from maxlm.train.objective import Objective
from maxlm.train.optim import make_optimizer, schedule_factor
from maxlm.train.state import TrainState, create_state
from maxlm.train.step import train_step

# Steps that may be under way at once: enough to hide the host's work, few enough to stop soon.
STEPS_IN_FLIGHT = 2


@dataclass(frozen=True)
class TrainResult:
    """How a run ended. It began at step `start`: where it was resumed, or 0."""

    state: TrainState
    start: int
    steps: int
    interrupted: bool
    metrics: dict[str, float]
    seconds: float
    tokens_per_second: float


def run(
    config: TrainConfig,
    *,
    mesh: Mesh,
    objective: Objective,
    trainable: Any,
    frozen: Any,
    assemble: Callable[[Any, Any], Any],
    fingerprint: str,
    start: dict[str, str] | None,
) -> TrainResult:
    """Train from the newest checkpoint in the run folder, or from `trainable`, to `config.steps`.

    Args:
      config: the resolved configuration.
      mesh: where the arrays lie; must be set by the caller (`jax.set_mesh`).
      objective: loss, batches, validation.
      trainable: initial values of what is trained.
      frozen: weights that do not change, or None.
      assemble: (trainable, frozen) -> the model that the objective's loss takes.
      fingerprint: of the tokenizer; a checkpoint of another is refused.
      start: the checkpoint that the run starts from, to be recorded; None where it starts from nothing.

    Raises:
      CheckpointError: the checkpoint in the folder is of another model or tokenizer.
      TrainingError: too many steps in a row were skipped, or a checkpoint could not be saved.
    """
    folder = storage_path(config.output)
    optimizer = make_optimizer(config.optim)
    schedule = partial(schedule_factor, config.optim.schedule, config.steps)
    step_function = jax.jit(
        partial(
            train_step,
            loss_function=lambda trainable, frozen, batch: objective.loss(assemble(trainable, frozen), batch),
            optimizer=optimizer,
            schedule=schedule,
            guard=config.guard,
            accumulate=config.accumulate,
        ),
        donate_argnums=0,
    )
    state = jax.jit(partial(create_state, optimizer=optimizer), donate_argnums=0)(trainable)
    metadata = {
        "config": config.model_dump(mode="json"),
        "config_yaml": dump_yaml(config),
        "fingerprint": fingerprint,
        "start": start,
    }

    with contextlib.ExitStack() as stack:
        checkpointer = stack.enter_context(Checkpointer(folder, keep=config.checkpoint.keep))
        if (restored := checkpointer.restore(state)) is not None:
            state, saved = restored
            check_fingerprint(saved["fingerprint"], fingerprint, folder)
            if is_primary():
                console.print(f"resuming {folder} at step {int(state.step)}", markup=False)
        first_step = int(state.step)
        if is_primary():
            # Not before: a run that is refused leaves the folder as it was.
            (folder / "config.yaml").write_text(metadata["config_yaml"], encoding="utf-8")
        log = stack.enter_context(MetricsLog(folder, start_step=first_step, total_steps=config.steps))
        stop_requested = stack.enter_context(stop_on_signal())
        window = StepWindow(
            (state.trainable, frozen), peak=peak_flops(mesh.devices.flat[0]), num_devices=mesh.devices.size
        )
        in_flight: collections.deque[Any] = collections.deque()
        began = time.perf_counter()
        step, interrupted, valid = first_step, False, {}

        # The batch builder of an objective that samples needs the weights of the moment.
        current: dict[str, Any] = {"state": state}
        batches = objective.batches(first_step, lambda: assemble(current["state"].trainable, frozen))
        while step < config.steps:
            with window.waiting():
                batch = put_batch(next(batches), mesh)
            state, metrics = step_function(current["state"], frozen, batch)
            current["state"] = state
            step += 1
            in_flight.append(metrics["loss"])
            if len(in_flight) > STEPS_IN_FLIGHT:
                in_flight.popleft().block_until_ready()
            window.add(metrics, num_tokens=num_tokens(batch))

            last = step == config.steps
            interrupted = stop_requested(step) and step % objective.resume_multiple == 0 and not last
            saves = last or interrupted or step % config.checkpoint.every == 0
            # A window ends at each checkpoint too: a run that goes on from one logs what an unbroken one would.
            if saves or step % config.log_every == 0:
                record = window.close(step, learning_rate=config.optim.learning_rate * float(schedule(step - 1)))
                log.train(record)
                check_guard(config, record, step)
            if last or (config.eval_every and step % config.eval_every == 0):
                with window.paused():
                    valid = objective.validate(assemble(state.trainable, frozen))
                log.valid(step, valid)
            if saves:
                with window.paused():
                    checkpointer.save(state, {**metadata, "step": step})
            if interrupted:
                break
        if first_step >= config.steps:
            valid = objective.validate(assemble(state.trainable, frozen))
        seconds = time.perf_counter() - began
        rate = window.tokens_per_second_overall()
    if interrupted and is_primary():
        console.print(f"stopped by a signal: step {step} is saved; run the same command to go on", markup=False)
    return TrainResult(state, first_step, step, interrupted, valid, seconds, rate)


def check_guard(config: TrainConfig, record: dict[str, Any], step: int) -> None:
    """Raise TrainingError when too many steps in a row were skipped."""
    if record["skipped_in_a_row"] >= config.guard.max_skipped_in_a_row:
        raise TrainingError(
            f"{record['skipped_in_a_row']} steps in a row up to step {step} were skipped: the loss or gradient is not"
            f" finite, or its norm exceeds guard.spike_factor={config.guard.spike_factor} times its mean; lower"
            " optim.learning_rate, or look at the data with `maxlm data at-step`"
        )


def check_fingerprint(saved: str, wanted: str, folder: Any) -> None:
    """Raise CheckpointError when a checkpoint in `folder` was trained with another tokenizer."""
    if saved != wanted:
        raise CheckpointError(
            f"{folder}: its checkpoint was trained with another tokenizer ({saved[:12]} and not {wanted[:12]});"
            " use the data and tokenizer of that run, or another output folder"
        )
