"""The first stage of a build: sources to clean, deduplicated documents, split into train and valid.

Cleaning and MinHash signatures run in worker processes, a batch at a time; deduplication, which needs all documents,
runs here in source order, so the result does not depend on the number of workers.
"""

import json
import platform
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import xxhash

from maxlm.config import DataConfig
from maxlm.data.clean import find_abnormal, normalize
from maxlm.data.datasets import local_data_files
from maxlm.data.decontaminate import count_overlaps, evaluation_ngrams
from maxlm.data.deduplicate import NearDuplicates, make_signatures
from maxlm.data.documents import Document, Record, Reject
from maxlm.data.embedded import URI as EMBEDDED
from maxlm.data.files import FoundSource, find_sources
from maxlm.data.parallel import map_in_order
from maxlm.data.shingles import hash_words
from maxlm.data.sources import read_sources
from maxlm.errors import DataError
from maxlm.runtime.manifest import FILE_NAME, content_hash, read_manifest, write_manifest
from maxlm.runtime.progress import console, track

SPLITS = ("train", "valid")
REJECTS_FILE = "rejects.jsonl"

_SCHEMA = pyarrow.schema([(name, pyarrow.string()) for name in ("id", "source", "licence", "text")])
_BATCH_CHARACTERS = 1_000_000
_BATCH_DOCUMENTS = 1000


def build_documents(config: DataConfig) -> dict:
    """Write `documents/{train,valid}.parquet` and `rejects.jsonl` into the build's folder.

    Existing documents of the same sources and settings are reused.

    Returns:
      The manifest of the folder `documents`. Its metrics count every record: `records_in` is the number of documents
      kept plus the sum of `rejected`.

    Raises:
      DataError: if a source cannot be used, or a split has no documents.
    """
    folder = Path(config.output) / "documents"
    sources = find_sources(config.sources, output=Path(config.output))
    inputs = {str(file.path): file.path for source in sources for file in source.files}
    inputs |= {str(path): path for source in config.sources for path in local_data_files(source.uri)}
    inputs |= {path: Path(path) for path in config.decontaminate.files if Path(path).is_file()}
    settings = _settings(config)
    if (folder / FILE_NAME).is_file():
        manifest = read_manifest(folder)
        hashes = {name: item["hash"] for name, item in manifest["inputs"].items()}
        if manifest["config"] == settings and hashes == {name: content_hash(path) for name, path in inputs.items()}:
            console.out(f"{folder}: is up to date")
            return manifest

    ngrams = evaluation_ngrams(config.decontaminate.files, config.decontaminate.ngram_words)

    # From here on, outputs built from the old documents are incomplete.
    (folder.parent / FILE_NAME).unlink(missing_ok=True)
    (folder / FILE_NAME).unlink(missing_ok=True)
    temporary = folder.with_name("documents.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    start = time.perf_counter()
    metrics = _write_documents(config, sources, ngrams, temporary)
    seconds = time.perf_counter() - start
    metrics |= {
        "seconds": round(seconds, 2),
        "records_per_second": round(metrics["records_in"] / seconds),
        "characters_per_second": round(sum(split["characters"] for split in metrics["splits"].values()) / seconds),
    }
    manifest = write_manifest(temporary, stage="data/documents", inputs=inputs, config=settings, metrics=metrics)
    (temporary / REJECTS_FILE).replace(folder.parent / REJECTS_FILE)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return manifest


def _settings(config: DataConfig) -> dict:
    """All that the documents depend on, except for input files."""
    settings = config.model_dump(mode="json", exclude={"kind", "output", "tokenizer", "row_length", "workers"})
    if any(source.uri == EMBEDDED for source in config.sources):
        settings["python"] = platform.python_version()
    return settings


def _write_documents(config: DataConfig, sources: list[FoundSource], ngrams: np.ndarray, folder: Path) -> dict:
    counts: dict[str, Counter] = {split: Counter(documents=0, characters=0, bytes=0) for split in SPLITS}
    by_source: dict[str, Counter] = defaultdict(Counter)
    rejected: Counter[str] = Counter()
    num_records = 0
    pending: dict[str, list[Document]] = {split: [] for split in SPLITS}
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(parquet.ParquetWriter(folder / f"{split}.parquet", _SCHEMA, compression="zstd"))
            for split in SPLITS
        }
        rejects = stack.enter_context((folder / REJECTS_FILE).open("w", encoding="utf-8"))

        def flush(split: str) -> None:
            columns = {name: [getattr(d, name) for d in pending[split]] for name in _SCHEMA.names}
            writers[split].write_table(pyarrow.table(columns, schema=_SCHEMA))
            for text in columns["text"]:
                counts[split].update(documents=1, characters=len(text), bytes=len(text.encode()))
            pending[split].clear()

        for record in track(_select_documents(config, sources, ngrams), "documents"):
            num_records += 1
            if isinstance(record, Reject):
                rejected[record.reason] += 1
                by_source[record.source]["rejected"] += 1
                rejects.write(json.dumps(asdict(record), ensure_ascii=False) + "\n")
                continue
            split = "valid" if _split_number(record.id, config) < config.valid_fraction else "train"
            by_source[record.source]["documents"] += 1
            pending[split].append(record)
            if len(pending[split]) == _BATCH_DOCUMENTS:
                flush(split)
        if not counts["train"]["documents"] and not pending["valid"] and config.valid_fraction > 0:
            _hold_one_out(pending, config)
        for split in SPLITS:
            flush(split)

    _check_splits(counts, config)
    num_kept = sum(split["documents"] for split in counts.values())
    if num_records != num_kept + sum(rejected.values()):
        raise AssertionError(f"{num_records} records in, {num_kept} kept and {rejected.total()} rejected")
    return {
        "records_in": num_records,
        "documents": num_kept,
        "rejected": dict(sorted(rejected.items())),
        "splits": {split: dict(counts[split]) for split in SPLITS},
        "sources": {uri: dict(counter) for uri, counter in by_source.items()},
    }


def _select_documents(config: DataConfig, sources: list[FoundSource], ngrams: np.ndarray) -> Iterator[Record]:
    """Every record of the sources, in order: a clean document, or a reject with the first reason that applies."""
    records = _batches(read_sources(sources))
    prepared = map_in_order(partial(_Preparer, config, ngrams), records, workers=config.workers)
    near = config.deduplicate.near_threshold
    kept_hashes: dict[bytes, str] = {}
    near_duplicates = NearDuplicates(threshold=near or 1.0, num_permutations=config.deduplicate.num_permutations)
    kept_ids: list[str] = []
    for batch in prepared:
        for item in batch:
            record = item.record
            if isinstance(record, Document):
                original = kept_hashes.get(item.text_hash)
                if original is not None:
                    record = _reject(record, "exact_duplicate", f"the same text as {original}")
                elif item.signature is not None and (found := near_duplicates.add(item.signature)):
                    number, similarity = found
                    detail = f"about {similarity:.0%} of its word n-grams are shared with {kept_ids[number]}"
                    record = _reject(record, "near_duplicate", detail)
                else:
                    kept_hashes[item.text_hash] = record.id
                    if item.signature is not None:
                        kept_ids.append(record.id)
            yield record


def _split_number(document_id: str, config: DataConfig) -> float:
    """A pure function of id and seed, uniform over 0 to 1. Documents below `valid_fraction` are held out."""
    return xxhash.xxh3_64_intdigest(f"{config.seed}/{document_id}".encode()) / 2**64


def _hold_one_out(pending: dict[str, list[Document]], config: DataConfig) -> None:
    """Hold out the document with the lowest number, if among few documents none is below the fraction."""
    if len(pending["train"]) > 1:
        lowest = min(pending["train"], key=lambda document: _split_number(document.id, config))
        pending["train"].remove(lowest)
        pending["valid"].append(lowest)


@dataclass(frozen=True)
class _Prepared:
    """A record after cleaning; a document's hash, and its MinHash signature if near-duplicates are removed."""

    record: Record
    text_hash: bytes = b""
    signature: np.ndarray | None = None


class _Preparer:
    """Cleans a batch and computes signatures, in a worker process."""

    def __init__(self, config: DataConfig, ngrams: np.ndarray):
        self._config = config
        self._ngrams = ngrams

    def __call__(self, batch: list[Record]) -> list[_Prepared]:
        results: list[_Prepared] = []
        words: list[np.ndarray] = []
        compared: list[int] = []
        for record in batch:
            if isinstance(record, Document):
                record, words_of_record = self._clean(record)
            if isinstance(record, Reject):
                results.append(_Prepared(record))
                continue
            if len(words_of_record) and self._config.deduplicate.near_threshold is not None:
                words.append(words_of_record)
                compared.append(len(results))
            results.append(_Prepared(record, xxhash.xxh3_128_digest(record.text.encode())))
        settings = self._config.deduplicate
        signatures = make_signatures(
            words, shingle_words=settings.shingle_words, num_permutations=settings.num_permutations
        )
        for index, signature in zip(compared, signatures):
            results[index] = replace(results[index], signature=signature)
        return results

    def _clean(self, document: Document) -> tuple[Record, np.ndarray | None]:
        text = normalize(document.text, self._config.clean.unicode_form)
        if problem := find_abnormal(text, self._config.clean):
            return _reject(document, *problem), None
        words = hash_words(text)
        size = self._config.decontaminate.ngram_words
        if overlaps := count_overlaps(words, self._ngrams, size):
            return _reject(document, "contaminated", f"{overlaps} {size}-grams of words are in an evaluation set"), None
        return replace(document, text=text), words


def _reject(document: Document, reason: str, detail: str) -> Reject:
    return Reject(document.id, document.source, reason, detail, document.text)


def _batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    batch: list[Record] = []
    size = 0
    for record in records:
        batch.append(record)
        size += len(record.text)
        if size >= _BATCH_CHARACTERS or len(batch) == _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _check_splits(counts: dict[str, Counter], config: DataConfig) -> None:
    total = sum(counter["documents"] for counter in counts.values())
    if total == 0:
        raise DataError("no document is left: all were rejected; loosen clean, or check the sources")
    for split, wanted in (("train", config.valid_fraction < 1), ("valid", config.valid_fraction > 0)):
        if wanted and counts[split]["documents"] == 0:
            raise DataError(
                f"none of the {total} documents fell into the {split} split (valid_fraction is"
                f" {config.valid_fraction}); split the text into more documents with split_on_blank_lines or"
                " document_per_line, or change valid_fraction or seed"
            )
