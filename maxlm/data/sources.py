"""Read documents from sources: the embedded corpus, files and globs, TFDS and Hugging Face datasets.

A malformed record is yielded as a `Reject` and reading continues; a source without any readable record is an error.
"""

import difflib
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
from maxlm.data.files import FoundSource, SourceFile, find_sources
from maxlm.data.json_values import Broken, lookup, read_values, shown
from maxlm.data.lines import BrokenFile, read_text_lines
from maxlm.errors import DataError


def read_source(source: SourceConfig) -> Iterator[Record]:
    """`read_sources` for a single source."""
    yield from read_sources(find_sources([source]))


def read_sources(sources: Iterable[FoundSource]) -> Iterator[Record]:
    """Every record of each source, in a fixed order.

    Raises:
      DataError: if a source is missing, empty, of an unknown format, or if all its records are malformed.
    """
    for source in sources:
        yield from _checked(_records(source), source.config)


def _checked(records: Iterator[Record], source: SourceConfig) -> Iterator[Record]:
    num_documents = 0
    first_reject: Reject | None = None
    for record in records:
        if isinstance(record, Document):
            num_documents += 1
        else:
            first_reject = first_reject or record
        yield record
        if num_documents == source.limit:
            return
    if num_documents == 0:
        if first_reject is None:
            raise DataError(f"source {source.uri}: has no documents")
        raise DataError(
            f"source {source.uri}: no record of it can be used; the first, {first_reject.id}: {first_reject.detail}"
        )


def _records(source: FoundSource) -> Iterator[Record]:
    uri = source.config.uri
    if uri == EMBEDDED:
        yield from read_embedded()
    elif uri.startswith("tfds:"):
        yield from _from_rows(read_tfds(uri), source)
    elif uri.startswith("hf:"):
        yield from _from_rows(read_hf(uri), source)
    else:
        for file in source.files:
            yield from _FILE_READERS[file.format](file, source.config)


# Files


def _read_text(file: SourceFile, source: SourceConfig) -> Iterator[Record]:
    """One document for the file, for each line, or for about `split_on_blank_lines` characters."""
    is_split = source.document_per_line or source.split_on_blank_lines is not None
    lines: list[str] = []
    size, first_line, problem = 0, 1, ""

    def take() -> Iterator[Record]:
        name = f"{file.name}:{first_line}" if is_split else file.name
        text = "".join(lines)
        if problem:
            yield Reject(name, source.uri, "broken_text", f"{file.path}: {problem}", text)
        elif text.strip() or not is_split:
            yield Document(name, source.uri, source.licence, text)

    number = 0
    try:
        for number, raw in read_text_lines(file.path):
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
        lines.append(shown(error.rest))
        problem = str(error)
    if number == 0 and not problem:
        yield Reject(file.name, source.uri, "empty_file", f"{file.path}: is empty", "")
    elif lines or not is_split:
        yield from take()


def _read_json(file: SourceFile, source: SourceConfig) -> Iterator[Record]:
    """A JSON list of objects, or objects one after another."""
    for item in read_values(file.path):
        place = f"{file.name}:{item.place}" if item.place else file.name
        if isinstance(item, Broken):
            yield Reject(place, source.uri, item.reason, f"{item.where}: {item.detail}", item.text)
        else:
            yield _from_row(item.value, source, place=place, where=item.where)


def _read_parquet(file: SourceFile, source: SourceConfig) -> Iterator[Record]:
    """Read the columns of a Parquet file that hold text and id; the others are not read."""
    path = file.path
    try:
        # Opened here, because Arrow rejects file names that are not UTF-8.
        table = parquet.ParquetFile(path.open("rb"))
        fields = [field for field in (source.text_field, source.id_field) if field is not None]
        columns = sorted({_column(field, table.schema_arrow.names, path) for field in fields})
        batches = table.iter_batches(columns=columns, batch_size=1024)
    except (pyarrow.ArrowException, OSError) as error:
        yield Reject(file.name, source.uri, "broken_file", f"{path}: is not a Parquet file: {_first_line(error)}", "")
        return
    position = 0
    while True:
        try:
            batch = next(batches, None)
        except (pyarrow.ArrowException, OSError) as error:
            detail = f"{path}, row {position}: {_first_line(error)}"
            yield Reject(f"{file.name}:{position}", source.uri, "broken_file", detail, "")
            return
        if batch is None:
            return
        for index in range(batch.num_rows):
            place, where = f"{file.name}:{position}", f"{path}, row {position}"
            try:
                row = {name: batch.column(name)[index].as_py() for name in columns}
            except UnicodeDecodeError as error:
                detail = f"{where}: is not valid UTF-8"
                yield Reject(place, source.uri, "broken_text", detail, shown(error.object))
            # Some times and decimals are out of Python's range.
            except (ValueError, OverflowError, pyarrow.ArrowException) as error:
                detail = f"{where}: holds a value that cannot be read: {_first_line(error)}"
                yield Reject(place, source.uri, "broken_value", detail, "")
            else:
                yield _from_row(row, source, place=place, where=where)
            position += 1


def _column(field: str, names: list[str], path: Path) -> str:
    """The column of a field, which may be nested in the column."""
    column = field if field in names else field.partition(".")[0]
    if names.count(column) == 1:
        return column
    if column in names:
        raise DataError(f"source {path}: has {names.count(column)} columns named {column!r}; rename all but one")
    near = difflib.get_close_matches(field, names, 1)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(names)}"
    raise DataError(f"source {path}: has no column {field!r}; {hint}")


_FILE_READERS = {"text": _read_text, "json": _read_json, "parquet": _read_parquet}


# Rows


def _from_rows(rows: Iterable[dict], source: FoundSource) -> Iterator[Record]:
    for position, row in enumerate(rows):
        where = f"{source.config.uri}, example {position}"
        yield _from_row(row, source.config, place=f"{source.name}:{position}", where=where)


def _from_row(row: object, source: SourceConfig, *, place: str, where: str) -> Record:
    """Make a document of a mapping with a text field; `place` is its id if it has none."""

    def reject(reason: str, detail: str) -> Reject:
        text = json.dumps(row, ensure_ascii=False, default=str)
        return Reject(place, source.uri, reason, f"{where}: {shown(detail)}", shown(text))

    if not isinstance(row, dict):
        return reject("no_text", f"must be an object with the field {source.text_field!r}, but is not an object")
    values = {}
    for field in (source.text_field, source.id_field):
        value = lookup(row, field) if field else None
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
        return reject("no_text", f"field {source.text_field!r} is not a string{hint}")
    given_id = values[source.id_field] if source.id_field else None
    document = Document(place if given_id is None else str(given_id), source.uri, source.licence, text)
    if shown(document.id + document.text) != document.id + document.text:
        return reject("broken_text", "contains a lone surrogate")
    return document


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
