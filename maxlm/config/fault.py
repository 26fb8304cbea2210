"""What a run does about bad steps and lost machines."""

from pydantic import Field, PositiveFloat

from maxlm.config.base import Count, Frozen


class GuardConfig(Frozen):
    """Steps whose loss or gradient is not finite, or jumps, are skipped and counted."""

    spike_factor: PositiveFloat | None = Field(
        10.0, description="Skip a step whose gradient norm exceeds this many times its running mean."
    )
    max_skipped_in_a_row: Count = 5


class CheckpointConfig(Frozen):
    """When checkpoints are saved, and how many stay."""

    every: Count = 500
    keep: Count = 2
