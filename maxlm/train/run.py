"""Train a configuration: from the configuration to a finished run folder."""

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
from maxlm.train.loss import TrainingLoss
from maxlm.train.objective import RunContext
from maxlm.train.setup import Setup, set_up
from maxlm.train.trained_model import make_model

# How long an earlier run may take to save and exit.
_ENDING_SECONDS = 10.0


def train(config: TrainConfig, *, accept_changes: bool = False) -> dict[str, Any]:
    """Run `config` to its end, or resume it, and return the manifest in its folder.

    Args:
      accept_changes: resume a run that was trained with other settings; the changes are recorded; see
        docs/resuming.md.

    Raises:
      MaxlmError: the user can fix it: configuration, data, tokenizer, checkpoints, skipped steps.
      FaultError: a process or machine is gone, or storage fails; a restart may help.
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
            # Of the inputs as read now: they may have changed when the run ends.
            hashes = {name: content_hash(path) for name, path in inputs.items()} if is_primary() else {}
            model = make_model(setup)
            objective = setup.config.objective
            start = setup.lineage.start
            context = RunContext(
                setup.config,
                setup.tokenizer,
                setup.mesh,
                model.reference,
                setup.folder,
                None if start is None else start["hash"],
            )
            data = objective.open_data(context)
            data.prepare(model.frozen)
            loss = TrainingLoss(objective, setup.config.regularization, model.assemble)
            result = fit(model, data, loss, setup.lineage, mesh=setup.mesh, stopwatch=stopwatch)
        if result.start == result.steps and is_finished(setup.folder, result.steps):
            return read_manifest(setup.folder)
        return finish(setup.config, result, inputs, hashes)


@contextlib.contextmanager
def _alone_in(folder: epath.Path) -> Iterator[None]:
    """Create the run folder, and lock it against a second run.

    Raises:
      CheckpointError: another process is training there.
    """
    if not is_primary():
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, seconds=_ENDING_SECONDS) as acquired:
        if not acquired:
            raise CheckpointError(
                f"{folder}: another process is training there; wait until it ends, or set another output"
            )
        yield


def copy_tokenizer(setup: Setup) -> None:
    """Copy the tokenizer into the run folder, so that the folder is self-contained.

    Raises:
      CheckpointError: the folder contains a run with another tokenizer.
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
    if setup.config.chat_template is not None:
        setup.tokenizer.save(copy)


def is_finished(folder: epath.Path, steps: int) -> bool:
    """Whether a manifest says that the run in this folder finished with `steps` steps, not just with fewer."""
    if not (folder / FILE_NAME).exists():
        return False
    metrics = read_manifest(folder)["metrics"]
    return metrics.get("finished", False) and metrics["steps"] == steps


def _inputs(setup: Setup) -> dict[str, str | epath.Path]:
    """The inputs for a run's manifest: files, and folders of other stages."""
    config = setup.config
    # A run that starts from another one also takes its tokenizer.
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
    """Write the manifest of a run that has finished, or was stopped and can be resumed."""
    metrics = {
        "steps": result.steps,
        "finished": not result.interrupted,
        **({"stopped": result.stopped} if result.stopped else {}),
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
        # The configuration that was run, not that of this start, which may have had no steps left.
        config=result.record["config"],
        more={name: result.record[name] for name in ("start", "changes") if result.record.get(name)},
        metrics=metrics,
    )
