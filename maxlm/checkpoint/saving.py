"""When and where a run saves checkpoints: in the run folder, and more often on a local disk."""

import contextlib
import os
import secrets
from typing import Any, Self

import jax
from etils import epath

from maxlm.checkpoint.checkpointer import Checkpointer, State, restore_newest
from maxlm.config.fault import CheckpointConfig
from maxlm.errors import ConfigError, TrainingError
from maxlm.runtime.agree import any_process, from_primary
from maxlm.runtime.distributed import is_primary
from maxlm.runtime.progress import console
from maxlm.runtime.storage import absolute_path
from maxlm.runtime.supervise import LOCAL_ID_FILE, local_id


class RunCheckpoints:
    """The checkpoints of a run, in one place or two. Use as a context manager."""

    def __init__(self, run_folder: epath.Path, config: CheckpointConfig):
        self._run_folder, self._config = run_folder, config
        self._stack = contextlib.ExitStack()
        retries: dict[str, Any] = {"retries": config.retries, "retry_seconds": config.retry_seconds}
        self._main = self._stack.enter_context(Checkpointer(run_folder, keep=config.keep, **retries))
        self._local: Checkpointer | None = None
        if config.local is not None:
            folder = local_folder(run_folder, config.local.folder)
            self._local = Checkpointer(folder, keep=config.local.keep, **retries)
            self._stack.push(self._leave_local)
        self._main_is_due = self._local_is_due = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error) -> bool | None:
        return self._stack.__exit__(*error)

    def restore(self, like: State) -> tuple[State, dict[str, Any]] | None:
        """The newest complete checkpoint of both places; see `restore_newest`."""
        self._main_is_due = self._local_is_due = False
        places = [self._main, *filter(None, [self._local])]
        for place in places:
            place.settle()
        return restore_newest(places, like)

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due; it stays due until one is saved."""
        self._main_is_due |= step % self._config.every == 0
        self._local_is_due |= self._local is not None and step % self._config.local.every == 0
        return self._main_is_due or self._local_is_due

    def check_failures(self) -> None:
        """Check for a failed background save, after which one is due. All processes must call it at the same step."""
        self._main_is_due |= self._main.has_failed()
        if self._local is not None:
            self._local_is_due |= self._local.has_failed()

    def save(self, state: State, metadata: dict[str, Any], *, is_end: bool = False) -> None:
        """Start a save where one is due; see `Checkpointer.save`.

        Args:
          is_end: this is the last save: save in the run folder, and wait until it is on disk.
        """
        place, other = self._main, self._local
        if not (self._main_is_due or is_end):
            place, other = other, place
        # Orbax uses the same barrier names for both places: overlapping saves would abort each other.
        if other is not None and jax.process_count() > 1:
            other.let_finish()
        place.save(state, metadata, wait=is_end)
        self._main_is_due = self._local_is_due = False

    def remove_local(self, step: int) -> None:
        """Remove the local checkpoints of a run that ended at `step`, if the run folder has that step.

        Errors are only reported, because the run itself is saved.
        """
        if self._local is None:
            return
        with contextlib.suppress(TrainingError):
            self._local.wait()
        folder = self._local.folder.parent
        # Other files on that disk belong to the user.
        if is_primary() and step in self._main.steps() and folder.name == local_id(self._run_folder):
            try:
                folder.rmtree()
            except Exception as error:
                console.print(f"{folder}: cannot be removed: {error}; remove it manually", markup=False)

    def _leave_local(self, *error) -> None:
        try:
            self._local.__exit__(*error)
        except TrainingError as failed:
            # A run that ended normally has saved in the run folder.
            console.print(f"{failed.args[0].partition(';')[0]}; the run folder has all that is needed", markup=False)


def local_folder(run_folder: epath.Path, base: str | os.PathLike) -> epath.Path:
    """The folder of a run's local checkpoints: `base/ID`, with an ID stored in the run folder.

    Raises:
      ConfigError: some process does not see what process 0 writes there.
    """
    name = local_id(run_folder) if is_primary() else None
    if is_primary() and name is None:
        name = f"{run_folder.name}-{secrets.token_hex(8)}"
        run_folder.mkdir(parents=True, exist_ok=True)
        temporary = run_folder / f"{LOCAL_ID_FILE}.tmp"
        temporary.write_text(f"{name}\n", encoding="utf-8")
        temporary.replace(run_folder / LOCAL_ID_FILE)
    folder = absolute_path(base) / from_primary(name)
    if is_primary():
        folder.mkdir(parents=True, exist_ok=True)
    from_primary(None)
    if any_process(not folder.exists()):
        raise ConfigError(
            [
                f"checkpoint.local.folder: {base} is not the same folder for all processes; name one that they share,"
                " or omit checkpoint.local"
            ]
        )
    return folder
