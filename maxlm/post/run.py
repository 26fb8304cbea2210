"""One entry for every objective."""

from typing import Any

import jax

from maxlm.config.train import TrainConfig
from maxlm.models.decoder import Decoder
from maxlm.models.reward import RewardModel
from maxlm.post.distill import Distill, load_teacher
from maxlm.post.dpo import Dpo
from maxlm.post.grpo import Grpo
from maxlm.post.reward import Reward
from maxlm.post.sft import Sft
from maxlm.train import run
from maxlm.train.pretrain import Pretrain

_OBJECTIVES = {"pretrain": Pretrain, "distill": Distill, "sft": Sft, "reward": Reward, "dpo": Dpo, "grpo": Grpo}


def train(config: TrainConfig, *, accept_changes: bool = False) -> dict[str, Any]:
    """Run `config` to its end, or resume it, and return the manifest that stands in its folder.

    Args:
      accept_changes: go on with a run that was trained with other settings, which are then recorded.

    Raises:
      MaxlmError: what the user can mend: configuration, data, tokenizer, checkpoints, skipped steps.
    """
    return run.train(config, recipe_of(config), accept_changes=accept_changes)


def recipe_of(config: TrainConfig) -> run.Recipe:
    """How the model of a configuration's objective is made, and what it is trained for."""
    objective = config.objective
    needs_reference = objective.kind == "dpo" or (objective.kind == "grpo" and objective.kl_beta > 0)
    if objective.kind == "reward":
        declare, from_decoder = RewardModel, RewardModel.from_decoder
    else:
        declare, from_decoder = Decoder, _unchanged
    teacher = load_teacher if objective.kind == "distill" else None
    return run.Recipe(declare, from_decoder, _OBJECTIVES[objective.kind], needs_reference, teacher)


def _unchanged(decoder: Decoder, key: jax.Array) -> Decoder:
    del key
    return decoder
