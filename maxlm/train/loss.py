"""The loss of a run: an objective's loss as a function of the trained and the frozen weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from maxlm.config.regularization import RegularizationConfig
from maxlm.core.batch import Batch
from maxlm.core.term import LossOutput, Term
from maxlm.models.applied import AppliedModel
from maxlm.train.objective import Objective


@dataclass(frozen=True)
class TrainingLoss:
    """(trainable, frozen, batch) -> the terms to minimize.

    assemble: (trainable, frozen) -> the trained model. A `teacher` in `frozen` is applied to each stream too.
    """

    objective: Objective
    regularization: RegularizationConfig
    assemble: Callable[[Any, dict[str, Any]], Any]

    def __call__(self, trainable: Any, frozen: dict[str, Any], batch: Batch) -> LossOutput:
        models = self.models(trainable, frozen)
        return self.of_outputs(
            {name: AppliedModel.of(model, batch, self.rates_of(name)) for name, model in models.items()}, batch
        )

    def rates_of(self, model: str) -> RegularizationConfig | None:
        """Nothing is random in a teacher or critic."""
        return self.regularization if model == "trained" else None

    def models(self, trainable: Any, frozen: dict[str, Any]) -> dict[str, Any]:
        """The models that the loss applies: the `trained` one; its `critic` and a `teacher`, if any."""
        trained = self.assemble(trainable, frozen)
        models = {"trained": trained}
        if trained.config.critic == "own":
            models["critic"] = trained.critic
        return models | ({"teacher": frozen["teacher"]} if "teacher" in frozen else {})

    def of_outputs(self, applied: dict[str, AppliedModel], batch: Batch) -> LossOutput:
        """The loss, given the outputs of the models."""
        trained, others = applied["trained"], {name: each for name, each in applied.items() if name != "trained"}
        output = self.objective.compute_loss(replace(trained, others=others), batch)
        return weigh_router_losses(output, self.regularization)


def weigh_router_losses(output: LossOutput, config: RegularizationConfig) -> LossOutput:
    """The output with the losses of routers multiplied by their weights; without those of weight 0."""
    weights = {"moe_balance": config.router_balance, "router_z_loss": config.router_z_loss}
    terms = {
        name: Term(weights[name] * term.sum, term.weight) if name in weights else term
        for name, term in output.terms.items()
        if weights.get(name, 1.0)
    }
    return LossOutput(terms, output.metrics)
