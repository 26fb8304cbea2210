"""From a configuration to a finished run folder."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath

from maxlm.checkpoint.folder import check_fingerprint, find_checkpoint, has_checkpoint, run_folder_of
from maxlm.config.train import TrainConfig
from maxlm.errors import CheckpointError
from maxlm.runtime.distributed import initialize_distributed, is_primary, stop_with_parent
from maxlm.runtime.manifest import FILE_NAME, content_hash, read_manifest, write_manifest
from maxlm.runtime.peers import ending_together
from maxlm.runtime.retry import storage_faults
from maxlm.runtime.storage import copy_folder, locked
from maxlm.runtime.supervise import SUPERVISED
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.goodput import Stopwatch
from maxlm.train.loop import TrainResult, fit
from maxlm.train.objective import RunContext
from maxlm.train.setup import Setup, set_up
from maxlm.train.trained_model import make_model

# How long a run of before may take to save and end.
_ENDING_SECONDS = 10.0


def train(config: TrainConfig, *, accept_changes: bool = False) -> dict[str, Any]:
    """Run `config` to its end, or resume it, and return the manifest that stands in its folder.

    Args:
      accept_changes: go on with a run that was trained with other settings, which are then recorded; see
        docs/resuming.md.

    Raises:
      MaxlmError: what the user can mend: configuration, data, tokenizer, checkpoints, skipped steps.
      FaultError: a process or machine is gone, or the storage fails; another start may help.
    """
    if os.environ.pop(SUPERVISED, None):
        stop_with_parent()
    peers = initialize_distributed(config.processes)
    with ending_together(peers), storage_faults(), Stopwatch() as stopwatch:
        setup = set_up(config, peers, accept_changes=accept_changes)
        with _alone_in(setup.folder), jax.set_mesh(setup.mesh):
            setup.lineage.check_folder()
            copy_tokenizer(setup)
            inputs = _inputs(setup)
            # Of what is read now: it may be another when the run ends.
            hashes = {name: content_hash(path) for name, path in inputs.items()} if is_primary() else {}
            model = make_model(setup)
            objective = setup.config.objective
            data = objective.open_data(RunContext(setup.config, setup.tokenizer, setup.mesh, model.reference))
            data.prepare(model.frozen)
            result = fit(model, data, objective.compute_loss, setup.lineage, mesh=setup.mesh, stopwatch=stopwatch)
        if result.start == result.steps and is_finished(setup.folder, result.steps):
            return read_manifest(setup.folder)
        return finish(setup.config, result, inputs, hashes)


@contextlib.contextmanager
def _alone_in(folder: epath.Path) -> Iterator[None]:
    """Make the run folder, and hold it against a second run.

    Raises:
      CheckpointError: another process trains there.
    """
    if not is_primary():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, seconds=_ENDING_SECONDS) as alone:
        if not alone:
            raise CheckpointError(
                f"{folder}: another process trains there; wait until it has ended, or give another output"
            )
        yield


def copy_tokenizer(setup: Setup) -> None:
    """Put a copy of the run's tokenizer into its folder, which then needs no other one.

    Raises:
      CheckpointError: a run with another tokenizer stands there.
    """
    if not is_primary():
        return
    copy = setup.folder / "tokenizer"
    if copy.exists():
        fingerprint = Tokenizer.load(copy).fingerprint
        if fingerprint == setup.tokenizer.fingerprint:
            return
        if has_checkpoint(setup.folder):
            check_fingerprint(fingerprint, setup.tokenizer.fingerprint, setup.folder)
    copy_folder(setup.tokenizer_folder, copy)


def is_finished(folder: epath.Path, steps: int) -> bool:
    """Whether a manifest says that the run in this folder has ended with so many steps; it may have had fewer once."""
    if not (folder / FILE_NAME).exists():
        return False
    metrics = read_manifest(folder)["metrics"]
    return metrics.get("finished", False) and metrics["steps"] == steps


def _inputs(setup: Setup) -> dict[str, str | epath.Path]:
    """What a run's manifest names: files, and folders of other stages."""
    config = setup.config
    # A run that starts from another takes that one's tokenizer with it.
    if config.init_from is None:
        inputs: dict[str, str | epath.Path] = {"tokenizer": setup.tokenizer_folder}
    else:
        inputs = {"init_from": run_folder_of(find_checkpoint(config.init_from))}
    for each in config.objective.inputs:
        if each.trains:
            path = run_folder_of(find_checkpoint(each.path)) if each.content == "weights" else each.path
            inputs[each.name] = path
    return inputs


def finish(
    config: TrainConfig, result: TrainResult, inputs: Mapping[str, Any], hashes: Mapping[str, str]
) -> dict[str, Any]:
    """Write the manifest of a run that has ended, or of one that was stopped and waits to go on."""
    metrics = {
        "steps": result.steps,
        "finished": not result.interrupted,
        "seconds": round(result.goodput.total, 2),
        "attempts": result.goodput.attempts,
        "tokens_per_second": round(result.tokens_per_second, 1),
        "skipped": int(result.state.guard.skipped),
        "goodput": result.goodput.summary(),
        "valid": result.metrics,
    }
    if not is_primary():
        return {"metrics": metrics}
    return write_manifest(
        config.output,
        stage=f"train/{config.objective.kind}",
        inputs=inputs,
        hashes=hashes,
        # What was run, and not what this start was asked for: it may have found nothing left to do.
        config=result.record["config"],
        more={name: result.record[name] for name in ("start", "changes") if result.record.get(name)},
        metrics=metrics,
    )
