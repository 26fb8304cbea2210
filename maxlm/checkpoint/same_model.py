"""Whether two model configurations compute the same function of the same weights."""

from typing import Any

from maxlm.config.model import ModelConfig
from maxlm.errors import CheckpointError


def check_same_model(wanted: ModelConfig, trained: ModelConfig, where: Any) -> None:
    """Raise CheckpointError if the weights of one model would be loaded as another model."""
    for name in ModelConfig.model_fields:
        if name == "vocab_size" or not _differs(name, wanted, trained):
            continue
        raise CheckpointError(
            f"{where}: is a model with {name} {getattr(trained, name)}, but model.{name} is"
            f" {getattr(wanted, name)}; leave it out to use the checkpoint's value"
        )


def _differs(name: str, model: ModelConfig, other: ModelConfig) -> bool:
    left, right = getattr(model, name), getattr(other, name)
    if name == "moe" and left and right:
        return left.function() != right.function()
    return left != right
