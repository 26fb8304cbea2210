"""Checkpoint folders: their location, and the metadata stored next to the weights.

A checkpoint is `RUN/checkpoints/STEP`, with three Orbax items: `weights` (the model, or its adapters), `rest` (the rest
of the training state) and `metadata`. Inference reads only the weights.
"""

import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import orbax.checkpoint as ocp
import xxhash
from etils import epath
from pydantic import TypeAdapter, ValidationError

from maxlm.config.adapters import AdaptersConfig, PrefixConfig, PromptTuningConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.errors import CheckpointError
from maxlm.runtime.retry import first_line
from maxlm.runtime.storage import absolute_path, plain_path

FOLDER = "checkpoints"
# Version of the state needed to resume training, including checksums. Weights of earlier formats can be read.
FORMAT = 2

_ADAPTERS: TypeAdapter[AdaptersConfig | None] = TypeAdapter(AdaptersConfig | None)


def has_checkpoint(run_folder: epath.Path) -> bool:
    """Whether a run has a complete checkpoint."""
    return bool(checkpoint_steps(run_folder / FOLDER))


def find_checkpoint(path: str | os.PathLike) -> epath.Path:
    """The newest checkpoint folder of a run folder, or `path` itself if it is a checkpoint folder.

    Raises:
      CheckpointError: there is none.
    """
    path = absolute_path(path)
    if (path / "weights").is_dir():
        return path
    folder = path / FOLDER if (path / FOLDER).is_dir() else path
    steps = checkpoint_steps(folder)
    if not steps and (path / "config.json").is_file():
        raise CheckpointError(
            f"{path}: is a Hugging Face folder; convert it into a run folder first: maxlm import hf {path} OUT"
        )
    if not steps:
        what = "there is no such folder" if not path.exists() else "has no complete checkpoint"
        raise CheckpointError(f"{path}: {what}; give a run folder of `maxlm train` or one of its checkpoints")
    return folder / str(max(steps))


def checkpoint_steps(folder: epath.Path) -> list[int]:
    """Steps of the complete checkpoints in a folder."""
    if not folder.is_dir():
        return []
    paths = [path for path in plain_path(folder).iterdir() if path.name.isdigit() and (path / "weights").is_dir()]
    return [int(path.name) for path in paths if ocp.utils.is_checkpoint_finalized(path)]


def read_metadata(checkpoint: epath.Path) -> dict[str, Any]:
    """The metadata of a checkpoint: config, fingerprint, step, shapes, checksums.

    Raises:
      CheckpointError: it is corrupt, or of a later version.
    """
    metadata = readable(checkpoint, lambda: load_metadata(checkpoint))
    if metadata.get("format", FORMAT) > FORMAT:
        raise CheckpointError(f"{checkpoint}: was saved by a later version of maxlm; use that version")
    return metadata


class Trained(NamedTuple):
    """What a checkpoint holds, as its run was configured."""

    model: ModelConfig
    execution: ExecutionConfig
    adapters: AdaptersConfig | None

    @property
    def merged(self) -> ModelConfig:
        """The model that loading it gives: with the virtual tokens that its adapters add."""
        if isinstance(self.adapters, PrefixConfig | PromptTuningConfig):
            return self.model.with_virtual_tokens(self.adapters.tokens)
        return self.model


def trained_as(metadata: dict[str, Any], *, where: epath.Path) -> Trained:
    """The model, execution and adapters in a checkpoint's metadata; other settings may be of any version.

    Raises:
      CheckpointError: they were written by an incompatible version of maxlm.
    """
    config = metadata["config"]
    try:
        model, execution = ModelConfig(**config["model"]), ExecutionConfig(**config["execution"])
        return Trained(model, execution, _ADAPTERS.validate_python(config.get("adapters")))
    except KeyError as error:
        raise CheckpointError(
            f"{where}: was saved by another version of maxlm, without the setting {error}; use that version"
        ) from None
    except ValidationError as error:
        settings = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        raise CheckpointError(
            f"{where}: was saved by another version of maxlm, whose {settings} this version does not support; use that"
            " version"
        ) from None


def load_metadata(checkpoint: epath.Path) -> dict[str, Any]:
    return ocp.Checkpointer(ocp.JsonCheckpointHandler()).restore(plain_path(checkpoint) / "metadata")


def run_folder_of(checkpoint: epath.Path) -> epath.Path:
    """The run folder that contains a checkpoint."""
    return checkpoint.parent.parent


def weights_hash(checkpoint: epath.Path) -> str:
    """Hash of the content of a checkpoint's weights, independent of its location."""
    sums = {path: value for path, value in read_metadata(checkpoint)["checksums"].items() if path.startswith("weights")}
    return xxhash.xxh3_128_hexdigest(json.dumps(sums, sort_keys=True).encode())


def check_fingerprint(saved: str | None, wanted: str, folder: Any) -> None:
    """Raise CheckpointError if a checkpoint in `folder` was trained with another tokenizer; None: it has none."""
    if saved not in (None, wanted):
        raise CheckpointError(
            f"{folder}: its checkpoint was trained with another tokenizer ({saved[:12]}, not {wanted[:12]});"
            " use the data and tokenizer of that run, or another output folder"
        )


def readable(checkpoint: epath.Path, read: Callable[[], Any]) -> Any:
    """Call `read`; raises CheckpointError if it fails."""
    try:
        return read()
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: is corrupt ({first_line(error)}); use another checkpoint of the run"
        ) from error
