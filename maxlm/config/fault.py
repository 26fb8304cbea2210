"""What a run does about bad steps, storage that fails, and lost machines."""

from typing import Annotated

from pydantic import Field, PositiveFloat

from maxlm.config.base import Count, CountOrZero, Frozen


class GuardConfig(Frozen):
    """Steps whose loss or gradient is not finite, or jumps, are skipped and counted; after many, the run goes back."""

    spike_factor: PositiveFloat | None = Field(
        10.0, description="Skip a step whose gradient norm exceeds this many times its running mean."
    )
    max_skipped_in_a_row: Count = Field(
        5, description="After so many, go back to the last checkpoint and pass over their batches."
    )
    max_rollbacks: CountOrZero = Field(3, description="Times that a run may go back before it stops.")


class LocalCheckpointConfig(Frozen):
    """Frequent checkpoints on a fast disk, beside those in the run folder."""

    folder: str = Field(description="A local folder that all processes share, such as one on the machine's own disk.")
    every: Count = 50
    keep: Count = 1


class CheckpointConfig(Frozen):
    """When checkpoints are saved, how many stay, and how often a storage that fails is tried again."""

    every: Count = 500
    keep: Count = 2
    retries: CountOrZero = Field(3, description="Times that a save or restore that failed is tried again.")
    retry_seconds: Annotated[float, Field(ge=0, le=1e9)] = Field(
        1.0, description="Wait before the first of them; each wait is about twice the one before it."
    )
    local: LocalCheckpointConfig | None = None
