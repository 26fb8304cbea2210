"""Atomic checkpoints: weights, optimizer state, data position, configuration and tokenizer fingerprint."""

import contextlib
import itertools
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental.multihost_utils import sync_global_devices

from maxlm.checkpoint.checksums import checksums
from maxlm.checkpoint.folder import FOLDER, FORMAT, checkpoint_steps, load_metadata
from maxlm.checkpoint.readback import check_written
from maxlm.checkpoint.restore import as_abstract, check_shapes, first_difference, is_unchanged, shapes_of
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import CheckpointError, FaultError, MaxlmError, TrainingError
from maxlm.runtime.agree import any_process
from maxlm.runtime.distributed import is_primary
from maxlm.runtime.progress import console
from maxlm.runtime.retry import Retries, first_line, is_disk_full, is_storage_error
from maxlm.runtime.storage import absolute_path, is_remote, plain_path

# Maximum chunk size of stored arrays, so that reading part of an array reads little else.
PIECE_BYTES = 1 << 24


# What is saved: a dataclass with `step`, weights in `trainable`, and the rest of the training state in other fields.
State = Any


class Checkpointer:
    """Saves checkpoints in the background, and restores the newest complete one.

    Use as a context manager: leaving it waits for the last save. A failed save is retried with the state passed then: a
    failure in the background is detected by `has_failed`, or by the next save. A checkpoint that cannot be read back
    counts as failed: it is not renamed to its final name, and no older one is removed for it.
    """

    def __init__(self, run_folder: str | os.PathLike, *, keep: int, retries: int = 3, retry_seconds: float = 1.0):
        self.folder = absolute_path(run_folder) / FOLDER
        self._retries = Retries(retries, retry_seconds)
        self._keep = keep
        self._failures = 0
        self._failure: Exception | None = None
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._manager = self._retries.call(self._open, f"{self.folder}: opening it")

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            # A background failure has been reported, or caused the error being raised.
            with contextlib.suppress(Exception):
                self._manager.close()

    def save(self, state: State, metadata: dict[str, Any], *, wait: bool = False) -> None:
        """Start a save; `metadata` must be JSON. Returns when the arrays are copied, before they are on disk.

        Args:
          wait: wait until they are on disk.

        Raises:
          TrainingError: there is not enough disk space, or saving failed after all retries.
          FaultError: with several processes, starting the save failed.
        """
        while True:
            try:
                self._finish_last()
                self._start(state, metadata)
                if wait:
                    self._finish_last()
                return
            except Exception as error:
                self._after_failure(error)

    def wait(self) -> None:
        """Wait until all saves are on disk; raises TrainingError if one failed."""
        try:
            self._finish_last()
        except Exception as error:
            raise self._save_failed(error) from error

    def settle(self) -> None:
        """Wait until nothing is being saved: all listed checkpoints are on disk. A failed save is reported and dropped.

        Raises:
          TrainingError: it failed after all retries.
        """
        try:
            self._finish_last()
        except Exception as error:
            self._after_failure(error)

    def has_failed(self) -> bool:
        """Whether a background save has failed, on any process, so that a new one is due.

        All processes must call it at the same step.
        """
        if not self._manager.is_saving_in_progress():
            self.let_finish()
        return any_process(self._failure is not None)

    def let_finish(self) -> None:
        """Wait until this process is not saving. A failure is kept for `has_failed` or the next save."""
        if self._failure is None:
            try:
                self._manager.wait_until_finished()
            except Exception as error:
                self._failure = error

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """The newest complete checkpoint, with the sharding of `like`; None if there is none at all.

        A corrupt one is reported on standard error and set aside, and the previous one is tried.

        Args:
          like: arrays or ShapeDtypeStructs.

        Raises:
          CheckpointError: the checkpoint is of another model, cannot be read, or all are corrupt.
        """
        return restore_newest([self], like)

    def restore_step(self, step: int, like: State) -> tuple[State, dict[str, Any]] | None:
        """The checkpoint of a step; None if it is corrupt: it is reported on standard error and set aside.

        Raises:
          CheckpointError: it is of another model, or cannot be read.
        """
        what = f"{self.folder / str(step)}: reading it"
        try:
            return self._retries.call(lambda: self._restore_step(step, like), what)
        except (CheckpointError, jax.errors.JaxRuntimeError, MemoryError):
            # Another model or too little memory: the checkpoint itself is fine.
            raise
        except Exception as error:
            if is_storage_error(error):
                raise CheckpointError(
                    f"{self.folder / str(step)}: cannot be read: {first_line(error)}; nothing was changed: run the same"
                    " command when the storage is available again"
                ) from error
            self._set_aside(step, first_line(error))
            return None

    def _open(self) -> ocp.CheckpointManager:
        self._failure, self._pending = None, None
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            enable_async_checkpointing=True,
            # If a folder cannot be created, threads waiting for it would keep the process alive for minutes.
            async_options=ocp.AsyncOptions(
                create_directories_asynchronously=False, post_finalization_callback=self._verify
            ),
            # Remove partial files of failed or killed saves.
            cleanup_tmp_directories=True,
        )
        return ocp.CheckpointManager(plain_path(self.folder), options=options)

    def _start(self, state: State, metadata: dict[str, Any]) -> None:
        step = int(state.step)
        if self._manager.latest_step() == step:
            return
        weights = flatten(state.trainable)
        rest = flatten(replace(state, trainable=None))
        self._check_room(sum(leaf.nbytes for leaf in [*weights.values(), *rest.values()]))
        metadata = {
            **metadata,
            "format": FORMAT,
            "checksums": checksums({"weights": weights, "rest": rest}),
            "shapes": shapes_of(weights),
            "rest_shapes": shapes_of(rest),
        }
        # A link that the name may need is in the temporary folder, which some systems clear.
        plain_path(self.folder)
        self._pending = step, metadata
        self._manager.save(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardSave(weights, save_args=_in_pieces(weights)),
                rest=ocp.args.StandardSave(rest, save_args=_in_pieces(rest)),
                metadata=ocp.args.JsonSave(metadata),
            ),
            force=True,
        )

    def _verify(self) -> None:
        """Read the checkpoint back. Called in the background after writing and before the rename to its final name."""
        if not is_primary():
            return
        try:
            check_written(self.folder, *self._pending)
        except Exception as error:
            raise ValueError(f"the written checkpoint cannot be read back: {first_line(error)}") from error

    def _finish_last(self) -> None:
        """Wait until the pending save is on disk; raises its error."""
        if self._failure is None:
            try:
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
            except Exception as error:
                self._failure = error
        if any_process(self._failure is not None):
            self._failure = self._failure or OSError("another process could not save its part")
            raise self._failure
        if self._pending is not None:
            self._pending, self._failures = None, 0

    def _after_failure(self, error: Exception) -> None:
        """Wait and prepare to save again; raises TrainingError or FaultError if a retry cannot help."""
        if isinstance(error, MaxlmError):
            raise error
        if is_disk_full(error) or self._failures == self._retries.count:
            raise self._save_failed(error) from error
        # In the middle of starting a save, a process cannot retry without the others, which wait for it: the retry is a
        # restart of all processes.
        if self._failure is None and jax.process_count() > 1:
            raise self._save_failed(error, FaultError) from error
        self._retries.wait(self._failures, f"{self.folder}: saving a checkpoint", error)
        self._failures += 1
        with contextlib.suppress(Exception):
            self._manager.close()
        try:
            self._manager = self._open()
        except Exception as again:
            self._failure = again

    def _set_aside(self, step: int, reason: str) -> None:
        """Move a corrupt checkpoint out of the way of the one that training will save in its place."""
        if is_primary():
            targets = (self.folder.parent / f"broken-checkpoint-{step}-{number}" for number in itertools.count(1))
            target = next(path for path in targets if not path.exists())
            (self.folder / str(step)).rename(target)
            console.print(f"checkpoint {step} is corrupt ({reason}) and was moved to {target}", markup=False)
        if jax.process_count() > 1:
            sync_global_devices(f"checkpoint {step} is set aside")
        self._manager.reload()

    def _restore_step(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        folder = self.folder / str(step)
        metadata = load_metadata(folder)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(
                f"{folder}: was saved by another version of maxlm and cannot be resumed; give another output and this"
                " checkpoint as init_from"
            )
        like_weights = flatten(like.trainable)
        check_shapes(metadata["shapes"], shapes_of(like_weights), where=folder)
        like_rest = flatten(replace(like, trainable=None))
        if difference := first_difference(metadata["rest_shapes"], shapes_of(like_rest)):
            raise CheckpointError(
                f"{folder}: was trained with another optimizer, or with or without ema_decay: {difference};"
                " give the optim section that it was trained with, or another output and this checkpoint as init_from"
            )
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                weights=ocp.args.StandardRestore(as_abstract(like_weights)),
                rest=ocp.args.StandardRestore(as_abstract(like_rest)),
            ),
        )
        if not is_unchanged({"weights": restored.weights, "rest": restored.rest}, metadata):
            raise ValueError("the checksums of its arrays differ from the saved ones")
        rest = unflatten(restored.rest, replace(like, trainable=None))
        return replace(rest, trainable=unflatten(restored.weights, like.trainable)), metadata

    def _check_room(self, size: int) -> None:
        if is_remote(self.folder):
            return
        free = shutil.disk_usage(self.folder).free
        if free < 1.1 * size:
            raise TrainingError(
                f"{self.folder}: a checkpoint takes {size / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free;"
                f" {self._newest()}; free some space and run the same command to resume from there"
            )

    def _save_failed(self, error: Exception, kind: type[MaxlmError] = TrainingError) -> MaxlmError:
        what = "the disk is full" if is_disk_full(error) else first_line(error)
        return kind(
            f"{self.folder}: a checkpoint could not be saved: {what};"
            f" {self._newest()}; run the same command to resume from there"
        )

    def _newest(self) -> str:
        # From the disk: the manager has dropped those that a failed save was to replace.
        steps = checkpoint_steps(self.folder)
        return (
            f"the newest complete checkpoint is of step {max(steps)}"
            if steps
            else "there is no complete checkpoint yet"
        )


def restore_newest(places: Sequence[Checkpointer], like: State) -> tuple[State, dict[str, Any]] | None:
    """The newest complete checkpoint of several places, the first place for equal steps; None if there is none.

    Raises:
      CheckpointError: the checkpoint is of another model, cannot be read, or all are corrupt.
    """
    found = sorted(((-step, number) for number, place in enumerate(places) for step in place.steps()))
    for step, number in found:
        if (restored := places[number].restore_step(-step, like)) is not None:
            return restored
    if found:
        folders = " and ".join(str(place.folder) for place in places)
        raise CheckpointError(
            f"{folders}: all checkpoints ({len(found)}) are corrupt; remove the run folder to start from scratch"
        )
    return None


def _in_pieces(flat: dict[str, Any]) -> dict[str, ocp.SaveArgs]:
    return {path: ocp.SaveArgs(chunk_byte_size=PIECE_BYTES) for path in flat}
