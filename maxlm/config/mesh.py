"""Layout of devices in a mesh."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from maxlm.config.base import Count, Frozen

Size = Annotated[int, Field(ge=-1)]


class MeshConfig(Frozen):
    """Devices along each mesh axis; -1 takes the remaining devices. docs/mesh.md explains how to choose."""

    data: Size = Field(1, description="Data parallelism: model replicas with their own rows; per slice, if several.")
    stage: Size = Field(1, description="Pipeline parallelism: stages with consecutive layers.")
    fsdp: Size = Field(
        -1, description="Fully sharded data parallelism: rows, and weights that are all-gathered for use."
    )
    expert: Size = Field(1, description="Expert parallelism: experts are sharded; acts like fsdp for other layers.")
    context: Size = Field(1, description="Context parallelism: the tokens of a row are sharded.")
    tensor: Size = Field(
        1, description="Tensor parallelism: heads, MLP channels, vocabulary, and tokens between layers are sharded."
    )
    slices: Count = Field(
        1, description="Slices of devices connected by a slow network: the outermost part of the data axis."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        sizes = self.model_dump(exclude={"slices"})
        if 0 in sizes.values():
            raise ValueError("an axis has at least one device, so none may be 0; -1 takes the remaining devices")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are -1, but only one axis may be; fsdp is -1 by default")
        return self
