"""`manifest.json`: a stage's inputs, resolved configuration, versions and metrics.

The manifests of a pipeline form a chain: each names its input folders' manifests by content hash.
"""

import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import xxhash
from etils import epath

from maxlm.errors import DataError
from maxlm.runtime.storage import absolute_path, files_in, relative_path, resolve_path, storage_path
from maxlm.runtime.streams import ESCAPE
from maxlm.runtime.written import parse_written

FILE_NAME = "manifest.json"


def write_manifest(
    folder: str | Path,
    *,
    stage: str,
    inputs: Mapping[str, str | Path],
    config: dict,
    metrics: dict,
    hashes: Mapping[str, str] | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict:
    """Write `folder/manifest.json` atomically and return it.

    Args:
      folder: the stage's output.
      stage: the stage that ran: "data", "tokenizer", "train/pretrain", "export/int8", ...
      inputs: name -> file or folder that was read. A folder that has a manifest is hashed by it.
      config: the resolved configuration.
      metrics: measured values; numbers, strings, lists, dicts.
      hashes: of inputs at the time they were read, if known.
      more: further entries, such as the `changes` of a run.
    """
    manifest = {
        "stage": stage,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "inputs": {
            name: {"path": relative_path(path, folder), "hash": (hashes or {}).get(name) or content_hash(path)}
            for name, path in inputs.items()
        },
        "config": config,
        "versions": _versions(),
        "metrics": metrics,
        **(more or {}),
    }
    write_json(storage_path(folder) / FILE_NAME, manifest)
    return manifest


def read_manifest(folder: str | Path) -> dict:
    """The manifest of a stage's folder.

    Raises:
      DataError: there is none, because the stage has not run or not finished, or it is corrupt.
    """
    path = storage_path(folder) / FILE_NAME
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"{folder}: has no {FILE_NAME}; the stage that writes it has not finished") from None
    manifest = parse_written(content, path)
    if not _is_manifest(manifest):
        raise DataError(f"{path}: is not a maxlm manifest, or was edited; run its stage again")
    return manifest


def _is_manifest(value: Any) -> bool:
    sections = {"stage": str, "inputs": dict, "config": dict, "metrics": dict}
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(name), kind) for name, kind in sections.items())
        and all(
            isinstance(item, dict) and isinstance(item.get("path"), str) and isinstance(item.get("hash"), str)
            for item in value["inputs"].values()
        )
    )


def manifest_chain(folder: str | Path) -> list[dict]:
    """All manifests that `folder` depends on, the first stage first, each with its `folder` and `hash`."""
    chain: dict[epath.Path, dict] = {}

    def visit(path: epath.Path) -> None:
        # An output file is in its stage's folder.
        path = path.parent if path.is_file() else path
        if path in chain or not (path / FILE_NAME).is_file():
            return
        manifest = read_manifest(path)
        for item in manifest["inputs"].values():
            visit(absolute_path(resolve_path(item["path"], path)))
        chain[path] = {"folder": str(path), "hash": content_hash(path), **manifest}

    visit(absolute_path(folder))
    return list(chain.values())


def content_hash(path: str | Path) -> str:
    """xxh3-128 of a file, of a folder's manifest, or of all files in a folder without a manifest."""
    path = storage_path(path)
    if path.is_dir():
        manifest = path / FILE_NAME
        files = [manifest] if manifest.is_file() else sorted(files_in(path))
    elif path.is_file():
        files = [path]
    else:
        raise DataError(f"{path}: there is no such file or folder")
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(str(file.relative_to(path)).encode() if len(files) > 1 else b"")
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON by atomic rename: a reader sees the old file or the complete new one."""
    path = storage_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    # File names may contain bytes that are not UTF-8; escaping them round-trips.
    temporary.write_bytes((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8", ESCAPE))
    temporary.replace(path)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("maxlm", "jax", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers", "numpy"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions
