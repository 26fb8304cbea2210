"""Bad steps: detection, rollback to the last checkpoint, and quarantine of their batches."""

import collections
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from maxlm.config.fault import GuardConfig
from maxlm.config.train import TrainConfig
from maxlm.data.quarantine import FILE_NAME, SKIPPED_FILE_NAME, batch_of_step, read_quarantine
from maxlm.errors import DivergenceError
from maxlm.runtime.agree import from_primary
from maxlm.runtime.distributed import is_primary
from maxlm.runtime.progress import console
from maxlm.runtime.storage import LineLog
from maxlm.train.objective import TrainingData
from maxlm.train.state import TrainState

# Maximum number of steps in flight: enough to hide the host's work, few enough to stop soon.
STEPS_IN_FLIGHT = 2


@dataclass(frozen=True)
class BadStep:
    """A bad step, counted from 0. Loss and norm are None if they were good and do not explain it."""

    step: int
    reason: str
    loss: float | None = None
    grad_norm: float | None = None


class GuardWatch:
    """Follows the guard's verdict on each step, a few steps behind, so that the device never waits for the host.

    Args:
      first_step: the step that training starts or resumes at.
      on_refused: called with each step whose update was skipped.
    """

    def __init__(self, guard: GuardConfig, first_step: int, on_refused: Callable[[BadStep], None]):
        self._guard = guard
        self._first_step = first_step
        self._on_refused = on_refused
        self._under_way: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self._refused: list[BadStep] = []

    @property
    def is_amid_refused(self) -> bool:
        """Whether the last step checked was skipped."""
        return bool(self._refused)

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Register a started step; wait for and check the one STEPS_IN_FLIGHT before it."""
        metrics["skipped_in_a_row"].copy_to_host_async()
        self._under_way.append((step, metrics))
        if len(self._under_way) > STEPS_IN_FLIGHT:
            self._look()

    def settle(self) -> None:
        """Wait for all steps in flight, and check them."""
        while self._under_way:
            self._look()

    def bad_steps(self, state: TrainState, *, check_state: bool = False) -> list[BadStep]:
        """The steps that require a rollback: none, unless the guard skipped too many in a row.

        A non-finite state makes every later loss non-finite: then the last step that the guard accepted is to blame.

        Args:
          check_state: check the state even if no step was skipped, before it is saved.
        """
        too_many = len(self._refused) >= self._guard.max_skipped_in_a_row
        if not (too_many or check_state):
            return []
        state_is_finite = bool(is_finite(state))
        if state_is_finite and not too_many:
            return []
        bad = list(self._refused)
        if not state_is_finite:
            culprit = (bad[0].step if bad else int(state.step)) - 1
            if culprit >= self._first_step:
                bad.insert(0, BadStep(culprit, "weights or optimizer state are not finite after it"))
        return bad

    def _look(self) -> None:
        step, metrics = self._under_way.popleft()
        if len(self._refused) >= self._guard.max_skipped_in_a_row:
            return
        if int(metrics["skipped_in_a_row"]) == 0:
            self._refused.clear()
            return
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not math.isfinite(loss):
            reason = f"the loss is {loss}"
        elif not math.isfinite(norm):
            reason = f"the gradient norm is {norm}"
        else:
            reason = f"the gradient norm exceeds {self._guard.spike_factor} times its mean"
        self._refused.append(BadStep(step, reason, loss, norm))
        self._on_refused(self._refused[-1])


class Quarantine:
    """The batches that a run excludes, and the number of its rollbacks."""

    def __init__(self, folder: epath.Path, config: TrainConfig):
        records = from_primary(read_quarantine(folder))
        self._guard, self._batch_size = config.guard, config.batch_size
        self._resume_multiple = config.objective.resume_multiple
        self._file = LineLog(folder / FILE_NAME)
        self._skipped = LineLog(folder / SKIPPED_FILE_NAME)
        self.batches = sorted({record["batch"] for record in records})
        self.rollbacks = max((record["rollback"] for record in records), default=0)

    def saved(self) -> dict[str, Any]:
        """The part of a checkpoint that makes its position in the data self-contained."""
        return {"batches": self.batches, "rollbacks": self.rollbacks}

    def restore(self, saved: dict[str, Any]) -> None:
        """Merge the record of a checkpoint with that of the file: either may be newer."""
        self.batches = sorted({*self.batches, *saved["batches"]})
        self.rollbacks = max(self.rollbacks, saved["rollbacks"])

    def batches_from(self, step: int, data: TrainingData, current_model: Callable[[], Any]) -> Iterator[Any]:
        """The batches of `step` and later steps."""
        first = batch_of_step(step, self.batches)
        excluded = set(self.batches)
        numbered = zip(count(first), data.batches(first, current_model))
        return (batch for number, batch in numbered if number not in excluded)

    def note(self, step: BadStep, data: TrainingData) -> None:
        """Record the data of a step whose update was skipped, whether or not the run is rolled back later."""
        if is_primary():
            batch = batch_of_step(step.step, self.batches)
            self._skipped.append(json.dumps(self._record(step, batch, data)))

    def add(self, bad: Sequence[BadStep], data: TrainingData) -> None:
        """Exclude the batches of these steps from now on, and record their data in the file.

        Raises:
          DivergenceError: the run has used up its rollbacks.
        """
        first, last = bad[0].step + 1, bad[-1].step + 1
        if self.rollbacks == self._guard.max_rollbacks:
            raise DivergenceError(
                f"{len(bad)} steps in a row up to step {last} were skipped ({bad[-1].reason}), and the run has been"
                f" rolled back {self.rollbacks} times (guard.max_rollbacks); lower optim.learning_rate, or check the"
                f" data with `maxlm data at-step` and in {FILE_NAME}"
            )
        self.rollbacks += 1
        by_batch = {batch_of_step(step.step, self.batches): step for step in bad}
        # Answers are sampled for several steps at once: those are excluded together.
        multiple = self._resume_multiple
        starts = sorted({batch - batch % multiple for batch in by_batch})
        added = [start + offset for start in starts for offset in range(multiple)]
        if is_primary():
            console.print(
                f"steps {first} to {last} are bad ({bad[-1].reason}): rolling back to the last checkpoint and excluding"
                f" {len(added)} batches (rollback {self.rollbacks} of {self._guard.max_rollbacks})",
                markup=False,
            )
            for batch in added:
                step = by_batch.get(batch, BadStep(bad[0].step, "from the same round of sampling"))
                record = self._record(step, batch, data)
                self._file.append(json.dumps({"rollback": self.rollbacks, **record}))
        # Barrier: all processes read the file after this.
        from_primary(None)
        self.batches = sorted({*self.batches, *added})

    def _record(self, step: BadStep, batch: int, data: TrainingData) -> dict[str, Any]:
        return {
            "step": step.step + 1,
            "batch": batch,
            "rows": [batch * self._batch_size, (batch + 1) * self._batch_size],
            "reason": step.reason,
            "loss": _finite(step.loss),
            "grad_norm": _finite(step.grad_norm),
            "documents": data.documents(batch),
        }


@jax.jit
def is_finite(tree: Any) -> jax.Array:
    """Whether all values in a tree are finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in leaves]))


def _finite(value: float | None) -> float | None:
    """The value, or None if it is not finite, which JSON cannot represent."""
    return value if value is not None and math.isfinite(value) else None
