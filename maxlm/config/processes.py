"""Several processes, on several machines, that train as one."""

from pydantic import Field

from maxlm.config.base import Count, Frozen, Seconds


class ProcessesConfig(Frozen):
    """How long they wait for each other, and when a supervisor starts them again."""

    start_timeout_seconds: Seconds = Field(300.0, description="Until all must have come.")
    heartbeat_seconds: Seconds = Field(
        30.0, description="A process that says nothing for so long is given up, and the others stop."
    )
    restart_seconds: Seconds = Field(
        2.0, description="A supervisor's first wait before it starts training again; each further one is twice as long."
    )
    restarts_without_progress: Count = Field(
        3, description="A supervisor gives up after so many starts that saved no further checkpoint."
    )
