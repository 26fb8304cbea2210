"""A process reward model: the probability that each step of a solution is right.

Dimensions: B rows (solutions), L length.
"""

from collections.abc import Iterator
from functools import partial
from typing import ClassVar, Literal

import jax.numpy as jnp
import numpy as np
from pydantic import Field

from maxlm.config.objective import RecordsConfig
from maxlm.config.train import TrainConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term
from maxlm.data.examples.steps import LabeledSteps
from maxlm.models.applied import AppliedModel
from maxlm.models.scores import token_scores
from maxlm.objectives.record_data import RecordData, first_examples
from maxlm.objectives.scalar_head import ScalarHead
from maxlm.objectives.sequences import rows_of
from maxlm.objectives.validation import means_of
from maxlm.ops.binary_loss import binary_cross_entropy
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.objective import ExampleMaker, PreviewRow, RunContext


class ProcessRewardModeling(ScalarHead, RecordsConfig):
    """A scalar head, read at the end of each step and trained on its label with cross-entropy.

    As in arXiv:2305.20050 and, with labels between 0 and 1, arXiv:2312.08935.
    """

    label: ClassVar[str] = "process_reward"

    kind: Literal["process_reward"] = "process_reward"
    train_file: str = Field(
        description="Solutions: JSON, JSONL or Parquet with `prompt` (messages or text), `steps` and `labels`."
    )

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        output = model.outputs["text"]
        weights_BL, labels_BL = batch["text"].loss_weights, batch.values["labels_BL"]
        scores_BL = token_scores(model.decoder, output)[..., 0]
        loss_BL = binary_cross_entropy(scores_BL, labels_BL)
        num_steps = jnp.sum(weights_BL)
        terms = {"step_cross_entropy": Term(jnp.sum(weights_BL * loss_BL), num_steps)}
        is_right_BL = labels_BL > 0.5
        correct_BL = weights_BL * ((scores_BL > 0) == is_right_BL)
        metrics = {"accuracy": Term(jnp.sum(correct_BL), num_steps)}
        # Most steps are right: accuracy alone would hide that no error is found.
        for name, members_BL in (("accuracy_of_right", is_right_BL), ("accuracy_of_wrong", ~is_right_BL)):
            metrics[name] = Term(jnp.sum(correct_BL * members_BL), jnp.sum(weights_BL * members_BL))
        return LossOutput(terms, metrics).joined(output.auxiliary)

    def open_data(self, context: RunContext) -> RecordData:
        config = context.config
        read = partial(
            LabeledSteps.read,
            tokenizer=context.tokenizer,
            row_length=config.row_length,
            parts=context.row_parts,
            form=self,
        )

        summarize = means_of("step_cross_entropy", "accuracy", "accuracy_of_right", "accuracy_of_wrong")
        return RecordData(context, read, loss=self.compute_loss, summarize=summarize)

    def preview(self, config: TrainConfig, tokenizer: Tokenizer, num_examples: int) -> Iterator[PreviewRow]:
        solutions = LabeledSteps.read(self.train_file, tokenizer, row_length=config.row_length, form=self)
        batch = first_examples(solutions, config, num_examples)
        for index, row in enumerate(rows_of(batch["text"])):
            labels = batch.values["labels_BL"][index][row.loss_weights[0] > 0]
            yield PreviewRow(f"solution {index + 1}", row, f"labels: {', '.join(f'{label:g}' for label in labels)}")

    def example(self, make: ExampleMaker) -> Batch:
        text = make.sequences(shared=5)
        labels_BL = np.clip(make.normal(text.tokens.shape, mean=0.5), 0.0, 1.0).astype(np.float32)
        return Batch({"text": text}, {"labels_BL": labels_BL})


OBJECTIVE = ProcessRewardModeling
