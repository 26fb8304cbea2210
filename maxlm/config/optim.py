"""Optimizers and their schedules."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from maxlm.config.base import Fraction, Frozen


class ScheduleConfig(Frozen):
    """Learning rate over steps, as a factor of the optimizer's."""

    kind: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="wsd: warm-up, stable, then a linear decay over the last `decay_fraction` of the steps."
    )
    warmup_steps: NonNegativeInt = 20
    decay_fraction: Fraction = 0.2
    final_factor: Fraction = 0.1


class OptimConfig(Frozen):
    """The optimizer, and what is done to gradients before it."""

    kind: Literal["adamw", "muon"] = Field(
        "adamw", description="muon orthogonalises the updates of the layers' matrices and leaves the rest to AdamW."
    )
    learning_rate: PositiveFloat = 3e-4
    muon_learning_rate: PositiveFloat = 0.02
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    epsilon: PositiveFloat = 1e-8
    muon_momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    weight_decay: NonNegativeFloat = 0.1
    clip_norm: PositiveFloat | None = 1.0
    schedule: ScheduleConfig = ScheduleConfig()
