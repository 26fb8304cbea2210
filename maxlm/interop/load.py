"""Load a trained model from a run, a checkpoint, or a folder of one of the formats here."""

import os
from pathlib import Path

from jax.sharding import Mesh

from maxlm.errors import CheckpointError
from maxlm.interop.formats import find_format, formats
from maxlm.models.decoder import Decoder
from maxlm.runtime.storage import storage_path
from maxlm.tokenizer.codec import Tokenizer


def load_model(
    path: str | os.PathLike, mesh: Mesh | None = None, *, ema: bool = False
) -> tuple[Decoder, Tokenizer | None]:
    """Load a language model with its adapters merged, and its tokenizer; None if it has none.

    Args:
      path: a run folder, a checkpoint, or a folder of another format.
      mesh: the mesh to shard it over; None is the first device.
      ema: load the EMA weights of a run instead of the weights.

    Raises:
      CheckpointError: there is no such model, or it cannot be read, sharded over a mesh, or generate text.
    """
    model, tokenizer = load_any_model(path, mesh, ema=ema)
    if model.config.labels is not None:
        kind = "reward model" if len(model.config.labels) == 1 else "classifier"
        raise CheckpointError(f"{path}: is a {kind}, which cannot generate text")
    return model, tokenizer


def load_reward_model(path: str | os.PathLike, mesh: Mesh | None = None) -> tuple[Decoder, Tokenizer | None]:
    """Load a reward model with its adapters merged, and its tokenizer; see `load_model`.

    Raises:
      CheckpointError: there is no such model, it cannot be read, or it is not a reward model.
    """
    model, tokenizer = load_any_model(path, mesh)
    if model.config.labels is not None and len(model.config.labels) > 1:
        raise CheckpointError(f"{path}: is a classifier of {len(model.config.labels)} labels, not a reward model")
    if model.config.labels is None:
        raise CheckpointError(
            f"{path}: is a language model, not a reward model; give the run folder of a training with"
            " objective.kind=reward, such as configs/post/reward.yaml"
        )
    return model, tokenizer


def check_folder(path: str | os.PathLike) -> None:
    """Raise CheckpointError early if there is no folder at all."""
    if not storage_path(path).is_dir():
        *others, last = ["a run", "a checkpoint", *(found.title for found in formats())]
        raise CheckpointError(f"{path}: there is no such folder; give {', '.join(others)} or {last}")


def load_any_model(
    path: str | os.PathLike, mesh: Mesh | None = None, *, ema: bool = False
) -> tuple[Decoder, Tokenizer | None]:
    """Load a language model, reward model or classifier; see `load_model`."""
    check_folder(path)
    found = find_format(Path(path))
    if found is None:
        # Orbax takes half a second to import, which a server of a bundle does not need.
        from maxlm.checkpoint.load import load_checkpoint

        return load_checkpoint(path, mesh, ema=ema)
    if ema:
        raise CheckpointError(f"{path}: is {found.title}, which has one set of weights; export it with --ema")
    if mesh is not None:
        raise CheckpointError(f"{path}: is {found.title}, but training needs the run that it was exported from")
    return found.load(Path(path))
