"""Add prediction modules to a model, and remove them."""

import jax
from jax.sharding import Mesh

from maxlm.config.model import MultiTokenConfig
from maxlm.core.parameters import initialize
from maxlm.core.tree import flatten, unflatten
from maxlm.models.decoder import Decoder


def without_modules(model: Decoder) -> Decoder:
    """The model without its prediction modules, which only training uses."""
    kept = {path: x for path, x in flatten(model).items() if not path.startswith("multi_token/")}
    return unflatten(kept, type(model)(model.config.main_model, model.execution)) if model.multi_token else model


def with_modules(model: Decoder, wanted: MultiTokenConfig | None, key: jax.Array, mesh: Mesh | None = None) -> Decoder:
    """The model with these prediction modules: its own, or new ones; or with none."""
    if wanted is None or model.multi_token:
        return model if wanted is not None else without_modules(model)
    plan = type(model)(model.config.model_copy(update={"multi_token": wanted}), model.execution)
    return unflatten({**flatten(model), **flatten(initialize({"multi_token": plan.multi_token}, key, mesh))}, plan)
