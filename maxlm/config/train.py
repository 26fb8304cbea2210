"""A training run: objective, data, optimizer, mesh, checkpoints."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeFloat, PositiveFloat, model_validator

from maxlm.config.base import Count, CountOrZero, Fraction, Frozen, Seed
from maxlm.config.data import RecordFormat
from maxlm.config.fault import CheckpointConfig, GuardConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig
from maxlm.config.optim import OptimConfig
from maxlm.config.processes import ProcessesConfig


class PackedSource(Frozen):
    """Packed rows to train on, and their share of the mixture."""

    path: str = Field(description="A folder of `maxlm data build`.")
    weight: PositiveFloat = 1.0


class PretrainObjective(Frozen):
    """Next-token prediction on packed rows."""

    kind: Literal["pretrain"] = "pretrain"
    sources: tuple[PackedSource, ...] = Field(min_length=1)
    z_loss: NonNegativeFloat = Field(0.0, description="Weight of the mean squared log of the softmax's normaliser.")


class DistillObjective(Frozen):
    """Learning the probabilities that a teacher gives to every token, on packed rows."""

    kind: Literal["distill"] = "distill"
    teacher: str = Field(description="A run folder or checkpoint of a model with the same tokenizer.")
    sources: tuple[PackedSource, ...] = Field(min_length=1)
    temperature: PositiveFloat = Field(1.0, description="Divides the logits of both; above 1 small ones count more.")
    alpha: Fraction = Field(0.5, description="Weight of the teacher's probabilities; the rest is cross-entropy's.")


class SftObjective(RecordFormat):
    """Next-token prediction on the assistant's tokens of chats."""

    kind: Literal["sft"] = "sft"
    train_file: str = Field(
        description="Chats: JSON, JSONL or Parquet with `messages`, `conversations`, or instruction and output."
    )
    valid_file: str | None = None
    z_loss: NonNegativeFloat = 0.0


class RewardObjective(RecordFormat):
    """A scalar head trained on preference pairs with the Bradley-Terry loss."""

    kind: Literal["reward"] = "reward"
    train_file: str = Field(
        description="Pairs: JSON, JSONL or Parquet with `prompt` (messages or text), `chosen` and `rejected`."
    )
    valid_file: str | None = None
    center: NonNegativeFloat = Field(0.0, description="Weight of the squared sum of a pair's rewards.")


class DpoObjective(RecordFormat):
    """Direct preference optimization against the frozen starting model."""

    kind: Literal["dpo"] = "dpo"
    train_file: str = Field(
        description="Pairs: JSON, JSONL or Parquet with `prompt` (messages or text), `chosen` and `rejected`."
    )
    valid_file: str | None = None
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    sft_weight: NonNegativeFloat = Field(0.0, description="Weight of the next-token loss on the chosen answers.")


class GrpoObjective(RecordFormat):
    """Group-relative policy optimization on prompts whose answers can be checked."""

    kind: Literal["grpo"] = "grpo"
    train_file: str = Field(
        description="Prompts: JSON, JSONL or Parquet with `prompt` (messages or text) and `answer`."
    )
    valid_file: str | None = None
    reward: str = Field(
        "exact_match", description="A reward function of `maxlm.post.rewards`, or your own as package.module:function."
    )
    group_size: Annotated[int, Field(ge=2)] = Field(8, description="Answers sampled for a prompt.")
    max_new_tokens: Count = 32
    temperature: PositiveFloat = 1.0
    clip_low: PositiveFloat = 0.2
    clip_high: PositiveFloat = 0.28
    kl_beta: NonNegativeFloat = Field(0.0, description="Weight of the KL divergence from the starting model.")
    updates_per_rollout: Count = Field(
        1, description="Steps that learn from one round of sampling, each from answers of its own."
    )
    normalize_std: bool = Field(True, description="Divide advantages by the group's standard deviation.")


Objective = Annotated[
    PretrainObjective | DistillObjective | SftObjective | RewardObjective | DpoObjective | GrpoObjective,
    Field(discriminator="kind"),
]


# Kinds that read folders of `maxlm data build`, and not a file of records.
PACKED_OBJECTIVES = ("pretrain", "distill")


class LoraConfig(Frozen):
    """Low-rank adapters: only they are trained."""

    rank: Count = 8
    alpha: PositiveFloat = 16.0
    targets: tuple[str, ...] = Field(
        ("query", "key", "value", "out", "gate", "up", "down"), description="Names of the weights that get an adapter."
    )


class TrainConfig(Frozen):
    """`maxlm train`: one run of one objective."""

    kind: Literal["train"]
    output: str = Field(description="The run folder; a run that stands there already is resumed.")
    init_from: str | None = Field(None, description="A run folder or checkpoint whose weights are the start.")
    tokenizer: str | None = Field(None, description="Tokenizer folder; null takes that of the data or of init_from.")
    model: ModelConfig | None = Field(None, description="null takes the model of init_from.")
    objective: Objective
    lora: LoraConfig | None = None
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    processes: ProcessesConfig = ProcessesConfig()
    steps: Count = 1000
    batch_size: Count = Field(
        16, description="Rows in a step, over all devices; for preferences pairs, for GRPO prompts."
    )
    accumulate: Count = Field(1, description="Microbatches that a step is cut into.")
    row_length: Count = Field(256, description="Tokens in a row.")
    log_every: Count = 10
    eval_every: CountOrZero = Field(200, description="Steps between validations; 0 validates at the end alone.")
    eval_batches: Count = Field(16, description="Batches of a validation.")
    seed: Seed = 0

    @model_validator(mode="after")
    def _fits(self) -> Self:
        problems = []
        if self.batch_size % self.accumulate:
            problems.append(f"batch_size ({self.batch_size}) must be a multiple of accumulate ({self.accumulate})")
        if self.optim.schedule.warmup(self.steps) > self.steps:
            problems.append(
                f"optim.schedule.warmup_steps ({self.optim.schedule.warmup_steps}) exceeds steps ({self.steps}), so the"
                f" learning rate would never be reached; set it to at most {self.steps}"
            )
        if self.model is None and self.init_from is None:
            problems.append("either model or init_from must be given")
        if self.model is not None and self.row_length > self.model.max_length:
            problems.append(f"row_length ({self.row_length}) exceeds model.max_length ({self.model.max_length})")
        if self.objective.kind in ("dpo", "grpo", "sft", "reward") and self.init_from is None:
            problems.append(f"init_from must name the model that objective.kind={self.objective.kind} starts from")
        if self.objective.kind == "grpo":
            if self.objective.max_new_tokens >= self.row_length:
                problems.append(
                    f"objective.max_new_tokens ({self.objective.max_new_tokens}) leaves no room for a prompt in"
                    f" row_length ({self.row_length})"
                )
            # Answers are sampled every so many steps, with the weights of that step: a run can go on from there alone.
            multiple = self.objective.updates_per_rollout
            for name, value in (("steps", self.steps), ("checkpoint.every", self.checkpoint.every)):
                if value % multiple:
                    problems.append(f"{name} ({value}) must be a multiple of updates_per_rollout ({multiple})")
        if problems:
            raise ValueError("; ".join(problems))
        return self
