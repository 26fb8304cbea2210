"""A training run: objective, data, optimizer, mesh, checkpoints."""

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator

from maxlm.config.adapters import AdaptersConfig, LoraConfig
from maxlm.config.base import Count, CountOrZero, Frozen, Seed
from maxlm.config.execution import DEFAULT_EXECUTION, ExecutionConfig
from maxlm.config.fault import CheckpointConfig, GuardConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig
from maxlm.config.objective import AnyObjective
from maxlm.config.optim import OptimConfig
from maxlm.config.processes import ProcessesConfig
from maxlm.config.regularization import RegularizationConfig


class TrainConfig(Frozen):
    """`maxlm train`: one run of one objective."""

    # The objectives are imported when the first configuration is validated.
    model_config = ConfigDict(defer_build=True)

    kind: Literal["train"]
    output: str = Field(description="The run folder; an existing run there is resumed.")
    init_from: str | None = Field(None, description="A run folder or checkpoint with the initial weights.")
    tokenizer: str | None = Field(None, description="Tokenizer folder; null uses that of the data or of init_from.")
    chat_template: str | None = Field(
        None,
        description="For a tokenizer without a chat template: the name of one, such as chatml or llama3, or a Jinja"
        " file; docs/chats.md lists them.",
    )
    model: ModelConfig | None = Field(None, description="null uses the model of init_from.")
    execution: ExecutionConfig | None = Field(None, description="null uses that of init_from, or the defaults.")
    objective: AnyObjective
    adapters: AdaptersConfig | None = Field(None, description="Train few parameters next to the frozen model.")
    regularization: RegularizationConfig = RegularizationConfig()
    optim: OptimConfig = OptimConfig()
    mesh: MeshConfig = MeshConfig()
    guard: GuardConfig = GuardConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    processes: ProcessesConfig = ProcessesConfig()
    steps: Count = 1000
    batch_size: Count = Field(
        16, description="Global batch size: rows per step; pairs for preferences, prompts for GRPO."
    )
    accumulate: Count = Field(1, description="Gradient accumulation: microbatches that a step is split into.")
    row_length: Count = Field(256, description="Tokens in a row.")
    log_every: Count = 10
    eval_every: CountOrZero = Field(200, description="Steps between validations; 0 validates only at the end.")
    eval_batches: Count = Field(16, description="Batches per validation.")
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
        if self.regularization.adapter_dropout and not isinstance(self.adapters, LoraConfig):
            problems.append(
                "regularization.adapter_dropout is of the inputs of low-rank updates; set adapters.kind=lora, or leave"
                " it out"
            )
        if self.model is None and self.init_from is None:
            problems.append("either model or init_from must be given")
        execution = self.execution or (DEFAULT_EXECUTION if self.init_from is None else None)
        if execution is not None and self.row_length > execution.max_length:
            problems.append(f"row_length ({self.row_length}) exceeds execution.max_length ({execution.max_length})")
        positions = None if self.model is None else self.model.learned_positions
        if execution is not None and positions is not None and execution.max_length > positions:
            problems.append(
                f"execution.max_length ({execution.max_length}) exceeds model.learned_positions ({positions})"
            )
        if self.objective.needs_start and self.init_from is None:
            problems.append(f"init_from must name the model that objective.kind={self.objective.kind} starts from")
        problems += self.objective.problems(self)
        if self.model is not None:
            problems += self.objective.model_problems(self.model)
        if problems:
            raise ValueError("; ".join(problems))
        return self
