"""Compatibility of a resumed run: the settings and inputs that a run was trained with, against those given now.

A checkpoint's metadata holds the resolved `config`, hashes of the run's inputs (`fingerprint` of the tokenizer,
`start`, `data`), and `changes`: the settings changed since the run began, each with the step of the change.
"""

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import xxhash
from etils import epath
from pydantic import ValidationError

from maxlm.checkpoint.folder import (
    FOLDER,
    FORMAT,
    find_checkpoint,
    has_checkpoint,
    read_metadata,
    run_folder_of,
    weights_hash,
)
from maxlm.config.objective import Input
from maxlm.config.resume import Change, change_of, differences
from maxlm.config.train import TrainConfig
from maxlm.errors import CheckpointError, ConfigError
from maxlm.optim.schedule import schedule_factor
from maxlm.runtime.distributed import is_primary
from maxlm.runtime.manifest import content_hash, read_manifest
from maxlm.runtime.progress import console
from maxlm.runtime.storage import absolute_path, real_path, relative_path, storage_path
from maxlm.runtime.supervise import local_id
from maxlm.tokenizer.codec import Tokenizer

_SHOWN_DIGITS = 8


@dataclass(frozen=True)
class Lineage:
    """Settings and inputs given for a run.

    Attributes:
      config: the resolved configuration.
      fingerprint: of the tokenizer.
      start: the checkpoint that the run starts from, relative to the run folder, and the hash of its weights; None if
        it starts from scratch.
      data: hashes of the other training inputs, by the dotted key that names them.
      accept_changes: whether changes that alter the meaning of the run are recorded instead of refused.
    """

    config: TrainConfig
    fingerprint: str
    start: dict[str, str] | None = None
    data: Mapping[str, str] | None = None
    accept_changes: bool = False

    @classmethod
    def of(cls, config: TrainConfig, tokenizer: Tokenizer, *, accept_changes: bool = False) -> "Lineage":
        """The lineage of a run that is about to start or resume, from its resolved `config`.

        Raises:
          DataError: data that it reads does not exist.
          CheckpointError: the model that it starts from, or learns from, does not exist.
        """
        start = None
        if config.init_from is not None:
            checkpoint = find_checkpoint(config.init_from)
            path = relative_path(checkpoint, absolute_path(config.output))
            start = {"checkpoint": path, "absolute": str(checkpoint), "hash": weights_hash(checkpoint)}
        return cls(config, tokenizer.fingerprint, start, _data_hashes(config), accept_changes)

    def check_folder(self) -> None:
        """Compare with an existing run in the folder before anything there is changed.

        Raises:
          ConfigError: see `changes_since`.
        """
        newest = newest_checkpoint(self.config)
        # Checkpoints that are corrupt or of another version are reported when they are restored.
        with contextlib.suppress(CheckpointError):
            saved = None if newest is None else read_metadata(newest)
            if saved is not None and saved.get("format") == FORMAT:
                self.changes_since(saved)

    @property
    def metadata(self) -> dict[str, Any]:
        """The part that a checkpoint's metadata stores."""
        return {
            "config": self.config.model_dump(mode="json"),
            "fingerprint": self.fingerprint,
            "start": self.start,
            "data": dict(self.data or {}),
        }

    def changes_since(self, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The changes to record from now on: those in a checkpoint's metadata, and those since it was saved.

        Raises:
          ConfigError: the run would be a different one, or its meaning would change and that is not accepted; or it has
            already done more steps than requested.
        """
        step, folder = saved["step"], self.config.output
        if step > self.config.steps:
            raise ConfigError(
                [f"steps: {self.config.steps} is less than the {step} steps that the run in {folder} has already done"]
            )
        found = self._differences(saved)
        refused = [key for key in found if change_of(key) in (Change.REFUSED, Change.ASKED)]
        acceptable = step < self.config.steps and all(change_of(key) is Change.ASKED for key in refused)
        if refused and not (acceptable and self.accept_changes):
            way = ", or --accept-changes to resume with them, which records them in the manifest" if acceptable else ""
            raise ConfigError(
                [
                    f"{folder}: has a run of {step} steps that was trained with other settings:",
                    *(f"  {key}: {_shown(found[key][0])} -> {_shown(found[key][1])}" for key in refused),
                    f"give the settings that it was trained with, or a new folder (output=...){way}",
                ]
            )
        new = [
            {"step": step, "key": key, "from": before, "to": now}
            for key, (before, now) in found.items()
            if change_of(key) is not Change.FREE
        ]
        return [*saved.get("changes", ()), *new]

    def report_changes(self, saved: Mapping[str, Any]) -> None:
        """Print what changes from now on, and how the learning rate changes."""
        if not is_primary() or saved["step"] == self.config.steps:
            return
        log = partial(console.print, markup=False, highlight=False)
        for key, (before, now) in self._differences(saved).items():
            if change_of(key) is not Change.FREE:
                log(f"  {key}: {_shown(before)} -> {_shown(now)}")
        with contextlib.suppress(ValidationError):  # settings of another version of maxlm
            before = TrainConfig.model_validate(saved["config"])
            if sentence := schedule_change(before, self.config, saved["step"]):
                log(f"  {sentence}")

    def _differences(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Values before and now, by dotted key. Inputs with a known hash may have moved."""
        config = self.config.model_dump(mode="json")
        found = {key: (before, now) for key, before, now in differences(saved["config"], config)}
        before, now = _hashes(saved), _hashes(self.metadata)
        for key in before.keys() & now.keys():
            found.pop(key, None)
            if before[key] != now[key]:
                old, new = _value(saved["config"], key), _value(config, key)
                found[key] = (_content(old, before[key]), _content(new, now[key]))
        return found


def schedule_change(before: TrainConfig, now: TrainConfig, step: int) -> str | None:
    """How the learning rate of the step after `step` changes, in one sentence; None if the schedule is unchanged."""
    if (before.steps, before.optim) == (now.steps, now.optim):
        return None
    old, new = (
        config.optim.learning_rate * float(schedule_factor(config.optim.schedule, config.steps, step))
        for config in (before, now)
    )
    kind = now.optim.schedule.kind
    if old == new:
        return f"the learning rate of step {step + 1} stays {new:.3g} (schedule {kind}, {now.steps} steps)"
    return (
        f"the learning rate of step {step + 1} changes from {old:.3g} to {new:.3g} (schedule {kind}, {now.steps} steps)"
    )


def check_not_read(config: TrainConfig) -> None:
    """Refuse a run folder that is one of the run's inputs, also through links.

    Raises:
      ConfigError: it is.
    """
    output = real_path(config.output)
    named = [("tokenizer", config.tokenizer)] if config.tokenizer is not None else []
    models = [("init_from", config.init_from)] if config.init_from is not None else []
    for each in config.objective.inputs:
        if each.content != "records":
            (models if each.content == "weights" else named).append((f"objective.{each.key}", each.path))
    folders = {key: real_path(path) for key, path in named}
    folders |= {key: real_path(run_folder_of(find_checkpoint(path))) for key, path in models}
    problems = [
        f"output: {config.output} is the folder that {key} names, which the run would overwrite; give a new folder"
        for key, folder in folders.items()
        if folder == output or folder / FOLDER in (output, *output.parents)
    ]
    if problems:
        raise ConfigError(problems)


def newest_checkpoint(config: TrainConfig) -> epath.Path | None:
    """The checkpoint that a run resumes from, in its folder or on its local disk if newer; None for a new run."""
    folder = storage_path(config.output)
    places = [folder]
    if config.checkpoint.local is not None and (name := local_id(folder)) is not None:
        places.append(storage_path(config.checkpoint.local.folder) / name)
    found = [find_checkpoint(place) for place in places if has_checkpoint(place)]
    return max(found, key=lambda checkpoint: int(checkpoint.name), default=None)


def _data_hashes(config: TrainConfig) -> dict[str, str]:
    """Hashes of the training inputs; for packed rows and weights of their content, so that they may move."""
    return {f"objective.{each.key}": _input_hash(each) for each in config.objective.inputs if each.trains}


def _input_hash(each: Input) -> str:
    if each.content == "rows":
        return rows_hash(each.path)
    if each.content == "weights":
        return weights_hash(find_checkpoint(each.path))
    return content_hash(each.path)


def rows_hash(folder: str) -> str:
    """Hash of the training rows of a folder of `maxlm data build`; an identical rebuild has the same hash.

    Raises:
      DataError: the folder has not been built.
    """
    metrics = read_manifest(folder)["metrics"]
    rows = metrics.get("splits", {}).get("train", {}).get("hash")
    if rows is None:
        # Built by an earlier version.
        return content_hash(folder)
    return xxhash.xxh3_128_hexdigest(f"{metrics['row_length']} {metrics['tokenizer_fingerprint']} {rows}".encode())


def _hashes(metadata: Mapping[str, Any]) -> dict[str, str]:
    """The hashes in a checkpoint's metadata, by the key of the hashed input."""
    start = metadata.get("start")
    named = {"tokenizer": metadata["fingerprint"], **metadata.get("data", {})}
    return named if start is None else {**named, "init_from": start["hash"]}


def _value(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree[int(name)] if isinstance(tree, list) else tree[name]
    return tree


def _content(path: str | None, content: str) -> str:
    return f"{path or 'that of its input'} ({content[:_SHOWN_DIGITS]})"


def _shown(value: Any) -> str:
    return "nothing" if value is None else str(value)
