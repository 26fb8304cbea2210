"""Optimizers: from gradients to updates at the full learning rate, which the step multiplies by the schedule."""

import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from maxlm.config.optim import NewRowsConfig, OptimConfig
from maxlm.core.parameters import Parameter, Role
from maxlm.core.tree import flatten
from maxlm.optim.adafactor import scale_by_adafactor
from maxlm.optim.adam8bit import scale_by_adam8bit
from maxlm.optim.groups import Plan, check_groups, group_of, map_with_plan, of_trained_layers
from maxlm.optim.muon import scale_by_muon
from maxlm.optim.new_rows import check_new_rows, only_new_rows
from maxlm.optim.rounding import stochastic_round
from maxlm.optim.soap import scale_by_soap

# Kinds that apply only to the matrices of layers.
_FOR_LAYERS = ("muon", "soap")
# The matrices of layers, both of whose sides grow with the width.
_HIDDEN = ("matrix", "router")


@dataclass(frozen=True)
class Optimizer:
    """An optimizer of declared parameters.

    plan: their declarations, by path.
    transformation: from gradients to updates at the full learning rate.
    new_rows: which rows are trained alone in the first steps; None: everything is trained from the start.
    """

    plan: Plan
    transformation: optax.GradientTransformation
    new_rows: NewRowsConfig | None = None

    def of_trained(self, grads: Any) -> Any:
        """The gradients, zero for layers of a stack that are not trained."""
        return map_with_plan(lambda _, parameter, grad: of_trained_layers(parameter, grad), self.plan, grads)

    def init(self, params: Any) -> Any:
        """The state before the first step."""
        return self.transformation.init(params)

    def update(self, grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        """Updates at the full learning rate, and the new state."""
        return self.transformation.update(grads, state, params)

    def gradient_norm(self, grads: Any) -> jax.Array:
        """Global gradient norm, in float32, without the "gradient" of router biases, which is a load error."""
        return gradient_norm(self.plan, grads)

    def apply_updates(self, params: Any, updates: Any, factor: ArrayLike, step: ArrayLike) -> Any:
        """Parameters after a step at `factor` of the full learning rate; router biases have their own rate.

        bfloat16 parameters are rounded stochastically, with separate random bits for each parameter and step: a resumed
        run draws the same bits.
        """

        def apply(path, parameter, param, update):
            change = (1 if parameter.role == "router_bias" else factor) * update
            if self.new_rows is not None:
                change = only_new_rows(self.new_rows, parameter, change, step)
            change = of_trained_layers(parameter, change)
            new = param.astype(jnp.float32) + change
            if param.dtype != jnp.bfloat16:
                return new.astype(param.dtype)
            return stochastic_round(new, jax.random.fold_in(jax.random.key(zlib.crc32(path.encode())), step))

        return map_with_plan(apply, self.plan, params, updates)


def make_optimizer(config: OptimConfig, declared: Any, *, width: float = 1.0) -> Optimizer:
    """Clip, add penalties, compute the direction, decay weights and multiply by the learning rate of each parameter.

    All computation and state is in float32 for any dtype of the parameters.

    Args:
      declared: the tree of `Parameter`s that is trained.
      width: width of the model relative to the one that the learning rates were tuned for.

    Raises:
      ConfigError: a pattern of `groups` matches none of the parameters, or none has `new_rows`.
    """
    plan = flatten(declared)
    check_groups(config.groups, plan)
    check_new_rows(config.new_rows, plan)
    direction = optax.partition(
        {"main": _direction(config, plan), "adam": _adam(config), "router_bias": optax.scale_by_sign()},
        lambda tree: map_with_plan(lambda path, parameter, _: label(config.kind, parameter), plan, tree),
    )
    chain = optax.chain(
        _clip(config.clip_norm, plan), _add_penalties(config, plan), direction, _scale_by_rates(config, plan, width)
    )
    return Optimizer(plan, _in_float32(chain), config.new_rows)


def label(kind: str, parameter: Parameter) -> str:
    """`main` for the `kind` itself, `adam` for AdamW, `router_bias` for the balancing bias of a router."""
    if parameter.role == "router_bias":
        return "router_bias"
    return "main" if kind not in _FOR_LAYERS or parameter.role in _HIDDEN else "adam"


def gradient_norm(plan: Plan, grads: Any) -> jax.Array:
    """See `Optimizer.gradient_norm`."""
    leaves = [leaf for path, leaf in flatten(grads).items() if plan[path].role != "router_bias"]
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in leaves))


def _direction(config: OptimConfig, plan: Plan) -> optax.GradientTransformation:
    if config.kind == "adam8bit":
        return scale_by_adam8bit(plan, config.beta1, config.beta2, config.epsilon)
    if config.kind == "adafactor":
        return scale_by_adafactor(plan)
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


def _clip(max_norm: float | None, plan: Plan) -> optax.GradientTransformation:
    """optax's clip_by_global_norm, except that router biases neither count in the norm nor are clipped."""
    if max_norm is None:
        return optax.identity()

    def update(updates, params):
        del params
        factor = jnp.minimum(1.0, max_norm / jnp.maximum(gradient_norm(plan, updates), jnp.finfo(jnp.float32).tiny))

        def clip(_, parameter, grad):
            return grad if parameter.role == "router_bias" else factor * grad

        return map_with_plan(clip, plan, updates)

    return optax.stateless(update)


def _add_penalties(config: OptimConfig, plan: Plan) -> optax.GradientTransformation:
    """The gradient of l1 * sum |w| + l2 / 2 * sum w^2 over matrices."""
    if not (config.l1_penalty or config.l2_penalty):
        return optax.identity()

    def add(_, parameter, grad, param):
        if not parameter.is_matrix:
            return grad
        return grad + config.l1_penalty * jnp.sign(param) + config.l2_penalty * param

    return optax.stateless(lambda updates, params: map_with_plan(add, plan, updates, params))


def _scale_by_rates(config: OptimConfig, plan: Plan, width: float) -> optax.GradientTransformation:
    """Direction d of a parameter w to -rate * (d * transfer + decay * w), with the rate and decay of its group."""

    def scale(path, parameter, direction, param):
        if parameter.role == "router_bias":
            return -config.router_bias_rate * direction
        group = group_of(path, config.groups)
        is_muon = config.kind == "muon" and label(config.kind, parameter) == "main"
        rate = group.learning_rate_factor * (config.muon_learning_rate if is_muon else config.learning_rate)
        decay = group.weight_decay
        if decay is None:
            decay = config.weight_decay if parameter.is_matrix else 0.0
        transfer = _transfer(config.kind, parameter.role, width)
        rate = parameter.learning_rate_factor * rate
        return -rate * (transfer * direction + decay * param)

    return optax.stateless(lambda updates, params: map_with_plan(scale, plan, updates, params))


def _transfer(kind: str, role: Role, width: float) -> float:
    """Factor that transfers a learning rate from another width (arXiv:2203.03466, table 8, with logits / width).

    The matrices of layers are hidden: both sides grow with the width. Muon's own scale fits every width: its
    updates have the same spectral norm (arXiv:2310.17813). The width of adapters is their rank.
    """
    if role == "adapter":
        return 1.0
    is_hidden = role in _HIDDEN
    if kind == "sgd":
        return 1.0 if is_hidden else width
    return 1 / width if is_hidden and kind != "muon" else 1.0
