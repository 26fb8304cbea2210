"""A reward model trained on preferences.

Dimensions: B pairs.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar, Literal, Self

import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeFloat

from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term, add
from maxlm.models.applied import AppliedModel
from maxlm.objectives.pairs import example_pairs, open_pairs, preview_pairs
from maxlm.objectives.record_data import RecordData
from maxlm.objectives.scalar_head import ScalarHead, pair_scores
from maxlm.objectives.sequences import is_real
from maxlm.ops.preference_losses import bradley_terry_loss
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, PreviewRow, RunContext


class RewardModeling(ScalarHead, RecordsConfig):
    """A scalar head trained on preference pairs with the Bradley-Terry loss."""

    label: ClassVar[str] = "reward"

    kind: Literal["reward"] = "reward"
    train_file: str = Field(
        description="Pairs: JSON, JSONL or Parquet with `prompt` (messages or text), `chosen` and `rejected`, and"
        " optionally `margin`, by how much the reward of the chosen answer is to be higher."
    )
    center: NonNegativeFloat = Field(0.0, description="Weight of the squared sum of a pair's rewards.")

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        real_B = is_real(batch["chosen"])
        weight = jnp.sum(real_B)
        outputs = model.outputs
        chosen_B, rejected_B = pair_scores(model, batch)
        loss_B = bradley_terry_loss(chosen_B, rejected_B, batch.values["margin_B"])
        terms = {"bradley_terry": Term(jnp.sum(real_B * loss_B), weight)}
        if self.center:
            # Otherwise only differences are learned; this centers the rewards of a pair at zero (arXiv:2312.09244).
            terms["center"] = Term(self.center * jnp.sum(real_B * jnp.square(chosen_B + rejected_B)), weight)
        metrics = {
            "accuracy": Term(jnp.sum(real_B * (chosen_B > rejected_B)), weight),
            "reward_margin": Term(jnp.sum(real_B * (chosen_B - rejected_B)), weight),
        }
        return LossOutput(terms, metrics).joined(add(outputs["chosen"].auxiliary, outputs["rejected"].auxiliary))

    def open_data(self, context: RunContext) -> RecordData:
        return open_pairs(context, self.compute_loss, term="bradley_terry", with_margins=True)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        return preview_pairs(self, config, tokenizer, num_examples, with_margins=True)

    def example(self, make: ExampleMaker) -> Batch:
        pairs = example_pairs(make)
        return replace(pairs, values={"margin_B": np.abs(make.normal((len(pairs["chosen"].tokens),)))})

    def for_verification(self) -> Self:
        return self.model_copy(update={"center": max(self.center, 0.1)})


OBJECTIVE = RewardModeling
