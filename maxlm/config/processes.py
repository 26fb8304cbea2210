"""Training with several processes, on several machines."""

from pydantic import Field

from maxlm.config.base import Count, Frozen, Seconds


class ProcessesConfig(Frozen):
    """Timeouts between processes, and when a supervisor restarts them."""

    start_timeout_seconds: Seconds = Field(300.0, description="How long to wait for all processes to connect.")
    heartbeat_seconds: Seconds = Field(
        30.0,
        description="Heartbeat timeout: a process silent for this long counts as lost, and the others stop.",
    )
    restart_seconds: Seconds = Field(
        2.0, description="A supervisor's first wait before it restarts training; each further wait is twice as long."
    )
    restarts_without_progress: Count = Field(
        3, description="A supervisor gives up after this many consecutive starts without a new checkpoint."
    )
