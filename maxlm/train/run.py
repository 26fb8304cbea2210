"""From a configuration to a finished run folder: tokenizer, model, mesh, objective, loop, manifest."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
from etils import epath

from maxlm.checkpoint.folder import (
    check_fingerprint,
    find_checkpoint,
    has_checkpoint,
    read_metadata,
    run_folder_of,
    trained_as,
    weights_hash,
)
from maxlm.checkpoint.lineage import Lineage, check_not_read
from maxlm.checkpoint.same_model import check_same_model
from maxlm.config.train import TrainConfig
from maxlm.core.parameters import abstract, initialize
from maxlm.core.sharding import make_mesh, mesh_sizes, row_shard
from maxlm.errors import CheckpointError, ConfigError
from maxlm.interop.load import load_model
from maxlm.models.adapters import apply_adapters, declare_adapters
from maxlm.models.decoder import with_config
from maxlm.runtime.distributed import initialize_distributed, is_primary, stop_with_parent
from maxlm.runtime.manifest import FILE_NAME, content_hash, read_manifest, write_manifest
from maxlm.runtime.output import check_output
from maxlm.runtime.peers import Peers, ending_together
from maxlm.runtime.retry import storage_faults
from maxlm.runtime.storage import copy_folder, locked, resolve_path, storage_path
from maxlm.runtime.supervise import SUPERVISED, newest_step
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.goodput import Stopwatch
from maxlm.train.layout import check_layout, check_precision, note_idle_devices
from maxlm.train.loop import TrainResult, run
from maxlm.train.objective import RunContext, StudentAndTeacher
from maxlm.train.startup import check_start, data_hashes

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
        return _train(config, peers, stopwatch, accept_changes)


def _train(config: TrainConfig, peers: Peers | None, stopwatch: Stopwatch, accept_changes: bool) -> dict[str, Any]:
    check_output(config.output, "train")
    folder = storage_path(config.output)
    check_not_read(config)
    tokenizer_folder = find_tokenizer(config)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if peers is not None:
        hashes = hashes_of(config, tokenizer) | {"--accept-changes": accept_changes}
        check_start(peers, config, hashes, timeout=config.processes.start_timeout_seconds)
    config = resolve_model(config, tokenizer)
    sizes = mesh_sizes(config.mesh, jax.device_count())
    check_layout(config, sizes)
    check_precision(config, jax.devices()[0])
    note_idle_devices(sizes, jax.device_count())
    mesh = make_mesh(config.mesh)
    # Refuses a mesh whose rows the processes cannot share, before anything is made.
    row_shard(mesh)
    if config.init_from is not None:
        start_fingerprint = read_metadata(find_checkpoint(config.init_from))["fingerprint"]
        check_fingerprint(start_fingerprint, tokenizer.fingerprint, config.init_from)
    lineage = Lineage.of(config, tokenizer, accept_changes=accept_changes)
    with _alone_in(folder):
        lineage.check_folder()
        return _train_in(folder, lineage, tokenizer, tokenizer_folder, mesh, stopwatch)


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


def _train_in(
    folder: epath.Path,
    lineage: Lineage,
    tokenizer: Tokenizer,
    tokenizer_folder: epath.Path,
    mesh: jax.sharding.Mesh,
    stopwatch: Stopwatch,
) -> dict[str, Any]:
    config = lineage.config
    prepare_folder(folder, tokenizer, tokenizer_folder)
    inputs = _inputs(config, tokenizer_folder)
    # Of what is read now: it may be another when the run ends.
    hashes = {name: content_hash(path) for name, path in inputs.items()} if is_primary() else {}
    objective = config.objective
    plan = objective.declare(config.model)
    key = jax.random.key(config.seed)

    def start_model():
        if config.init_from is None:
            return initialize(plan, key, mesh)
        decoder, _ = load_model(config.init_from, mesh)
        return objective.from_decoder(with_config(decoder, config.model), key)

    with jax.set_mesh(mesh):
        if config.lora is None:
            like, create, frozen = abstract(plan, mesh), start_model, {}
            reference = start_model() if objective.needs_reference else None
        else:
            adapters = declare_adapters(plan, config.lora)
            like, create = abstract(adapters, mesh), lambda: initialize(adapters, key, mesh)
            reference = start_model()
            frozen = {"base": reference}
        if (teacher := objective.load_teacher(config, tokenizer, mesh)) is not None:
            frozen["teacher"] = teacher
        data = objective.open_data(RunContext(config, tokenizer, mesh, reference))
        data.prepare(frozen)
        result = run(
            mesh=mesh,
            data=data,
            compute_loss=objective.compute_loss,
            like=like,
            create=create,
            frozen=frozen,
            assemble=partial(assemble, config),
            lineage=lineage,
            stopwatch=stopwatch,
        )
    if result.start == result.steps and is_finished(folder, result.steps):
        return read_manifest(folder)
    return finish(config, result, inputs, hashes)


def assemble(config: TrainConfig, trainable: Any, frozen: dict[str, Any]) -> Any:
    """What an objective's loss takes: the model, or its adapters on a frozen `base`; with the `teacher`, if any."""
    model = apply_adapters(frozen["base"], trainable, config.lora) if "base" in frozen else trainable
    return StudentAndTeacher(model, frozen["teacher"]) if "teacher" in frozen else model


def hashes_of(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What all processes of a run must read alike, by name."""
    hashes = {"tokenizer": tokenizer.fingerprint, f"newest step of {config.output}": newest_step(config.output)}
    if config.init_from is not None:
        hashes[f"weights of {config.init_from}"] = weights_hash(find_checkpoint(config.init_from))
    return hashes | data_hashes(config)


def resolve_model(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The configuration with the model that will be trained: that of `init_from`, the vocabulary of the tokenizer."""
    model = config.model
    if config.init_from is not None:
        checkpoint = find_checkpoint(config.init_from)
        start, _ = trained_as(read_metadata(checkpoint), where=checkpoint)
        if model is not None:
            check_same_model(model, start, config.init_from)
        model = start if model is None else model
    if model.vocab_size not in (0, tokenizer.vocab_size):
        raise ConfigError(
            [f"model.vocab_size: {model.vocab_size} differs from the tokenizer's {tokenizer.vocab_size}; leave it out"]
        )
    if config.row_length > model.max_length:
        raise ConfigError([f"row_length: {config.row_length} exceeds the model's max_length of {model.max_length}"])
    model = model.model_copy(update={"vocab_size": tokenizer.vocab_size})
    return config.model_copy(update={"model": model})


def find_tokenizer(config: TrainConfig) -> epath.Path:
    """The tokenizer named in the configuration, or that of the model or data that it starts from."""
    if config.tokenizer is not None:
        return storage_path(config.tokenizer)
    if config.init_from is not None:
        return run_folder_of(find_checkpoint(config.init_from)) / "tokenizer"
    rows = next(each for each in config.objective.inputs if each.content == "rows")
    data = storage_path(rows.path)
    return resolve_path(read_manifest(data)["inputs"]["tokenizer"]["path"], data)


def prepare_folder(folder: epath.Path, tokenizer: Tokenizer, tokenizer_folder: epath.Path) -> None:
    """Make the run folder, with a copy of the run's tokenizer, so that it needs no other folder.

    Raises:
      CheckpointError: a run with another tokenizer stands there.
    """
    if not is_primary():
        return
    folder.mkdir(parents=True, exist_ok=True)
    copy = folder / "tokenizer"
    if copy.exists():
        fingerprint = Tokenizer.load(copy).fingerprint
        if fingerprint == tokenizer.fingerprint:
            return
        if has_checkpoint(folder):
            check_fingerprint(fingerprint, tokenizer.fingerprint, folder)
    copy_folder(tokenizer_folder, copy)


def is_finished(folder: epath.Path, steps: int) -> bool:
    """Whether a manifest says that the run in this folder has ended with so many steps; it may have had fewer once."""
    if not (folder / FILE_NAME).exists():
        return False
    metrics = read_manifest(folder)["metrics"]
    return metrics.get("finished", False) and metrics["steps"] == steps


def _inputs(config: TrainConfig, tokenizer_folder: epath.Path) -> dict[str, str | epath.Path]:
    """What a run's manifest names: files, and folders of other stages."""
    # A run that starts from another takes that one's tokenizer with it.
    if config.init_from is None:
        inputs = {"tokenizer": tokenizer_folder}
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
