"""A sweep: many short runs of one training configuration, and the settings that vary between them."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from maxlm.config.base import Count, Frozen, Seconds, Seed

_RANGE_KEYS = {"low", "high", "log", "points"}


class Range(Frozen):
    """All values from `low` to `high`."""

    low: float
    high: float
    log: bool = Field(False, description="Uniform in the logarithm: as many values from 1 to 10 as from 10 to 100.")
    points: Annotated[int, Field(ge=2)] = Field(5, description="How many values a grid takes, both ends included.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be less than high ({self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"low ({self.low}) must be above 0 if log is true")
        return self


Choices = Annotated[tuple[Any, ...], Field(min_length=1, strict=False, description="The values to try.")]
Dimension = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")],
    Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "choices"),
]


class GridMethod(Frozen):
    """Every combination of the fields' values."""

    kind: Literal["grid"] = "grid"


class RandomMethod(Frozen):
    """Settings drawn at random, without repeats."""

    kind: Literal["random"] = "random"
    trials: Count = 8
    seed: Seed = 0


class HalvingMethod(Frozen):
    """Many random settings for a few steps; the best 1/eta of each round continue to eta times as many steps."""

    kind: Literal["successive_halving"] = "successive_halving"
    trials: Count = Field(9, description="Settings in the first round.")
    eta: Annotated[int, Field(ge=2)] = 3
    min_steps: Count = Field(description="Minimum steps of the first round.")
    max_steps: Count | None = Field(None, description="Steps of the last round; null uses the training file's.")
    seed: Seed = 0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_steps is not None and self.min_steps > self.max_steps:
            raise ValueError(f"min_steps ({self.min_steps}) exceeds max_steps ({self.max_steps})")
        return self


Method = Annotated[GridMethod | RandomMethod | HalvingMethod, Field(discriminator="kind")]


def _dotted(tree: Any) -> Any:
    """Flatten nested sections to dotted keys, so that overrides from the command line merge with those of the file.

    A section with a `kind` stays whole: it replaces the old one.
    """
    if not isinstance(tree, dict):
        return tree
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        inner = _dotted(value) if isinstance(value, dict) else None
        if inner and "kind" not in value and not _RANGE_KEYS & set(value):
            found = {f"{key}.{rest}": leaf for rest, leaf in inner.items()}
        else:
            found = {str(key): value}
        for name, leaf in found.items():
            old = flat.get(name)
            both = isinstance(old, dict) and isinstance(leaf, dict) and _RANGE_KEYS & set(leaf)
            flat[name] = old | leaf if both else leaf
    return flat


Overrides = Annotated[dict[str, Any], BeforeValidator(_dotted)]


class ScalesConfig(Frozen):
    """A scaling ladder: small models first, then a larger one predicted from them."""

    ladder: tuple[Overrides, ...] = Field(
        min_length=3,
        description="Overrides of the training configuration for each size, smallest first. Three fit a scaling law,"
        " four or more also show its uncertainty.",
    )
    against: Literal["flops", "parameters", "tokens"] = Field("flops", description="The variable of the scaling law.")
    target: Overrides | None = Field(None, description="Overrides of the size to predict.")
    run_target: bool = Field(True, description="Train the target too, and compare.")


class SweepConfig(Frozen):
    """`maxlm sweep`: trials of one training configuration."""

    kind: Literal["sweep"]
    output: str = Field(description="A local folder; an existing sweep there is resumed.")
    train: str = Field(description="A file of kind: train, the base of every trial.")
    overrides: Overrides = Field({}, description="Dotted key -> value: changes that all trials make to it.")
    fields: Annotated[dict[str, Dimension], BeforeValidator(_dotted)] = Field(
        {}, description="Dotted key -> list of values, or {low, high, log}: the settings that vary between trials."
    )
    method: Method = GridMethod()
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] | None = Field(
        None,
        description="Each setting is trained with all seeds and ranked by the mean; null: that of the file.",
    )
    metric: str = Field("loss", description="The validation metric to rank trials by.")
    goal: Literal["minimize", "maximize"] = "minimize"
    scales: ScalesConfig | None = None
    keep_checkpoints: Literal["best", "all", "none"] = Field(
        "best", description="Checkpoints to keep: those of the best trial at each size, all, none."
    )
    trial_seconds: Seconds | None = Field(None, description="A trial that takes longer is stopped and fails.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = []
        if not self.fields and self.scales is None:
            problems.append("fields must name the settings to vary, or scales the sizes to fit a scaling law to")
        if self.scales is not None and self.goal == "maximize":
            problems.append("scales need goal: minimize, because the scaling law models a falling loss")
        taken = {"kind", "output"} | ({"seed"} if self.seeds else set())
        if self.method.kind == "successive_halving" and not self.fields:
            problems.append("method.kind: successive_halving needs fields to vary")
        sections: dict[str, Any] = {"overrides": self.overrides}
        if self.scales is not None:
            sections |= {f"scales.ladder.{index}": size for index, size in enumerate(self.scales.ladder)}
            sections |= {"scales.target": self.scales.target or {}}
        for where, names in sections.items():
            problems += [f"{where}.{name}: is also varied by fields" for name in names if name in self.fields]
            problems += [f"{where}.{name}: is set by the sweep itself" for name in names if name in taken]
        # With halving, `steps` of a size are those of its last round.
        taken |= {"steps"} if self.method.kind == "successive_halving" else set()
        problems += [f"fields.{name}: is set by the sweep itself" for name in self.fields if name in taken]
        if problems:
            raise ValueError("; ".join(problems))
        return self
