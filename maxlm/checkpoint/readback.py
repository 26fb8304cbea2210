"""A checkpoint that was just written, looked at as a reader would: indexes, metadata and sizes, without its arrays."""

import json
from collections.abc import Iterator
from typing import Any

import tensorstore
from etils import epath

from maxlm.runtime.storage import is_remote, plain_path

# Where Orbax writes what it renames when it is whole.
_UNDER_WAY = ".orbax-checkpoint-tmp"


def check_written(folder: epath.Path, step: int, metadata: dict[str, Any]) -> None:
    """Raise ValueError or OSError where the checkpoint of `step` in `folder` could not be restored.

    It may still have the name that it has while it is being written. Objects of a bucket are whole or not there, and
    are not looked at one by one.

    Args:
      metadata: what is saved with it; its `shapes` and `rest_shapes` say which arrays must be there.
    """
    checkpoint = plain_path(folder) / f"{step}{_UNDER_WAY}"
    if not checkpoint.exists():
        checkpoint = plain_path(folder) / str(step)
    read = json.loads((checkpoint / "metadata" / "metadata").read_text(encoding="utf-8"))
    if read.get("checksums") != metadata["checksums"]:
        raise ValueError("its metadata is not what was written")
    for item, shapes in (("weights", metadata["shapes"]), ("rest", metadata["rest_shapes"])):
        if not (checkpoint / item / "_METADATA").exists():
            raise ValueError(f"its {item} have no index")
        if not is_remote(folder):
            check_arrays(checkpoint / item, shapes)


def check_arrays(item: epath.Path, shapes: dict[str, list]) -> None:
    """Each array is described with its shape, and each of its pieces lies inside of a file."""
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
                raise ValueError(f"{item.name}/{file} is cut short: {sizes[file]} of at least {end} bytes")
    for name, shape in shapes.items():
        # The last entry is the type.
        if found.get(name) != shape[:-1]:
            raise ValueError(f"{item.name}/{name} is not there with its shape {shape[:-1]}")


def _entries(item: epath.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, entry) of all that the key-value store in a folder holds: TensorStore's OCDBT, a B+tree in files."""
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
    """File, and the byte where a value in it ends, of `value:BASE:FILE:OFFSET:LENGTH`."""
    _, base, file, offset, length = location.split(":")
    return base + file, int(offset) + int(length)
