"""A trained model, whatever its folder is: a run, a checkpoint, or a folder of one of the formats here."""

import os
from pathlib import Path

from jax.sharding import Mesh

from maxlm.errors import CheckpointError
from maxlm.interop.formats import find_format, formats
from maxlm.models.decoder import Decoder
from maxlm.models.reward import RewardModel
from maxlm.runtime.storage import storage_path
from maxlm.tokenizer.codec import Tokenizer


def load_model(
    path: str | os.PathLike, mesh: Mesh | None = None, *, ema: bool = False
) -> tuple[Decoder, Tokenizer | None]:
    """A language model with its adapters merged, and its tokenizer; None where it has none.

    Args:
      path: a run folder, a checkpoint, or a folder of another format.
      mesh: where to lay it; None is the first device.
      ema: the running mean of a run's weights instead of the weights.

    Raises:
      CheckpointError: there is no such model, or it cannot be read, laid over a mesh, or generate text.
    """
    model, tokenizer = _load(path, mesh, ema=ema)
    if isinstance(model, RewardModel):
        raise CheckpointError(f"{path}: holds a reward model, which generates no text")
    return model, tokenizer


def load_reward_model(path: str | os.PathLike, mesh: Mesh | None = None) -> tuple[RewardModel, Tokenizer | None]:
    """A reward model with its adapters merged, and its tokenizer; see `load_model`.

    Raises:
      CheckpointError: there is no such model, or it cannot be read, or it is no reward model.
    """
    model, tokenizer = _load(path, mesh)
    if not isinstance(model, RewardModel):
        raise CheckpointError(
            f"{path}: holds a language model, and no reward model; give the run folder of a training with"
            " objective.kind=reward, as configs/post/reward.yaml is"
        )
    return model, tokenizer


def check_folder(path: str | os.PathLike) -> None:
    """Raise CheckpointError where there is no folder at all, before anything is waited for."""
    if not storage_path(path).is_dir():
        *others, last = ["a run", "a checkpoint", *(found.title for found in formats())]
        raise CheckpointError(f"{path}: there is no such folder; give {', '.join(others)} or {last}")


def _load(
    path: str | os.PathLike, mesh: Mesh | None, *, ema: bool = False
) -> tuple[Decoder | RewardModel, Tokenizer | None]:
    check_folder(path)
    found = find_format(Path(path))
    if found is None:
        # Orbax takes half a second to import, which a server of a bundle can do without.
        from maxlm.checkpoint.load import load_checkpoint

        return load_checkpoint(path, mesh, ema=ema)
    if ema:
        raise CheckpointError(f"{path}: is {found.title}, which holds one set of weights; export it with --ema")
    if mesh is not None:
        raise CheckpointError(f"{path}: is {found.title}, and training needs the run that it was exported from")
    return found.load(Path(path))
