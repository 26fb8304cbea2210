"""Write a model as a run folder that training can start from, with one checkpoint, of step 0."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.folder import weights_hash
from maxlm.config.adapters import AdaptersConfig
from maxlm.models.adapters.frozen import Adapters
from maxlm.models.decoder import Decoder
from maxlm.runtime.manifest import write_manifest
from maxlm.runtime.output import Stage, check_output, check_replaceable, replaced_folder, temporary_name
from maxlm.runtime.storage import absolute_path, relative_path
from maxlm.tokenizer.codec import Tokenizer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """The state of a run before its first step, without an optimizer's."""

    step: Any
    trainable: Any


@dataclass(frozen=True)
class Adapted:
    """Adapters of the model of a checkpoint."""

    base: epath.Path
    adapters: Adapters
    config: AdaptersConfig


def check_run_folder(output: str | os.PathLike, stage: Stage) -> Path:
    """The absolute path of a run folder to write.

    Raises:
      ConfigError: it cannot be written, or contains something else than an earlier output of this stage.
    """
    check_output(output, stage, key="OUT", suffix=len(temporary_name("")))
    output = Path(os.path.abspath(output))
    check_replaceable(output)
    return output


def write_run_folder(
    output: Path,
    model: Decoder,
    tokenizer: Tokenizer | None,
    *,
    stage: str,
    inputs: Mapping[str, str | Path],
    metrics: dict[str, Any],
    adapted: Adapted | None = None,
) -> None:
    """Write a run folder atomically; an existing one is replaced.

    Args:
      output: from `check_run_folder`.
      stage, inputs, metrics: of its manifest.
      adapted: adapters of the model, which are stored in its place.
    """
    config: dict[str, Any] = {
        "seed": 0,
        "model": model.config.model_dump(mode="json"),
        "execution": model.execution.model_dump(mode="json"),
    }
    weights: Any = model
    start = None
    if adapted is not None:
        weights, config["adapters"] = adapted.adapters, adapted.config.model_dump(mode="json")
        path = relative_path(adapted.base, absolute_path(output))
        start = {"checkpoint": path, "absolute": str(adapted.base), "hash": weights_hash(adapted.base)}
    with replaced_folder(output) as temporary:
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer")
        metadata = {"step": 0, "config": config, "fingerprint": tokenizer and tokenizer.fingerprint, "start": start}
        with Checkpointer(temporary, keep=1) as checkpointer:
            checkpointer.save(_State(jnp.int32(0), weights), metadata, wait=True)
        write_manifest(temporary, stage=stage, inputs=inputs, config=config, metrics=metrics)
