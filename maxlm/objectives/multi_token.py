"""Multi-token prediction (arXiv:2412.19437, section 2.2): next-token prediction, and some tokens further."""

from typing import ClassVar, Literal

import jax.numpy as jnp
from pydantic import Field, PositiveFloat

from maxlm.config.model import ModelConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term, unite
from maxlm.models.applied import AppliedModel
from maxlm.objectives.pretrain import Pretraining


class MultiTokenPrediction(Pretraining):
    """Next-token prediction on packed rows, and the tokens after it by the modules of `model.multi_token`.

        cross-entropy + weight / D * sum_k cross-entropy of module k,   k = 1, ..., D

    Module k predicts the token that stands k places after the next one, wherever the document has one. Each
    cross-entropy is a mean over its own predictions.
    """

    trains_modules: ClassVar[bool] = True

    kind: Literal["multi_token"] = "multi_token"  # type: ignore[assignment]
    weight: PositiveFloat = Field(0.3, description="Weight of the mean cross-entropy of the modules.")

    def model_problems(self, model: ModelConfig) -> list[str]:
        problems = super().model_problems(model)
        if model.multi_token is None:
            problems.append(
                f"objective.kind={self.kind} trains prediction modules, and this model has none; set"
                " model.multi_token.modules=1, or choose objective.kind=pretrain"
            )
        return problems

    def compute_loss(self, model: AppliedModel, batch: Batch) -> LossOutput:
        parts = [super().compute_loss(model, batch)]
        predictions = model.decoder.predict_ahead(model.outputs["text"], batch["text"])
        for number, (ahead, output) in enumerate(predictions, 1):
            log_probability_BL, _ = model.decoder.log_probabilities(
                output.hidden_BLD, ahead.targets, smoothing=model.label_smoothing
            )
            cross_entropy = -jnp.sum(ahead.loss_weights * log_probability_BL)
            count = jnp.sum(ahead.loss_weights)
            terms = {f"ahead_{number}": Term(self.weight / len(predictions) * cross_entropy, count)}
            metrics = {f"ahead_{number}_cross_entropy": Term(cross_entropy, count)}
            parts += [LossOutput(terms, metrics), output.auxiliary]
        return unite(parts)


OBJECTIVE = MultiTokenPrediction
