"""Examples of TFDS (without TensorFlow) and Hugging Face (streamed) datasets, as mappings of fields."""

import os
from collections.abc import Iterator
from pathlib import Path

from maxlm.errors import DataError


def read_tfds(uri: str) -> Iterator[dict]:
    """Read the examples of `tfds:NAME[:SPLIT]`; NAME may be a folder prepared by TFDS.

    Raises:
      DataError: if there is no such dataset or split, or it cannot be read without TensorFlow.
    """
    import tensorflow_datasets as tfds

    name, split = _name_and_split(uri)
    try:
        builder = tfds.builder_from_directory(name) if Path(name).is_dir() else tfds.builder(name, try_gcs=False)
        builder.download_and_prepare(file_format="array_record")
        examples = builder.as_data_source(split)
    except Exception as error:  # TFDS raises many kinds of errors, including network errors
        raise DataError(f"source {uri}: TFDS cannot load it: {_first_line(error)}") from None
    for index in range(len(examples)):
        yield examples[index]


def read_hf(uri: str) -> Iterator[dict]:
    """Stream the examples of `hf:NAME[:SPLIT]`; NAME may be a local folder of data files.

    Raises:
      DataError: if the extra `hf` is not installed, or there is no such dataset or split.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"source {uri}: needs the package `datasets`; install it with: pip install 'maxlm[hf]'"
        ) from None

    name, split = _name_and_split(uri)
    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # includes network errors; closing the generator raises GeneratorExit instead
        raise DataError(f"source {uri}: the dataset cannot be read: {_first_line(error)}") from None


def local_data_files(uri: str) -> list[Path]:
    """The files of a dataset in a local folder, whose content reveals changes; [] for a remote one."""
    if not uri.startswith(("tfds:", "hf:")):
        return []
    folder = Path(_name_and_split(uri)[0])
    return sorted(path for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else []


def _name_and_split(uri: str) -> tuple[str, str]:
    _, _, name = uri.partition(":")
    if not os.path.isdir(name) and ":" in name:
        name, _, split = name.rpartition(":")
        return name, split
    return name, "train"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
