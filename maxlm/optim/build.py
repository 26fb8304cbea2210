"""Optimizers: from gradients to updates at the full learning rate, which the step multiplies by the schedule."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax

from maxlm.config.optim import OptimConfig
from maxlm.core.tree import flatten, path_of
from maxlm.optim.adafactor import scale_by_adafactor
from maxlm.optim.adam8bit import scale_by_adam8bit
from maxlm.optim.groups import check_groups, group_of, is_matrix, is_router_bias, is_stacked, map_with_path
from maxlm.optim.muon import scale_by_muon
from maxlm.optim.rounding import stochastic_round
from maxlm.optim.soap import scale_by_soap

# Kinds that apply only to the matrices of layers.
_FOR_LAYERS = ("muon", "soap")


def make_optimizer(config: OptimConfig, *, width: float = 1.0) -> optax.GradientTransformation:
    """Clip, add penalties, compute the direction, decay weights and multiply by the learning rate of each parameter.

    All computation and state is in float32 for any dtype of the parameters. `apply_updates` applies the updates.

    Args:
      width: width of the model relative to the one that the learning rates were tuned for.

    Raises:
      ConfigError: from `init`, when a pattern of `groups` matches none of the parameters.
    """
    direction = optax.partition(
        {"main": _direction(config), "adam": _adam(config), "router_bias": optax.scale_by_sign()},
        lambda tree: labels(config.kind, tree),
    )
    return _in_float32(
        optax.chain(_clip(config.clip_norm), _add_penalties(config), direction, _scale_by_rates(config, width))
    )


def labels(kind: str, tree: Any) -> Any:
    """Label each parameter: `main` for the `kind` itself, `adam` for AdamW, `router_bias` for router biases."""

    def label(path, leaf):
        if is_router_bias(path_of(path)):
            return "router_bias"
        # The first key of an adapter is the full path of its weight: a low-rank factor is not a matrix of the layers.
        is_of_layers = path_of(path[:1]) == "layers" and is_matrix(path_of(path), leaf)
        return "main" if kind not in _FOR_LAYERS or is_of_layers else "adam"

    return jax.tree_util.tree_map_with_path(label, tree)


def gradient_norm(grads: Any) -> jax.Array:
    """Global gradient norm, in float32, without the "gradient" of router biases, which is a load error."""
    leaves = [leaf for path, leaf in flatten(grads).items() if not is_router_bias(path)]
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


def apply_updates(params: Any, updates: Any, factor: jax.Array, step: jax.Array) -> Any:
    """Parameters after a step at `factor` of the full learning rate; router biases have their own rate.

    bfloat16 parameters are rounded stochastically, with separate random bits for each parameter and step: a resumed run
    draws the same bits.
    """

    def apply(path, param, update):
        new = param.astype(jnp.float32) + (1 if is_router_bias(path) else factor) * update
        if param.dtype != jnp.bfloat16:
            return new.astype(param.dtype)
        return stochastic_round(new, jax.random.fold_in(jax.random.key(zlib.crc32(path.encode())), step))

    return map_with_path(apply, params, updates)


def _direction(config: OptimConfig) -> optax.GradientTransformation:
    if config.kind == "adam8bit":
        return scale_by_adam8bit(config.beta1, config.beta2, config.epsilon)
    if config.kind == "adafactor":
        return scale_by_adafactor()
    if config.kind == "lion":
        return optax.scale_by_lion(config.beta1, config.beta2)
    if config.kind == "sgd":
        return optax.trace(config.momentum, nesterov=True)
    if config.kind == "muon":
        return scale_by_muon(config.momentum)
    if config.kind == "soap":
        return scale_by_soap(
            config.beta1,
            config.beta2,
            config.epsilon,
            every=config.precondition_every,
            max_dim=config.precondition_max_dim,
        )
    return _adam(config)


def _adam(config: OptimConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)


def _in_float32(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run in float32: bfloat16 moments would lose what a step adds, less than half a unit in the last place."""

    def init(params):
        return optimizer.init(optax.tree.cast(params, jnp.float32))

    def update(updates, state, params):
        return optimizer.update(optax.tree.cast(updates, jnp.float32), state, optax.tree.cast(params, jnp.float32))

    return optax.GradientTransformation(init, update)


def _clip(max_norm: float | None) -> optax.GradientTransformation:
    """optax's clip_by_global_norm, except that router biases neither count in the norm nor are clipped."""
    if max_norm is None:
        return optax.identity()

    def update(updates, params):
        del params
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(gradient_norm(updates), jnp.finfo(jnp.float32).tiny))
        return map_with_path(lambda path, leaf: leaf if is_router_bias(path) else factor * leaf, updates)

    return optax.stateless(update)


def _add_penalties(config: OptimConfig) -> optax.GradientTransformation:
    """The gradient of l1 * sum |w| + l2 / 2 * sum w^2 over matrices."""
    if not (config.l1_penalty or config.l2_penalty):
        return optax.identity()

    def add(path, grad, param):
        if is_router_bias(path) or not is_matrix(path, param):
            return grad
        return grad + config.l1_penalty * jnp.sign(param) + config.l2_penalty * param

    return optax.stateless(lambda updates, params: map_with_path(add, updates, params))


def _scale_by_rates(config: OptimConfig, width: float) -> optax.GradientTransformation:
    """Direction d of a parameter w to -rate * (d * transfer + decay * w), with the rate and decay of its group."""

    def init(params):
        check_groups(config.groups, params)
        return optax.EmptyState()

    def scale(path, direction, param, label):
        if label == "router_bias":
            return -config.router_bias_rate * direction
        group = group_of(path, config.groups)
        is_muon = config.kind == "muon" and label == "main"
        rate = group.learning_rate_factor * (config.muon_learning_rate if is_muon else config.learning_rate)
        decay = group.weight_decay
        if decay is None:
            decay = config.weight_decay if is_matrix(path, param) else 0.0
        transfer = _transfer(config.kind, is_stacked(path) and is_matrix(path, param), width)
        return -rate * (transfer * direction + decay * param)

    def update(updates, state, params):
        return map_with_path(scale, updates, params, labels(config.kind, params)), state

    return optax.GradientTransformation(init, update)


def _transfer(kind: str, is_hidden: bool, width: float) -> float:
    """Factor that transfers a learning rate from another width (arXiv:2203.03466, table 8, with logits / width).

    The matrices of layers are hidden: both sides grow with the width. Muon's own scale fits every width: its
    updates have the same spectral norm (arXiv:2310.17813).
    """
    if kind == "sgd":
        return 1.0 if is_hidden else width
    return 1 / width if is_hidden and kind != "muon" else 1.0
