"""The parameters that a run trains, and the others that it needs: frozen weights, starting model, teacher."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from maxlm.config.adapters import PromptTuningConfig
from maxlm.config.train import TrainConfig
from maxlm.core.parameters import abstract, initialize
from maxlm.core.tree import flatten
from maxlm.interop.load import load_model
from maxlm.models.adapters.apply import apply_adapters
from maxlm.models.adapters.declare import create_adapters, declare_adapters
from maxlm.models.adapters.frozen import quantized_base
from maxlm.models.decoder import Decoder, with_execution
from maxlm.models.multi_token import with_modules
from maxlm.runtime.progress import console
from maxlm.tokenizer.codec import Tokenizer
from maxlm.train.setup import Setup


@dataclass(frozen=True)
class TrainedModel:
    """The model of a run, in parts.

    plan: declarations of the trained parameters: the whole model, or its adapters.
    active_parameters: how many parameters, trained or not, process one token.
    like: shapes and shardings of the trained parameters.
    create: makes their initial values; called only if there is no checkpoint to resume from or roll back to.
    frozen: weights that are not trained, by name: the `base` of adapters, a `teacher`.
    assemble: (trainable, frozen) -> the model for the loss.
    reference: gives the starting model; without adapters it loads it.
    """

    plan: Any
    active_parameters: float
    like: Any
    create: Callable[[], Any]
    frozen: dict[str, Any]
    assemble: Callable[[Any, dict[str, Any]], Any]
    reference: Callable[[], Any]


def make_model(setup: Setup) -> TrainedModel:
    """The model of a run, sharded over its mesh, which must be set (`jax.set_mesh`)."""
    config, mesh, objective = setup.config, setup.mesh, setup.config.objective
    plan = objective.declare(config.model, config.execution)
    key = jax.random.key(config.seed)

    def starting_model():
        if config.init_from is None:
            return initialize(plan, key, mesh)
        decoder, _ = load_model(config.init_from, mesh)
        if decoder.multi_token and config.model.multi_token is None:
            console.print(
                f"objective.kind={objective.kind} does not train the prediction modules of {config.init_from}: they are"
                " left out"
            )
        decoder = with_modules(decoder, config.model.multi_token, key, mesh)
        return objective.from_decoder(with_execution(decoder, config.execution), key)

    trained, used, adapters = plan, [plan], None
    if config.adapters is None:
        create, frozen, reference = starting_model, {}, starting_model
    else:
        trained = adapters = declare_adapters(plan, config.adapters)
        base = quantized_base(starting_model(), config.adapters.base, adapters)
        ids = _initial_ids(config, setup.tokenizer)
        create = partial(create_adapters, plan, config.adapters, base, key, mesh, initial_ids=ids)
        frozen = {"base": base}
        reference = lambda: base  # noqa: E731
    if (teacher := objective.load_teacher(config, setup.tokenizer, mesh)) is not None:
        used.append(type(teacher)(teacher.config, teacher.execution))
        frozen["teacher"] = teacher
    return TrainedModel(
        trained,
        num_active_parameters(used, adapters),
        abstract(trained, mesh),
        create,
        frozen,
        partial(assemble, config),
        reference,
    )


def _initial_ids(config: TrainConfig, tokenizer: Tokenizer) -> tuple[int, ...] | None:
    """The tokens of the text that virtual tokens begin with, if there is one."""
    if not isinstance(config.adapters, PromptTuningConfig) or config.adapters.initial_text is None:
        return None
    return tuple(tokenizer.encode(config.adapters.initial_text))


def num_active_parameters(models: Sequence[Decoder], adapters: Any = None) -> float:
    """Declared parameters that process one token: of routed experts, those that it is routed to."""

    def count(tree: Any, share: float = 1.0) -> float:
        return sum(math.prod(each.shape) * (share if "experts" in each.axes else 1) for each in flatten(tree).values())

    # A weight that is trained whole is one of the model's.
    new = {path: each for path, each in flatten(adapters).items() if not path.endswith("/whole")}
    total = count(new)
    for model in models:
        alone = [leaf for path, leaf in flatten(model).items() if not path.startswith(("layers/", "multi_token/"))]
        total += count(alone)
        for group, layers in zip(model.config.layers, model.layers):
            total += sum(count(layer, part.mlp.active_share) for part, layer in zip(group.pattern, layers))
        for layer in model.config.module_layers:
            total += count(model.multi_token, layer.mlp.active_share)
    return total


def assemble(config: TrainConfig, trainable: Any, frozen: dict[str, Any]) -> Any:
    """The trained model: the trained weights, or adapters on a frozen `base`."""
    return apply_adapters(frozen["base"], trainable, config.adapters) if "base" in frozen else trainable
