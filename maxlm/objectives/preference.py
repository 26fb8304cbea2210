"""Preference optimization: make the chosen answer more likely than the rejected one, relative to the starting model.

Dimensions: B pairs, L length.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import jax
import jax.numpy as jnp
from pydantic import Field, NonNegativeFloat, PositiveFloat

from maxlm.config.base import Frozen
from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, put_batch
from maxlm.core.term import LossOutput, Term, add
from maxlm.models.applied import AppliedModel
from maxlm.objectives.pairs import example_pairs, open_pairs, preview_pairs
from maxlm.objectives.record_data import RecordData
from maxlm.objectives.sequences import is_real, local_rows, target_log_probabilities, whole_rows
from maxlm.ops.preference_losses import dpo_loss, hinge_loss
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext


class DpoLoss(Frozen):
    """Direct preference optimization."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0

    def __call__(self, margin_B: jax.Array) -> jax.Array:
        return dpo_loss(margin_B, beta=self.beta, label_smoothing=self.label_smoothing)


class HingeLoss(Frozen):
    """Hinge loss: zero once the margin of a pair reaches 1 / beta."""

    kind: Literal["hinge"] = "hinge"
    beta: PositiveFloat = 0.1

    def __call__(self, margin_B: jax.Array) -> jax.Array:
        return hinge_loss(margin_B, beta=self.beta)


class PreferenceOptimization(Objective, RecordsConfig):
    """Learn from pairs of answers, regularized towards the frozen starting model."""

    kind: Literal["preference"] = "preference"
    train_file: str = Field(
        description="Pairs: JSON, JSONL or Parquet with `prompt` (messages or text), `chosen` and `rejected`."
    )
    loss: Annotated[DpoLoss | HingeLoss, Field(discriminator="kind")] = Field(
        DpoLoss(), description="Loss of a pair: a function of the margin of the chosen answer over the rejected one."
    )
    sft_weight: NonNegativeFloat = Field(0.0, description="Weight of the next-token loss on the chosen answers.")

    @property
    def needs_reference(self) -> bool:
        return True

    def compute_loss(self, model: AppliedModel, batch: Batch, teacher: AppliedModel | None = None) -> LossOutput:
        chosen, rejected, pair_loss = batch["chosen"], batch["rejected"], self.loss
        real_B = is_real(chosen)
        weight = jnp.sum(real_B)

        outputs = model.outputs
        chosen_BL = target_log_probabilities(model.decoder, chosen, outputs["chosen"])
        rejected_BL = target_log_probabilities(model.decoder, rejected, outputs["rejected"])
        gain_chosen_B = jnp.sum(chosen_BL, axis=1) - batch.values["reference_chosen_B"]
        gain_rejected_B = jnp.sum(rejected_BL, axis=1) - batch.values["reference_rejected_B"]
        margin_B = gain_chosen_B - gain_rejected_B

        terms: dict[str, Term] = {pair_loss.kind: Term(jnp.sum(real_B * pair_loss(margin_B)), weight)}
        if self.sft_weight:
            smoothed_BL = chosen_BL
            if model.label_smoothing:
                smoothed_BL = target_log_probabilities(
                    model.decoder, chosen, outputs["chosen"], smoothing=model.label_smoothing
                )
            terms["sft"] = Term(-self.sft_weight * jnp.sum(smoothed_BL), jnp.sum(chosen.loss_weights))
        metrics = {
            "accuracy": Term(jnp.sum(real_B * (margin_B > 0)), weight),
            "reward_margin": Term(pair_loss.beta * jnp.sum(real_B * margin_B), weight),
            "reward_chosen": Term(pair_loss.beta * jnp.sum(real_B * gain_chosen_B), weight),
            "reward_rejected": Term(pair_loss.beta * jnp.sum(real_B * gain_rejected_B), weight),
        }
        return LossOutput(terms, metrics).joined(add(outputs["chosen"].auxiliary, outputs["rejected"].auxiliary))

    def open_data(self, context: RunContext) -> RecordData:
        @jax.jit
        def reference_sums(model: Any, pairs: Batch) -> dict[str, jax.Array]:
            return {
                f"reference_{name}_B": jnp.sum(whole_rows(target_log_probabilities(model, pairs[name])), axis=1)
                for name in ("chosen", "rejected")
            }

        def with_reference(pairs: Batch) -> Batch:
            sums = reference_sums(context.reference, put_batch(pairs, context.mesh))
            return replace(pairs, values={name: local_rows(value) for name, value in sums.items()})

        return open_pairs(context, self.compute_loss, term=self.loss.kind, complete=with_reference)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        return preview_pairs(self, config, tokenizer, num_examples)

    def example(self, make: ExampleMaker) -> Batch:
        pairs = example_pairs(make)

        def reference(name: str) -> Any:
            stream = pairs[name]
            noise_B = make.normal((len(stream.tokens),), scale=3) * (stream.segment_ids > 0).any(axis=1)
            return (make.log_probabilities(stream).sum(axis=1) + noise_B).astype("float32")

        return replace(pairs, values={f"reference_{name}_B": reference(name) for name in pairs.streams})

    def for_verification(self) -> Self:
        return self.model_copy(update={"sft_weight": max(self.sft_weight, 0.1)})


OBJECTIVE = PreferenceOptimization
