"""Whether two model configurations compute the same function of the same weights."""

from typing import Any

from maxlm.config.model import ModelConfig
from maxlm.config.resume import differences
from maxlm.errors import CheckpointError


def check_same_model(wanted: ModelConfig, trained: ModelConfig, where: Any) -> None:
    """Raise CheckpointError if the weights of one model would be loaded as another model."""
    for name, given, saved in differences(wanted.model_dump(mode="json"), trained.model_dump(mode="json")):
        # A family is only a format, and prediction modules may be added and left out as a whole.
        if name not in ("vocab_size", "family", "token_ids", "multi_token"):
            raise CheckpointError(
                f"{where}: is a model with {name} {saved}, but model.{name} is {given}; leave it out to use the"
                " checkpoint's value"
            )
