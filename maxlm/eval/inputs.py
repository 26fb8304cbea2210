"""Documents to evaluate on: a split of a data folder, or files."""

import os
from pathlib import Path

import numpy as np

from maxlm.config.data import SourceConfig
from maxlm.data.documents import Document
from maxlm.data.held_out import distinct_ends
from maxlm.data.sample import even_sample
from maxlm.data.sources import read_source
from maxlm.errors import DataError
from maxlm.runtime.manifest import manifest_chain
from maxlm.runtime.written import table_batches

# Training text for the baselines: xz takes about a second per megabyte.
MAX_TRAIN_BYTES = 64 << 20


def find_data_folders(model_path: str | Path) -> list[Path]:
    """The data folders that a model was trained on, from its manifests; only those that still exist.

    A checkpoint is two folders below its run, which has the manifest.
    """
    path = Path(model_path).resolve()
    chain = manifest_chain(path) or manifest_chain(path.parent.parent)
    return [Path(os.path.relpath(item["folder"])) for item in chain if item["stage"] == "data"]


def read_held_out_texts(path: str | Path, *, limit: int | None = None) -> list[str]:
    """The texts of `read_held_out_by_source`."""
    return read_held_out_by_source(path, limit=limit)[0]


def read_held_out_by_source(path: str | Path, *, limit: int | None = None) -> tuple[list[str], list[str]]:
    """Texts of the held-out split of a folder of `maxlm data build`, or of a .txt, .md, .json(l) or .parquet file.

    Args:
      path: the folder or the file.
      limit: at most this many documents, spread evenly over the sources and the documents of each.

    Returns:
      (texts, the source of each: a short name).

    Raises:
      DataError: `path` does not exist or has no documents.
    """
    path = Path(path)
    documents = _split(path, "valid") if path.is_dir() else _file_documents(path)
    texts, sources = documents["text"], documents["source"]
    if not any(texts):
        raise DataError(f"{path}: has no held-out text; build the data with a larger valid_fraction")
    short = distinct_ends(list(dict.fromkeys(sources)))
    if limit is not None and limit < len(texts):
        groups = [np.flatnonzero(np.array(sources) == source) for source in sorted(short)]
        taken = even_sample(groups, limit)
        texts, sources = [texts[index] for index in taken], [sources[index] for index in taken]
    return texts, [short[source] for source in sources]


def read_training(folder: str | Path, *, max_bytes: int = MAX_TRAIN_BYTES) -> list[str]:
    """Texts of the training split of a data folder, subsampled evenly to about `max_bytes`."""
    texts = _split(Path(folder), "train")["text"]
    total = sum(map(len, texts))
    return texts[:: max(1, -(-total // max_bytes))]


def _split(folder: Path, split: str) -> dict[str, list[str]]:
    for documents in (folder / "documents", folder):
        file = documents / f"{split}.parquet"
        if file.is_file():
            batches = list(table_batches(file, columns=["text", "source"]))
            return {
                name: [value for batch in batches for value in batch.column(name).to_pylist()]
                for name in ("text", "source")
            }
    raise DataError(f"{folder}: is not a folder of `maxlm data build`: it has no documents/{split}.parquet")


def _file_documents(path: Path) -> dict[str, list[str]]:
    texts = [record.text for record in read_source(SourceConfig(uri=str(path))) if isinstance(record, Document)]
    return {"text": texts, "source": [str(path)] * len(texts)}
