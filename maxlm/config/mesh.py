"""How devices are laid out."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from maxlm.config.base import Count, Frozen

Size = Annotated[int, Field(ge=-1)]


class MeshConfig(Frozen):
    """Devices along each mesh axis; -1 takes those that are left. docs/mesh.md tells how to choose."""

    data: Size = Field(1, description="Copies of the model, each with its own rows; of a slice, if there are several.")
    stage: Size = Field(1, description="Pipeline stages: consecutive layers on each.")
    fsdp: Size = Field(-1, description="Rows are cut, and so are the weights, which are gathered where they are used.")
    expert: Size = Field(1, description="Experts are cut; for all other layers it is one more axis like fsdp.")
    context: Size = Field(1, description="The tokens of a row are cut.")
    tensor: Size = Field(1, description="Heads, MLP channels and vocabulary are cut, and tokens between the layers.")
    slices: Count = Field(
        1, description="Slices of devices that a slow network joins: the outermost part of the data axis."
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        sizes = self.model_dump(exclude={"slices"})
        if 0 in sizes.values():
            raise ValueError("an axis has at least one device, so none may be 0; -1 takes those that are left")
        free = [axis for axis, size in sizes.items() if size == -1]
        if len(free) > 1:
            raise ValueError(f"{' and '.join(free)} are -1, and one axis may be; fsdp is where it is not given")
        return self
