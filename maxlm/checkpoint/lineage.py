"""Whose run it is: what a run in a folder was trained with, against what it is asked to be when it is resumed.

A checkpoint's metadata holds the resolved `config`, hashes of what the run read (`fingerprint` of the tokenizer,
`start`, `data`), and `changes`: what was changed since the run began, each with the step that it was changed at.
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
    """What a run is asked to be.

    Attributes:
      config: as it is resolved.
      fingerprint: of the tokenizer.
      start: the checkpoint that the run starts from, as seen from the run folder, and the hash of its weights; None
        where it starts from nothing.
      data: hashes of what else is read for training, by the dotted key that names it.
      accept_changes: whether what changes the meaning of the run is recorded, and not refused.
    """

    config: TrainConfig
    fingerprint: str
    start: dict[str, str] | None = None
    data: Mapping[str, str] | None = None
    accept_changes: bool = False

    @classmethod
    def of(cls, config: TrainConfig, tokenizer: Tokenizer, *, accept_changes: bool = False) -> "Lineage":
        """Of a run that is about to begin, or to go on; `config` as it is resolved.

        Raises:
          DataError: data that it reads is not there.
          CheckpointError: the model that it starts from, or learns from, is not there.
        """
        start = None
        if config.init_from is not None:
            checkpoint = find_checkpoint(config.init_from)
            path = relative_path(checkpoint, absolute_path(config.output))
            start = {"checkpoint": path, "absolute": str(checkpoint), "hash": weights_hash(checkpoint)}
        return cls(config, tokenizer.fingerprint, start, _data_hashes(config), accept_changes)

    def check_folder(self) -> None:
        """Compare with the run that stands in the folder, if one does, before anything there is changed.

        Raises:
          ConfigError: see `changes_since`.
        """
        newest = newest_checkpoint(self.config)
        # What is broken, or of another version, is told when it is restored.
        with contextlib.suppress(CheckpointError):
            saved = None if newest is None else read_metadata(newest)
            if saved is not None and saved.get("format") == FORMAT:
                self.changes_since(saved)

    @property
    def metadata(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "config": self.config.model_dump(mode="json"),
            "fingerprint": self.fingerprint,
            "start": self.start,
            "data": dict(self.data or {}),
        }

    def changes_since(self, saved: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What is to be recorded from here on: the changes in a checkpoint's metadata, and those since it was saved.

        Raises:
          ConfigError: the run would be another one, or mean something else and that is not accepted; or it has done
            more steps than it is asked for.
        """
        step, folder = saved["step"], self.config.output
        if step > self.config.steps:
            raise ConfigError(
                [f"steps: {self.config.steps} is less than the {step} that the run in {folder} has done already"]
            )
        found = self._differences(saved)
        refused = [key for key in found if change_of(key) in (Change.REFUSED, Change.ASKED)]
        acceptable = step < self.config.steps and all(change_of(key) is Change.ASKED for key in refused)
        if refused and not (acceptable and self.accept_changes):
            way = ", or --accept-changes to go on with them, which records them in the manifest" if acceptable else ""
            raise ConfigError(
                [
                    f"{folder}: holds a run of {step} steps that was trained with other settings:",
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

    def tell_changes(self, saved: Mapping[str, Any]) -> None:
        """Say on the console what is different from now on, and what becomes of the learning rate."""
        if not is_primary() or saved["step"] == self.config.steps:
            return
        say = partial(console.print, markup=False, highlight=False)
        for key, (before, now) in self._differences(saved).items():
            if change_of(key) is not Change.FREE:
                say(f"  {key}: {_shown(before)} -> {_shown(now)}")
        with contextlib.suppress(ValidationError):  # of settings of another version of maxlm
            before = TrainConfig.model_validate(saved["config"])
            if told := schedule_change(before, self.config, saved["step"]):
                say(f"  {told}")

    def _differences(self, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Value before and value now, by dotted key. What is read may have moved, where its hash is known."""
        config = self.config.model_dump(mode="json")
        found = {key: (before, now) for key, before, now in differences(saved["config"], config)}
        before, now = _hashes(saved), _hashes(self.metadata)
        for key in before.keys() & now.keys():
            found.pop(key, None)
            if before[key] != now[key]:
                paths = _value(saved["config"], key), _value(config, key)
                found[key] = tuple(_content(*each) for each in zip(paths, (before[key], now[key])))
        return found


def schedule_change(before: TrainConfig, now: TrainConfig, step: int) -> str | None:
    """What becomes of the learning rate of the step after `step`, in one sentence; None where it is as it was."""
    if (before.steps, before.optim) == (now.steps, now.optim):
        return None
    old, new = (
        config.optim.learning_rate * float(schedule_factor(config.optim.schedule, config.steps, step))
        for config in (before, now)
    )
    kind = now.optim.schedule.kind
    if old == new:
        return f"the learning rate of step {step + 1} stays {new:.3g} (schedule {kind}, {now.steps} steps)"
    return f"the learning rate of step {step + 1} goes from {old:.3g} to {new:.3g} (schedule {kind}, {now.steps} steps)"


def check_not_read(config: TrainConfig) -> None:
    """Refuse a run folder that is what the run reads, by whatever spelling.

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
        f"output: {config.output} is the folder that {key} names, which the run would write over; give a new folder"
        for key, folder in folders.items()
        if folder == output or folder / FOLDER in (output, *output.parents)
    ]
    if problems:
        raise ConfigError(problems)


def newest_checkpoint(config: TrainConfig) -> epath.Path | None:
    """Where a run would go on: in its folder or, where that one is newer, on its local disk; None where it begins."""
    folder = storage_path(config.output)
    places = [folder]
    if config.checkpoint.local is not None and (name := local_id(folder)) is not None:
        places.append(storage_path(config.checkpoint.local.folder) / name)
    found = [find_checkpoint(place) for place in places if has_checkpoint(place)]
    return max(found, key=lambda checkpoint: int(checkpoint.name), default=None)


def _data_hashes(config: TrainConfig) -> dict[str, str]:
    """Hashes of what is read for training; of packed rows and of weights what they hold, so that they may move."""
    return {f"objective.{each.key}": _input_hash(each) for each in config.objective.inputs if each.trains}


def _input_hash(each: Input) -> str:
    if each.content == "rows":
        return rows_hash(each.path)
    if each.content == "weights":
        return weights_hash(find_checkpoint(each.path))
    return content_hash(each.path)


def rows_hash(folder: str) -> str:
    """Of the training rows of a folder of `maxlm data build`: one that is built again alike has the same.

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
    """The hashes in a checkpoint's metadata, by the key that names what they are of."""
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
