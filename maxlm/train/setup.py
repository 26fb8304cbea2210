"""Set up a run: resolve and validate its configuration before anything is created."""

from dataclasses import dataclass
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from maxlm.checkpoint.folder import (
    check_fingerprint,
    find_checkpoint,
    read_metadata,
    run_folder_of,
    trained_as,
    weights_hash,
)
from maxlm.checkpoint.lineage import Lineage, check_not_read
from maxlm.checkpoint.same_model import check_same_model
from maxlm.config.execution import DEFAULT_EXECUTION
from maxlm.config.train import TrainConfig
from maxlm.core.sharding import make_mesh, mesh_sizes, row_shard
from maxlm.errors import ConfigError, DataError, TokenizerError
from maxlm.models.adapters.declare import declare_adapters
from maxlm.runtime.manifest import read_manifest
from maxlm.runtime.output import check_output
from maxlm.runtime.peers import Peers
from maxlm.runtime.storage import resolve_path, storage_path
from maxlm.runtime.supervise import newest_step
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.layout import check_layout, check_precision, note_idle_devices
from maxlm.train.startup import check_start, data_hashes


@dataclass(frozen=True)
class Setup:
    """The parts of a run.

    config: resolved, with the model to train.
    folder: its run folder.
    lineage: the requested run, to compare with the one in the folder.
    """

    config: TrainConfig
    folder: epath.Path
    tokenizer: Tokenizer
    tokenizer_folder: epath.Path
    mesh: Mesh
    lineage: Lineage


def set_up(config: TrainConfig, peers: Peers | None, *, accept_changes: bool = False) -> Setup:
    """Resolve a configuration, and check that all processes have the same one and that it fits the devices.

    Raises:
      MaxlmError: something the user can fix.
    """
    check_output(config.output, "train")
    check_not_read(config)
    tokenizer_folder = find_tokenizer(config)
    tokenizer = load_tokenizer(config)
    if peers is not None:
        hashes = _hashes(config, tokenizer) | {"--accept-changes": accept_changes}
        check_start(peers, config, hashes, timeout=config.processes.start_timeout_seconds)
    config = resolve_model(config, tokenizer)
    tokenizer = tokenizer.with_vocab_size(config.model.vocab_size)
    sizes = mesh_sizes(config.mesh, jax.device_count())
    check_layout(config, sizes)
    check_precision(config, jax.devices()[0])
    note_idle_devices(sizes, jax.device_count())
    mesh = make_mesh(config.mesh)
    # Rejects a mesh whose rows are not divisible by the processes, before anything is created.
    row_shard(mesh)
    if config.init_from is not None:
        start_fingerprint = read_metadata(find_checkpoint(config.init_from))["fingerprint"]
        # What it was trained with: it may lack the chat template that this run adds.
        check_fingerprint(start_fingerprint, Tokenizer.load(tokenizer_folder).fingerprint, config.init_from)
    lineage = Lineage.of(config, tokenizer, accept_changes=accept_changes)
    return Setup(config, storage_path(config.output), tokenizer, tokenizer_folder, mesh, lineage)


def resolve_model(config: TrainConfig, tokenizer: Tokenizer) -> TrainConfig:
    """The configuration with the model to train: shape from `init_from`, vocabulary from the tokenizer."""
    model, execution = config.model, config.execution
    if config.init_from is not None:
        checkpoint = find_checkpoint(config.init_from)
        trained = trained_as(read_metadata(checkpoint), where=checkpoint)
        start = trained.merged
        if model is not None:
            check_same_model(model, start, config.init_from)
        if config.adapters is not None and model is not None and model.multi_token and not start.multi_token:
            raise ConfigError(
                [
                    f"adapters: cannot train modules of model.multi_token that {config.init_from} lacks; set adapters"
                    " to null"
                ]
            )
        model = (
            config.objective.trained_part(start)
            if model is None
            else model.model_copy(update={"vocab_size": model.vocab_size or start.vocab_size})
        )
        execution = trained.execution if execution is None else execution
    execution = DEFAULT_EXECUTION if execution is None else execution
    # More rows than tokens, such as a multiple of 128, are never used.
    if 0 < model.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            [f"model.vocab_size: {model.vocab_size} is less than the tokenizer's {tokenizer.vocab_size}; leave it out"]
        )
    if config.row_length > execution.max_length:
        raise ConfigError([f"row_length: {config.row_length} exceeds execution.max_length of {execution.max_length}"])
    if problems := config.objective.model_problems(model):
        raise ConfigError(problems)
    model = model.model_copy(update={"vocab_size": model.vocab_size or tokenizer.vocab_size})
    return config.model_copy(update={"model": model, "execution": execution})


def declared_model(config: TrainConfig) -> Any:
    """The declarations of the model that a configuration trains, with the adapters if it has any.

    Raises:
      ConfigError: the size of the vocabulary is unknown, because there is no tokenizer yet.
      CheckpointError: the model of `init_from` does not exist.
    """
    if config.model is None or config.model.vocab_size == 0:
        try:
            tokenizer = load_tokenizer(config)
        except (DataError, TokenizerError) as error:
            raise ConfigError(
                [f"model.vocab_size: is that of the tokenizer ({error}); or give model.vocab_size"]
            ) from None
        config = resolve_model(config, tokenizer)
    plan = config.objective.declare(config.model, config.execution or DEFAULT_EXECUTION)
    return plan if config.adapters is None else {"model": plan, "adapters": declare_adapters(plan, config.adapters)}


def load_tokenizer(config: TrainConfig) -> Tokenizer:
    """The tokenizer of a run, with the chat template that the configuration names.

    Raises:
      DataError, TokenizerError: there is none, or the template does not fit.
    """
    tokenizer = Tokenizer.load(find_tokenizer(config))
    if config.chat_template is None:
        return tokenizer
    try:
        return tokenizer.with_template(config.chat_template)
    except TokenizerError as error:
        raise TokenizerError(f"{find_tokenizer(config)}: {error}") from None


def find_tokenizer(config: TrainConfig) -> epath.Path:
    """The tokenizer named in the configuration, or that of its starting model or data."""
    if config.tokenizer is not None:
        return storage_path(config.tokenizer)
    if config.init_from is not None:
        return run_folder_of(find_checkpoint(config.init_from)) / "tokenizer"
    rows = next(each for each in config.objective.inputs if each.content == "rows")
    data = storage_path(rows.path)
    return resolve_path(read_manifest(data)["inputs"]["tokenizer"]["path"], data)


def _hashes(config: TrainConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Hashes of the inputs that must be the same on all processes, by name."""
    hashes = {"tokenizer": tokenizer.fingerprint, f"newest step of {config.output}": newest_step(config.output)}
    if config.init_from is not None:
        hashes[f"weights of {config.init_from}"] = weights_hash(find_checkpoint(config.init_from))
    return hashes | data_hashes(config)
