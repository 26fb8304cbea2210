"""The interface of objectives: pretraining, SFT, reward modeling, preference and policy optimization.

An objective is the section of the configuration that defines what a run trains for, with its methods: the loss,
which is a pure function, and separately the data for batches. Each is one module of `maxlm/objectives`.
"""

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
from etils import epath
from jax.sharding import Mesh

from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.objective import ObjectiveConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, Stream
from maxlm.core.sharding import RowShard, row_shard
from maxlm.core.term import LossOutput
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.tokenizer.codec import Tokenizer


@dataclass(frozen=True)
class RunContext:
    """Arguments for opening the data of an objective."""

    config: TrainConfig
    tokenizer: Tokenizer
    mesh: Mesh
    # Gives the starting model, unchanged by training. Without adapters it loads it, to be dropped after use.
    reference: Callable[[], Any]
    # The run folder, and the hash of the starting model's weights; None: nothing is kept.
    folder: epath.Path | None = None
    reference_hash: str | None = None

    @functools.cached_property
    def rows(self) -> RowShard:
        """The rows of a batch that this process reads."""
        return row_shard(self.mesh)

    @property
    def row_parts(self) -> int:
        """Equal parts that a row is split into: two per device for ring attention, times the devices of `tensor`."""
        sizes = self.mesh.shape
        return sizes["tensor"] * (2 * sizes["context"] if sizes["context"] > 1 else 1)


class TrainingData(Protocol):
    """The batches of an objective, and its metrics on held-out data. The constructor opens the training data."""

    def prepare(self, frozen: dict[str, Any]) -> None:
        """Open and test what the run uses later: held-out data, user functions, a `teacher` in `frozen`.

        Called before the first step.

        Raises:
          MaxlmError: something cannot be used.
        """

    def batches(self, start_step: int, current_model: Callable[[], Any]) -> Iterator[Batch]:
        """This process's rows of the batches start_step, start_step + 1, ...: a pure function of the step and,
        if answers are sampled, of the model."""

    def documents(self, batch: int) -> list[dict[str, Any]]:
        """Documents in a batch, counted from 0, over all processes: each with its `id`, or FILE:LINE instead."""

    def validate(self, model: Any) -> dict[str, float]:
        """Metrics by name, on held-out data."""


class PreviewRow(NamedTuple):
    """A training example to show: a title, a stream of one row, and optionally a note below it, and where each of its
    segments is from."""

    title: str
    row: Stream
    note: str = ""
    places: tuple[str, ...] = ()


class ExampleMaker(Protocol):
    """Synthetic data that exposes layout bugs."""

    def documents(self) -> Stream:
        """Rows of documents of varying length and loss weight."""

    def sequences(self, *, shared: int = 0) -> Stream:
        """One sequence per row: the first `shared` tokens are a prompt; the loss weights of the others are 1."""

    def log_probabilities(self, stream: Stream) -> Any:
        """Log-probabilities of the targets under the current model: numpy [batch, length]."""

    def normal(self, shape: tuple[int, ...], *, scale: float = 1.0, mean: float = 0.0) -> Any:
        """float32 noise."""


class Objective(ObjectiveConfig):
    """Base class of objectives: what the rest of maxlm requires of one."""

    # Whether it predicts text, documents or chats, packed into rows: then packing must not change the result.
    learns_text: ClassVar[bool] = False
    # Whether answers are sampled from the model that is trained.
    samples: ClassVar[bool] = False

    def declare(self, config: ModelConfig, execution: ExecutionConfig) -> Decoder:
        """The parameters of the model that is trained."""
        return Decoder(config, execution)

    def from_decoder(self, decoder: Decoder, key: jax.Array) -> Decoder:
        """The trained model with the weights of a language model; `key` initializes new parameters."""
        del key
        return decoder

    def load_teacher(self, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh) -> Decoder | None:
        """The teacher, sharded over the mesh; None if the objective has none."""
        del config, tokenizer, mesh
        return None

    def declare_teacher(self, config: ModelConfig, execution: ExecutionConfig) -> Decoder | None:
        """A teacher of another width for a student of this shape; None if the objective has none."""
        del config, execution
        return None

    def stop_reason(self, records: Sequence[Mapping[str, Any]]) -> str | None:
        """Why training should end now, as a clause; None to go on.

        Args:
          records: of `metrics.jsonl`, since this attempt began; the last one is new.
        """
        del records
        return None

    @abstractmethod
    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        """The loss terms of a batch; pure and traceable.

        Args:
          model: that of `declare`, with adapters, and its outputs for the streams of the batch; among its `others` a
            teacher, if there is one.
          batch: its `row_seeds_B` are for randomness in training.
        """

    @abstractmethod
    def open_data(self, context: RunContext) -> TrainingData:
        """The batches to train on.

        Raises:
          MaxlmError: the data cannot be read.
        """

    @abstractmethod
    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        """The first training examples, in order.

        Raises:
          MaxlmError: the data cannot be read.
        """

    @abstractmethod
    def example(self, make: ExampleMaker) -> Batch:
        """A synthetic batch for `maxlm verify`, in numpy arrays."""

    def for_verification(self) -> Self:
        """The same objective with every term of its loss enabled, and small sizes for sampling.

        Terms get a large enough weight: an error in one scaled by 1e-4 would be lost in the rounding of the others.
        """
        return self
