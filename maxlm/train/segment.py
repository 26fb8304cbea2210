"""The steps between two rollbacks: batch, step, metrics, validation, checkpoint."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from maxlm.checkpoint.saving import RunCheckpoints
from maxlm.config.train import TrainConfig
from maxlm.core.batch import num_tokens, put_batch
from maxlm.errors import MaxlmError
from maxlm.optim.ema import ema_as
from maxlm.runtime.progress import console
from maxlm.train.faults import BadStep, GuardWatch, Quarantine
from maxlm.train.goodput import GoodputLog, Stopwatch
from maxlm.train.metrics import MetricsLog, StepWindow
from maxlm.train.objective import TrainingData
from maxlm.train.state import TrainState


@dataclass(frozen=True)
class SegmentEnd:
    """Why a segment ended: the last step, a reason of the objective, a signal, or bad steps, after which there is no
    state."""

    state: TrainState | None
    step: int
    interrupted: bool = False
    valid: dict[str, float] | None = None
    bad_steps: tuple[BadStep, ...] = ()
    stopped: str | None = None


@dataclass(frozen=True)
class Segment:
    """Training from a checkpoint to the end of the run or to a rollback."""

    config: TrainConfig
    mesh: Mesh
    data: TrainingData
    model: Callable[[Any], Any]
    step_function: Callable[[TrainState, Any, Any], tuple[TrainState, dict[str, Any]]]
    frozen: Any
    learning_rate: Callable[[int], float]
    checkpoints: RunCheckpoints
    quarantine: Quarantine
    goodput: GoodputLog
    stopwatch: Stopwatch
    window: StepWindow
    stop_requested: Callable[[int], bool]

    def train(self, state: TrainState, log: MetricsLog, metadata: dict[str, Any]) -> SegmentEnd:
        """Train from `state`; checkpoints are saved with `metadata`."""
        config, data, counting = self.config, self.data, self.stopwatch.counting
        resume_multiple = config.objective.resume_multiple
        first = step = int(state.step)
        interrupted, valid, stopped = False, {}, None
        records: list[dict[str, Any]] = []
        watch = GuardWatch(config.guard, step, lambda bad: self.quarantine.note(bad, data))
        self.window.reset()
        # The batch builder of an objective that samples needs the current weights.
        current = {"state": state}
        batches = self.quarantine.batches_from(step, data, lambda: self.model(current["state"].trainable))

        def report():
            record = self.window.close(step, learning_rate=self.learning_rate(step - 1))
            records.append(record)
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
            console.print(f"step {step} is saved; run the same command to resume", markup=False)

        @contextlib.contextmanager
        def saving_on_failure(part: str):
            """Save the state of the steps so far if the code in this context fails, since they are not at fault."""
            try:
                with counting(part):
                    yield
            except Exception:
                # Several processes do not fail together, and one cannot save without the others.
                if jax.process_count() == 1 and step > first and step % resume_multiple == 0:
                    with contextlib.suppress(MaxlmError):
                        keep()
                raise

        while step < config.steps:
            with saving_on_failure("data_wait"):
                batch = put_batch(next(batches), self.mesh)
            state, metrics = self.step_function(current["state"], self.frozen, batch)
            current["state"] = state
            watch.add(step, metrics)
            self.window.add(metrics, num_tokens=num_tokens(batch))
            step += 1

            last = step == config.steps
            is_due, stopping = self.checkpoints.is_due(step), self.stop_requested(step)
            saves = last or ((is_due or stopping) and step % resume_multiple == 0)
            if saves:
                watch.settle()
                # A checkpoint amid skipped steps would prevent a rollback to before them.
                saves = last or not watch.is_amid_refused
            if bad_steps := watch.bad_steps(state, check_state=saves):
                self.goodput.close(step)
                return SegmentEnd(None, step, bad_steps=tuple(bad_steps))
            # A window ends at each checkpoint too: a resumed run logs the same as an uninterrupted one.
            if saves or step % config.log_every == 0:
                report()
                self.checkpoints.check_failures()
                stopped = stopped or config.objective.stop_reason(records)
            if stopped and step % resume_multiple == 0 and not watch.is_amid_refused:
                last = saves = True
            if last:
                # Saved before validation: if something fails after training, a restart does the rest.
                save(is_end=True)
            if last or (config.eval_every and step % config.eval_every == 0):
                with saving_on_failure("validation"):
                    valid = validate(data, state, self.model)
                log.valid(step, valid)
            if saves and not last:
                interrupted = stopping
                save(is_end=interrupted)
            if last or interrupted:
                break
        if first == config.steps:
            # The run may have ended before validation, removal of local checkpoints, or writing its manifest.
            with counting("validation"):
                valid = validate(data, state, self.model)
            if not log.has_valid(step):
                log.valid(step, valid)
        return SegmentEnd(current["state"], step, interrupted, valid, stopped=stopped)


def validate(data: TrainingData, state: TrainState, model: Callable[[Any], Any]) -> dict[str, float]:
    """Metrics on held-out data for the model and, named `ema_...`, for the average of its weights."""
    values = data.validate(model(state.trainable))
    if state.ema is None:
        return values
    of_ema = data.validate(model(ema_as(state.ema, state.trainable)))
    return {**values, **{f"ema_{name}": value for name, value in of_ema.items()}}
