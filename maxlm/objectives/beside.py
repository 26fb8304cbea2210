"""Models that a run computes with beside the one that it trains: teachers and reward models."""

from jax.sharding import Mesh

from maxlm.checkpoint.folder import find_checkpoint, read_metadata, trained_as
from maxlm.config.execution import ExecutionConfig
from maxlm.config.model import ModelConfig
from maxlm.config.train import TrainConfig
from maxlm.errors import CheckpointError, ConfigError
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.layout import check_layout


def check_beside(
    path: str, config: TrainConfig, tokenizer: Tokenizer, mesh: Mesh, *, key: str, remedy: str
) -> tuple[ModelConfig, ExecutionConfig]:
    """What a trained model is, and how to compute it in this run, before its weights are loaded.

    Args:
      key: of the configuration that names it.
      remedy: if it has another tokenizer.

    Raises:
      CheckpointError: the model does not exist, or has another tokenizer.
      ConfigError: it does not fit the mesh or the rows, or the objective cannot use it.
    """
    checkpoint = find_checkpoint(path)
    metadata = read_metadata(checkpoint)
    if metadata["fingerprint"] not in (None, tokenizer.fingerprint):
        raise CheckpointError(
            f"{key}: {path} has another tokenizer, so its tokens are not those of the trained model; {remedy}"
        )
    # Both models are computed on one mesh, so the pipeline settings of the run apply to this one too.
    trained = trained_as(metadata, where=checkpoint)
    model, execution = trained.merged.main_model, trained.execution
    execution = execution.model_copy(update={"pipeline": config.execution.pipeline})
    if problems := config.objective.model_problems(model):
        raise ConfigError([f"{key}: {path}: {problem}" for problem in problems])
    if config.row_length > execution.max_length:
        raise ConfigError(
            [f"row_length: {config.row_length} exceeds the max_length of {execution.max_length} of {path} ({key})"]
        )
    try:
        check_layout(config.model_copy(update={"model": model, "execution": execution}), mesh.shape)
    except ConfigError as error:
        raise ConfigError([f"{key}: {path}: {problem}" for problem in error.problems]) from None
    return model, execution
