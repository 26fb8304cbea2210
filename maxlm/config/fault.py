"""How a run handles bad steps, failing storage and lost machines."""

from typing import Annotated

from pydantic import Field, PositiveFloat

from maxlm.config.base import Count, CountOrZero, Frozen


class GuardConfig(Frozen):
    """Skip and count steps with a non-finite loss or gradient, or a spike; after many in a row, roll back."""

    spike_factor: PositiveFloat | None = Field(
        10.0, description="Skip a step whose gradient norm exceeds its running mean times this factor."
    )
    max_skipped_in_a_row: Count = Field(
        5, description="After this many, roll back to the last checkpoint and skip their batches."
    )
    max_rollbacks: CountOrZero = Field(3, description="Rollbacks before a run stops with an error.")


class LocalCheckpointConfig(Frozen):
    """Frequent checkpoints on a fast local disk, in addition to those in the run folder."""

    folder: str = Field(description="A local folder shared by all processes, such as one on the machine's own disk.")
    every: Count = 50
    keep: Count = 1


class CheckpointConfig(Frozen):
    """How often checkpoints are saved, how many are kept, and how storage errors are retried."""

    every: Count = 500
    keep: Count = 2
    retries: CountOrZero = Field(3, description="Retries of a failed save or restore.")
    retry_seconds: Annotated[float, Field(ge=0, le=1e9)] = Field(
        1.0, description="Wait before the first retry; each further wait is about twice as long."
    )
    local: LocalCheckpointConfig | None = None
