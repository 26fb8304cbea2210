"""Whether two configurations of a model are of the same function of the same weights."""

from typing import Any

from maxlm.config.model import ModelConfig
from maxlm.errors import CheckpointError

# Fields that change how a model is computed, and not what it computes.
RUNTIME_FIELDS = (
    "activation_dtype",
    "matmul_dtype",
    "eight_bit",
    "remat",
    "unroll",
    "loss_chunk_length",
    "pipeline",
    "attention",
    "context_attention",
    "max_length",
)


def check_same_model(wanted: ModelConfig, trained: ModelConfig, where: Any) -> None:
    """Raise CheckpointError when weights trained as one model would be taken for another."""
    for name in ModelConfig.model_fields:
        if name in ("vocab_size", *RUNTIME_FIELDS) or not _differs(name, wanted, trained):
            continue
        raise CheckpointError(
            f"{where}: is a model with {name} {getattr(trained, name)}, and model.{name} asks for"
            f" {getattr(wanted, name)}; leave it out to take that one's"
        )


def _differs(name: str, model: ModelConfig, other: ModelConfig) -> bool:
    left, right = getattr(model, name), getattr(other, name)
    if name == "moe" and left and right:
        return left.function() != right.function()
    return left != right
