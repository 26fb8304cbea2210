"""Inspect a data folder: documents, packed rows, rejected records, and the documents of a training step."""

from collections.abc import Iterator
from pathlib import Path

from maxlm.config import load_config
from maxlm.config.objective import PackedRowsConfig
from maxlm.data.loader import PackedRows, open_in_order, open_mixture
from maxlm.data.prepare import REJECTS_FILE
from maxlm.errors import DataError, TokenizerError
from maxlm.runtime.manifest import read_manifest
from maxlm.runtime.storage import resolve_path, storage_path
from maxlm.runtime.written import read_written_lines, table_batches
from maxlm.tokenizer.codec import Tokenizer

_SHOWN_CHARACTERS = 400


def read_documents(folder: str | Path, split: str) -> Iterator[dict]:
    """The documents of a split: id, source, licence and text.

    Raises:
      DataError: if the folder's documents have not been built.
    """
    read_manifest(Path(folder) / "documents")
    columns = ("id", "source", "licence", "text")
    for batch in table_batches(Path(folder) / "documents" / f"{split}.parquet", columns=columns, batch_size=64):
        yield from batch.to_pylist()


def read_rejects(folder: str | Path) -> Iterator[dict]:
    """The rejected records: id, source, reason, detail and text.

    Raises:
      DataError: if the folder's documents have not been built.
    """
    read_manifest(Path(folder) / "documents")
    yield from read_written_lines(storage_path(folder) / REJECTS_FILE)


def read_rows(folder: str | Path, split: str) -> Iterator[dict]:
    """The packed rows of a split, each with its document ids and its text including control tokens.

    Raises:
      DataError: if the folder has not been built.
      TokenizerError: if the tokenizer of the rows is not at the location in the manifest.
    """
    manifest = read_manifest(folder)
    rows = open_in_order([folder], split=split, batch_size=1)
    tokenizer_folder = resolve_path(manifest["inputs"]["tokenizer"]["path"], folder)
    tokenizer = Tokenizer.load(tokenizer_folder)
    if tokenizer.fingerprint != (made_with := manifest["metrics"]["tokenizer_fingerprint"]):
        raise TokenizerError(
            f"{tokenizer_folder}: is not the tokenizer ({tokenizer.fingerprint[:12]}) that the rows of {folder}"
            f" were made with ({made_with[:12]}); rebuild the data, or restore that tokenizer"
        )
    for step in range(rows.num_steps):
        batch = rows.batch(step)
        tokens = batch["tokens"][0][batch["segment_ids"][0] > 0].tolist()
        yield {
            "id": f"row {step}",
            "documents": [document.id for document in rows.documents(step)],
            "targets": int(batch["loss_weights"].sum()),
            "text": tokenizer.decode(tokens, skip_control=False),
        }


def open_run(folder: str | Path) -> PackedRows:
    """Open the rows that a pretraining run reads, by its configuration.

    Raises:
      DataError: if the run reads no packed rows.
      ConfigError: if its configuration cannot be read.
    """
    config = load_config(Path(folder) / "config.yaml", kind="train")
    if not isinstance(config.objective, PackedRowsConfig):
        raise DataError(f"{folder}: is a run of objective.kind={config.objective.kind}, which reads no packed rows")
    return open_mixture(
        [(source.path, source.weight) for source in config.objective.sources],
        seed=config.seed,
        batch_size=config.batch_size,
        expected_row_length=config.row_length,
    )


def describe_item(item: dict) -> str:
    """One document, row or rejected record in a few lines."""
    facts = {key: value for key, value in item.items() if key not in ("id", "text")}
    title = ", ".join(
        f"{key}: {', '.join(value) if isinstance(value, list) else value}" for key, value in facts.items()
    )
    text = item["text"]
    more = f" … ({len(text):,} characters)" if len(text) > _SHOWN_CHARACTERS else ""
    return f"== {item['id']} ({title})\n{text[:_SHOWN_CHARACTERS]}{more}\n"
