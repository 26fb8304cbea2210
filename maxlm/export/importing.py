"""Models of other formats as run folders, to train on: `maxlm import`."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from maxlm.checkpoint.folder import find_checkpoint
from maxlm.checkpoint.load import load_checkpoint
from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.export.run_folder import Adapted, check_run_folder, write_run_folder
from maxlm.interop.huggingface import is_huggingface, load_huggingface
from maxlm.interop.peft import read_peft
from maxlm.runtime.storage import real_path


@dataclass(frozen=True)
class Imported:
    """What was imported.

    modules: of multi-token prediction; tokenizer_size: None without a tokenizer.
    """

    family: str
    parameters: int
    modules: int
    dtype: str
    max_length: int
    vocab_size: int
    tokenizer_size: int | None


@dataclass(frozen=True)
class ImportedAdapters:
    """What was imported: adapters of `kind`, of so many matrices."""

    kind: str
    parameters: int
    matrices: int


def import_peft(folder: str | os.PathLike, output: str | os.PathLike, base: str | os.PathLike) -> ImportedAdapters:
    """Write a run folder with adapters of `peft` as its checkpoint of step 0, atomically.

    Args:
      folder: as peft's save_pretrained writes it.
      output: a new folder, or one of an earlier import, which is replaced.
      base: the run folder or checkpoint of the model that the adapters were trained on.

    Raises:
      CheckpointError: `folder` has no such adapters, they are not supported, or are of another model.
      ConfigError: `output` contains something else.
    """
    output = check_run_folder(output, "import")
    checkpoint = find_checkpoint(base)
    model, tokenizer = load_checkpoint(checkpoint)
    config, adapters = read_peft(Path(folder), model)
    arrays = flatten(adapters)
    found = ImportedAdapters(config.kind, sum(x.size for x in arrays.values()), len(adapters))
    write_run_folder(
        output,
        model,
        tokenizer,
        stage="import/peft",
        inputs={"adapters": real_path(folder), "model": Path(base)},
        metrics=asdict(found),
        adapted=Adapted(checkpoint, adapters, config),
    )
    return found


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
    output = check_run_folder(output, "import")
    if not is_huggingface(folder):
        what = "there is no such folder" if not folder.exists() else "has no config.json"
        raise CheckpointError(f"{folder}: {what}; give a folder as transformers' save_pretrained writes it")
    model, tokenizer = load_huggingface(folder)
    arrays = flatten(model)
    found = Imported(
        family=model.config.family,
        parameters=sum(x.size for x in arrays.values()),
        modules=model.config.num_modules,
        dtype=model.execution.parameter_dtype,
        max_length=model.execution.max_length,
        vocab_size=model.config.vocab_size,
        tokenizer_size=None if tokenizer is None else tokenizer.vocab_size,
    )
    inputs = {"model": real_path(folder)}
    write_run_folder(output, model, tokenizer, stage="import/hf", inputs=inputs, metrics=asdict(found))
    return found
