"""How devices are laid out."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from maxlm.config.base import Frozen

Size = Annotated[int, Field(ge=-1)]


class MeshConfig(Frozen):
    """Devices along each mesh axis; -1 takes those that are left."""

    data: Annotated[int, Field(ge=-1)] = 1
    fsdp: Annotated[int, Field(ge=-1)] = -1
    tensor: Annotated[int, Field(ge=-1)] = 1

    @model_validator(mode="after")
    def _one_free_axis(self) -> Self:
        sizes = (self.data, self.fsdp, self.tensor)
        if sizes.count(-1) > 1 or 0 in sizes:
            raise ValueError("at most one mesh axis may be -1, and none may be 0")
        return self
