"""The int8 bundle: a folder with all that inference needs, and a receipt of the quantization error.

    model.safetensors   int8 `values` and float32 `scales` of each matrix, layers stacked, output-first; float32 norms
                        and routers; embedding and output head as int8 too, or as float16
    bundle.json         format, model, shape, dtype and checksum of each tensor, tokenizer fingerprint, receipt
    tokenizer/          the tokenizer that the model was trained with, if it has one
    manifest.json       inputs of the export

Tensors are named by their path in the model: `layers/attention/query/values`.
"""

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
import xxhash
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.core.parameters import abstract
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import CheckpointError, TokenizerError
from maxlm.interop.formats import Candidate, Format
from maxlm.models.decoder import Decoder
from maxlm.models.multi_token import without_modules
from maxlm.models.quantized import Tables, quantize_model
from maxlm.ops.qtensor import QTensor
from maxlm.runtime.manifest import write_json
from maxlm.tokenizer.codec import Tokenizer

INDEX_FILE = "bundle.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FOLDER = "tokenizer"
INDEX_FORMAT, INDEX_VERSION = "maxlm/int8", 3

_AGAIN = "export the model again with `maxlm export`"


def write_bundle(folder: Path, model: Decoder, tokenizer: Tokenizer | None, receipt: dict[str, Any]) -> None:
    """Write a quantized model and its tokenizer into an empty folder, `bundle.json` last."""
    tensors = {path: np.asarray(leaf) for path, leaf in flatten(model).items()}
    save_file(tensors, folder / WEIGHTS_FILE)
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER_FOLDER)
    index = {
        "format": INDEX_FORMAT,
        "version": INDEX_VERSION,
        "model": model.config.model_dump(mode="json"),
        "execution": model.execution.model_dump(mode="json"),
        "tables": "int8" if isinstance(model.embedding, QTensor) else str(model.embedding.dtype),
        "tokenizer_fingerprint": tokenizer and tokenizer.fingerprint,
        "receipt": receipt,
        "tensors": {path: {**_type(tensor), "xxh3": _checksum(tensor)} for path, tensor in tensors.items()},
    }
    write_json(folder / INDEX_FILE, index)
    # safetensors makes files that other users cannot read, such as a server with its own account.
    shutil.copymode(folder / INDEX_FILE, folder / WEIGHTS_FILE)


def load_bundle(path: str | Path) -> tuple[Decoder, Tokenizer | None]:
    """Load a decoder whose matrices are QTensors onto the first device, and its tokenizer; None if it has none.

    Raises:
      CheckpointError: the folder is not a bundle, is of another version, incomplete or corrupt.
    """
    path = Path(path)
    index = read_index(path)
    try:
        config, execution = ModelConfig(**index["model"]), ExecutionConfig(**index["execution"])
        described, fingerprint, tables = dict(index["tensors"]), index["tokenizer_fingerprint"], index["tables"]
    except (KeyError, TypeError, ValueError, pydantic.ValidationError):
        raise CheckpointError(f"{path / INDEX_FILE}: is corrupt: it does not describe a model; {_AGAIN}") from None
    if tables not in get_args(Tables):
        raise CheckpointError(f"{path / INDEX_FILE}: is corrupt: it has tables of {tables!r}; {_AGAIN}")
    like = jax.eval_shape(partial(quantize_model, tables=tables), abstract(Decoder(config, execution)))
    tensors = _read_tensors(path / WEIGHTS_FILE, flatten(like), described)
    tokenizer = None if fingerprint is None else _read_tokenizer(path, fingerprint)
    return unflatten(jax.tree.map(jnp.asarray, tensors), like), tokenizer


def read_index(path: Path) -> dict[str, Any]:
    """Read `bundle.json`, which includes the receipt.

    Raises:
      CheckpointError: there is none, or it is of a format that this version cannot read.
    """
    file = path / INDEX_FILE
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        raise CheckpointError(f"{path}: is not an int8 bundle: it has no {INDEX_FILE}; {_AGAIN}") from None
    except ValueError:
        raise CheckpointError(f"{file}: is corrupt: it is not valid JSON; {_AGAIN}") from None
    found = (index.get("format"), index.get("version")) if isinstance(index, dict) else (None, None)
    if found != (INDEX_FORMAT, INDEX_VERSION):
        raise CheckpointError(
            f"{file}: is of format {found[0]} version {found[1]}, but this release reads {INDEX_FORMAT} version"
            f" {INDEX_VERSION}; {_AGAIN} of this release"
        )
    return index


def is_bundle(path: Path) -> bool:
    """Whether a folder is an int8 bundle, complete or corrupt."""
    return (path / INDEX_FILE).is_file()


def _read_tensors(
    file: Path, like: dict[str, jax.ShapeDtypeStruct], described: dict[str, Any]
) -> dict[str, np.ndarray]:
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: there is no such file, but the bundle needs it; {_AGAIN}") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: is corrupt or truncated ({error}); {_AGAIN}") from None
    if odd := sorted(tensors.keys() ^ like.keys()):
        what = "lacks" if odd[0] in like else "has, in addition to its model,"
        raise CheckpointError(f"{file}: {what} the tensor {odd[0]}; {_AGAIN}")
    for name, tensor in tensors.items():
        if _type(tensor) != _type(like[name]):
            raise CheckpointError(
                f"{file}: {name} is {_type(tensor)}, but the model needs {_type(like[name])}; {_AGAIN}"
            )
        if described.get(name) != {**_type(tensor), "xxh3": _checksum(tensor)}:
            raise CheckpointError(f"{file}: {name} differs from what was exported; {_AGAIN}")
    return tensors


def _read_tokenizer(path: Path, fingerprint: str) -> Tokenizer:
    try:
        tokenizer = Tokenizer.load(path / TOKENIZER_FOLDER)
    except TokenizerError as error:
        raise CheckpointError(f"{path}: its tokenizer is corrupt ({error}); {_AGAIN}") from None
    if tokenizer.fingerprint != fingerprint:
        raise CheckpointError(f"{path}: its tokenizer is not the one it was exported with; {_AGAIN}")
    return tokenizer


def _type(tensor: Any) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}


def _checksum(tensor: np.ndarray) -> str:
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(tensor).data)


def candidates(model: Decoder) -> Iterator[Candidate]:
    """All matrices in 8 bits; then with embedding and output head in 16 bits."""
    quantize = jax.jit(quantize_model, static_argnames="tables")
    for tables in get_args(Tables):
        yield Candidate(f"int8, tables of {tables}", quantize(model, tables=tables))


FORMAT = Format(
    "int8",
    "an int8 bundle",
    recognizes=is_bundle,
    load=load_bundle,
    write=write_bundle,
    stored=without_modules,
    quantize=candidates,
)
