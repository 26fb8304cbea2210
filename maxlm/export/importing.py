"""Models of other formats as run folders, to train on: `maxlm import`."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError, ConfigError
from maxlm.interop.huggingface import is_huggingface, load_huggingface
from maxlm.runtime.manifest import write_manifest
from maxlm.runtime.output import check_output, replaced_folder, temporary_name
from maxlm.runtime.storage import real_path


@dataclass(frozen=True)
class Imported:
    """What was imported.

    tokenizer_size: None without a tokenizer.
    """

    family: str
    parameters: int
    dtype: str
    max_length: int
    vocab_size: int
    tokenizer_size: int | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _State:
    """The state of a run before its first step, without an optimizer's."""

    step: Any
    trainable: Any


def import_huggingface(folder: str | os.PathLike, output: str | os.PathLike) -> Imported:
    """Write a run folder with a model of Hugging Face as its checkpoint of step 0, atomically.

    Args:
      folder: as transformers writes it.
      output: a new folder, or one of an earlier import, which is replaced.

    Raises:
      CheckpointError: `folder` has no such model, or one that is not supported.
      TokenizerError: its tokenizer is not supported.
      ConfigError: `output` contains something else.
    """
    folder = Path(folder)
    check_output(output, "import", key="OUT", suffix=len(temporary_name("")))
    if not is_huggingface(folder):
        what = "there is no such folder" if not folder.exists() else "has no config.json"
        raise CheckpointError(f"{folder}: {what}; give a folder as transformers' save_pretrained writes it")
    output = Path(os.path.abspath(output))
    if output.exists() and any(output.iterdir()) and not (output / "manifest.json").is_file():
        raise ConfigError([f"OUT: {output} exists and is not an import; give a new folder"])
    model, tokenizer = load_huggingface(folder)
    arrays = flatten(model)
    found = Imported(
        family=model.config.family,
        parameters=sum(x.size for x in arrays.values()),
        dtype=model.execution.parameter_dtype,
        max_length=model.execution.max_length,
        vocab_size=model.config.vocab_size,
        tokenizer_size=None if tokenizer is None else tokenizer.vocab_size,
    )
    config = {
        "seed": 0,
        "model": model.config.model_dump(mode="json"),
        "execution": model.execution.model_dump(mode="json"),
    }
    with replaced_folder(output) as temporary:
        if tokenizer is not None:
            tokenizer.save(temporary / "tokenizer")
        metadata = {"step": 0, "config": config, "fingerprint": tokenizer and tokenizer.fingerprint, "start": None}
        with Checkpointer(temporary, keep=1) as checkpointer:
            checkpointer.save(_State(jnp.int32(0), model), metadata, wait=True)
        write_manifest(
            temporary, stage="import/hf", inputs={"model": real_path(folder)}, config=config, metrics=asdict(found)
        )
    return found
