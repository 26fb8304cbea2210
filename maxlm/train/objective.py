"""What distinguishes pretraining, SFT, reward modelling, preference and policy optimization: an objective.

An objective is the section of the configuration that says what a run trains for, with the methods that do it: the loss,
which is pure, and apart from it the data that batches are built from. Each is one module of `maxlm/objectives`.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
from jax.sharding import Mesh

from maxlm.config.model import ModelConfig
from maxlm.config.objective import ObjectiveConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, Stream
from maxlm.core.sharding import RowShard, row_shard
from maxlm.core.term import LossOutput
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class RunContext:
    """What the data of an objective is opened with."""

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
        """Equal parts that a row is split into: two for each device along a ring, times the devices of `tensor`."""
        sizes = self.mesh.shape
        return sizes["tensor"] * (2 * sizes["context"] if sizes["context"] > 1 else 1)


@partial(jax.tree_util.register_dataclass, data_fields=["student", "teacher"], meta_fields=[])
@dataclass(frozen=True)
class StudentAndTeacher:
    """The model that is trained, and the one that it learns from: what a loss with a teacher takes."""

    student: Any
    teacher: Any


class TrainingData(Protocol):
    """The batches of an objective, and what it measures on held-out data. Training data is opened as it is built."""

    def prepare(self, frozen: dict[str, Any]) -> None:
        """Open and try what the run will use later: held-out data, functions of the user's, a `teacher` in `frozen`.

        Called before the first step.

        Raises:
          MaxlmError: something cannot be used.
        """

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        """This process's rows of the batches start_step, start_step + 1, ...: a pure function of that number, and,
        where answers are sampled, of the model."""

    def documents(self, batch: int) -> list[dict[str, Any]]:
        """What a batch, counted from 0, holds over all processes: each with its `id`, or FILE:LINE as one."""

    def validate(self, model: Any) -> dict[str, float]:
        """Numbers by name, on held-out data."""


class PreviewRow(NamedTuple):
    """A training example to show: a title, a stream of one row, and perhaps a note below it."""

    title: str
    row: Stream
    note: str = ""


class ExampleMaker(Protocol):
    """Made-up data that brings mistakes of layout to light."""

    def documents(self) -> Stream:
        """Rows of documents of uneven length, with weights of uneven size."""

    def sequences(self, *, shared: int = 0) -> Stream:
        """One sequence a row, of which the first `shared` tokens are a prompt; the loss weights of the others are 1."""

    def log_probabilities(self, stream: Stream) -> Any:
        """Of the targets under the model as it stands: numpy [batch, length]."""

    def normal(self, shape: tuple[int, ...], *, scale: float = 1.0, mean: float = 0.0) -> Any:
        """float32 noise."""


class Objective(ObjectiveConfig):
    """The base of all objectives: what the rest of maxlm asks of one."""

    # Whether it predicts text, documents or chats, of which several share a row: packing must not matter then.
    learns_text: ClassVar[bool] = False
    # Whether answers are sampled from the model that is trained.
    samples: ClassVar[bool] = False

    @property
    def needs_reference(self) -> bool:
        """Whether the starting model must be kept beside the one that is trained."""
        return False

    def declare(self, config: ModelConfig) -> Decoder:
        """The parameters of the model that is trained."""
        return Decoder(config)

    def from_decoder(self, decoder: Decoder, key: jax.Array) -> Decoder:
        """That model with the weights of a language model; `key` draws what is new."""
        del key
        return decoder

    def load_teacher(self, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Decoder | None:
        """The model that is learned from, sharded over the mesh; None where there is none."""
        del config, tokenizer, mesh

    def declare_teacher(self, config: ModelConfig) -> Decoder | None:
        """A teacher for a student of this shape, of another width; None where there is none."""
        del config

    @abstractmethod
    def compute_loss(self, model: Any, batch: Batch, key: jax.Array | None = None) -> LossOutput:
        """Pure and traceable.

        Args:
          model: what `declare` declares, its adapters applied; a `StudentAndTeacher` where there is a teacher.
          key: of what is random in training; None: nothing is.
        """

    @abstractmethod
    def open_data(self, context: RunContext) -> TrainingData:
        """The batches to train on.

        Raises:
          MaxlmError: the data cannot be read.
        """

    @abstractmethod
    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        """The first examples that are trained on, in that order.

        Raises:
          MaxlmError: the data cannot be read.
        """

    @abstractmethod
    def example(self, make: ExampleMaker) -> Batch:
        """A made-up batch for `maxlm verify`, in numpy arrays."""

    def for_verification(self) -> Self:
        """The same objective with every term of its loss turned on, and small where it samples.

        Terms get a weight that shows: an error in one that is scaled by 1e-4 would hide in the rounding of the others.
        """
        return self
