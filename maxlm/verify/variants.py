"""The variants of a configuration: the ways of computing it, derived from its schema and the mesh axes."""

import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from maxlm.config.execution import ExecutionConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.train import TrainConfig
from maxlm.core.sharding import MESH_AXES, mesh_sizes
from maxlm.errors import CheckFailed, ConfigError
from maxlm.train.layout import check_layout
from maxlm.verify.reduce import NUM_ROWS, ROW_LENGTH, own_mesh

# Six of the twenty products of three axes contain every pair of axes.
_PRODUCTS = (
    ("data", "fsdp", "tensor"),
    ("data", "context", "tensor"),
    ("fsdp", "expert", "context"),
    ("data", "stage", "expert"),
    ("stage", "expert", "tensor"),
    ("stage", "fsdp", "context"),
)

# Implementations that do not run on a CPU.
_NEEDS = {"pallas_tpu": "needs a TPU", "cudnn": "needs an NVIDIA GPU", "ragged": "needs a TPU or GPU"}

# Settings that determine which meshes it fits.
_LAID_OUT_BY = ("context_attention", "pipeline")

Examples = Literal["packed", "unpacked", "padded", "renamed"]


@dataclass(frozen=True)
class Variant:
    """One way of computing the loss and gradient.

    group, detail: its name in two parts.
    execution: how the model is computed.
    mesh: None for one device without sharding.
    sampler: the layout of the weights while sampling; None as configured.
    skipped: why it cannot be run, if so.
    """

    group: str
    detail: str
    execution: ExecutionConfig
    mesh: MeshConfig | None = None
    accumulate: int = 1
    examples: Examples = "packed"
    sampler: str | None = None
    skipped: str | None = None

    @property
    def name(self) -> str:
        return f"{self.group}: {self.detail}"

    @property
    def names(self) -> tuple[str, ...]:
        """Its own name, and the shared ones: its group, and `mesh.AXIS` for each of its axes."""
        axes = wide_axes(self.mesh) if self.mesh is not None else {}
        return (self.name, self.group, *(f"mesh.{axis}" for axis in axes))

    @property
    def moves_tokens(self) -> bool:
        """Whether tokens are in other rows or places than in the baseline."""
        return self.examples in ("unpacked", "padded")


def variants_of(
    full: TrainConfig, reduced: TrainConfig, *, num_devices: int, all_products: bool = False
) -> Iterator[Variant]:
    """All variants of a configuration, including those that cannot be run.

    Args:
      full: the configuration at full size, with its model: determines the valid meshes.
      reduced: the configuration that is computed.
      num_devices: number of devices available.
      all_products: of mesh axes; otherwise a few that contain each pair of axes.
    """
    objective, own = reduced.objective, reduced.execution
    base = plain(own)

    def changed(**fields: Any) -> ExecutionConfig:
        return base.model_copy(update=fields)

    def on_mesh(
        mesh: MeshConfig, note: str = "", *, execution: ExecutionConfig = own, group: str = "mesh", **settings: Any
    ) -> Variant:
        skipped = _no_mesh(mesh, full, reduced, execution, num_devices)
        return Variant(group, f"{_describe(mesh)}{note}", execution, mesh=mesh, skipped=skipped, **settings)

    for parts in (2, 4):
        yield Variant("accumulation", str(parts), base, accumulate=parts)
    one_each = None if objective.learns_text else f"rows of {objective.kind} hold one sequence each"
    yield Variant("packing", "a row for each document", base, examples="unpacked", skipped=one_each)
    yield Variant("padding", "more rows and columns", base, examples="padded")
    yield Variant("token ids", "renamed", base, examples="renamed")
    yield Variant("layers", "one loop", changed(unroll=False))
    for policy in _choices(own, "remat"):
        if policy != "none":
            yield Variant("remat", policy, changed(unroll=False, remat=policy))
    for chunk in (ROW_LENGTH // 3, ROW_LENGTH // 2 - 7):
        yield Variant("cross-entropy", f"chunks of {chunk} of {ROW_LENGTH}", changed(loss_chunk_length=chunk))
    for name in _choices(own, "attention"):
        if name not in ("auto", "reference"):
            yield Variant("attention", name, changed(attention=name), skipped=_NEEDS.get(name))
    if any(part.kind == "moe" for _, part in reduced.model.each_part()):
        for name in _choices(own, "experts"):
            if name not in ("auto", "reference"):
                yield Variant("experts", name, changed(experts=name), skipped=_NEEDS.get(name))
    yield Variant("one device", "as configured", own)
    for mesh in meshes(all_products=all_products):
        yield on_mesh(mesh)
    if wide_axes(asked := own_mesh(full)):
        yield on_mesh(asked, ", the configuration's own")
    for method in _choices(own, "context_attention"):
        if method != own.context_attention:
            for mesh in (MeshConfig(fsdp=1, context=2), MeshConfig(fsdp=2, context=2, tensor=2)):
                yield on_mesh(mesh, f", {method}", execution=own.model_copy(update={"context_attention": method}))
    for schedule, repeats in itertools.product(_choices(own.pipeline, "schedule"), (1, 2)):
        pipeline = own.pipeline.model_copy(update={"schedule": schedule, "repeats": repeats})
        if pipeline != own.pipeline:
            note = f", {schedule}{', each stage twice' if repeats == 2 else ''}"
            yield on_mesh(MeshConfig(fsdp=1, stage=2), note, execution=own.model_copy(update={"pipeline": pipeline}))
    both = MeshConfig(data=2, fsdp=2)
    yield on_mesh(both, ", accumulation 2", accumulate=2)
    yield on_mesh(both, ", accumulation 2, padding", accumulate=2, examples="padded")
    if objective.samples:
        yield Variant("rollout", "after an update, one device", own)
        for axes in (("data", "fsdp", "tensor"), ("stage", "fsdp"), ("expert", "context", "tensor")):
            mesh = MeshConfig(**({"fsdp": 1} | dict.fromkeys(axes, 2)))
            yield on_mesh(mesh, ", after an update", group="rollout")
        if hasattr(objective, "sampler"):
            # Weights gathered in each decode step, of dense layers and of experts.
            for axes in (("data", "fsdp", "tensor"), ("fsdp", "expert", "tensor")):
                mesh = MeshConfig(**({"fsdp": 1} | dict.fromkeys(axes, 2)))
                yield on_mesh(mesh, ", sharded, after an update", group="rollout", sampler="sharded")


def plain(execution: ExecutionConfig) -> ExecutionConfig:
    """The simplest way to compute a model: reference attention and experts, no chunking, no recomputation."""
    changes: dict[str, Any] = {
        "unroll": True,
        "remat": "none",
        "attention": "reference",
        "experts": "reference",
        "loss_chunk_length": 4 * ROW_LENGTH,
    }
    return execution.model_copy(update=changes)


def meshes(*, all_products: bool) -> Iterator[MeshConfig]:
    """Each axis alone at 2, slices, and products: of three axes covering each pair, or all of two and three."""
    products = [axes for count in (2, 3) for axes in itertools.combinations(MESH_AXES, count)]
    for axes in [(axis,) for axis in MESH_AXES] + (products if all_products else list(_PRODUCTS)):
        yield MeshConfig(**({"fsdp": 1} | dict.fromkeys(axes, 2)))
    yield MeshConfig(slices=2, fsdp=2)


def wide_axes(mesh: MeshConfig) -> dict[str, int]:
    """Sizes of the axes larger than 1."""
    return {name: size for name in ("slices", *MESH_AXES) if (size := getattr(mesh, name)) != 1}


def _describe(mesh: MeshConfig) -> str:
    return ", ".join(f"{axis}={size}" for axis, size in wide_axes(mesh).items())


def _no_mesh(
    mesh: MeshConfig, full: TrainConfig, reduced: TrainConfig, execution: ExecutionConfig, num_devices: int
) -> str | None:
    """Why the configuration does not fit a mesh: weights or tokens are not divisible. Rows can always be added.

    Raises:
      CheckFailed: it fits, and the reduced one does not.
    """
    asked = {name: getattr(execution, name) for name in _LAID_OUT_BY}
    for config in (full, reduced):
        update = {"execution": config.execution.model_copy(update=asked), "batch_size": NUM_ROWS, "accumulate": 1}
        try:
            check_layout(config.model_copy(update=update), mesh_sizes(mesh, num_devices))
        except ConfigError as error:
            if config is full:
                return error.problems[0]
            raise CheckFailed(
                f"{_describe(mesh)}: the configuration fits, but the reduced one does not: {error.problems[0]}"
            ) from error
    return None


def _choices(section: Any, name: str) -> tuple[str, ...]:
    """The values that the schema allows for a field."""
    return typing.get_args(type(section).model_fields[name].annotation)
