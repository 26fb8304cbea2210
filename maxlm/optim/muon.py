"""Muon: orthogonalized momentum."""

import jax
import jax.numpy as jnp
import optax

from maxlm.optim.spread import on_whole_matrices

# Quintic Newton-Schulz coefficients that push every singular value into about [0.7, 1.2] (Jordan et al., 2024, Muon).
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def scale_by_muon(momentum: float) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalized: G = U S V^T becomes about U V^T, times sqrt(max(1, out / in)).

    For trees of stacked matrices [layers, in, out] or [layers, experts, in, out].
    """

    def init(params):
        return optax.TraceState(jax.tree.map(jnp.zeros_like, params))

    def update(updates, state, params=None):
        del params
        trace = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, state.trace, updates)
        nesterov = jax.tree.map(lambda old, new: momentum * old + (1 - momentum) * new, trace, updates)
        return jax.tree.map(_direction, nesterov), optax.TraceState(trace)

    return optax.GradientTransformation(init, update)


def orthogonalize(matrices: jax.Array) -> jax.Array:
    """Newton-Schulz iteration on [..., in, out]: singular values go to about 1, singular vectors stay."""
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


def _direction(matrices):
    scale = max(1.0, matrices.shape[-1] / matrices.shape[-2]) ** 0.5
    (orthogonal,) = on_whole_matrices(lambda _, whole: (orthogonalize(whole),), matrices)
    return scale * orthogonal
