"""Trials of a sweep's configuration: each is a complete training configuration with its own name."""

import contextlib
import functools
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xxhash

from maxlm.checkpoint.folder import find_checkpoint, run_folder_of, weights_hash
from maxlm.config.layers import value_at
from maxlm.config.load import load_config
from maxlm.config.model import ModelConfig
from maxlm.config.sweep import Range, SweepConfig
from maxlm.config.train import TrainConfig
from maxlm.core.parameters import abstract
from maxlm.errors import ConfigError
from maxlm.models.decoder import Decoder
from maxlm.optim.schedule import schedule_factor
from maxlm.sweep.space import Rung, Setting, draw_settings, halving_rungs
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.setup import find_tokenizer, resolve_model
from maxlm.train.startup import data_hashes

# The target's index among the sizes of a sweep: after the ladder.
TARGET = -1


@dataclass(frozen=True)
class Size:
    """Size of a trial: parameters, tokens of all its steps, and FLOPs, 6 per parameter and token."""

    parameters: int
    tokens: int
    flops: float


@dataclass(frozen=True)
class Trial:
    """One run. Trials with the same `id` are one run, continued to `steps`; `since` is the step it resumes from."""

    id: str
    scale: int
    setting: Setting
    config: TrainConfig
    size: Size
    since: int = 0


class Plan:
    """Plan of a sweep: its settings, its sizes, the rounds at each size.

    Raises:
      ConfigError: all fields, overrides, sizes or values that the training configuration does not accept.
    """

    def __init__(self, config: SweepConfig):
        self.config = config
        self.folder = Path(config.output)
        self.sizes: list[dict[str, Any]] = list(config.scales.ladder) if config.scales else [{}]
        self._loaded: dict[str, TrainConfig] = {}
        self._read: dict[str, dict[str, str]] = {}
        self.base = load_config(config.train, kind="train")
        self._seeds = [{"seed": seed} for seed in config.seeds or ()] or [{}]
        self.integers = self._integers()
        self.settings = draw_settings(config.fields, config.method, integers=self.integers)
        self._check()
        self.inputs = _inputs(self._train_config(0, self.settings[0]))
        if config.scales:
            self._check_growth()

    @property
    def runs_target(self) -> bool:
        return TARGET in self.scales and self.config.scales.run_target

    @property
    def scales(self) -> list[int]:
        """All sizes: those of the ladder, and the target."""
        has_target = self.config.scales is not None and self.config.scales.target is not None
        return [*range(len(self.sizes)), *([TARGET] if has_target else [])]

    def rungs(self, scale: int) -> list[Rung]:
        """The rounds of the search at a size."""
        steps = self._train_config(scale, self.settings[0]).steps
        if self.config.method.kind == "successive_halving":
            return halving_rungs(self.config.method, len(self.settings), steps)
        return [Rung(len(self.settings), steps)]

    def trials(self, scale: int, setting: Setting, rung: int) -> list[Trial]:
        """A setting's runs in a round, one for each seed.

        A run continues from the previous round if its learning rates there were the same, i.e. if the schedule does
        not depend on the last step; else it restarts from scratch, because an already decayed learning rate would be
        a disadvantage.
        """
        rungs = self.rungs(scale)
        halving = self.config.method.kind == "successive_halving"
        found = []
        for seed in self._seeds:
            steps = {"steps": rungs[rung].steps} if halving else {}
            config = self._train_config(scale, setting, seed | steps)
            continues = (
                all(is_prefix(config, a.steps, b.steps) for a, b in itertools.pairwise(rungs)) and len(rungs) > 1
            )
            budget = [each.steps for each in rungs] if continues else None
            since = rungs[rung - 1].steps if continues and rung else 0
            found.append(self._trial(scale, setting, config, budget, since))
        return found

    def target(self, setting: Setting) -> list[Trial]:
        """The runs of the target size."""
        configs = [self._train_config(TARGET, setting, seed) for seed in self._seeds]
        return [self._trial(TARGET, setting, config, None, 0) for config in configs]

    def label(self, scale: int) -> str:
        """A size as text."""
        overrides = self._overrides(scale)
        return ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in overrides.items()) or "as configured"

    def _overrides(self, scale: int) -> Mapping[str, Any]:
        return self.config.scales.target if scale == TARGET else self.sizes[scale]

    def _train_config(self, scale: int, setting: Setting, more: Mapping[str, Any] | None = None) -> TrainConfig:
        merged = {**self.config.overrides, **self._overrides(scale), **setting, **(more or {})}
        key = json.dumps(merged)
        if key not in self._loaded:
            overrides = [f"{name}={json.dumps(value)}" for name, value in merged.items()]
            self._loaded[key] = load_config(self.config.train, overrides, kind="train")
        return self._loaded[key]

    def _trial(self, scale: int, setting: Setting, config: TrainConfig, budget: list[int] | None, since: int) -> Trial:
        content: dict[str, Any] = config.model_dump(mode="json", exclude={"output"})
        if budget is not None:
            content |= {"steps": budget}
        text = json.dumps([content, self._hashes(config)], sort_keys=True)
        name = xxhash.xxh3_64_hexdigest(text.encode())[:12]
        config = config.model_copy(update={"output": str(self.folder / "trials" / name)})
        return Trial(name, scale, setting, config, size_of(config), since)

    def _hashes(self, config: TrainConfig) -> dict[str, str]:
        """Hashes of a trial's inputs."""
        key = config.objective.model_dump_json() + str(config.init_from)
        if key not in self._read:
            self._read[key] = data_hashes(config)
            if config.init_from is not None:
                self._read[key]["init_from"] = weights_hash(find_checkpoint(config.init_from))
        return self._read[key]

    def _integers(self) -> set[str]:
        """Integer fields: validation keeps an int as it is if the key accepts only integers."""
        found = set()
        for name, dimension in self.config.fields.items():
            tried = (dimension.low, dimension.high) if isinstance(dimension, Range) else dimension
            for value in tried:
                # Invalid values are reported when all settings are checked.
                with contextlib.suppress(ConfigError):
                    value = int(value) if isinstance(value, float) and value.is_integer() else value
                    if type(value_at(self._train_config(0, {name: value}), name)) is int:
                        found.add(name)
        return found

    def _check(self) -> None:
        """Validate every setting at every size: unknown keys, values out of range, head counts that do not divide."""
        problems: dict[str, None] = {}
        for scale in self.scales:
            for setting in self.settings:
                try:
                    self._train_config(scale, setting)
                except ConfigError as error:
                    problems.update(dict.fromkeys(error.problems))
        if problems:
            prefix = f"{self.config.train}: "
            raise ConfigError(
                [f"{self.config.train} as the sweep changes it: {text.removeprefix(prefix)}" for text in problems]
            )

    def _check_growth(self) -> None:
        against = self.config.scales.against
        sizes = [getattr(size_of(self._train_config(scale, self.settings[0])), against) for scale in self.scales]
        if any(a >= b for a, b in itertools.pairwise(sizes)):
            values = ", ".join(f"{size:.4g}" for size in sizes)
            raise ConfigError([f"scales: {against} must increase from one to the next, but is {values}"])


def describe_setting(setting: Setting) -> str:
    """`optim.learning_rate=0.003 batch_size=16`"""
    items = (f"{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in setting.items())
    return " ".join(items) or "as configured"


def size_of(config: TrainConfig) -> Size:
    """Parameters, tokens and FLOPs of a run. C = 6 N D (Kaplan et al., 2020, arXiv:2001.08361), without attention."""
    model = resolve_model(config, _tokenizer(str(find_tokenizer(config)))).model
    parameters = _num_parameters(model)
    tokens = config.steps * config.batch_size * config.row_length
    return Size(parameters, tokens, 6.0 * parameters * tokens)


def is_prefix(config: TrainConfig, short: int, long: int) -> bool:
    """Whether a run of `long` steps has the learning rates of a run of `short` steps in its first `short` steps."""
    steps = np.arange(short)
    first, second = (np.asarray(schedule_factor(config.optim.schedule, total, steps)) for total in (short, long))
    return bool(np.array_equal(first, second))


@functools.cache
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer.load(folder)


@functools.cache
def _num_parameters(model: ModelConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(Decoder(model))))


def _inputs(config: TrainConfig) -> dict[str, str | Path]:
    """Inputs of a run, for the manifest: name -> file or folder."""
    found: dict[str, str | Path] = {
        each.name: each.path for each in config.objective.inputs if each.trains and each.content != "weights"
    }
    if config.init_from is not None:
        found["init_from"] = str(run_folder_of(find_checkpoint(config.init_from)))
    return found
