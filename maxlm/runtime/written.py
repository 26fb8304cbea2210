"""Read files that a stage wrote; truncated or edited ones are reported as such."""

import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
from etils import epath

from maxlm.errors import DataError
from maxlm.runtime.storage import read_lines


class _Written(dict):
    """A JSON object of such a file; a missing key means a bad file, not a bug in the reading code."""

    where = ""

    def __missing__(self, key: str) -> Any:
        raise DataError(
            f"{self.where}: lacks {key!r}, so it was edited or is from another version; run its stage again"
        )


def parse_written(content: bytes | str, where: str | os.PathLike) -> Any:
    """Parse JSON that maxlm wrote; `where` names it in messages.

    Raises:
      DataError: it is not valid JSON; or later, when a missing key is accessed.
    """

    def section(pairs: list[tuple[str, Any]]) -> _Written:
        found = _Written(pairs)
        found.where = str(where)
        return found

    try:
        return json.loads(content, object_pairs_hook=section)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: is not valid JSON ({error.msg}, line {error.lineno}); run its stage again") from None
    except (ValueError, RecursionError):
        raise DataError(f"{where}: is not valid JSON; run its stage again") from None


def read_written_lines(path: epath.Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, without a truncated last line.

    Raises:
      DataError: naming the first line that is not an object.
    """
    try:
        lines = read_lines(path)
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text, so it was edited; remove it") from None
    found = [parse_written(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    if wrong := next((number for number, item in enumerate(found, start=1) if not isinstance(item, dict)), None):
        raise DataError(f"{path}:{wrong}: is not a JSON object, so it was edited; remove the line")
    return found


def table_batches(
    path: str | os.PathLike, *, columns: Sequence[str] | None = None, batch_size: int = 1024
) -> Iterator[pyarrow.RecordBatch]:
    """The batches of a Parquet file that maxlm wrote.

    Raises:
      DataError: it does not exist, is corrupt, or lacks a column.
    """
    try:
        with parquet.ParquetFile(path) as file:
            missing = [name for name in columns or () if name not in file.schema_arrow.names]
            if missing:
                raise DataError(f"{path}: has no column {missing[0]!r}; rerun the stage that writes it")
            yield from file.iter_batches(columns=columns and list(columns), batch_size=batch_size)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; rerun the stage that writes it") from None
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({reason}); rerun the stage that writes it") from None
