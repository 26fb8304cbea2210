"""Parameter declarations: shape, dtype, logical axes and initializer in one place.

A model class builds a tree of `Parameter`s. That tree is the model's plan: `initialize` turns it into arrays,
`shardings` and `abstract` derive the rest, and the tree of arrays has the same classes and methods.
"""

import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from maxlm.core.sharding import named_sharding
from maxlm.core.tree import path_of

Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

# matrix: weights [..., in, out] of a product; table: [vocabulary or labels, width]; router: a matrix that selects or
# weighs experts; router_bias: moved by the load of the experts, not by a gradient; bias_table: [distances, heads],
# added to logits; adapter: a low-rank factor of a matrix; virtual: keys or values [tokens, channels] of virtual tokens.
Role = Literal["matrix", "table", "router", "router_bias", "norm", "bias", "bias_table", "vector", "adapter", "virtual"]


# Leading axes that stack the parameters of layers.
LAYER_AXES = ("layers", "unstaged_layers", "times")


@dataclass(frozen=True)
class Parameter:
    """One declared parameter. Optimizers, quantization, adapters and reports ask its role, never its path or rank."""

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    initializer: Initializer
    dtype: Any = jnp.float32
    role: Role = field(kw_only=True)
    # What its random numbers depend on, if not its path.
    name: str | None = field(default=None, kw_only=True)
    # Which layers of its stack are trained, counted over all leading axes of layers; None: all.
    trained: tuple[bool, ...] | None = field(default=None, kw_only=True)
    # Its learning rate, relative to that of its parameter group.
    learning_rate_factor: float = field(default=1.0, kw_only=True)

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def is_matrix(self) -> bool:
        """Whether its last two axes are a matrix."""
        return self.role in ("matrix", "table", "router", "adapter")

    @property
    def is_vocabulary(self) -> bool:
        """Whether it has a row for each token: the embedding, or the output table."""
        return self.role == "table" and self.axes[0] == "vocab"

    @property
    def num_stacked(self) -> int:
        """Number of leading axes, over layers and experts, that stack matrices or vectors."""
        return len(self.shape) - (2 if self.is_matrix or self.role in ("bias_table", "virtual") else 1)


def stack(tree: Any, numbers: np.ndarray, *, axes: tuple[str, ...], name: str) -> Any:
    """The declarations of equal layers, stacked on leading axes.

    Args:
      numbers: the number of each layer among all layers, in the shape of the leading axes.
      axes: their logical axes.
      name: of all layers: random numbers depend on it, on the parameter's path in its layer and on the layer's number,
        and so not on how layers are stacked.
    """

    def stacked(path, parameter: Parameter) -> Parameter:
        return replace(
            parameter,
            shape=(*numbers.shape, *parameter.shape),
            axes=(*axes, *parameter.axes),
            initializer=_Stacked(parameter.initializer, numbers.shape, tuple(numbers.ravel().tolist())),
            name=f"{name}/{path_of(path)}",
        )

    return jax.tree_util.tree_map_with_path(stacked, tree, is_leaf=_is_parameter)


def initialize(tree: Any, key: jax.Array, mesh: Mesh | None = None) -> Any:
    """Arrays for a tree of declarations.

    A parameter's random numbers depend only on the key and its name, not on other parameters or the mesh.
    """

    def draw(path, parameter):
        own_key = jax.random.fold_in(key, zlib.crc32((parameter.name or path_of(path)).encode()))
        sharding = None if mesh is None else named_sharding(mesh, parameter.axes)
        return _draw(parameter.initializer, parameter.shape, parameter.dtype, sharding)(own_key)

    return jax.tree_util.tree_map_with_path(draw, tree, is_leaf=_is_parameter)


@functools.cache
def _draw(initializer: Initializer, shape: tuple[int, ...], dtype: Any, sharding: NamedSharding | None) -> Callable:
    """The compiled initializer of one parameter, shared by parameters with the same arguments.

    Each device draws its own part: no device ever holds a whole model.
    """
    return jax.jit(lambda key: initializer(key, shape, dtype), out_shardings=sharding)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each declared parameter."""
    return jax.tree.map(lambda parameter: named_sharding(mesh, parameter.axes), tree, is_leaf=_is_parameter)


def abstract(tree: Any, mesh: Mesh | None = None) -> Any:
    """A ShapeDtypeStruct for each declared parameter, with its sharding if there is a mesh."""

    def one(parameter: Parameter) -> jax.ShapeDtypeStruct:
        sharding = None if mesh is None else named_sharding(mesh, parameter.axes)
        return jax.ShapeDtypeStruct(parameter.shape, parameter.dtype, sharding=sharding)

    return jax.tree.map(one, tree, is_leaf=_is_parameter)


@dataclass(frozen=True)
class Normal:
    """Draws from a normal distribution with mean zero."""

    stddev: float

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return self.stddev * jax.random.normal(key, shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.ones(shape, dtype)


@dataclass(frozen=True)
class _Stacked:
    """Draws each layer separately, by its number."""

    initializer: Initializer
    shape: tuple[int, ...]
    numbers: tuple[int, ...]

    def __call__(self, key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        keys = jax.random.split(key, max(self.numbers) + 1)[jnp.asarray(self.numbers)]
        inner = shape[len(self.shape) :]
        return jax.vmap(lambda k: self.initializer(k, inner, dtype))(keys).reshape(shape)


def _is_parameter(leaf: Any) -> bool:
    return isinstance(leaf, Parameter)
