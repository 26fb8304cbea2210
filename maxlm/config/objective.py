"""The objective section of a run. Its kinds are the modules of `maxlm/objectives`."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, GetCoreSchemaHandler, PositiveFloat

from maxlm.config.base import Frozen
from maxlm.config.data import RecordFormat
from maxlm.config.model import ModelConfig
from maxlm.config.registry import collect

if TYPE_CHECKING:
    from maxlm.config.train import TrainConfig


@dataclass(frozen=True)
class Input:
    """A file or folder that an objective reads.

    key: below `objective`, dotted; name: in a run's manifest.
    content: a folder of packed rows, a file of records, or a run folder whose weights are loaded.
    trains: whether the trained weights depend on it; held-out data is only evaluated.
    """

    key: str
    name: str
    path: str
    content: Literal["rows", "records", "weights"]
    trains: bool = True


class ObjectiveConfig(Frozen):
    """Base class of the settings of every objective."""

    # Whether it always starts from another model, which init_from must name.
    needs_start: ClassVar[bool] = True
    # Whether it can train prefix language models, whose rows mark prefixes.
    marks_prefixes: ClassVar[bool] = False
    # Whether it trains the prediction modules of a model. Others train the model without them.
    trains_modules: ClassVar[bool] = False

    kind: str

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What it reads besides the model that the run starts from."""
        return ()

    @property
    def resume_multiple(self) -> int:
        """Checkpoints are allowed at multiples of this many steps."""
        return 1

    def trained_part(self, start: ModelConfig) -> ModelConfig:
        """What is trained of a starting model: all of it, or the model without its prediction modules."""
        return start if self.trains_modules else start.main_model

    def problems(self, config: "TrainConfig") -> list[str]:
        """Problems with the other settings of its run, one sentence each."""
        del config
        return []

    def model_problems(self, model: ModelConfig) -> list[str]:
        """Why it cannot train this model, one sentence each."""
        problems = []
        if model.prefix_attention and not self.marks_prefixes:
            problems.append(
                f"objective.kind={self.kind} trains causal models, and prompts of this one attend to themselves in both"
                " directions (model.prefix_attention); choose objective.kind=prefix_lm or sft"
            )
        if model.multi_token is not None and not self.trains_modules:
            problems.append(
                f"objective.kind={self.kind} does not train the prediction modules of model.multi_token; set it to"
                " null, or choose objective.kind=multi_token"
            )
        return problems


class PackedSource(Frozen):
    """Packed rows to train on, and their share of the mixture."""

    path: str = Field(description="A folder of `maxlm data build`.")
    weight: PositiveFloat = 1.0


class PackedRowsConfig(ObjectiveConfig):
    """An objective that reads a mixture of packed rows."""

    sources: tuple[PackedSource, ...] = Field(min_length=1)

    @property
    def inputs(self) -> tuple[Input, ...]:
        return tuple(
            Input(f"sources.{index}.path", f"data_{index}", source.path, "rows")
            for index, source in enumerate(self.sources)
        )


class RecordsConfig(ObjectiveConfig, RecordFormat):
    """An objective that reads a file of records, and optionally one for validation."""

    train_file: str
    valid_file: str | None = None

    @property
    def inputs(self) -> tuple[Input, ...]:
        found = [Input("train_file", "train_file", self.train_file, "records")]
        if self.valid_file is not None:
            found.append(Input("valid_file", "valid_file", self.valid_file, "records", trains=False))
        return tuple(found)


@functools.cache
def objective_classes() -> tuple[type[ObjectiveConfig], ...]:
    """All objectives. Their modules import jax, so they are imported only when the first run is configured."""
    return tuple(collect("maxlm.objectives", "OBJECTIVE"))


def find_objective(kind: str) -> Any:
    """The objective of a kind; None if this version has none, as for a run of another version."""
    return next((found for found in objective_classes() if found.model_fields["kind"].default == kind), None)


class _ByKind:
    """Validates a section as the objective that its `kind` names."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Annotated[Union[objective_classes()], Field(discriminator="kind")])  # noqa: UP007


# What an objective does is declared above this package, in maxlm/train/objective.py.
if TYPE_CHECKING:
    AnyObjective = Any
else:
    AnyObjective = Annotated[ObjectiveConfig, _ByKind()]
