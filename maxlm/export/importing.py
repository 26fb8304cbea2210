"""Models of other formats as run folders, to train on: `maxlm import`."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from maxlm.core.tree import flatten
from maxlm.errors import CheckpointError
from maxlm.export.run_folder import check_run_folder, write_run_folder
from maxlm.interop.huggingface import is_huggingface, load_huggingface
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
