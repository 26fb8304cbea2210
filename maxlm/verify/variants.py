"""The ways of computing one thing: what a configuration may be run as, derived from its schema and the mesh axes."""

import itertools
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig
from maxlm.config.train import TrainConfig
from maxlm.core.sharding import MESH_AXES, mesh_sizes
from maxlm.errors import ConfigError
from maxlm.train.layout import check_layout
from maxlm.verify.reduce import NUM_ROWS, ROW_LENGTH
from maxlm.verify.subject import PACKED_KINDS

# Devices that all meshes fit on: three axes of two.
NUM_DEVICES = 8

# The baseline: the plainest way. Its attention is the definition, its logits are held whole.
PLAIN: dict[str, Any] = {
    "unroll": True,
    "remat": "none",
    "attention": "reference",
    "loss_chunk_length": 4 * ROW_LENGTH,
}

# Six of the twenty products of three axes hold each pair of axes.
_PRODUCTS = (
    ("data", "fsdp", "tensor"),
    ("data", "context", "tensor"),
    ("fsdp", "expert", "context"),
    ("data", "stage", "expert"),
    ("stage", "expert", "tensor"),
    ("stage", "fsdp", "context"),
)

Examples = Literal["packed", "unpacked", "padded", "renamed"]


@dataclass(frozen=True)
class Variant:
    """One way.

    group, detail: its name in two parts.
    model: fields of the model's configuration that differ from the plain ones.
    mesh: None is one device without shardings.
    skipped: why it cannot be, if so.
    """

    group: str
    detail: str
    model: Mapping[str, Any] = field(default_factory=dict)
    mesh: MeshConfig | None = None
    accumulate: int = 1
    examples: Examples = "packed"
    skipped: str | None = None

    @property
    def name(self) -> str:
        return f"{self.group}: {self.detail}"


def variants_of(
    full: TrainConfig, reduced: TrainConfig, *, num_devices: int, all_products: bool = False
) -> Iterator[Variant]:
    """All variants of a configuration, those that cannot be among them.

    Args:
      full: with its model, at its own size: it says which meshes may be.
      reduced: what is computed.
      num_devices: that there are.
      all_products: of mesh axes; otherwise a few, in which each two axes meet.
    """
    kind, model = reduced.objective.kind, reduced.model
    own = {name: getattr(model, name) for name in (*PLAIN, "context_attention")}
    for parts in (2, 4):
        yield Variant("accumulation", str(parts), accumulate=parts)
    yield Variant(
        "packing",
        "a row for each document",
        examples="unpacked",
        skipped=None if kind in PACKED_KINDS else f"rows of {kind} hold one sequence each",
    )
    yield Variant("padding", "more rows and columns", examples="padded")
    yield Variant("token ids", "renamed", examples="renamed")
    yield Variant("layers", "one loop", {"unroll": False})
    for policy in _choices("remat"):
        if policy != PLAIN["remat"]:
            yield Variant("remat", policy, {"unroll": False, "remat": policy})
    for chunk in (ROW_LENGTH // 3, ROW_LENGTH // 2 - 7):
        yield Variant("cross-entropy", f"chunks of {chunk} of {ROW_LENGTH}", {"loss_chunk_length": chunk})
    for name in _choices("attention"):
        if name not in ("auto", PLAIN["attention"]):
            yield Variant("attention", name, {"attention": name}, skipped=_no_attention(name))
    yield Variant("one device", "as configured", own)
    for mesh in meshes(all_products=all_products):
        skipped = _no_mesh(mesh, full, reduced, num_devices)
        yield Variant("mesh", _describe(mesh), own, mesh=mesh, skipped=skipped)
    for method in _choices("context_attention"):
        if method != model.context_attention:
            for mesh in (MeshConfig(fsdp=1, context=2), MeshConfig(fsdp=2, context=2, tensor=2)):
                changes = {"context_attention": method}
                skipped = _no_mesh(mesh, _with_model(full, changes), _with_model(reduced, changes), num_devices)
                yield Variant("mesh", f"{_describe(mesh)}, {method}", own | changes, mesh=mesh, skipped=skipped)
    both = MeshConfig(data=2, fsdp=2)
    for examples in ("packed", "padded"):
        yield Variant(
            "mesh",
            f"{_describe(both)}, accumulation 2{', padding' if examples == 'padded' else ''}",
            own,
            mesh=both,
            accumulate=2,
            examples=examples,
            skipped=_no_mesh(both, full, reduced, num_devices),
        )

    if kind == "grpo":
        yield Variant("rollout", "after an update, one device", own)
        wide = MeshConfig(data=2, fsdp=2, tensor=2)
        skipped = _no_mesh(wide, full, reduced, num_devices)
        yield Variant("rollout", f"after an update, {_describe(wide)}", own, mesh=wide, skipped=skipped)


def meshes(*, all_products: bool) -> Iterator[MeshConfig]:
    """Each axis alone at 2, slices, and products: of three axes in which each two meet, or all of two and three."""
    products = [axes for count in (2, 3) for axes in itertools.combinations(MESH_AXES, count)]
    for axes in [(axis,) for axis in MESH_AXES] + (products if all_products else list(_PRODUCTS)):
        yield MeshConfig(**({"fsdp": 1} | dict.fromkeys(axes, 2)))
    yield MeshConfig(slices=2, fsdp=2)


def _describe(mesh: MeshConfig) -> str:
    return ", ".join(f"{name}={size}" for name in ("slices", *MESH_AXES) if (size := getattr(mesh, name)) != 1)


def _no_mesh(mesh: MeshConfig, full: TrainConfig, reduced: TrainConfig, num_devices: int) -> str | None:
    """Why the configuration cannot be laid out so: its weights or tokens cannot be cut. Rows can always be added."""
    try:
        sizes = mesh_sizes(mesh, num_devices)
        for config in (full, reduced):
            check_layout(config.model_copy(update={"batch_size": NUM_ROWS, "accumulate": 1}), sizes)
    except ConfigError as error:
        return error.problems[0]
    return None


def _with_model(config: TrainConfig, changes: Mapping[str, Any]) -> TrainConfig:
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _no_attention(name: str) -> str | None:
    if name == "pallas_tpu":
        return "needs a TPU"
    return "needs an NVIDIA GPU" if name == "cudnn" else None


def _choices(name: str) -> tuple[str, ...]:
    """What the schema allows for a field of the model."""
    return typing.get_args(ModelConfig.model_fields[name].annotation)
