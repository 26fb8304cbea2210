"""Base class and number types of all configuration models."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

# JAX counts steps and sizes in 32 bits.
MAX_COUNT = 2**31 - 1
# Grain's shuffle and JAX's PRNG keys take 32-bit seeds.
MAX_SEED = 2**32 - 1

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1, le=MAX_COUNT)]
CountOrZero = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Characters = Annotated[int, Field(ge=1, le=2**53)]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
# Timers overflow above a few centuries.
Seconds = Annotated[float, Field(gt=0, le=1e9)]


class Frozen(BaseModel):
    """An immutable section of a configuration; unknown keys are errors.

    Values are not coerced: no number from a string, no integer from `true` or 1.0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, section: Any) -> Any:
        """Convert YAML's lists to the tuples that fields expect."""
        if not isinstance(section, dict):
            return section
        return {key: tuple(value) if isinstance(value, list) else value for key, value in section.items()}
