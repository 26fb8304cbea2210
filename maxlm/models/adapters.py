"""Low-rank adapters (LoRA): a separate pytree next to the frozen model."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config.train import LoraConfig
from maxlm.core.parameters import Normal, Parameter, zeros
from maxlm.core.tree import flatten, unflatten
from maxlm.errors import ConfigError
from maxlm.ops.linear import AdaptedWeight


def declare_adapters(plan: Any, config: LoraConfig) -> dict[str, dict[str, Parameter]]:
    """Declare adapters for the parameters of a model, by path of the adapted weight.

    `down` is initialized at random and `up` to zero: the adapted model starts as the base (arXiv:2106.09685). Weights
    in the plan's `trained_whole` are declared unchanged.

    Raises:
      ConfigError: a target does not name a weight of the model.
    """
    weights = {path: leaf for path, leaf in flatten(plan).items() if _can_be_adapted(leaf)}
    names = {path.rsplit("/", 1)[-1] for path in weights}
    if unknown := [target for target in config.targets if target not in names]:
        raise ConfigError([f"lora.targets: {unknown[0]!r} is not a weight; allowed: {', '.join(sorted(names))}"])
    adapters = {}
    for path, leaf in weights.items():
        if path.rsplit("/", 1)[-1] not in config.targets:
            continue
        (*layers, in_size, out_size), (*layer_axes, in_axis, out_axis) = leaf.shape, leaf.axes
        adapters[path] = {
            "down": Parameter(
                (*layers, in_size, config.rank),
                (*layer_axes, in_axis, "rank"),
                Normal(1 / math.sqrt(in_size)),
                role="adapter",
            ),
            "up": Parameter((*layers, config.rank, out_size), (*layer_axes, "rank", out_axis), zeros, role="adapter"),
        }
    for path in plan.trained_whole:
        adapters[path] = {"whole": flatten(plan)[path]}
    return adapters


def apply_adapters(model: Any, adapters: dict[str, dict[str, jax.Array]], config: LoraConfig) -> Any:
    """The model with adapted weights; no gradient flows to the model itself."""
    flat = {path: jax.lax.stop_gradient(leaf) for path, leaf in flatten(model).items()}
    scale = config.alpha / config.rank
    for path, adapter in adapters.items():
        whole = adapter.get("whole")
        flat[path] = AdaptedWeight(flat[path], adapter["down"], adapter["up"], scale) if whole is None else whole
    return unflatten(flat, model)


def merge_adapters(model: Any, adapters: dict[str, dict[str, jax.Array]], config: LoraConfig) -> Any:
    """The model with the adapters merged into its weights: W + alpha / rank * down @ up.

    Computed in float32, then rounded once to the dtype of W.
    """
    flat = flatten(model)
    for path, adapter in adapters.items():
        if "whole" in adapter:
            flat[path] = adapter["whole"]
            continue
        weight = flat[path]
        update = jnp.einsum("...ir,...ro->...io", adapter["down"], adapter["up"], precision="highest")
        flat[path] = (weight.astype(jnp.float32) + config.alpha / config.rank * update).astype(weight.dtype)
    return unflatten(flat, model)


def _can_be_adapted(parameter: Parameter) -> bool:
    """Whether it is a matrix of every layer; experts have none."""
    return parameter.role == "matrix" and "experts" not in parameter.axes
