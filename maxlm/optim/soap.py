"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner (arXiv:2409.11321)."""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import current_mesh, is_explicit, spec_of
from maxlm.core.tree import flatten, unflatten
from maxlm.optim.spread import axis_names, on_whole_matrices

# Turns of the bases at the first gradient; one from then on.
FIRST_TURNS = 8
# Added to all eigenvalues, as a fraction of their mean.
SHIFT = 0.01


def scale_by_soap(
    beta1: float, beta2: float, epsilon: float, *, every: int, max_dim: int
) -> optax.GradientTransformation:
    """SOAP for trees of stacked matrices [layers, in, out] or [layers, experts, in, out], each with its own bases.

    For a gradient G, L and R are running means of G G^T and G^T G, and P and Q their eigenvectors. The first moment M
    is rotated to P^T M Q, divided by the square root of the second moment of P^T G Q, and rotated back. The bases lag
    one step behind: the first step sets them and makes no update.

    Args:
      every: steps between updates of the bases, each a step of orthogonal iteration: P becomes the Q factor of L P.
      max_dim: longer sides keep the standard basis, as in Adam.
    """

    def init(params):
        return {
            "count": jnp.zeros((), jnp.int32),
            "matrices": {path: _init_matrix(leaf, max_dim) for path, leaf in flatten(params).items()},
        }

    def update(updates, state, params=None):
        del params
        count = state["count"]
        directions, matrices = {}, {}
        for path, grad in flatten(updates).items():
            directions[path], matrices[path] = step(grad, state["matrices"][path], count)
        return unflatten(directions, updates), {"count": count + 1, "matrices": matrices}

    def step(grad, old, count):
        sides = [side for side in ("rows", "columns") if side in old]
        first = jnp.where(count == 0, 0.0, beta1 * old["first"] + (1 - beta1) * grad)

        def whole(count, grad, second, *others):
            *squares, first = others
            means, bases = dict(zip(sides, squares)), dict(zip(sides, squares[len(sides) :]))
            # The first gradient is used only by the preconditioner.
            correction1, correction2 = (1 - beta ** jnp.maximum(count, 1) for beta in (beta1, beta2))
            second = jnp.where(count == 0, 0.0, beta2 * second + (1 - beta2) * jnp.square(_turn(grad, bases)))
            scaled = (_turn(first, bases) / correction1) / (jnp.sqrt(second / correction2) + epsilon)
            direction = _turn_back(scaled, bases)
            products = {"rows": grad @ grad.mT, "columns": grad.mT @ grad}
            means = {side: beta2 * means[side] + (1 - beta2) * products[side] for side in sides}
            bases = {side: _turned_basis(bases[side], means[side], count, every) for side in sides}
            return direction, second, *means.values(), *bases.values()

        names = [*sides, *(f"{side}_basis" for side in sides)]
        squares = [old[name] for name in names]
        direction, second, *squares = on_whole_matrices(whole, grad, old["second"], *squares, first, count=count)
        return direction, {"first": first, "second": second, **dict(zip(names, squares))}

    return optax.GradientTransformation(init, update)


def _turn(x, bases):
    """P^T x Q, with the bases that exist."""
    x = bases["rows"].mT @ x if "rows" in bases else x
    return x @ bases["columns"] if "columns" in bases else x


def _turn_back(x, bases):
    """P x Q^T."""
    x = bases["rows"] @ x if "rows" in bases else x
    return x @ bases["columns"].mT if "columns" in bases else x


def _turned_basis(basis, mean, count, every):
    """The Q factor of mean @ basis every `every` steps; the first time from the identity, with several iterations.

    A fraction of the mean eigenvalue is added to all: otherwise directions without any gradient yet, of which a wide
    matrix has many, would be rotated by rounding errors, differently on each mesh.
    """
    identity = jnp.eye(mean.shape[-1])
    shift = SHIFT * jnp.trace(mean, axis1=-2, axis2=-1)[..., None, None] / mean.shape[-1]

    def turn(_, basis):
        return jnp.linalg.qr(mean @ basis + shift * basis)[0]

    num_turns = jnp.where(count == 0, FIRST_TURNS, jnp.where(count % every == 0, 1, 0))
    return jax.lax.fori_loop(0, num_turns, turn, jnp.where(count == 0, identity, basis))


def _init_matrix(leaf, max_dim):
    state = {"first": jnp.zeros_like(leaf), "second": jnp.zeros_like(leaf)}
    for name, size in zip(("rows", "columns"), leaf.shape[-2:]):
        if size <= max_dim:
            state[name] = _square_zeros(leaf, size)
            state[f"{name}_basis"] = _square_zeros(leaf, size)
    return state


def _square_zeros(leaf, size):
    """Zeros [..., size, size], rows sharded over all mesh axes of the matrix, so that no device holds it whole."""
    shape = (*leaf.shape[:-2], size, size)
    if not is_explicit():
        return jnp.zeros(shape)
    mesh, spec = current_mesh(), spec_of(leaf)
    wanted = {name for entry in spec[-2:] for name in axis_names(entry)}
    axes = [axis for axis in mesh.axis_names if axis in wanted]
    while axes and size % math.prod(mesh.shape[axis] for axis in axes):
        axes.pop()
    return jnp.zeros(shape, out_sharding=P(*spec[:-2], tuple(axes) or None, None))
