"""The frozen model under adapters, whose matrices may be quantized."""

import math
from functools import partial
from typing import Any

import jax

from maxlm.config.adapters import QuantizedBaseConfig
from maxlm.core.parameters import Parameter
from maxlm.core.sharding import is_explicit, logical_to_spec, sharded_count
from maxlm.core.tree import flatten, path_of
from maxlm.errors import ConfigError
from maxlm.ops.block_quantized import quantize
from maxlm.ops.linear import WEIGHTS

# Adapters by the path of the weight that they adapt.
Adapters = dict[str, dict[str, Any]]
# Stands for a path: of what the virtual tokens of all layers are made.
VIRTUAL_TOKENS = "virtual_tokens"


def is_adaptable(parameter: Parameter) -> bool:
    """Whether it is a matrix that multiplies every token; those of experts do not."""
    return parameter.role == "matrix" and "experts" not in parameter.axes


def weights_of(model: Any) -> dict[str, Any]:
    """The weights of a model by path; one of several arrays is one weight."""
    is_weight = lambda node: isinstance(node, WEIGHTS)  # noqa: E731
    return {path_of(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(model, is_leaf=is_weight)}


def quantized_base(model: Any, config: QuantizedBaseConfig | None, adapters: Adapters) -> Any:
    """The model with quantized matrices of its layers; tables, norms, routers and experts stay as they are.

    Args:
      config: None: nothing is quantized.
      adapters: declarations; what they replace stays too.

    Raises:
      ConfigError: blocks do not divide the inputs of a matrix.
    """
    if config is None:
        return model
    replaced = {path for path, adapter in adapters.items() if "whole" in adapter}
    declared = flatten(type(model)(model.config, model.execution))
    quantized = {path for path, leaf in declared.items() if is_adaptable(leaf) and path not in replaced}
    for path in sorted(quantized):
        _check_blocks(path, declared[path], config.block_size)
    store = jax.jit(
        partial(quantize, kind=config.kind, block_size=config.block_size, double=config.double_quantization)
    )
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: store(leaf) if path_of(path) in quantized else leaf, model
    )


def _check_blocks(path: str, declared: Parameter, block_size: int) -> None:
    parts = sharded_count(logical_to_spec(declared.axes[-2:-1])) if is_explicit() else 1
    inputs = declared.shape[-2] // parts
    if inputs % block_size == 0:
        return
    fits, on_device = math.gcd(inputs, block_size), " on each device" if parts > 1 else ""
    remedy = f"set it to {fits}" if fits % 2 == 0 else "set adapters.base to null"
    raise ConfigError(
        [f"adapters.base.block_size: {block_size} does not divide the {inputs} inputs of {path}{on_device}; {remedy}"]
    )
