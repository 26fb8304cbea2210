"""Optimizers and learning-rate schedules."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from maxlm.config.optim import OptimConfig, ScheduleConfig
from maxlm.core.sharding import is_explicit, spec_of
from maxlm.core.tree import path_of

# Quintic Newton-Schulz coefficients that push every singular value into about [0.7, 1.2] (Jordan et al., 2024, Muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def schedule_factor(config: ScheduleConfig, num_steps: int, step: jax.Array) -> jax.Array:
    """What the learning rate of `step` (0-based) is multiplied by: warm-up from 1/warmup_steps to 1, then the decay."""
    step = jnp.asarray(step, jnp.float32)
    warmup = jnp.minimum(1.0, (step + 1) / max(config.warmup_steps, 1))
    if config.kind == "constant":
        return warmup
    if config.kind == "cosine":
        start = config.warmup_steps
        shape = lambda t: 0.5 * (1 + jnp.cos(jnp.pi * t))  # noqa: E731
    else:
        start = num_steps - round(config.decay_fraction * num_steps)
        shape = lambda t: 1 - t  # noqa: E731
    done = jnp.clip((step - start) / max(num_steps - start, 1), 0.0, 1.0)
    return warmup * (config.final_factor + (1 - config.final_factor) * shape(done))


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Gradients to updates at the full learning rate; the step multiplies them by `schedule_factor`.

    Weight decay applies to matrices alone, scaled by the learning rate, never to norm scales.
    """
    adamw = optax.adamw(
        config.learning_rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=lambda tree: jax.tree_util.tree_map_with_path(lambda path, leaf: _is_matrix(path, leaf), tree),
    )
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    if config.kind == "adamw":
        return optax.chain(clip, adamw)
    muon = optax.chain(
        scale_by_muon(config.muon_momentum),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(config.muon_learning_rate),
    )
    return optax.chain(clip, optax.multi_transform({"muon": muon, "adamw": adamw}, muon_labels))


def muon_labels(tree: Any) -> Any:
    """`muon` for the stacked matrices of layers, or of their adapters; `adamw` for tables and norm scales."""

    def label(path, leaf):
        # The first key of an adapter is the whole path of the weight that it adapts.
        return "muon" if path_of(path[:1]) == "layers" and leaf.ndim == 3 else "adamw"

    return jax.tree_util.tree_map_with_path(label, tree)


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised: G = U S V^T becomes about U V^T, times sqrt(max(1, out / in)).

    For trees of stacked matrices [layers, in, out].
    """

    def init(params):
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        trace = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, state.trace, updates)
        nesterov = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, trace, updates)
        return jax.tree.map(_orthogonalize_sharded, nesterov), optax.TraceState(trace)

    return optax.GradientTransformation(init, update)


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Newton-Schulz iteration on [layers, in, out]: singular values go to about 1, singular vectors stay."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.astype(jnp.float32)
    transpose = x.shape[-2] > x.shape[-1]
    if transpose:
        x = x.mT
    x = x / (jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-7)

    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transpose else x


def _orthogonalize_sharded(matrices):
    scale = max(1.0, matrices.shape[-1] / matrices.shape[-2]) ** 0.5
    if not is_explicit():
        return scale * orthogonalize(matrices)
    # The iteration needs whole matrices: each device works on all of them and keeps its part.
    whole = jax.reshard(matrices, P(None, None, None))
    return jax.reshard(scale * orthogonalize(whole), spec_of(matrices))


def _is_matrix(path, leaf) -> bool:
    # A stacked norm scale is [layers, embed]; a matrix that is not stacked is [in, out].
    return leaf.ndim == 3 or (leaf.ndim == 2 and not path_of(path).startswith("layers/"))
