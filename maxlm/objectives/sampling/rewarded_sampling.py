"""The settings that objectives share whose answers are sampled and rewarded."""

from pydantic import Field, PositiveFloat

from maxlm.config.base import Count, Seconds
from maxlm.config.feedback import JudgedReward
from maxlm.config.objective import Input, RecordsConfig
from maxlm.config.recipes import find_config
from maxlm.config.train import TrainConfig
from maxlm.objectives.sampling.sampler import Layout
from maxlm.scoring.rewards import RewardSetting, judges_of


class RewardedSampling(RecordsConfig):
    """Groups of answers to the prompts of a file, and their rewards."""

    train_file: str = Field(
        description="Prompts: JSON, JSONL or Parquet with `prompt` (messages or text), and `answer` for most rewards."
    )
    reward: RewardSetting = Field(
        "exact_match",
        description="A rule of `maxlm.scoring.rewards`, your own function as package.module:function, or a list of"
        " {name, weight, settings}, {model, weight} and {judge, constitution, weight}, whose weighted sum it is.",
    )
    reward_time_limit: Seconds = Field(
        60.0, description="Seconds that a reward function may take for the answers to one prompt."
    )
    group_size: Count = Field(8, description="Answers sampled per prompt.")
    max_new_tokens: Count = 32
    temperature: PositiveFloat = 1.0
    sampler: Layout = Field(
        "auto",
        description="The weights while sampling: `replicated` gathers the model on each device, which must have room"
        " for it; `sharded` gathers one layer at a time, in each decode step; `auto` replicates models of up to 1 GiB.",
    )
    updates_per_rollout: Count = Field(
        1, description="Training steps per round of sampling, each on different answers."
    )

    @property
    def inputs(self) -> tuple[Input, ...]:
        return (*super().inputs, *reward_inputs("reward", self.reward))

    @property
    def longest_answer(self) -> int:
        """Tokens after a prompt at most."""
        return self.max_new_tokens

    @property
    def resume_multiple(self) -> int:
        """Answers are sampled every so many steps, and a run can only resume at such a step."""
        return self.updates_per_rollout

    def problems(self, config: TrainConfig) -> list[str]:
        problems = []
        if self.group_size < 2 and any(part.measure == "wins_in_group" for part in judges_of(self.reward).values()):
            problems.append(
                "objective.reward: measure=wins_in_group compares answers to the same prompt; set objective.group_size"
                " to at least 2"
            )
        if self.longest_answer >= config.row_length:
            name = "max_new_tokens" if self.longest_answer == self.max_new_tokens else "environment.max_tokens"
            problems.append(
                f"objective.{name} ({self.longest_answer}) leaves no room for a prompt in"
                f" row_length ({config.row_length})"
            )
        counts = ("updates_per_rollout", "epochs_per_rollout")
        names = " * ".join(name for name in counts if getattr(self, name, 1) > 1)
        for name, value in (("steps", config.steps), ("checkpoint.every", config.checkpoint.every)):
            if value % self.resume_multiple:
                problems.append(f"{name} ({value}) must be a multiple of {names} ({self.resume_multiple})")
        return problems


def reward_inputs(key: str, setting: RewardSetting) -> list[Input]:
    """The reward models and constitutions that a setting below `objective` names."""
    if isinstance(setting, str):
        return []
    found = []
    for index, part in enumerate(setting):
        if isinstance(part, JudgedReward):
            path = str(find_config(part.constitution))
            found.append(Input(f"{key}.{index}.constitution", f"{key}_{index}", path, "records"))
        elif part.model is not None:
            found.append(Input(f"{key}.{index}.model", f"{key}_{index}", part.model, "weights"))
    return found
