"""Held-out documents or chats to compare two models on, as rows with the unit (document or chat) of each target.

Shapes: B rows of a batch, L length.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from maxlm.checkpoint.folder import find_checkpoint, run_folder_of
from maxlm.config.objective import find_objective
from maxlm.core.batch import Stream
from maxlm.data.examples.chat import PackedChats
from maxlm.data.held_out import open_held_out
from maxlm.data.loader import open_splits
from maxlm.data.prefixes import with_prefixes
from maxlm.data.sample import even_sample
from maxlm.errors import DataError
from maxlm.interop.formats import find_format
from maxlm.runtime.manifest import FILE_NAME, read_manifest
from maxlm.runtime.storage import resolve_path
from maxlm.tokenizer.codec import Tokenizer

# Tokens per batch, padding included.
BATCH_TOKENS = 4096

_NAME_DATA = "give held-out documents (a folder of `maxlm data build`) or chats (a .jsonl file) with --data"


@dataclass(frozen=True)
class HeldOut:
    """Rows [n, length] of documents or of chats.

    units: [n, length] int: index of the document or chat of each token, consistent across rows.
    paths: where they were read from.
    """

    kind: Literal["documents", "chats"]
    paths: tuple[Path, ...]
    rows: Stream
    units: np.ndarray

    def batches(self) -> Iterator[tuple[Stream, np.ndarray]]:
        """All rows once, in batches of one shape, each with its units; the last batch is padded."""
        num_rows, length = self.units.shape
        size = min(num_rows, max(1, BATCH_TOKENS // length))
        for start in range(0, num_rows, size):

            def slice_rows(x: np.ndarray, start=start) -> np.ndarray:
                part = x[start : start + size]
                return np.pad(part, ((0, size - len(part)), (0, 0)))

            yield jax.tree.map(slice_rows, self.rows), slice_rows(self.units)


def read_held_out(
    paths: Sequence[str | Path], tokenizer: Tokenizer, *, max_length: int, max_tokens: int, prefixes: bool = False
) -> HeldOut:
    """Read evenly spread rows, as many as `max_tokens` allows and at least one.

    Args:
      paths: folders of `maxlm data build`, for their held-out documents, or one .jsonl file of chats, of which
        the assistant tokens are compared.
      max_length: the model's context.
      prefixes: of documents and chats, for a prefix language model.

    Raises:
      DataError: there is nothing to read, or rows exceed the context.
      TokenizerError: the rows were made with another tokenizer.
    """
    folders = tuple(map(Path, paths))
    if all(path.is_dir() for path in folders):
        return _read_documents(folders, tokenizer, max_length=max_length, max_tokens=max_tokens, prefixes=prefixes)
    (path,) = folders
    chats = PackedChats.read(path, tokenizer, row_length=max_length, prefixes=prefixes)
    rows = chats.batch(even_sample([np.arange(len(chats))], max(1, max_tokens // max_length)))["text"]
    # A chat is one segment of one row.
    units = np.arange(len(rows.tokens))[:, None] * (rows.segment_ids.max() + 1) + rows.segment_ids
    return HeldOut("chats", folders, rows, units)


def find_held_out(model_path: str | Path) -> list[Path]:
    """The validation data of a run: the data of pretraining, the chats of SFT; for alignment, of its initial model.

    Raises:
      DataError: the run's manifests name none, or it no longer exists.
    """
    if (found_format := find_format(Path(model_path))) is not None:
        raise DataError(f"{model_path}: is {found_format.title}, which names no validation data; {_NAME_DATA}")
    folder, chat_model = Path(run_folder_of(find_checkpoint(model_path))), False
    while True:
        if not (folder / FILE_NAME).is_file():
            raise DataError(f"{folder}: has no {FILE_NAME} that names its validation data; {_NAME_DATA}")
        manifest = read_manifest(folder)
        if "objective" not in manifest["config"]:
            raise DataError(f"{folder}: was imported, so it names no validation data; {_NAME_DATA}")
        objective, inputs = manifest["config"]["objective"], manifest["inputs"]
        kind = find_objective(objective["kind"])
        learns_text = kind is not None and kind.learns_text
        if learns_text and objective.get("valid_file") is not None:
            found = [_validation_file(objective, resolve_path(inputs["train_file"]["path"], folder))]
            break
        if learns_text and "sources" in objective and not chat_model:
            found = [resolve_path(item["path"], folder) for name, item in inputs.items() if name.startswith("data_")]
            # A source without held-out rows contributes none to validation.
            found = [path for path in found if _holds_rows_out(path)] or found
            break
        if learns_text:
            raise DataError(f"{model_path}: names no file of held-out chats; {_NAME_DATA}")
        folder, chat_model = Path(resolve_path(inputs["init_from"]["path"], folder)), True
    found = [Path(os.path.relpath(path)) for path in found]
    if gone := [path for path in found if not path.exists()]:
        raise DataError(f"{gone[0]}: does not exist, but {model_path} was validated on it; {_NAME_DATA}")
    return found


def _holds_rows_out(path: Path) -> bool:
    return not path.exists() or bool(read_manifest(path)["metrics"]["splits"]["valid"]["rows"])


def _validation_file(objective: dict[str, Any], train_file: Path) -> Path:
    """The validation file of a run, found next to its training file: the manifest links only to the latter."""
    return train_file.parent / os.path.relpath(objective["valid_file"], Path(objective["train_file"]).parent)


def _read_documents(
    paths: tuple[Path, ...], tokenizer: Tokenizer, *, max_length: int, max_tokens: int, prefixes: bool
) -> HeldOut:
    _, row_length = open_splits(paths, "valid", tokenizer.fingerprint)
    if row_length > max_length:
        raise DataError(
            f"{paths[0]}: its rows of {row_length} tokens exceed the model's context of {max_length};"
            f" build the data with row_length={max_length}"
        )
    stored = open_held_out(paths, batch_size=1, num_batches=max(1, max_tokens // row_length))
    units: dict[tuple[str, int], int] = {}
    read, unit_rows = [], []
    for index in range(stored.num_steps):
        row = stored.batch(index)
        # A document may span many rows, which are not independent samples.
        numbers = [units.setdefault((item.folder, item.ordinal), len(units)) for item in stored.documents(index)]
        read.append(with_prefixes(row, (index,)) if prefixes else row)
        unit_rows.append(np.array([0, *numbers])[row["segment_ids"]])
    rows = {name: np.concatenate([row[name] for row in read]) for name in read[0]}
    return HeldOut("documents", paths, Stream.from_rows(rows), np.concatenate(unit_rows))
