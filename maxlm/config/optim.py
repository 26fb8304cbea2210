"""Optimizers and their schedules."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat

from maxlm.config.base import Count, CountOrZero, Fraction, Frozen

Decay = Annotated[float, Field(ge=0, lt=1)]


class ScheduleConfig(Frozen):
    """Learning rate over steps, as a factor of the optimizer's: a linear warm-up, then what `kind` says."""

    kind: Literal["cosine", "linear", "wsd", "inverse_sqrt", "cosine_restarts", "constant"] = Field(
        "cosine",
        description="cosine, linear: down to `final_factor` at the last step; wsd: stable, then linear over the last"
        " `decay_fraction` of the steps; inverse_sqrt: with the root of the step, without end; cosine_restarts:"
        " `cycles` times from 1 to `final_factor`.",
    )
    warmup_steps: CountOrZero | None = Field(None, description="null takes 20, or all steps of a shorter run.")
    decay_fraction: Fraction = 0.2
    final_factor: Fraction = 0.1
    cycles: Count = Field(4, description="Cycles of cosine_restarts between the warm-up and the last step.")
    cycle_growth: Annotated[float, Field(ge=1)] = Field(1.0, description="How many times longer each cycle is.")

    def warmup(self, num_steps: int) -> int:
        """Steps of the warm-up of a run of `num_steps`."""
        return min(20, num_steps) if self.warmup_steps is None else self.warmup_steps


class GroupConfig(Frozen):
    """Parameters that are treated in a way of their own."""

    match: Annotated[str, Field(min_length=1)] = Field(
        description="Pattern of parameters' paths, such as `layers/mlp/*` or `*norm*`; * stands for anything."
    )
    learning_rate_factor: NonNegativeFloat = Field(1.0, description="0 leaves the parameters as they are.")
    weight_decay: NonNegativeFloat | None = Field(
        None, description="Of these parameters, matrices or not; null is optim.weight_decay for matrices alone."
    )


class OptimConfig(Frozen):
    """The optimizer, and what is done to gradients before it."""

    kind: Literal["adamw", "adam8bit", "adafactor", "lion", "sgd", "muon", "soap"] = Field(
        "adamw",
        description="adam8bit: AdamW whose moments take a byte each; muon and soap are for the layers' matrices and"
        " leave the rest to AdamW.",
    )
    learning_rate: PositiveFloat = 3e-4
    muon_learning_rate: PositiveFloat = 0.02
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    epsilon: PositiveFloat = 1e-8
    momentum: Decay = Field(0.95, description="Of sgd and muon, both in Nesterov's form.")
    precondition_every: Count = Field(10, description="Steps between two turns of soap's bases.")
    precondition_max_dim: Count = Field(
        4096, description="Longer sides of a matrix keep their own basis in soap: its state grows with their square."
    )
    weight_decay: NonNegativeFloat = Field(
        0.1, description="Of matrices, decoupled from the gradient: each step takes learning rate * decay * weight off."
    )
    l1_penalty: NonNegativeFloat = Field(0.0, description="Weight of the sum of |w| over matrices, in the gradient.")
    l2_penalty: NonNegativeFloat = Field(0.0, description="Weight of half the sum of w^2, in the gradient.")
    clip_norm: PositiveFloat | None = 1.0
    router_bias_rate: NonNegativeFloat = Field(
        1e-3, description="What a step moves the bias of an expert that got too few or too many tokens by."
    )
    groups: tuple[GroupConfig, ...] = Field((), description="The first whose pattern matches a parameter counts.")
    ema_decay: Decay | None = Field(
        None, description="Decay of a running mean of the weights, kept and validated beside them; null keeps none."
    )
    schedule: ScheduleConfig = ScheduleConfig()
