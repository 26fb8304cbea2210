"""What distinguishes pretraining, SFT, reward modelling, DPO and GRPO: the loss, and what builds the batch."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from maxlm.config.train import TrainConfig
from maxlm.core.sharding import RowShard, row_shard
from maxlm.core.term import LossOutput
from maxlm.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class RunContext:
    """What an objective is built from."""

    config: TrainConfig
    tokenizer: Tokenizer
    mesh: Mesh
    # The starting model, unchanged by training; None where the objective does not ask for it.
    reference: Any

    @functools.cached_property
    def rows(self) -> RowShard:
        """The rows of a batch that this process reads."""
        return row_shard(self.mesh)

    @property
    def row_parts(self) -> int:
        """Equal parts that a row is cut into: two for each device along a ring, for each device of the tensor axis."""
        sizes = self.mesh.shape
        return sizes["tensor"] * (2 * sizes["context"] if sizes["context"] > 1 else 1)


@partial(jax.tree_util.register_dataclass, data_fields=["student", "teacher"], meta_fields=[])
@dataclass(frozen=True)
class StudentAndTeacher:
    """The model that is trained, and the one that it learns from: what the loss of a recipe with a teacher takes."""

    student: Any
    teacher: Any


class Objective(Protocol):
    """The loop's only view of what it trains for."""

    # Whether the starting model must be kept beside the one that is trained.
    needs_reference: bool
    # A checkpoint may be taken at multiples of this many steps.
    resume_multiple: int

    def prepare(self, frozen: dict[str, Any]) -> None:
        """Open and try what the run will use later: held-out data, functions of the user's, a `teacher` in `frozen`.

        Called before the first step; training data is opened as the objective is built.

        Raises:
          MaxlmError: something cannot be used.
        """

    def loss(self, model: Any, batch: Any) -> LossOutput:
        """Pure and traceable. The first axis of every array in `batch` is the batch."""

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Any]:
        """This process's rows of the batches start_step, start_step + 1, ...: a pure function of that number, and,
        where answers are sampled, of the model."""

    def documents(self, batch: int) -> list[dict[str, Any]]:
        """What a batch, counted from 0, holds over all processes: each with its `id`, or FILE:LINE as one."""

    def validate(self, model: Any) -> dict[str, float]:
        """Numbers by name, on held-out data."""
