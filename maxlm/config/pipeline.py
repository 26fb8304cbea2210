"""Pipeline schedule."""

from typing import Literal

from pydantic import Field

from maxlm.config.base import Count, Frozen


class PipelineConfig(Frozen):
    """Microbatches over the `stage` axis of the mesh; without that axis it has no effect."""

    schedule: Literal["gpipe", "1f1b"] = Field(
        "gpipe",
        description="gpipe: all forward passes, then all backward ones; 1f1b: a microbatch's backward pass begins as"
        " soon as it leaves the last stage, so that activations do not grow with the microbatches.",
    )
    microbatches: Count | None = Field(
        None, description="Pipeline microbatches per (micro)batch of a step; null uses twice the stages, or once."
    )
    repeats: Count = Field(
        1, description="Groups of layers per stage; a microbatch goes around this many times: divides the bubble."
    )
