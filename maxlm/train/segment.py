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
    """Why a segment has ended: the last step, a signal, or steps that went wrong, after which there is no state."""

    state: TrainState | None
    step: int
    interrupted: bool = False
    valid: dict[str, float] | None = None
    bad_steps: tuple[BadStep, ...] = ()


@dataclass(frozen=True)
class Segment:
    """What training takes from a checkpoint on, to the end of the run or to where it must go back."""

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
                # Amid refused steps it would be too late to go back to before them.
                saves = last or not watch.is_amid_refused
            if bad_steps := watch.bad_steps(state, check_state=saves):
                self.goodput.close(step)
                return SegmentEnd(None, step, bad_steps=tuple(bad_steps))
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
        return SegmentEnd(current["state"], step, interrupted, valid)


def validate(data: TrainingData, state: TrainState, model: Callable[[Any], Any]) -> dict[str, float]:
    """The numbers on held-out data for the model and, named `ema_...`, for the running mean of its weights."""
    values = data.validate(model(state.trainable))
    if state.ema is None:
        return values
    of_ema = data.validate(model(ema_as(state.ema, state.trainable)))
    return {**values, **{f"ema_{name}": value for name, value in of_ema.items()}}
