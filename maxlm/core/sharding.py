"""Logical axes, the one table that maps them to mesh axes, and the mesh itself.

Meshes have explicit axis types: an array's sharding is part of its type, so a sharding mistake surfaces when a
function is traced, on virtual CPU devices too. Without a mesh every helper here does nothing.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config.mesh import MeshConfig
from maxlm.errors import ConfigError

MESH_AXES = ("data", "fsdp", "tensor")

# Logical axis -> the mesh axes that cut it. `None` is replicated.
LOGICAL_AXES: dict[str, tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "length": None,
    "layers": None,
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "norm": None,
    "rank": None,
}


def logical_to_spec(axes: Sequence[str | None]) -> P:
    """The PartitionSpec of an array with these logical axes.

    Raises:
      ValueError: an axis is not in the table, or two axes want the same mesh axis.
    """
    entries, used = [], set()
    for axis in axes:
        if axis is not None and axis not in LOGICAL_AXES:
            raise ValueError(f"logical axis {axis!r} is not in the table: {', '.join(LOGICAL_AXES)}")
        mesh_axes = (axis and LOGICAL_AXES[axis]) or ()
        if clash := used.intersection(mesh_axes):
            raise ValueError(f"logical axes {tuple(axes)} use mesh axis {clash.pop()!r} twice")
        used.update(mesh_axes)
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return P(*entries)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all).

    Raises:
      ConfigError: the sizes need more devices than there are, or the free axis would leave some without work.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    fixed = 1
    for size in sizes:
        fixed *= max(size, 1)
    if -1 in sizes and fixed <= len(devices):
        sizes[sizes.index(-1)] = len(devices) // fixed
    described = ", ".join(f"{axis}={getattr(config, axis)}" for axis in MESH_AXES)
    if fixed > len(devices):
        raise ConfigError(
            [f"mesh: {described} needs {fixed} devices, and there are {len(devices)}; make mesh sizes smaller"]
        )
    if -1 in (config.data, config.fsdp, config.tensor) and len(devices) % fixed:
        raise ConfigError(
            [f"mesh: {described} leaves {len(devices) % fixed} of {len(devices)} devices without work; name every size"]
        )
    needed = sizes[0] * sizes[1] * sizes[2]
    return jax.make_mesh(tuple(sizes), MESH_AXES, (AxisType.Explicit,) * 3, devices=devices[:needed])


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def is_explicit() -> bool:
    """Whether shardings are part of types here: under a mesh, outside of shard_map."""
    mesh = current_mesh()
    return mesh is not None and all(kind == AxisType.Explicit for kind in mesh.axis_types)


def spec_of(x: jax.Array) -> P:
    """The sharding in an array's type, one entry for each dimension."""
    return jax.typeof(x).sharding.spec


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by its logical axes."""
    return jax.reshard(x, logical_to_spec(axes)) if is_explicit() else x


def gather_weight(weight: jax.Array) -> jax.Array:
    """The all-gather of fully sharded data parallelism: `weight` whole along `fsdp`, still cut along `tensor`.

    The gather is explicit, because a compiler left to choose may turn it into many small collectives.
    """
    if not is_explicit():
        return weight
    return jax.reshard(weight, P(*(_without(entry, "fsdp") for entry in spec_of(weight))))


def _without(entry, axis: str):
    names = tuple(name for name in (entry if isinstance(entry, tuple) else (entry,)) if name not in (axis, None))
    return names[0] if len(names) == 1 else names or None


def named_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, logical_to_spec(axes))
