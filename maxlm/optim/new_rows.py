"""Training that begins with the rows of new tokens, so that they fit the model before they change it."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from maxlm.config.optim import NewRowsConfig
from maxlm.core.parameters import Parameter
from maxlm.core.sharding import is_explicit, spec_of
from maxlm.errors import ConfigError
from maxlm.optim.groups import Plan


def only_new_rows(config: NewRowsConfig, parameter: Parameter, change: jax.Array, step: ArrayLike) -> jax.Array:
    """The change of a parameter at a step: in the first steps zero, but for new rows of the vocabulary's tables."""
    is_trained = jnp.asarray(step) >= config.steps
    if parameter.is_vocabulary:
        sharding = spec_of(change) if is_explicit() else None
        row = jax.lax.broadcasted_iota(jnp.int32, change.shape, 0, out_sharding=sharding)
        is_trained |= row >= config.first
    # -0 is the number that added to any other, 0 and -0 included, returns its bits.
    return jnp.where(is_trained, change, -0.0)


def check_new_rows(config: NewRowsConfig | None, plan: Plan) -> None:
    """Raise ConfigError if no trained table of the vocabulary has new rows."""
    if config is None:
        return
    tables = [parameter for parameter in plan.values() if parameter.is_vocabulary]
    if not tables:
        raise ConfigError(["optim.new_rows: adapters have no rows of tokens; leave out adapters, or optim.new_rows"])
    if config.first >= (rows := tables[0].shape[0]):
        raise ConfigError(
            [
                f"optim.new_rows.first: {config.first} is not a row of the embedding, which has {rows}; give the number"
                " of tokens before the vocabulary was extended"
            ]
        )
