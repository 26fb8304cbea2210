"""Sources to documents: the embedded corpus, files and globs of them, TFDS and Hugging Face data sets.

A broken record is yielded as a `Reject` and the run goes on; a source of which nothing can be read is an error.
"""

import difflib
import glob
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

from maxlm.config.data import SourceConfig
from maxlm.data.datasets import read_hf, read_tfds
from maxlm.data.documents import Document, Record, Reject
from maxlm.data.embedded import URI as EMBEDDED
from maxlm.data.embedded import read_embedded
from maxlm.data.lines import BrokenFile, read_lines
from maxlm.errors import DataError

_FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_COMPRESSIONS = (".gz", ".zst")


def read_source(source: SourceConfig) -> Iterator[Record]:
    """Every record of a source, in a fixed order.

    Raises:
      DataError: if the source is missing, empty, of a format that is not read, or if all of its records are broken.
    """
    num_documents = 0
    first_reject: Reject | None = None
    for record in _records(source):
        if isinstance(record, Document):
            num_documents += 1
        else:
            first_reject = first_reject or record
        yield record
        if num_documents == source.limit:
            return
    if num_documents == 0:
        if first_reject is None:
            raise DataError(f"source {source.uri}: holds no documents")
        raise DataError(
            f"source {source.uri}: no record of it can be used; the first, {first_reject.id}: {first_reject.detail}"
        )


def local_files(source: SourceConfig) -> list[Path]:
    """The files of this machine that a source reads; empty for data sets and the embedded corpus.

    Raises:
      DataError: if none is there, or one has a format that is not read; with the nearest name that is there.
    """
    if source.uri == EMBEDDED or source.uri.startswith(("tfds:", "hf:")):
        return []
    paths = sorted(Path(name) for name in glob.glob(source.uri, recursive=True) if Path(name).is_file())
    if Path(source.uri).is_file():
        paths = [Path(source.uri)]
    if not paths:
        raise DataError(f"source {source.uri}: {_nothing_there(source.uri)}")
    for path in paths:
        _format(path)
    return paths


def _records(source: SourceConfig) -> Iterator[Record]:
    if source.uri == EMBEDDED:
        yield from read_embedded()
    elif source.uri.startswith("tfds:"):
        yield from _from_rows(read_tfds(source.uri), source, name=source.uri)
    elif source.uri.startswith("hf:"):
        yield from _from_rows(read_hf(source.uri), source, name=source.uri)
    else:
        for path in local_files(source):
            yield from _FILE_READERS[_format(path)](path, source)


def _nothing_there(uri: str) -> str:
    if uri.startswith("python:"):
        return f"the embedded corpus is {EMBEDDED}"
    path = Path(uri)
    neighbours = [str(p) for p in path.parent.glob("*")] if path.parent.is_dir() else []
    if path.is_dir():
        return f"is a folder; give the files in it, as {uri.rstrip('/')}/*.jsonl"
    near = difflib.get_close_matches(uri, neighbours, 1)
    return "there is no such file" + (f"; did you mean {near[0]}?" if near else "")


def _format(path: Path) -> str:
    name = path.with_suffix("") if path.suffix in _COMPRESSIONS else path
    if name.suffix not in _FORMATS:
        raise DataError(
            f"source {path}: its format is not known; it must end in {', '.join(_FORMATS)}, or that and .gz or .zst"
        )
    return _FORMATS[name.suffix]


# Files


def _read_text(path: Path, source: SourceConfig) -> Iterator[Record]:
    """One document for the file, or for each line, or for about `split_on_blank_lines` characters."""
    is_cut = source.document_per_line or source.split_on_blank_lines is not None
    lines: list[str] = []
    size, first_line, problem = 0, 1, ""

    def take() -> Iterator[Record]:
        name = f"{path.name}:{first_line}" if is_cut else path.name
        text = "".join(lines)
        if problem:
            yield Reject(name, source.uri, "broken_text", f"{path}: {problem}", text)
        elif text.strip() or not is_cut:
            yield Document(name, source.uri, source.licence, text)

    number = 0
    try:
        for number, raw in read_lines(path):
            try:
                line = raw.decode()
            except UnicodeDecodeError:
                line = raw.decode(errors="replace")
                problem = problem or f"line {number} is not valid UTF-8"
            lines.append(line)
            size += len(line)
            is_full = source.split_on_blank_lines is not None and (problem or size >= source.split_on_blank_lines)
            if source.document_per_line or (is_full and not line.strip()):
                yield from take()
                lines, size, first_line, problem = [], 0, number + 1, ""
    except BrokenFile as error:
        lines.append(_shown(error.rest))
        problem = str(error)
    if number == 0 and not problem:
        yield Reject(path.name, source.uri, "empty_file", f"{path} is empty", "")
    elif lines or not is_cut:
        yield from take()


def _read_json(path: Path, source: SourceConfig) -> Iterator[Record]:
    """A JSON list of objects, or one object a line."""
    lines = read_lines(path)
    number = 0
    try:
        for number, raw in lines:
            if number == 1 and raw.lstrip().startswith(b"["):
                yield from _read_json_list(path, raw + b"".join(line for _, line in lines), source)
                return
            if not raw.strip():
                continue
            place = f"{path.name}:{number}"
            try:
                row = json.loads(raw.decode().rstrip())
            except UnicodeDecodeError:
                yield Reject(place, source.uri, "broken_text", f"{path}:{number}: is not valid UTF-8", _shown(raw))
            except (ValueError, RecursionError) as error:
                yield Reject(place, source.uri, "no_json", f"{path}:{number}: is no JSON: {error}", _shown(raw))
            else:
                yield _from_row(row, source, place=place, where=f"{path}:{number}")
    except BrokenFile as error:
        place = f"{path.name}:{number + 1}"
        yield Reject(place, source.uri, "broken_text", f"{path}:{number + 1}: {error}", _shown(error.rest))
        return
    if number == 0:
        yield Reject(path.name, source.uri, "empty_file", f"{path} is empty", "")


def _read_json_list(path: Path, content: bytes, source: SourceConfig) -> Iterator[Record]:
    try:
        rows = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        yield Reject(path.name, source.uri, "no_json", f"{path}: is no JSON list: {error}", _shown(content))
        return
    for position, row in enumerate(rows):
        yield _from_row(row, source, place=f"{path.name}:{position}", where=f"{path}, item {position}")


def _read_parquet(path: Path, source: SourceConfig) -> Iterator[Record]:
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        yield Reject(path.name, source.uri, "broken_file", f"{path}: is no Parquet file: {error}", "")
        return
    columns = [name for name in (source.text_field, source.id_field) if name is not None]
    for name in columns:
        if name not in file.schema_arrow.names:
            near = difflib.get_close_matches(name, file.schema_arrow.names, 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(file.schema_arrow.names)}"
            raise DataError(f"source {path}: has no column {name!r}; {hint}")
    position = 0
    batches = file.iter_batches(columns=columns, batch_size=1024)
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            yield Reject(f"{path.name}:{position}", source.uri, "broken_file", f"{path}, row {position}: {error}", "")
            return
        if batch is None:
            return
        for index in range(batch.num_rows):
            place, where = f"{path.name}:{position}", f"{path}, row {position}"
            try:
                row = {name: batch.column(name)[index].as_py() for name in columns}
            except UnicodeDecodeError:
                raw = batch.column(source.text_field)[index].cast(pyarrow.binary()).as_py()
                yield Reject(place, source.uri, "broken_text", f"{where}: is not valid UTF-8", _shown(raw))
            else:
                yield _from_row(row, source, place=place, where=where)
            position += 1


_FILE_READERS = {"text": _read_text, "json": _read_json, "parquet": _read_parquet}


# Rows


def _from_rows(rows: Iterable[dict], source: SourceConfig, *, name: str) -> Iterator[Record]:
    for position, row in enumerate(rows):
        yield _from_row(row, source, place=f"{name}:{position}", where=f"{name}, example {position}")


def _from_row(row: object, source: SourceConfig, *, place: str, where: str) -> Record:
    """A document of a mapping with a text field; `place` is its id where it has none of its own."""

    def reject(reason: str, detail: str) -> Reject:
        text = json.dumps(row, ensure_ascii=False, default=str)
        return Reject(place, source.uri, reason, f"{where}: {_shown(detail)}", _shown(text))

    if not isinstance(row, dict):
        return reject("no_text", "is no object with fields")
    values = {}
    for field in (source.text_field, source.id_field):
        value = row.get(field)
        if isinstance(value, bytes):
            try:
                value = value.decode()
            except UnicodeDecodeError:
                return reject("broken_text", f"field {field!r} is not valid UTF-8")
        values[field] = value
    text = values[source.text_field]
    if not isinstance(text, str):
        near = difflib.get_close_matches(source.text_field, [key for key in row if isinstance(row[key], str)], 1)
        hint = f"; did you mean text_field: {near[0]}?" if near else ""
        return reject("no_text", f"field {source.text_field!r} holds no text{hint}")
    given_id = values[source.id_field] if source.id_field else None
    document = Document(place if given_id is None else str(given_id), source.uri, source.licence, text)
    if _shown(document.id + document.text) != document.id + document.text:
        return reject("broken_text", "holds half of a surrogate pair")
    return document


def _shown(raw: bytes | str) -> str:
    """What can be shown of a broken record."""
    if isinstance(raw, str):
        return raw.encode(errors="replace").decode()
    return raw.decode(errors="replace")
