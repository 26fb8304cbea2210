"""Computation on whole matrices, distributed over the devices.

A stack of matrices is sharded along rows and columns; some algorithms need each matrix whole. Instead of gathering
all matrices on every device, each device gets some of the matrices whole and returns their shards.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from maxlm.core.sharding import current_mesh, is_explicit, spec_of


def on_whole_matrices(
    function: Callable[..., tuple[jax.Array, ...]], *stacks: jax.Array, count: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Apply `function` to whole matrices, each device working on its share of the stack.

    Args:
      function: takes `count` and arrays [n, rows, columns], one for each of `stacks`, and treats each of the n
        independently. Returns at most that many arrays, the first shaped as the first of the stacks, and so on.
      stacks: arrays [..., rows, columns] whose leading axes agree in size and sharding. Mesh axes that
        shard the same axis must be in the order of the mesh.
      count: a number of steps.

    Returns:
      The results of `function`, with the leading axes and sharding of the `stacks`.
    """
    if not is_explicit():
        results = function(count, *[x.reshape(-1, *x.shape[-2:]) for x in stacks])
        return tuple(result.reshape(x.shape) for result, x in zip(results, stacks))

    mesh = current_mesh()
    specs = [_full_spec(x) for x in stacks]
    leading = {name for entry in specs[0][:-2] for name in axis_names(entry)}
    # Innermost first, so that adjacent shards are joined first.
    axes = [axis for axis in reversed(mesh.axis_names) if mesh.shape[axis] > 1 and axis not in leading]
    num_shares = math.prod(mesh.shape[axis] for axis in axes)

    def local(count, *parts):
        flat = [x.reshape(-1, *x.shape[-2:]) for x in parts]
        num_matrices = flat[0].shape[0]
        padding = -num_matrices % num_shares
        padded = [jnp.pad(x, ((0, padding), (0, 0), (0, 0))) for x in flat]
        shares = [_spread(x, spec, axes) for x, spec in zip(padded, specs)]
        results = [_collect(x, spec, axes) for x, spec in zip(function(count, *shares), specs)]
        return tuple(result[:num_matrices].reshape(x.shape) for result, x in zip(results, parts))

    num_results = len(jax.eval_shape(function, count, *[_as_stack(x) for x in stacks]))
    layout = [P(*spec) for spec in specs]
    in_specs, out_specs = (P(), *layout), tuple(layout[:num_results])
    return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(count, *stacks)


def _spread(x, spec, axes):
    """[n, part of rows, part of columns] on every device, to [n / devices, rows, columns]."""
    for axis in axes:
        if axis in axis_names(spec[-2]):
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=1, tiled=True)
        elif axis in axis_names(spec[-1]):
            x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=2, tiled=True)
        else:
            size = x.shape[0] // jax.lax.axis_size(axis)
            x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * size, size)
    return x


def _collect(x, spec, axes):
    """The inverse of `_spread`."""
    for axis in reversed(axes):
        if axis in axis_names(spec[-2]):
            x = jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=0, tiled=True)
        elif axis in axis_names(spec[-1]):
            x = jax.lax.all_to_all(x, axis, split_axis=2, concat_axis=0, tiled=True)
        else:
            x = jax.lax.all_gather(x, axis, tiled=True)
    return x


def _full_spec(x) -> tuple:
    spec = tuple(spec_of(x))
    return spec + (None,) * (x.ndim - len(spec))


def axis_names(entry) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def _as_stack(x):
    return jax.ShapeDtypeStruct((1, *x.shape[-2:]), x.dtype)
