"""The parameters that a run trains, and the others that it needs: frozen weights, starting model, teacher."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from maxlm.config.train import TrainConfig
from maxlm.core.parameters import abstract, initialize
from maxlm.interop.load import load_model
from maxlm.models.adapters import apply_adapters, declare_adapters
from maxlm.models.decoder import with_config
from maxlm.train.objective import StudentAndTeacher
from maxlm.train.setup import Setup


@dataclass(frozen=True)
class TrainedModel:
    """The model of a run, in parts.

    like: shapes and shardings of the trained parameters: the whole model, or its adapters.
    create: makes their initial values; called only if there is no checkpoint to resume from or roll back to.
    frozen: weights that are not trained, by name: the `base` of adapters, a `teacher`.
    assemble: (trainable, frozen) -> the model for the loss.
    reference: the starting model, if the objective or adapters need it.
    """

    like: Any
    create: Callable[[], Any]
    frozen: dict[str, Any]
    assemble: Callable[[Any, dict[str, Any]], Any]
    reference: Any = None


def make_model(setup: Setup) -> TrainedModel:
    """The model of a run, sharded over its mesh, which must be set (`jax.set_mesh`)."""
    config, mesh, objective = setup.config, setup.mesh, setup.config.objective
    plan = objective.declare(config.model)
    key = jax.random.key(config.seed)

    def starting_model():
        if config.init_from is None:
            return initialize(plan, key, mesh)
        decoder, _ = load_model(config.init_from, mesh)
        return objective.from_decoder(with_config(decoder, config.model), key)

    if config.lora is None:
        like, create, frozen = abstract(plan, mesh), starting_model, {}
        reference = starting_model() if objective.needs_reference else None
    else:
        adapters = declare_adapters(plan, config.lora)
        like, create = abstract(adapters, mesh), lambda: initialize(adapters, key, mesh)
        reference = starting_model()
        frozen = {"base": reference}
    if (teacher := objective.load_teacher(config, setup.tokenizer, mesh)) is not None:
        frozen["teacher"] = teacher
    return TrainedModel(like, create, frozen, partial(assemble, config), reference)


def assemble(config: TrainConfig, trainable: Any, frozen: dict[str, Any]) -> Any:
    """The model for an objective's loss: the model, or its adapters on a frozen `base`; with the `teacher`, if any."""
    model = apply_adapters(frozen["base"], trainable, config.lora) if "base" in frozen else trainable
    return StudentAndTeacher(model, frozen["teacher"]) if "teacher" in frozen else model
