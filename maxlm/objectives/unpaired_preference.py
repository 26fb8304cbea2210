"""Preference optimization from answers that were judged alone: make good ones more likely, and bad ones less.

Dimensions: B answers, L length.
"""

from collections.abc import Iterator
from functools import partial
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveFloat

from maxlm.config.base import Frozen
from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch, put_batch
from maxlm.core.term import LossOutput, Term
from maxlm.data.examples.judged import JudgedAnswers
from maxlm.models.applied import AppliedModel
from maxlm.models.decoder import Decoder
from maxlm.objectives.record_data import Examples, RecordData, first_examples
from maxlm.objectives.reference import with_reference
from maxlm.objectives.sequences import is_real, local_rows, rows_of, target_log_probabilities
from maxlm.objectives.validation import means_of
from maxlm.ops.preference_losses import kto_loss
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, Objective, PreviewRow, RunContext


class KtoLoss(Frozen):
    """Kahneman-Tversky optimization: gains are compared with the divergence from the starting model."""

    needs_baseline: ClassVar[bool] = True

    kind: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1


class ApoZeroLoss(Frozen):
    """Anchored preference optimization of good answers that are better than the model's: gains are compared with 0."""

    needs_baseline: ClassVar[bool] = False

    kind: Literal["apo"] = "apo"
    beta: PositiveFloat = 0.1


class UnpairedPreferenceOptimization(Objective, RecordsConfig):
    """Learn from answers that were judged alone (KTO)."""

    kind: Literal["unpaired_preference"] = "unpaired_preference"
    train_file: str = Field(
        description="Answers: JSON, JSONL or Parquet with a prompt, `completion` and `label` (true: good), chats with"
        " `label`, or pairs."
    )
    loss: Annotated[KtoLoss | ApoZeroLoss, Field(discriminator="kind")] = KtoLoss()
    good_weight: NonNegativeFloat = Field(1.0, description="Weight of good answers.")
    bad_weight: NonNegativeFloat = Field(
        1.0, description="Weight of bad ones; good_weight * good ones should be 1 to 4/3 times bad_weight * bad ones."
    )

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        answers, values = batch["answers"], batch.values
        output = model.outputs["answers"]
        real_B, is_good_B = is_real(answers), values["is_good_B"]
        gain_B = jnp.sum(target_log_probabilities(model.decoder, answers, output), axis=1) - values["reference_B"]
        loss_B = kto_loss(gain_B, is_good_B, values.get("baseline_B", 0.0), beta=self.loss.beta)
        weight_B = real_B * jnp.where(is_good_B > 0, self.good_weight, self.bad_weight)
        # As in the paper, a weighted loss is divided by the number of answers.
        terms: dict[str, Term] = {self.loss.kind: Term(jnp.sum(weight_B * loss_B), jnp.sum(real_B))}
        reward_B, good_B, bad_B = self.loss.beta * gain_B, real_B * is_good_B, real_B * (1 - is_good_B)
        metrics = {
            "reward_good": Term(jnp.sum(good_B * reward_B), jnp.sum(good_B)),
            "reward_bad": Term(jnp.sum(bad_B * reward_B), jnp.sum(bad_B)),
        }
        if self.loss.needs_baseline:
            metrics["kl"] = Term(jnp.sum(real_B * values["baseline_B"]), jnp.sum(real_B))
        return LossOutput(terms, metrics).joined(output.auxiliary)

    def open_data(self, context: RunContext) -> RecordData:
        config = context.config

        def prepare(examples: Examples, indices: np.ndarray) -> Examples:
            return with_reference(examples, context, indices, _reference_sums, key="judged answers")

        @jax.jit
        def baseline(model: Decoder, batch: Batch) -> jax.Array:
            """An estimate of the divergence from the starting model, for each row (arXiv:2402.01306, section 4.1)."""
            real_B = is_real(batch["mismatched"])
            gain_B = _log_probability(model, batch, "mismatched") - batch.values["reference_mismatched_B"]
            mean = Term(jnp.sum(real_B * gain_B), jnp.sum(real_B)).mean()
            return jnp.maximum(mean, 0.0) * real_B

        def with_baseline(model: Decoder, batch: Batch) -> Batch:
            values = dict(batch.values)
            if self.loss.needs_baseline:
                values["baseline_B"] = local_rows(baseline(model, put_batch(batch, context.mesh)))
            del values["reference_mismatched_B"]
            return Batch({"answers": batch["answers"]}, values)

        def summarize(sums: dict[str, Term], batches: list[Batch]) -> dict[str, float]:
            means = means_of(self.loss.kind, "reward_good", "reward_bad")(sums, batches)
            return means | {"reward_margin": means["reward_good"] - means["reward_bad"]}

        read = partial(self._read, config=config, tokenizer=context.tokenizer, parts=context.row_parts)
        return RecordData(
            context,
            read,
            loss=self.compute_loss,
            summarize=summarize,
            prepare_examples=prepare,
            with_policy=with_baseline,
        )

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        batch = first_examples(self._read(self.train_file, config=config, tokenizer=tokenizer), config, num_examples)
        for number, (row, is_good) in enumerate(zip(rows_of(batch["answers"]), batch.values["is_good_B"]), 1):
            yield PreviewRow(f"answer {number}, {'good' if is_good else 'bad'}", row)

    def example(self, make: ExampleMaker) -> Batch:
        answers = make.sequences(shared=5)
        count = len(answers.tokens)
        noise_B = make.normal((count,), scale=3)
        return Batch(
            {"answers": answers},
            {
                "is_good_B": (make.normal((count,)) > 0).astype(np.float32),
                "reference_B": (make.log_probabilities(answers).sum(axis=1) + noise_B).astype(np.float32),
                "baseline_B": np.full(count, 0.7, np.float32),
            },
        )

    def _read(self, path: str, *, config: TrainConfig, tokenizer: Tokenizer, parts: int = 1) -> JudgedAnswers:
        return JudgedAnswers.read(path, tokenizer, row_length=config.row_length, parts=parts, form=self)


def _log_probability(model: Decoder, batch: Batch, name: str) -> jax.Array:
    """Of the answers of a stream: [B]."""
    return jnp.sum(target_log_probabilities(model, batch[name]), axis=1)


def _reference_sums(model: Decoder, batch: Batch) -> dict[str, jax.Array]:
    return {
        "reference_B": _log_probability(model, batch, "answers"),
        "reference_mismatched_B": _log_probability(model, batch, "mismatched"),
    }


OBJECTIVE = UnpairedPreferenceOptimization
