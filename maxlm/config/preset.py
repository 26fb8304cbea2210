"""Published models: `configs/models/*.yaml`, which training configurations take as their `base`."""

from typing import Literal

from pydantic import Field, PositiveInt

from maxlm.config.base import Count, Frozen
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.optim import OptimConfig


class AboutConfig(Frozen):
    """Where a model comes from."""

    title: str
    source: str = Field(description="Address of the model card or paper.")
    parameters: PositiveInt = Field(description="The published number, possibly rounded.")


class PresetConfig(Frozen):
    """A published model, and how it was trained as far as that is known."""

    kind: Literal["model"] = "model"
    about: AboutConfig
    model: ModelConfig
    execution: ExecutionConfig
    optim: OptimConfig = OptimConfig()
    batch_size: Count | None = None
    row_length: Count | None = None
