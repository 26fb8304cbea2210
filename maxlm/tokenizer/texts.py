"""Texts that tokenizers are trained on: the documents of `maxlm data build`, or a text file."""

from collections.abc import Iterator
from pathlib import Path

import xxhash

from maxlm.errors import DataError
from maxlm.runtime.manifest import read_manifest
from maxlm.runtime.written import table_batches

_CHUNK_CHARACTERS = 10_000
_NOT_PLAIN_TEXT = (".jsonl", ".json", ".parquet", ".gz", ".zst", ".xz", ".bz2", ".zip")


def find_documents(given: str) -> Path:
    """The documents stage of a data folder, or a text file.

    Raises:
      DataError: it is neither.
    """
    path = Path(given)
    if path.is_file() and path.suffix.lower() in _NOT_PLAIN_TEXT:
        raise DataError(
            f"{given}: is not plain text, so a tokenizer would learn its markup; convert it to documents with"
            " `maxlm data build CONFIG --stop-after documents`, and give the folder of that build"
        )
    if path.is_file():
        return path
    if path.is_dir():
        read_manifest(path / "documents")
        return path / "documents"
    raise DataError(
        f"{given}: there is no such file or folder; create one with `maxlm data build CONFIG --stop-after documents`"
    )


def draw_texts(path: Path, max_characters: int, seed: int) -> list[str]:
    """About `max_characters` of what `find_documents` found, sampled evenly; a file is read in pieces.

    Raises:
      DataError: there is no text, or it is not UTF-8.
    """
    share = max_characters / max(1, _num_characters(path))
    texts = [text for number, text in enumerate(_read_texts(path)) if _is_drawn(number, share, seed)]
    if not texts:
        raise DataError(f"{path}: has no text to train a tokenizer on")
    return texts


def _read_texts(path: Path) -> Iterator[str]:
    if path.is_dir():
        for batch in table_batches(path / "train.parquet", columns=["text"]):
            yield from batch.column("text").to_pylist()
        return
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: is not UTF-8 text (byte {error.start + 1})") from None
    for start in range(0, len(text), _CHUNK_CHARACTERS):
        yield text[start : start + _CHUNK_CHARACTERS]


def _num_characters(path: Path) -> int:
    if path.is_dir():
        return read_manifest(path)["metrics"]["splits"]["train"]["characters"]
    return path.stat().st_size


def _is_drawn(number: int, share: float, seed: int) -> bool:
    """Even sampling: a hash of a text's index decides whether it is drawn."""
    return xxhash.xxh3_64_intdigest(f"{seed}/{number}".encode()) < share * 2**64
