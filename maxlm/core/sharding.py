"""Logical axes, the table that maps them to mesh axes, and the mesh itself.

Meshes have explicit axis types: an array's sharding is part of its type, so a sharding mistake surfaces when a
function is traced, also on virtual CPU devices. Without a mesh every helper here does nothing.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config.mesh import MeshConfig
from maxlm.errors import ConfigError

# From outermost to innermost: neighbors along the last axis are physically closest.
MESH_AXES = ("data", "stage", "fsdp", "expert", "context", "tensor")

# Logical axis -> the mesh axes that shard it. `None` is replicated.
LOGICAL_AXES: dict[str, tuple[str, ...] | None] = {
    # Outside of the pipeline (embedding, head and loss), stages shard the rows.
    "batch": ("data", "stage", "fsdp", "expert"),
    "length": ("context",),
    # Tokens between the layers: norms and sums work per token, so the tensor axis shards them too.
    "residual_length": ("context", "tensor"),
    "layers": ("stage",),
    # Layers of a group that is too short for the pipeline, and equal layers in a row within a pattern.
    "unstaged_layers": None,
    "times": None,
    "embed": ("fsdp", "expert", "context"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    # The embed axis of an expert's weights.
    "expert_embed": ("fsdp", "context"),
    "norm": None,
    # Channels that a layer compresses to: every device computes them all.
    "latent": None,
    # Channels of a recurrent state, and of its gates: every device computes them all.
    "state": None,
    "gates": None,
    "rank": None,
}

# The mesh axes that shard weights and along which they are all-gathered before use.
_GATHERED = ("fsdp", "expert", "context")


def logical_to_spec(axes: Sequence[str | None]) -> P:
    """The PartitionSpec of an array with these logical axes, without the manual axes of an enclosing shard_map.

    Raises:
      ValueError: an axis is not in the table, or two axes use the same mesh axis.
    """
    entries: list[Any] = []
    used: set[str] = set()
    for axis in axes:
        if axis is not None and axis not in LOGICAL_AXES:
            raise ValueError(f"logical axis {axis!r} is not in the table: {', '.join(LOGICAL_AXES)}")
        mesh_axes = _mesh_axes(axis)
        if clash := [name for name in mesh_axes if name in used]:
            raise ValueError(f"logical axes {tuple(axes)} use mesh axis {clash[0]!r} twice")
        used.update(mesh_axes)
        entries.append(mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes or None)
    return P(*entries)


def mesh_sizes(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Devices along each mesh axis, with `data` counted over all slices.

    Raises:
      ConfigError: the sizes need more devices than there are, or the free axis would leave some idle.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = config.slices * math.prod(max(size, 1) for size in sizes.values())
    wide = {axis: size for axis, size in sizes.items() if size != 1} | (
        {"slices": config.slices} if config.slices > 1 else {}
    )
    described = ", ".join(f"{axis}={size}" for axis, size in wide.items()) or "one device"
    if fixed > num_devices:
        nearest = " ".join(f"mesh.{axis}={size}" for axis, size in _nearest_that_fits(wide, num_devices).items())
        raise ConfigError(
            [
                f"mesh: {described} needs {fixed} devices, but there are {num_devices};"
                f" the closest mesh that fits is {nearest}"
            ]
        )
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = num_devices // fixed
            if num_devices % fixed:
                raise ConfigError(
                    [
                        f"mesh: {described} leaves {num_devices % fixed} of {num_devices} devices idle;"
                        f" set every size explicitly, such as mesh.{axis}={sizes[axis]}"
                    ]
                )
    return {**sizes, "data": sizes["data"] * config.slices}


def _nearest_that_fits(wide: dict[str, int], num_devices: int) -> dict[str, int]:
    """The change to a mesh that needs too many devices: the largest axis if that is enough, else every axis.

    In the latter case slices and inner axes keep their sizes as far as possible, and outer ones get the rest.

    Args:
      wide: sizes of the axes that are not 1, and of the slices; -1 is the axis that takes the remaining devices.
    """
    named, is_free = {axis: size for axis, size in wide.items() if size > 1}, -1 in wide.values()
    for axis in sorted(named, key=named.__getitem__, reverse=True):
        others = math.prod(named.values()) // named[axis]
        if is_free and num_devices % others == 0:
            return {axis: _largest_divisor(num_devices // others, named[axis])}
        if not is_free and others <= num_devices:
            return {axis: num_devices // others}
    left, nearest = num_devices, {}
    for axis in ("slices", *reversed(MESH_AXES)):
        if axis in named:
            nearest[axis] = _largest_divisor(left, named[axis])
            left //= nearest[axis]
    return {axis: nearest[axis] for axis in named}


def _largest_divisor(number: int, limit: int) -> int:
    return max(size for size in range(1, min(number, limit) + 1) if number % size == 0)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over `devices` (default: all) with explicit axes.

    With several slices, the data axis spans slices, and all others stay within one: only gradients cross the slow
    network.

    Raises:
      ConfigError: the sizes do not fit the number of devices, or the slices differ in size.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(config, len(devices))
    shape = (sizes["data"] // config.slices, *(sizes[axis] for axis in MESH_AXES[1:]))
    size = math.prod(shape)
    groups = [devices[:size]] if config.slices == 1 else _slices(devices, config.slices, size)
    # Splitting physical axes takes any sizes. Without it, an axis must be a product of physical ones where those are
    # rings: 2 devices would not do on a 4 x 4 x 4 torus.
    parts = [mesh_utils.create_device_mesh(shape, group, allow_split_physical_axes=True) for group in groups]
    return Mesh(np.concatenate(parts, axis=0), MESH_AXES, axis_types=(AxisType.Explicit,) * len(MESH_AXES))


def _slices(devices: list[jax.Device], num_slices: int, size: int) -> list[list[jax.Device]]:
    """The devices of each slice; devices without a slice index are split into equal consecutive groups."""
    by_slice: dict[int, list[jax.Device]] = {}
    per_run = len(devices) // num_slices
    for place, device in enumerate(devices):
        by_slice.setdefault(getattr(device, "slice_index", place // per_run), []).append(device)
    groups = [group[:size] for _, group in sorted(by_slice.items())]
    if len(groups) < num_slices or any(len(group) < size for group in groups[:num_slices]):
        found = ", ".join(str(len(group)) for group in by_slice.values())
        raise ConfigError(
            [f"mesh.slices: {num_slices} slices of {size} devices are requested, but there are slices of {found}"]
        )
    return groups[:num_slices]


@dataclass(frozen=True)
class RowShard:
    """The part of a batch's rows that a process reads: part `index` of `count` equal ones."""

    index: int
    count: int


def row_shard(mesh: Mesh) -> RowShard:
    """The part of a batch's rows that this process's devices hold. Processes that shard the same rows share a part.

    On a TPU slice a process's devices need not be adjacent along the mesh's axes. Its rows then are not adjacent in the
    global batch either: a step has the same rows as on one process, in another order.

    Raises:
      ConfigError: the rows of two processes overlap only partly, or some process holds none.
    """
    held = _held_groups(mesh)
    parts, mine = sorted(set(held.values())), held.get(jax.process_index(), ())
    num_groups = len(set().union(*parts))
    if not mine or any(len(part) != len(mine) for part in parts) or len(parts) * len(mine) != num_groups:
        raise ConfigError(
            [
                f"mesh: process {jax.process_index()} would hold {len(mine)} of {num_groups} groups of rows, which"
                " overlap partly with those of others; make mesh.data * mesh.stage * mesh.fsdp * mesh.expert a multiple"
                " or a divisor of the number of processes"
            ]
        )
    return RowShard(parts.index(mine), len(parts))


def row_groups(mesh: Mesh) -> tuple[int, ...]:
    """The groups of rows that this process's devices hold, in order; a batch is split into equal groups."""
    return _held_groups(mesh)[jax.process_index()]


def _held_groups(mesh: Mesh) -> dict[int, tuple[int, ...]]:
    """`row_groups` of each process."""
    axes = [MESH_AXES.index(axis) for axis in LOGICAL_AXES["batch"]]
    order = [*axes, *(axis for axis in range(len(MESH_AXES)) if axis not in axes)]
    num_groups = math.prod(mesh.devices.shape[axis] for axis in axes)
    held: dict[int, set[int]] = {}
    for group, devices in enumerate(mesh.devices.transpose(order).reshape(num_groups, -1)):
        for device in devices:
            held.setdefault(device.process_index, set()).add(group)
    return {process: tuple(sorted(groups)) for process, groups in held.items()}


def current_mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh set by `jax.set_mesh`, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty else mesh


def is_explicit() -> bool:
    """Whether shardings are part of types here: under a mesh, outside of a shard_map over all of its axes."""
    mesh = current_mesh()
    return mesh is not None and AxisType.Explicit in mesh.axis_types


def _mesh_axes(axis: str | None) -> tuple[str, ...]:
    """The mesh axes that shard a logical axis, without the manual axes of an enclosing shard_map."""
    mesh = current_mesh()
    taken = () if mesh is None else mesh.manual_axes
    return tuple(name for name in (axis and LOGICAL_AXES[axis]) or () if name not in taken)


def spec_of(x: jax.Array) -> P:
    """The sharding in an array's type, one entry per dimension."""
    return jax.typeof(x).sharding.spec


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Shard `x` along its logical axes."""
    return jax.reshard(x, logical_to_spec(axes)) if is_explicit() else x


def on_each_device(function: Callable[..., Any], *arguments: Any, out_specs: Any) -> Any:
    """`function` of each device's own parts of the arguments, which are sharded as their types say.

    For what exchanges nothing between devices: indexing and drawing within rows and heads.
    """
    if not is_explicit():
        return function(*arguments)
    in_specs = specs_of(arguments)
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)


def specs_of(tree: Any) -> Any:
    """`spec_of` each array in a tree."""
    return jax.tree.map(spec_of, tree)


def fits(shape: Sequence[int], axes: Sequence[str | None]) -> bool:
    """Whether the current mesh evenly shards an array of this shape along its logical axes."""
    if not is_explicit():
        return True
    sizes = current_mesh().shape
    parts = [math.prod(sizes[name] for name in _mesh_axes(axis)) for axis in axes]
    return all(size % count == 0 for size, count in zip(shape, parts, strict=True))


def check_row_length(length: int, context: int) -> None:
    """Raise ConfigError if rows of `length` tokens cannot be split evenly over `context` devices."""
    if length % context:
        longer = -(-length // context) * context
        raise ConfigError(
            [f"rows of {length} tokens are not divisible by mesh.context = {context}; make them {longer}"]
        )


def gather_weight(weight: jax.Array) -> jax.Array:
    """The all-gather of fully sharded data parallelism: `weight` stays sharded along `tensor` only.

    The gather is explicit, because otherwise the compiler may turn it into many small collectives.
    """
    if not is_explicit():
        return weight
    return jax.reshard(weight, gathered_spec(spec_of(weight)))


def gathered_spec(spec: P) -> P:
    """The sharding after `gather_weight` of a weight with sharding `spec`."""
    return P(*(without(entry, _GATHERED) for entry in spec))


def gather_layers(stacked: jax.Array) -> jax.Array:
    """Stacked weights with all layers on each device: pipeline stages gathered."""
    return jax.reshard(stacked, P(None, *spec_of(stacked)[1:])) if is_explicit() else stacked


def without(entry: str | tuple[str, ...] | None, axes: Collection[str]) -> str | tuple[str, ...] | None:
    """An entry of a PartitionSpec without some mesh axes."""
    names = tuple(name for name in names_of(entry) if name not in axes)
    return names[0] if len(names) == 1 else names or None


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in an entry of a PartitionSpec."""
    return entry if isinstance(entry, tuple) else () if entry is None else (entry,)


def sharded_count(entries: Iterable[str | tuple[str, ...] | None]) -> int:
    """Into how many parts the current mesh splits dimensions with these entries of a PartitionSpec."""
    return math.prod(current_mesh().shape[name] for entry in entries for name in names_of(entry))


def named_sharding(mesh: Mesh, axes: Sequence[str | None]) -> NamedSharding:
    return NamedSharding(mesh, logical_to_spec(axes))
