"""The safetensors files of a Hugging Face folder: one, or several with an index."""

import json
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from maxlm.errors import CheckpointError
from maxlm.runtime.manifest import write_json

FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# A file is assembled in memory before it is written.
MAX_FILE_BYTES = 1 << 30

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class TensorFiles:
    """The tensors of a folder, of which only what is asked for is read.

    dtypes: of each tensor, by name; shapes: likewise.
    """

    def __init__(self, folder: Path):
        """Open all files.

        Raises:
          CheckpointError: there are none, or one is missing, corrupt or truncated.
        """
        self.folder = folder
        self._slices: dict[str, Any] = {}
        self._file_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        expected = _read_index(folder)
        for file in sorted(set(expected.values())) if expected is not None else [FILE]:
            self._open(folder / file)
        for name, file in (expected or {}).items():
            if self._file_of.get(name) != folder / file:
                raise CheckpointError(
                    f"{folder / INDEX}: {name} is not in {file}, as the index says; copy the folder again"
                )

    def _open(self, file: Path) -> None:
        try:
            opened = safe_open(file, framework="np")
            # It has keys, but is no mapping.
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                self._slices[name], self._file_of[name] = part, file
                self.shapes[name] = tuple(part.get_shape())
                dtype = part.get_dtype()
                if dtype not in _DTYPES:
                    raise CheckpointError(
                        f"{file}: {name} is of dtype {dtype}, which maxlm does not read; convert it to BF16 or F32"
                    )
                self.dtypes[name] = _DTYPES[dtype]
        except FileNotFoundError:
            raise CheckpointError(
                f"{file}: there is no such file, but {INDEX} names it; copy the folder again"
            ) from None
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: is corrupt or truncated ({error}); copy the file again") from None

    def add_prefix(self, prefix: str, *, but: Container[str]) -> None:
        """Name all tensors with a prefix, but those of these names."""
        tables: tuple[dict[str, Any], ...] = (self._slices, self._file_of, self.shapes, self.dtypes)
        for by_name in tables:
            for name in [name for name in by_name if name not in but]:
                by_name[prefix + name] = by_name.pop(name)

    def read(self, name: str, *index: slice) -> np.ndarray:
        """A part of a tensor, with a slice of step 1 for each axis."""
        try:
            return self._slices[name][index]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{self._file_of[name]}: {name} is corrupt ({error}); copy the file again") from None


def _read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, by name; None if there is one file without an index."""
    if (folder / FILE).is_file():
        return None
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return {str(name): str(file) for name, file in index["weight_map"].items()}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{folder / INDEX}: is corrupt; copy the file again") from None
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise CheckpointError(
            f"{folder}: has PyTorch files only, which can run any code when they are opened; if you trust them, convert"
            ' them with transformers: python -c "from transformers import AutoModelForCausalLM as Model;'
            f" Model.from_pretrained('{folder}').save_pretrained('{folder}')\""
        )
    raise CheckpointError(f"{folder}: has neither {FILE} nor {INDEX}; copy the folder again")


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], total_bytes: int) -> None:
    """Write tensors into one file, or several of up to `MAX_FILE_BYTES` with an index, one after the other."""
    file_of: dict[str, str] = {}
    for number, part in enumerate(_batches(tensors), 1):
        file = FILE if total_bytes <= MAX_FILE_BYTES else f"model-{number:05}.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(part, file)
    if total_bytes > MAX_FILE_BYTES:
        write_json(folder / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": file_of})


def _batches(tensors: Iterable[tuple[str, np.ndarray]]) -> Iterator[dict[str, np.ndarray]]:
    part: dict[str, np.ndarray] = {}
    for name, tensor in tensors:
        if part and sum(x.nbytes for x in part.values()) + tensor.nbytes > MAX_FILE_BYTES:
            yield part
            part = {}
        part[name] = np.ascontiguousarray(tensor)
    yield part
