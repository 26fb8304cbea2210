"""Declarations and initial values of adapters: a separate pytree next to the frozen model.

An adapter is a dict of parameters, whose names say what it does to the weight at its path:
  down, up: a low-rank update; magnitude: the length of each output's weights;
  output_scale, input_scale: factors of outputs and inputs;
  whole: the weight itself;
  new: a weight that the model lacks; project, project_bias: what makes it of `VIRTUAL_TOKENS`, shared by all layers;
  prompt: embeddings of virtual tokens, of which the frozen model makes them.
A new adapter changes nothing, unless it adds weights. One of a stack of layers has a part for each of them; those that
are not chosen keep their initial values.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from maxlm.config.adapters import (
    AdaptersConfig,
    BitfitConfig,
    Ia3Config,
    LayersConfig,
    LoraConfig,
    PrefixConfig,
    PromptTuningConfig,
)
from maxlm.core.parameters import Normal, Parameter, initialize, ones, shardings, stack, zeros
from maxlm.core.tree import flatten
from maxlm.errors import ConfigError
from maxlm.models.adapters.frozen import VIRTUAL_TOKENS, Adapters, is_adaptable, weights_of
from maxlm.models.adapters.prompt import check_prompt, initial_prompt
from maxlm.models.adapters.targets import Target, choose
from maxlm.models.decoder import Decoder
from maxlm.models.virtual_tokens import plan_with_virtual_tokens
from maxlm.ops.linear import output_squares


def declare_adapters(plan: Decoder, config: AdaptersConfig) -> Adapters:
    """Declare the adapters of a model. Weights in the plan's `trained_whole` are trained next to them.

    Raises:
      ConfigError: a target does not name a weight of the model; a rank exceeds a side of a matrix.
    """
    flat = flatten(plan)
    return _declare(plan, config) | {path: {"whole": flat[path]} for path in plan.trained_whole}


def create_adapters(
    plan: Decoder,
    config: AdaptersConfig,
    base: Decoder,
    key: jax.Array,
    mesh: Mesh | None = None,
    *,
    initial_ids: tuple[int, ...] | None = None,
) -> Adapters:
    """New adapters, with which the model computes what `base` does, unless they add weights.

    Args:
      initial_ids: the tokens of `PromptTuningConfig.initial_text`.
    """
    declared = declare_adapters(plan, config)
    fill = jax.jit(
        partial(_fill, initial_ids=initial_ids), out_shardings=None if mesh is None else shardings(declared, mesh)
    )
    return fill(initialize(declared, key, mesh), base, key)


def _fill(adapters: Adapters, base: Decoder, key: jax.Array, *, initial_ids: tuple[int, ...] | None) -> Adapters:
    """Adapters with the values that depend on the adapted weights."""
    weights = weights_of(base)

    def filled(path: str, adapter: dict[str, jax.Array]) -> dict[str, jax.Array]:
        if "whole" in adapter:
            # A copy, since a training step overwrites what it trains.
            return {"whole": jnp.array(weights[path], copy=True)}
        if "prompt" in adapter:
            return {"prompt": initial_prompt(base, len(adapter["prompt"]), key, initial_ids)}
        if "magnitude" in adapter:
            return {**adapter, "magnitude": jnp.sqrt(output_squares(weights[path]))}
        return adapter

    return {path: filled(path, adapter) for path, adapter in adapters.items()}


def _declare(plan: Decoder, config: AdaptersConfig) -> Adapters:
    match config:
        case LoraConfig():
            targets = choose(plan, config.targets, "adapters.targets", allowed=is_adaptable, what="matrix")
            return {path: _stacked(target, _low_rank(path, target, config)) for path, target in targets.items()}
        case Ia3Config():
            return _declare_factors(plan, config)
        case BitfitConfig():
            biases = {path: leaf for path, leaf in flatten(plan).items() if leaf.role == "bias"}
            if not biases:
                raise ConfigError(["adapters.kind: bitfit trains biases, and the model has none; set lora or ia3"])
            return {path: {"whole": leaf} for path, leaf in biases.items()}
        case PrefixConfig():
            return _declare_prefix(plan, config)
        case PromptTuningConfig():
            check_prompt(plan.config)
            plan_with_virtual_tokens(plan, config.tokens)
            shape = (config.tokens, plan.config.embed_dim)
            return {VIRTUAL_TOKENS: {"prompt": Parameter(shape, (None, None), Normal(0.02), role="adapter")}}
        case LayersConfig():
            trained = lambda leaf: leaf.role != "router_bias"  # noqa: E731
            targets = choose(plan, config.targets, "adapters.targets", allowed=trained, what="parameter")
            return {
                path: {"whole": replace(target.parameter, trained=target.trained)} for path, target in targets.items()
            }


def _declare_prefix(plan: Decoder, config: PrefixConfig) -> Adapters:
    extended = plan_with_virtual_tokens(plan, config.tokens)
    is_virtual = lambda leaf: leaf.role == "virtual"  # noqa: E731
    targets = choose(extended, ("role:virtual",), "adapters", allowed=is_virtual, what="virtual token")
    if config.reparametrize is None:
        return {path: {"new": target.parameter} for path, target in targets.items()}
    width, dim = plan.config.embed_dim, config.reparametrize.dim
    shared = {
        "embedding": Parameter((config.tokens, width), (None, None), Normal(1.0), role="adapter"),
        "widen": Parameter((width, dim), (None, None), Normal(1 / math.sqrt(width)), role="adapter"),
        "widen_bias": Parameter((dim,), (None,), zeros, role="bias"),
    }

    def projection(target: Target) -> dict[str, Parameter]:
        size, axis = target.parameter.shape[-1], target.parameter.axes[-1]
        project = Parameter((dim, size), (None, axis), Normal(0.02), role="adapter")
        return _stacked(target, {"project": project, "project_bias": Parameter((size,), (axis,), zeros, role="bias")})

    return {VIRTUAL_TOKENS: shared} | {path: projection(target) for path, target in targets.items()}


def _declare_factors(plan: Decoder, config: Ia3Config) -> Adapters:
    adapters: Adapters = {}
    for key, name, axis in (("outputs", "output_scale", -1), ("inputs", "input_scale", -2)):
        patterns = getattr(config, key)
        targets = choose(plan, patterns, f"adapters.{key}", allowed=is_adaptable, what="matrix") if patterns else {}
        for path, target in targets.items():
            if path in adapters:
                raise ConfigError([f"adapters.inputs: {path} is also in adapters.outputs; name it in one of them"])
            leaf = target.parameter
            factor = Parameter((leaf.shape[axis],), (leaf.axes[axis],), ones, role="vector")
            adapters[path] = _stacked(target, {name: factor})
    if not adapters:
        raise ConfigError(["adapters.outputs: is empty, and so is adapters.inputs; name a matrix in one of them"])
    return adapters


def _low_rank(path: str, target: Target, config: LoraConfig) -> dict[str, Parameter]:
    """`down` is drawn at random and `up` is zero (arXiv:2106.09685)."""
    (in_size, out_size), (in_axis, out_axis) = target.parameter.shape[-2:], target.parameter.axes[-2:]
    if config.rank > min(in_size, out_size):
        raise ConfigError(
            [
                f"adapters.rank: {config.rank} exceeds the smaller side of {path}, which is {in_size} x {out_size}; set"
                f" it to at most {min(in_size, out_size)}, or leave the matrix out of adapters.targets"
            ]
        )
    declared = {
        "down": Parameter((in_size, config.rank), (in_axis, "rank"), Normal(1 / math.sqrt(in_size)), role="adapter"),
        "up": Parameter(
            (config.rank, out_size),
            ("rank", out_axis),
            zeros,
            role="adapter",
            learning_rate_factor=config.up_learning_rate_ratio,
        ),
    }
    if config.decomposed:
        declared["magnitude"] = Parameter((out_size,), (out_axis,), ones, role="vector")
    return declared


def _stacked(target: Target, of_layer: dict[str, Parameter]) -> dict[str, Parameter]:
    """The adapter of each layer, stacked as the weights that it adapts."""
    if target.numbers is None:
        return of_layer
    axes = target.parameter.axes[: target.numbers.ndim]
    stacked = stack(of_layer, target.numbers, axes=axes, name=f"adapters/{target.name}")
    return {name: replace(each, trained=target.trained) for name, each in stacked.items()}
