"""`maxlm data build`: sources to documents to packed rows."""

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from array_record.python.array_record_module import ArrayRecordWriter

from maxlm.config import DataConfig
from maxlm.data.parallel import map_in_order, num_cores
from maxlm.data.prepare import SPLITS, build_documents
from maxlm.data.rows import Packer, encode_row, token_bytes_for
from maxlm.errors import DataError
from maxlm.runtime.manifest import FILE_NAME, content_hash, read_manifest, write_manifest
from maxlm.runtime.output import check_output
from maxlm.runtime.progress import console, progress_bar
from maxlm.runtime.storage import locked, storage_path
from maxlm.runtime.written import table_batches
from maxlm.tokenizer.codec import Tokenizer

_BATCH_DOCUMENTS = 256
# One row per group: rows are read individually, in random order.
_WRITER_OPTIONS = "group_size:1"


def build_data(config: DataConfig, *, stop_after: Literal["documents"] | None = None) -> dict:
    """Build the folder `config.output`: documents, rejected records and packed rows.

    Existing outputs of the same inputs and settings are reused; if only the tokenizer changes, the documents are kept.
    The folder's manifest is written last: without it, the build is incomplete.

    Args:
      config: what to build.
      stop_after: "documents" stops before tokenization, so that a tokenizer can be trained on the documents.

    Returns:
      The manifest of the folder, or of its documents with `stop_after`.

    Raises:
      ConfigError: the folder cannot be written, or is another stage's.
      DataError: if a source cannot be used, a split is empty, or another process builds there.
      TokenizerError: if the tokenizer is missing.
    """
    check_output(config.output, "data")
    output = storage_path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output, seconds=0) as alone:
        if not alone:
            raise DataError(f"{output}: another process builds there; wait until it ends, or give another output")
        return _build(config, stop_after)


def _build(config: DataConfig, stop_after: Literal["documents"] | None) -> dict:
    if stop_after == "documents":
        return build_documents(config)
    tokenizer = Tokenizer.load(config.tokenizer)
    documents = build_documents(config)
    output = Path(config.output)
    resolved = config.model_dump(mode="json")
    if (output / FILE_NAME).is_file():
        manifest = read_manifest(output)
        if (
            manifest["config"] | {"workers": config.workers} == resolved
            and manifest["inputs"]["documents"]["hash"] == content_hash(output / "documents")
            and manifest["metrics"]["tokenizer_fingerprint"] == tokenizer.fingerprint
        ):
            console.out(f"{output}: is up to date")
            return manifest

    (output / FILE_NAME).unlink(missing_ok=True)
    temporary = output / "packed.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    start = time.perf_counter()
    packed = {split: _pack_split(config, tokenizer, split, documents, temporary) for split in SPLITS}
    seconds = time.perf_counter() - start
    shutil.rmtree(output / "packed", ignore_errors=True)
    temporary.rename(output / "packed")

    counted = documents["metrics"]
    splits = {split: counted["splits"][split] | packed[split] for split in SPLITS}
    num_tokens = sum(split["tokens"] for split in splits.values())
    return write_manifest(
        output,
        stage="data",
        inputs={"documents": output / "documents", "tokenizer": Path(config.tokenizer)},
        config=resolved,
        metrics={
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "row_length": config.row_length,
            "records_in": counted["records_in"],
            "documents": counted["documents"],
            "rejected": counted["rejected"],
            "splits": splits,
            "tokens": num_tokens,
            "characters_per_token": round(sum(s["characters"] for s in splits.values()) / num_tokens, 3),
            "seconds": {"documents": counted["seconds"], "tokens": round(seconds, 2)},
            "tokens_per_second": round(num_tokens / seconds),
        },
    )


def _pack_split(config: DataConfig, tokenizer: Tokenizer, split: str, documents: dict, folder: Path) -> dict[str, Any]:
    """Write the rows of one split; a split without documents has no file."""
    num_documents = documents["metrics"]["splits"][split]["documents"]
    if num_documents == 0:
        return {"tokens": 0, "rows": 0}
    token_bytes = token_bytes_for(tokenizer.vocab_size)
    packer = Packer(row_length=config.row_length, pad_id=tokenizer.pad_id)
    writer = ArrayRecordWriter(str(folder / f"{split}.array_record"), _WRITER_OPTIONS)
    texts = _text_batches(Path(config.output) / "documents" / f"{split}.parquet")
    encoded = map_in_order(partial(_Encoder, config.tokenizer, config.workers), texts, workers=config.workers)
    num_tokens = num_rows = 0
    digest = xxhash.xxh3_128()

    def write(row: bytes) -> None:
        writer.write(row)
        digest.update(row)

    with progress_bar(f"tokens ({split})", num_documents) as (progress, task):
        for tokens, lengths in encoded:
            num_tokens += len(tokens)
            for row in packer.add(tokens, lengths):
                write(encode_row(row, token_bytes=token_bytes))
                num_rows += 1
            progress.advance(task, len(lengths))
        for row in packer.finish():
            write(encode_row(row, token_bytes=token_bytes))
            num_rows += 1
    writer.close()
    return {"tokens": num_tokens, "rows": num_rows, "hash": digest.hexdigest()}


class _Encoder:
    """Tokenizes texts in a worker process. With a single process, SentencePiece's threads share the work."""

    def __init__(self, folder: str, workers: int):
        self._tokenizer = Tokenizer.load(folder)
        self._num_threads = num_cores() if workers == 0 else 1

    def __call__(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = self._tokenizer.encode_documents(texts, num_threads=self._num_threads)
        lengths = np.array([len(document) for document in ids], np.int64)
        flat = np.fromiter((id_ for document in ids for id_ in document), np.int32, int(lengths.sum()))
        return flat, lengths


def _text_batches(path: Path) -> Iterator[list[str]]:
    for batch in table_batches(path, columns=["text"], batch_size=_BATCH_DOCUMENTS):
        yield batch.column("text").to_pylist()
