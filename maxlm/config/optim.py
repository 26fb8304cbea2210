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
        " `decay_fraction` of the steps; inverse_sqrt: with the root of the step, open-ended; cosine_restarts:"
        " `cycles` times from 1 to `final_factor`.",
    )
    warmup_steps: CountOrZero | None = Field(None, description="null is 20, or all steps of a shorter run.")
    decay_fraction: Fraction = 0.2
    final_factor: Fraction = 0.1
    cycles: Count = Field(4, description="Cycles of cosine_restarts between the warm-up and the last step.")
    cycle_growth: Annotated[float, Field(ge=1)] = Field(1.0, description="How many times longer each cycle is.")

    def warmup(self, num_steps: int) -> int:
        """Warm-up steps of a run of `num_steps`."""
        return min(20, num_steps) if self.warmup_steps is None else self.warmup_steps


class GroupConfig(Frozen):
    """A parameter group with its own learning-rate factor and weight decay."""

    match: Annotated[str, Field(min_length=1)] = Field(
        description="Pattern of parameter paths, such as `*/mlp/*` or `*norm*`; * matches anything."
    )
    learning_rate_factor: NonNegativeFloat = Field(1.0, description="0 freezes the parameters.")
    weight_decay: NonNegativeFloat | None = Field(
        None, description="For all these parameters, matrices or not; null is optim.weight_decay, for matrices only."
    )


class NewRowsConfig(Frozen):
    """Training that begins with the rows of new tokens only, after the vocabulary was extended."""

    first: Count = Field(description="The id of the first new token: how many tokens there were before.")
    steps: Count = Field(
        description="So many steps change only rows of the embedding and the output table from `first` on, and no bit"
        " of any other weight; then everything is trained. The optimizer's moments are those of all gradients."
    )


class OptimConfig(Frozen):
    """The optimizer, and the gradient transformations before it."""

    kind: Literal["adamw", "adam8bit", "adafactor", "lion", "sgd", "muon", "soap"] = Field(
        "adamw",
        description="adam8bit: AdamW with 8-bit moments; muon and soap apply to the layers' matrices and"
        " leave the rest to AdamW.",
    )
    learning_rate: PositiveFloat = 3e-4
    muon_learning_rate: PositiveFloat = 0.02
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    epsilon: PositiveFloat = 1e-8
    momentum: Decay = Field(0.95, description="For sgd and muon, both Nesterov.")
    precondition_every: Count = Field(10, description="Steps between updates of soap's eigenbases.")
    precondition_max_dim: Count = Field(
        4096, description="Longer sides of a matrix keep the identity basis in soap: its state grows with their square."
    )
    weight_decay: NonNegativeFloat = Field(
        0.1, description="Of matrices, decoupled: each step subtracts learning rate * decay * weight."
    )
    l1_penalty: NonNegativeFloat = Field(0.0, description="Weight of the sum of |w| over matrices, in the gradient.")
    l2_penalty: NonNegativeFloat = Field(0.0, description="Weight of half the sum of w^2, in the gradient.")
    clip_norm: PositiveFloat | None = 1.0
    router_bias_rate: NonNegativeFloat = Field(
        1e-3, description="How far a step moves the bias of an expert that got too few or too many tokens."
    )
    groups: tuple[GroupConfig, ...] = Field((), description="A parameter belongs to the first group that matches.")
    new_rows: NewRowsConfig | None = Field(
        None, description="Train the embeddings of new tokens first, before they change the rest; null: everything."
    )
    ema_decay: Decay | None = Field(
        None, description="Decay of an exponential moving average of the weights, saved and validated too; null: none."
    )
    schedule: ScheduleConfig = ScheduleConfig()
