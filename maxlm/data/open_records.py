"""Open the packed rows of a split, and check the first and last one before a run relies on them."""

from pathlib import Path
from typing import Any

import grain
import pyarrow
import pyarrow.parquet as parquet

from maxlm.data.rows import decode_row
from maxlm.errors import DataError

_AGAIN = "run `maxlm data build` again"


def open_records(folder: Path, split: str, metrics: dict[str, Any]) -> grain.sources.ArrayRecordDataSource:
    """Open the records of a split of a data folder.

    Args:
      metrics: of the folder's manifest, with the expected numbers of rows, documents and token ids.

    Raises:
      DataError: a file of the split is missing, corrupt or of another build, judged by its numbers of rows and
        documents, and its first and last row.
    """
    packed, documents = folder / "packed" / f"{split}.array_record", folder / "documents" / f"{split}.parquet"
    counts = metrics["splits"][split]
    try:
        records = grain.sources.ArrayRecordDataSource(str(packed))
        num_rows = len(records)
        rows = [decode_row(records[index]) for index in (0, num_rows - 1)] if num_rows else []
    # The C++ reader raises errors of several types.
    except (OSError, RuntimeError, ValueError, IndexError, DataError) as error:
        raise DataError(f"{packed}: cannot be read: {_message(error)}; {_AGAIN}") from None
    if num_rows != counts["rows"]:
        raise DataError(f"{packed}: has {num_rows} rows, but its manifest says {counts['rows']}; {_AGAIN}")
    for place, row in zip(("first", "last"), rows):
        if (
            row.row_length != metrics["row_length"]
            or not 0 <= row.tokens.min() <= row.tokens.max() < metrics["vocab_size"]
        ):
            raise DataError(f"{packed}: its {place} row is of another build, or corrupt; {_AGAIN}")
    try:
        num_documents = parquet.read_metadata(documents).num_rows
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{documents}: cannot be read: {_message(error)}; {_AGAIN}") from None
    if num_documents != counts["documents"]:
        raise DataError(
            f"{documents}: has {num_documents} documents, but its manifest says {counts['documents']}; {_AGAIN}"
        )
    return records


def _message(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
