"""Give a model rows for the tokens that were added to its tokenizer: `maxlm model resize`."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np

from maxlm.core.tree import flatten, unflatten
from maxlm.errors import CheckpointError, TokenizerError
from maxlm.export.run_folder import check_run_folder, write_run_folder
from maxlm.interop.formats import find_format
from maxlm.interop.load import load_any_model
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.codec import Tokenizer
from maxlm.tokenizer.extension import check_extends, former_ids

Init = Literal["mean", "noise", "zero"]


@dataclass(frozen=True)
class Resized:
    """What was resized.

    first_new_token: the id of the first new token, which is also how many there were.
    tables: paths of the parameters that have a row for each token.
    """

    rows_before: int
    rows_after: int
    first_new_token: int
    tokens_added: int
    tables: tuple[str, ...]
    init: Init


def resize_model(
    model_path: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer_folder: str | os.PathLike,
    *,
    init: Init = "mean",
    multiple_of: int = 128,
    seed: int = 0,
) -> Resized:
    """Write a run folder with the model as its checkpoint of step 0, for an extended tokenizer, atomically.

    Args:
      model_path: a run folder, a checkpoint or a Hugging Face folder, with its tokenizer.
      output: a new folder, or one of an earlier resize, which is replaced.
      tokenizer_folder: an extension of the model's tokenizer: its ids are the same, and more follow.
      init: see `with_rows`.
      multiple_of: the number of rows is rounded up to a multiple of this, for meshes and matrix units.
      seed: of the noise.

    Raises:
      CheckpointError: there is no model with a tokenizer at `model_path`, or it is quantized.
      TokenizerError: the tokenizer is no extension of the model's.
      ConfigError: `output` contains something else.
    """
    output = check_run_folder(output, "model")
    model_path, tokenizer_folder = Path(model_path), Path(tokenizer_folder)
    if (exported := find_format(model_path)) is not None and exported.quantize is not None:
        raise CheckpointError(f"{model_path}: is {exported.title}; give the run that it was exported from")
    model, old = load_any_model(model_path)
    if old is None:
        raise CheckpointError(f"{model_path}: has no tokenizer to compare with {tokenizer_folder}; restore it")
    new = Tokenizer.load(tokenizer_folder)
    try:
        check_extends(new, old)
    except TokenizerError as error:
        raise TokenizerError(f"--tokenizer {tokenizer_folder}: {error}, as in {model_path}") from None
    rows = -(-max(model.config.vocab_size, new.vocab_size) // multiple_of) * multiple_of
    resized = with_rows(model, rows, old.vocab_size, former_ids(new, old), init=init, seed=seed)
    found = Resized(
        rows_before=model.config.vocab_size,
        rows_after=rows,
        first_new_token=old.vocab_size,
        tokens_added=new.vocab_size - old.vocab_size,
        tables=tuple(_tables(model)),
        init=init,
    )
    inputs = {"model": model_path, "tokenizer": tokenizer_folder}
    write_run_folder(output, resized, new, stage="model/resize", inputs=inputs, metrics=asdict(found))
    return found


def with_rows(
    model: Decoder, num_rows: int, first: int, former: Sequence[Sequence[int]], *, init: Init = "mean", seed: int = 0
) -> Decoder:
    """The model with more rows in its embedding, and in its output table if it has one; old rows keep their bits.

    Args:
      num_rows: at least as many as there are.
      first: id of the first new token. Rows from there on that exist already belonged to no token, and are initialized
        as well.
      former: for each new token, the ids that its text had before.
      init: mean: of the rows of the former ids, or of all tokens for a token or row without any; noise: normal, with
        the mean and standard deviation of each column over the rows of tokens; zero.
      seed: of the noise.
    """
    plan = Decoder(model.config.model_copy(update={"vocab_size": num_rows}), model.execution)
    arrays = flatten(model)
    for path in _tables(model):
        table = np.asarray(arrays[path])
        known = table[:first].astype(np.float32)
        new = _new_rows(known, num_rows, former, init=init, random=np.random.default_rng([seed, *path.encode()]))
        # Rows beyond the new tokens that exist already are as good as any.
        kept = table[first + len(former) :]
        rows = [table[:first], new[: len(former)], kept, new[len(former) + len(kept) :]]
        arrays[path] = jnp.concatenate([jnp.asarray(part, table.dtype) for part in rows])
    return unflatten(arrays, plan)


def _new_rows(
    known: np.ndarray, num_rows: int, former: Sequence[Sequence[int]], *, init: Init, random: np.random.Generator
) -> np.ndarray:
    """float32 [num_rows - known rows, width]."""
    shape = (num_rows - len(known), known.shape[1])
    if init == "zero":
        return np.zeros(shape, np.float32)
    if init == "noise":
        return known.mean(0) + known.std(0) * random.standard_normal(shape, np.float32)
    rows = np.broadcast_to(known.mean(0), shape).copy()
    for row, ids in zip(rows, former):
        if ids:
            row[:] = known[list(ids)].mean(0)
    return rows


def _tables(model: Decoder) -> list[str]:
    """The paths of the parameters with a row for each token."""
    declared = flatten(Decoder(model.config, model.execution))
    return [path for path, parameter in declared.items() if parameter.is_vocabulary]
