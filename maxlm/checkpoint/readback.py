"""Verify a checkpoint just written: indexes, metadata and file sizes, without reading its arrays."""

import json
from collections.abc import Iterator
from typing import Any

import tensorstore
from etils import epath

from maxlm.runtime.storage import is_remote, plain_path

# Suffix of Orbax's temporary folder, which it renames when it is complete.
_TEMPORARY_SUFFIX = ".orbax-checkpoint-tmp"


def check_written(folder: epath.Path, step: int, metadata: dict[str, Any]) -> None:
    """Raise ValueError or OSError if the checkpoint of `step` in `folder` could not be restored.

    It may still have its temporary name. Objects of a bucket are complete or absent, and are not checked one by one.

    Args:
      metadata: its saved metadata; `shapes` and `rest_shapes` list the arrays that must exist.
    """
    checkpoint = plain_path(folder) / f"{step}{_TEMPORARY_SUFFIX}"
    if not checkpoint.exists():
        checkpoint = plain_path(folder) / str(step)
    read = json.loads((checkpoint / "metadata" / "metadata").read_text(encoding="utf-8"))
    if read.get("checksums") != metadata["checksums"]:
        raise ValueError("its metadata differs from what was written")
    for item, shapes in (("weights", metadata["shapes"]), ("rest", metadata["rest_shapes"])):
        if not (checkpoint / item / "_METADATA").exists():
            raise ValueError(f"its {item} item has no index")
        if not is_remote(folder):
            check_arrays(checkpoint / item, shapes)


def check_arrays(item: epath.Path, shapes: dict[str, list]) -> None:
    """Check that the index has each array with its shape, and that each of its chunks is inside of a file."""
    sizes: dict[str, int] = {}
    found = {}
    for key, entry in _entries(item):
        name, _, piece = key.rpartition("/")
        if piece == ".zarray":
            found[name] = json.loads(entry["inline_value"])["shape"]
        elif "indirect_value" in entry:
            file, end = _place(entry["indirect_value"])
            if file not in sizes:
                sizes[file] = (item / file).stat().length
            if sizes[file] < end:
                raise ValueError(f"{item.name}/{file} is truncated: {sizes[file]} of at least {end} bytes")
    for name, shape in shapes.items():
        # The last entry is the type.
        if found.get(name) != shape[:-1]:
            raise ValueError(f"{item.name}/{name} is missing or does not have the shape {shape[:-1]}")


def _entries(item: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, entry) of everything in the key-value store in a folder: TensorStore's OCDBT, a B+tree in files."""
    base = tensorstore.KvStore.open({"driver": "file", "path": f"{item}/"}).result()
    root = tensorstore.ocdbt.dump(base).result()["versions"][-1]["root"]
    nodes = [("", root["location"])] if "location" in root else []
    while nodes:
        prefix, location = nodes.pop()
        node = tensorstore.ocdbt.dump(base, location).result()
        for entry in node["entries"]:
            if node["height"]:
                nodes.append((prefix + entry["subtree_common_prefix"].decode(), entry["location"]))
            else:
                yield prefix + entry["key"].decode(), entry


def _place(location: str) -> tuple[str, int]:
    """The file and end offset of a value given as `value:BASE:FILE:OFFSET:LENGTH`."""
    _, base, file, offset, length = location.split(":")
    return base + file, int(offset) + int(length)
