"""Load a trained language model or reward model from its checkpoint, with adapters merged."""

import contextlib
import os
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
from etils import epath

from maxlm.checkpoint.folder import (
    check_fingerprint,
    find_checkpoint,
    read_metadata,
    run_folder_of,
    trained_as,
    weights_hash,
)
from maxlm.checkpoint.restore import restore_ema, restore_weights
from maxlm.config.adapters import AdaptersConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.core.parameters import abstract
from maxlm.errors import CheckpointError
from maxlm.models.adapters.apply import merge_adapters
from maxlm.models.adapters.declare import declare_adapters
from maxlm.models.adapters.frozen import Adapters, quantized_base
from maxlm.models.critic import with_critic, without_critic
from maxlm.models.decoder import Decoder, with_execution
from maxlm.models.multi_token import without_modules
from maxlm.models.scores import with_labels
from maxlm.runtime.storage import absolute_path, real_path, resolve_path, storage_path
from maxlm.tokenizer.codec import Tokenizer

_NO_ADAPTERS = "has trained a whole model, and no adapters; give a run with adapters"


def load_checkpoint(
    path: str | os.PathLike, mesh: jax.sharding.Mesh | None = None, *, ema: bool = False
) -> tuple[Decoder, Tokenizer | None]:
    """Load the model that a run trained, and its tokenizer; None if the run folder has none.

    Args:
      path: a run folder or a checkpoint.
      mesh: the mesh to shard it over; None is the first device.
      ema: load the EMA weights instead.

    Raises:
      CheckpointError: there is no complete checkpoint, or no EMA weights; its tokenizer, or the base model of its
        adapters, has changed.
    """
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    if (adapted := _load_adapters(checkpoint, metadata, mesh, ema=ema)) is not None:
        with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
            base = quantized_base(adapted.base, adapted.config.base, adapted.declared)
            merge = jax.jit(partial(merge_adapters, config=adapted.config), donate_argnums=0)
            model = merge(base, adapted.adapters)
    else:
        restore = restore_ema if ema else restore_weights
        model = restore(checkpoint, abstract(_declared(metadata, checkpoint), mesh))
    return without_critic(model), _read_tokenizer(checkpoint, metadata["fingerprint"])


@dataclass(frozen=True)
class Adapted:
    """Adapters of a run, and the model that they were trained on, which is not quantized.

    declared: declarations of the adapters.
    """

    base: Decoder
    adapters: Adapters
    config: AdaptersConfig
    declared: Adapters


@dataclass(frozen=True)
class AdaptersAlone:
    """Adapters of a run without their base, and the run's tokenizer; None if it has none."""

    adapters: Adapters
    config: AdaptersConfig
    tokenizer: Tokenizer | None


def load_adapters_of(path: str | os.PathLike, base: str | os.PathLike) -> AdaptersAlone:
    """Load the adapters of a run for a model that is in memory already.

    Args:
      base: the run or checkpoint of that model.

    Raises:
      CheckpointError: they were trained on another model, or the run has trained a whole model.
    """
    checkpoint, trained_on = find_checkpoint(path), find_checkpoint(base)
    metadata = read_metadata(checkpoint)
    config = trained_as(metadata, where=checkpoint).adapters
    if config is None:
        raise CheckpointError(f"{path}: {_NO_ADAPTERS}")
    start = metadata["start"]
    if start["hash"] != weights_hash(trained_on):
        raise CheckpointError(
            f"{path}: its adapters were trained on {start.get('absolute', start['checkpoint'])}, whose weights are not"
            f" those of {base}; give that model"
        )
    declared = declare_adapters(_declared(metadata, checkpoint), config)
    adapters = restore_weights(checkpoint, abstract(declared))
    return AdaptersAlone(adapters, config, _read_tokenizer(checkpoint, metadata["fingerprint"]))


def load_adapters(path: str | os.PathLike, *, ema: bool = False) -> Adapted:
    """Load the adapters of a run and their base, on the first device.

    Raises:
      CheckpointError: see `load_checkpoint`; or the run has trained a whole model.
    """
    checkpoint = find_checkpoint(path)
    if (found := _load_adapters(checkpoint, read_metadata(checkpoint), None, ema=ema)) is None:
        raise CheckpointError(f"{path}: {_NO_ADAPTERS}")
    return found


def _load_adapters(
    checkpoint: epath.Path, metadata: dict[str, Any], mesh: jax.sharding.Mesh | None, *, ema: bool
) -> Adapted | None:
    settings = trained_as(metadata, where=checkpoint).adapters
    if settings is None:
        return None
    plan = _declared(metadata, checkpoint)
    base = load_start(checkpoint, plan.execution, mesh)
    base = base if plan.config.multi_token else without_modules(base)
    with jax.set_mesh(mesh) if mesh is not None else contextlib.nullcontext():
        if plan.config.critic is not None:
            base = with_critic(base, plan.config.critic, jax.random.key(metadata["config"]["seed"]))
        if plan.config.labels is not None:
            base = with_labels(base, plan.config.labels, jax.random.key(metadata["config"]["seed"]))
        declared = declare_adapters(plan, settings)
        adapters = (restore_ema if ema else restore_weights)(checkpoint, abstract(declared, mesh))
    return Adapted(base, adapters, settings, declared)


def _declared(metadata: dict[str, Any], checkpoint: epath.Path) -> Decoder:
    """The declarations of the model of a checkpoint."""
    config, execution, _ = trained_as(metadata, where=checkpoint)
    # The weights identify the model: a reward model has a head, with or without adapters, named as its objective.
    parts = {path.split("/")[0] for path in metadata["shapes"]}
    if "score" in parts and config.labels is None:
        config = config.model_copy(update={"labels": (metadata["config"]["objective"]["kind"],)})
    critic: Literal["own", "shared"] | None = "own" if "critic" in parts else "shared" if "value" in parts else None
    return Decoder(config.model_copy(update={"critic": critic}), execution)


def load_start(checkpoint: epath.Path, execution: ExecutionConfig, mesh: jax.sharding.Mesh | None = None) -> Decoder:
    """Load the base model of a checkpoint's adapters, to be computed as `execution` says.

    Raises:
      CheckpointError: it does not exist, or has changed.
    """
    decoder, _ = load_checkpoint(find_start(checkpoint), mesh)
    return with_execution(decoder, execution)


def find_start(checkpoint: epath.Path) -> epath.Path:
    """The checkpoint that a run started from: relative to the run folder, or at its absolute path in training.

    Raises:
      CheckpointError: there is none, or one with other weights.
    """
    start = read_metadata(checkpoint)["start"]
    folder = run_folder_of(checkpoint)
    named = [absolute_path(resolve_path(start["checkpoint"], each)) for each in (folder, real_path(folder))]
    named += [storage_path(start["absolute"])] if "absolute" in start else []
    places = list(dict.fromkeys(named))
    found = [place for place in places if (place / "weights").is_dir()]
    for place in found:
        if weights_hash(place) == start["hash"]:
            return place
    if found:
        raise CheckpointError(
            f"{found[0]}: has changed since the adapters of {checkpoint} were trained on it; train them again"
        )
    raise CheckpointError(
        f"{checkpoint}: the base model of its adapters is missing, at"
        f" {' or '.join(map(str, places))}; put its run folder back, or a link to it:"
        f" ln -s WHERE_IT_IS {run_folder_of(places[0])}"
    )


def _read_tokenizer(checkpoint: epath.Path, fingerprint: str | None) -> Tokenizer | None:
    """Load the run's tokenizer; raises CheckpointError if it was replaced by another one."""
    run_folder = run_folder_of(checkpoint)
    if not (run_folder / "tokenizer").exists():
        return None
    tokenizer = Tokenizer.load(run_folder / "tokenizer")
    check_fingerprint(fingerprint, tokenizer.fingerprint, run_folder)
    return tokenizer
