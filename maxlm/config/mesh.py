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
    def _one_free_axis(self) -> Self:
        sizes = (self.data, self.stage, self.fsdp, self.expert, self.context, self.tensor)
        if sizes.count(-1) > 1 or 0 in sizes:
            raise ValueError("at most one mesh axis may be -1, and none may be 0")
        return self
