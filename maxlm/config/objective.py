"""The section that says what a run trains for. Its kinds are the modules of `maxlm/objectives`."""

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Union

from pydantic import Field, GetCoreSchemaHandler, PositiveFloat

from maxlm.config.base import Frozen
from maxlm.config.data import RecordFormat
from maxlm.config.registry import collect

if TYPE_CHECKING:
    from maxlm.config.train import TrainConfig


@dataclass(frozen=True)
class Input:
    """A file or folder that an objective reads.

    key: below `objective`, dotted; name: in a run's manifest.
    content: a folder of packed rows, a file of records, or a run folder whose weights are read.
    trains: whether what is trained depends on it; held-out data is only measured on.
    """

    key: str
    name: str
    path: str
    content: Literal["rows", "records", "weights"]
    trains: bool = True


class ObjectiveConfig(Frozen):
    """What every objective tells of its settings."""

    # Whether it only ever goes on from another model, which init_from must name.
    needs_start: ClassVar[bool] = True

    kind: str

    @property
    def inputs(self) -> tuple[Input, ...]:
        """What it reads beside the model that the run starts from."""
        return ()

    @property
    def resume_multiple(self) -> int:
        """A checkpoint may be taken at multiples of this many steps."""
        return 1

    def problems(self, config: "TrainConfig") -> list[str]:
        """What is wrong with the other settings of its run, a sentence each."""
        del config
        return []


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
    """An objective that reads a file of records, and perhaps another one to validate on."""

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
    """All objectives. Their modules import jax, so that this room asks for them when the first run is configured."""
    return tuple(collect("maxlm.objectives", "OBJECTIVE"))


def find_objective(kind: str) -> type[ObjectiveConfig] | None:
    """The objective of a kind; None where this version has none, as of a run of another one."""
    return next((found for found in objective_classes() if found.model_fields["kind"].default == kind), None)


class _ByKind:
    """Validates a section as the objective that its `kind` names."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> Any:
        return handler.generate_schema(Annotated[Union[objective_classes()], Field(discriminator="kind")])  # noqa: UP007


AnyObjective = Annotated[ObjectiveConfig, _ByKind()]
