"""Hugging Face's format: config.json, and safetensors files with a tensor for each parameter of each layer."""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh
from pydantic import ValidationError

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig, TokenIds
from maxlm.core.parameters import Parameter, abstract
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import CheckpointError
from maxlm.families.family import CLASSIFIER, Description, Family, families
from maxlm.families.placement import Piece, Placed, copied_tables, ignores, placed_tensors
from maxlm.families.settings import Settings
from maxlm.interop.formats import Format
from maxlm.interop.tensor_files import TensorFiles, write_tensors
from maxlm.models.decoder import Decoder
from maxlm.models.multi_token import without_modules
from maxlm.runtime.manifest import write_json
from maxlm.runtime.storage import storage_path
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.huggingface import GENERATION_FILE, is_huggingface_tokenizer

CONFIG_FILE = "config.json"


def is_huggingface(path: Path) -> bool:
    """Whether a folder has a config.json."""
    return (path / CONFIG_FILE).is_file()


def load_huggingface(path: Path, mesh: Mesh | None = None) -> tuple[Decoder, Tokenizer | None]:
    """Load a model, each device reading its own part.

    Raises:
      CheckpointError: the model is of an unknown family, has a setting that is not supported, or its tensors are not
        those that config.json describes.
    """
    family, description = read_description(path)
    files = TensorFiles(path)
    if not _has_modules(files, description.model):
        description = dataclasses.replace(description, model=description.model.main_model)
    dtypes = {dtype for name, dtype in files.dtypes.items() if not ignores(family, name, description.model)}
    is_short = dtypes == {"bfloat16"}
    execution = ExecutionConfig(
        max_length=description.max_length,
        parameter_dtype="bfloat16" if is_short else "float32",
        activation_dtype="bfloat16" if is_short else "float32",
        matmul_dtype="auto" if is_short else "float32",
    )
    declared = Decoder(description.model, execution)
    placed = placed_tensors(family, declared)
    # A model without its output head is stored without the first part of the names.
    prefix = f"{next(iter(placed)).split('.')[0]}."
    if not any(name.startswith(prefix) for name in files.shapes):
        files.add_prefix(prefix, but=placed)
    _check_tensors(family, files, placed, declared)
    readers = _readers(files, placed)
    targets = abstract(declared, mesh)
    arrays = {
        path: _read_parameter(readers[path], parameter, flatten(targets)[path])
        for path, parameter in flatten(declared).items()
    }
    return unflatten(arrays, targets), _read_tokenizer(path, description.model)


def _has_modules(files: TensorFiles, model: ModelConfig) -> bool:
    """Whether files have the prediction modules that config.json counts. transformers does not write them."""
    first_module = rf"(model\.)?layers\.{model.num_layers}\..*"
    return model.labels is None and any(re.fullmatch(first_module, name) for name in files.shapes)


def _read_tokenizer(path: Path, model: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a folder; None if it has none."""
    if not is_huggingface_tokenizer(storage_path(path)):
        return None
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > model.vocab_size:
        raise CheckpointError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} tokens, but the model only {model.vocab_size}; copy the"
            " files of both from the same model, or remove the tokens that were added"
        )
    return tokenizer


def read_description(path: Path) -> tuple[Family, Description]:
    """The family of a model, and what its config.json says. The files may lack its prediction modules.

    Raises:
      CheckpointError: see `load_huggingface`.
    """
    file = path / CONFIG_FILE
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        model_type = values["model_type"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{file}: is corrupt, or names no model_type; copy the file again") from None
    if model_type not in families():
        known = ", ".join(sorted(families()))
        raise CheckpointError(f"{file}: model_type is {model_type!r}, which maxlm does not know; it knows {known}")
    family, settings = families()[model_type], Settings(values, file)
    try:
        description = family.read(settings)
    except ValidationError as error:
        problem = error.errors()[0]
        what = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(
            f"{file}: does not describe a model that maxlm supports: {what}: {problem['msg']}"
        ) from None
    settings.check_all_read()
    model = description.model.model_copy(
        update={
            "family": family.model_type,
            "token_ids": _read_token_ids(values, file),
            "labels": _read_labels(values, file),
        }
    )
    return family, dataclasses.replace(description, model=model)


def _read_labels(values: dict[str, Any], file: Path) -> tuple[str, ...] | None:
    """The labels of a classifier or reward model; two by default, as transformers has it."""
    if not any(str(name).endswith(CLASSIFIER) for name in values.get("architectures") or ()):
        return None
    names = values.get("id2label") or {str(i): f"LABEL_{i}" for i in range(values.get("num_labels", 2))}
    if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
        raise CheckpointError(f"{file}: id2label must have the keys 0 to {len(names) - 1}, not {', '.join(names)}")
    return tuple(str(names[str(i)]) for i in range(len(names)))


def _read_token_ids(values: dict[str, Any], file: Path) -> TokenIds:
    found = {name: values.get(f"{name}_token_id") for name in TokenIds.model_fields}
    try:
        return TokenIds.model_validate(found)
    except ValidationError:
        raise CheckpointError(f"{file}: an id of a special token is not a number: {found}; restore it") from None


def _check_tensors(family: Family, files: TensorFiles, placed: dict[str, Placed], declared: Decoder) -> None:
    """Raise CheckpointError for a tensor that is missing, unexpected, or of another shape than the model's."""
    where = files.folder
    if missing := [name for name in placed if name not in files.shapes]:
        raise CheckpointError(
            f"{where}: the tensor {missing[0]} is missing{_more(missing)}; the files do not fit {CONFIG_FILE}"
        )
    extra = [name for name in files.shapes if name not in placed and not ignores(family, name, declared.config)]
    copies = copied_tables(family, placed, declared.config)
    for name in copies.keys() & files.shapes:
        if not _same_tables(files, name, copies[name]):
            raise CheckpointError(
                f"{where}: {name} differs from {copies[name]}, which prediction modules share with the model; set"
                f" num_nextn_predict_layers to 0 in {CONFIG_FILE} to leave the modules out"
            )
    extra = [name for name in extra if name not in copies]
    if declared.config.tie_embeddings:
        extra = [name for name in extra if not _is_copy_of_embedding(family, files, placed, name)]
    if extra:
        raise CheckpointError(
            f"{where}: the tensor {extra[0]} is not part of the model that {CONFIG_FILE} describes{_more(extra)}"
        )
    for name, tensor in placed.items():
        if files.shapes[name] != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} has the shape {list(files.shapes[name])}, but {CONFIG_FILE} describes"
                f" {list(tensor.shape)}"
            )


def _is_copy_of_embedding(family: Family, files: TensorFiles, placed: dict[str, Placed], name: str) -> bool:
    """Whether a tensor is the output head, stored once more although it is tied to the embedding."""
    if name not in {each.name for each in family.tensors if each.holds == ("head",)}:
        return False
    (embedding,) = [each.name for each in placed.values() if each.pieces[0].path == "embedding"]
    if not _same_tables(files, name, embedding):
        raise CheckpointError(
            f"{files.folder}: {name} differs from {embedding}, but {CONFIG_FILE} ties them: set tie_word_embeddings to"
            " false if the model has two tables"
        )
    return True


def _same_tables(files: TensorFiles, left: str, right: str) -> bool:
    return np.array_equal(files.read(left, slice(None)), files.read(right, slice(None)))


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more are" if len(names) > 1 else ""


# Reads [rows, columns] or [rows] of a parameter of one layer and expert.
_Readers = dict[tuple[int, ...], Any]


def _readers(files: TensorFiles, placed: dict[str, Placed]) -> dict[str, _Readers]:
    """For each parameter, functions that read it by the place in its stack."""
    readers: dict[str, _Readers] = {}
    for tensor in placed.values():
        for piece in tensor.pieces:
            readers.setdefault(piece.path, {})[piece.place] = _reader(files, tensor, piece)
    return readers


def _reader(files: TensorFiles, tensor: Placed, piece: Piece):
    def read(*index: slice) -> np.ndarray:
        row_slice, *columns = index[::-1] if tensor.is_transposed else index
        wanted = piece.rows[row_slice]
        start, stop = int(wanted.min()), int(wanted.max()) + 1
        read_index = (slice(start, stop), *columns)
        read_index = read_index[::-1] if tensor.input_first else read_index
        if piece.expert is None:
            block = files.read(tensor.name, *read_index)
        else:
            block = files.read(tensor.name, slice(piece.expert, piece.expert + 1), *read_index)[0]
        block = block.T if tensor.input_first else block
        block = block if stop - start == len(wanted) and np.all(np.diff(wanted) == 1) else block[wanted - start]
        return block.T if tensor.is_transposed else block

    return read


def _read_parameter(readers: _Readers, parameter: Parameter, target: jax.ShapeDtypeStruct) -> jax.Array:
    stacked = parameter.num_stacked

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = [range(*each.indices(size)) for each, size in zip(index, parameter.shape)]
        result = np.empty([len(each) for each in bounds], parameter.dtype)
        inner = tuple(slice(each.start, each.stop) for each in bounds[stacked:])
        for place in np.ndindex(*result.shape[:stacked]):
            result[place] = readers[tuple(each[i] for each, i in zip(bounds, place))](*inner)
        return result

    sharding = target.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.make_array_from_callback(parameter.shape, sharding, part)


def write_huggingface(path: Path, model: Decoder, tokenizer: Tokenizer | None, receipt: dict[str, Any]) -> None:
    """Write config.json and the tensors.

    Raises:
      CheckpointError: no family has such models.
    """
    del receipt
    family, placed = find_family(model)
    dtype = stored_dtype(model)
    config = family.write(Description(model.config, model.execution.max_length))
    write_json(
        path / CONFIG_FILE,
        {
            "architectures": [family.class_name(model.config)],
            "model_type": family.model_type,
            "torch_dtype": dtype,
            **_token_ids(model.config.token_ids, tokenizer),
            **_labels(model.config.labels),
            **config,
        },
    )
    if tokenizer is not None:
        for name, content in tokenizer.huggingface_files().items():
            (path / name).write_bytes(content)
        if not (path / GENERATION_FILE).exists():
            write_json(path / GENERATION_FILE, _token_ids(None, tokenizer))
    copies = copied_tables(family, placed, model.config)
    tensors = placed | {name: placed[table] for name, table in copies.items()}
    total = sum(math.prod(tensor.shape) for tensor in tensors.values()) * np.dtype(jnp.dtype(dtype)).itemsize
    write_tensors(path, _their_tensors(flatten(model), tensors, dtype), total)


def _token_ids(given: TokenIds | None, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The settings of special tokens."""
    if given is None and tokenizer is not None:
        given = TokenIds(bos=tokenizer.bos_id, eos=tokenizer.stop_ids or None, pad=tokenizer.pad_id)
    if given is None:
        return {}
    # transformers has defaults for the first three, so what is not there must be written too.
    ids = given.model_dump(mode="json").items()
    return {f"{key}_token_id": id_ for key, id_ in ids if id_ is not None or key in ("bos", "eos", "pad")}


def _labels(labels: tuple[str, ...] | None) -> dict[str, Any]:
    if labels is None:
        return {}
    return {
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
    }


def find_family(model: Decoder) -> tuple[Family, dict[str, Placed]]:
    """The family that a model was imported from, or else Llama or the first that has such models; where tensors are.

    Raises:
      CheckpointError: there is none.
    """
    if model.config.bias_table is not None:
        raise CheckpointError(
            "model.layers.mixer.relative_bias: none of the families that maxlm writes in Hugging Face's format has one;"
            " leave out --format hf"
        )
    if any(getattr(layer.mixer, "virtual_tokens", None) is not None for layer in model.config.each_layer()):
        raise CheckpointError(
            "the model has virtual tokens, for which Hugging Face's format has no place; export the adapters of its"
            " run: --format peft"
        )
    declared = Decoder(model.config, model.execution)
    config = model.config.model_copy(update={"family": None, "token_ids": None, "labels": None})
    wanted = Description(config, model.execution.max_length)
    preferred = (model.config.family, "llama")
    for family in sorted(families().values(), key=lambda family: [family.model_type != name for name in preferred]):
        try:
            settings = Settings(json.loads(json.dumps(family.write(wanted))), family.model_type)
            if family.read(settings).model == wanted.model and family.class_name(model.config):
                return family, placed_tensors(family, declared)
        except (CheckpointError, ValidationError, LookupError, AttributeError, TypeError, StopIteration):
            # It has no word for something in this model.
            continue
    raise CheckpointError(
        "the model is of no family that Hugging Face's transformers computes: see docs/families.md for those that are"
    )


def stored_dtype(model: Decoder) -> str:
    """The dtype that tensors are stored in: bfloat16 or float16 if that loses nothing, else float32."""
    arrays = list(flatten(model).values())
    if model.execution.parameter_dtype == "bfloat16":
        return "bfloat16" if all(_is_exact(x, ml_dtypes.bfloat16) for x in arrays) else "float32"
    return "float16" if all(_is_exact(x, np.float16) for x in arrays) else "float32"


def _is_exact(x: jax.Array, dtype: Any) -> bool:
    return x.dtype == dtype or bool(jnp.all(x.astype(dtype).astype(jnp.float32) == x))


def _their_tensors(
    arrays: dict[str, jax.Array], tensors: dict[str, Placed], dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    for name, tensor in tensors.items():
        whole = np.empty(tensor.shape, jnp.dtype(dtype))
        for piece in tensor.pieces:
            part = np.asarray(arrays[piece.path][piece.place])
            of_piece = whole if piece.expert is None else whole[piece.expert]
            rows_first = of_piece.T if tensor.input_first else of_piece
            rows_first[piece.rows] = part.T if tensor.is_transposed else part
        yield name, whole


def _stored(model: Decoder) -> Decoder:
    """The model with its prediction modules, or without them if no family has models with such modules."""
    if model.multi_token:
        with contextlib.suppress(CheckpointError):
            find_family(model)
            return model
    return without_modules(model)


FORMAT = Format(
    "hf",
    "a Hugging Face folder",
    recognizes=is_huggingface,
    load=load_huggingface,
    write=write_huggingface,
    stored=_stored,
)
