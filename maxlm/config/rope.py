"""Rotary positions: the wavelengths of a head's channels, and how they are stretched for longer texts."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat

from maxlm.config.base import Count, Frozen


class LinearScaling(Frozen):
    """All wavelengths times a factor (arXiv:2306.15595)."""

    kind: Literal["linear"]
    factor: PositiveFloat


class Llama3Scaling(Frozen):
    """Long wavelengths times a factor, short ones unchanged, and those between interpolated, as in Llama 3.1."""

    kind: Literal["llama3"]
    factor: PositiveFloat
    low_frequency_factor: PositiveFloat = Field(1.0, description="original_length over the shortest long wavelength.")
    high_frequency_factor: PositiveFloat = Field(4.0, description="original_length over the longest short wavelength.")
    original_length: Count = Field(8192, description="Tokens of a text that the model was trained with first.")


class YarnScaling(Frozen):
    """As `llama3`, by the number of turns within the original length, and with larger queries and keys
    (arXiv:2309.00071)."""

    kind: Literal["yarn"]
    factor: PositiveFloat
    original_length: Count = Field(description="Tokens of a text that the model was trained with first.")
    beta_fast: PositiveFloat = Field(32.0, description="Channels with more turns are unchanged.")
    beta_slow: PositiveFloat = Field(1.0, description="Channels with fewer turns are interpolated.")
    attention_factor: PositiveFloat | None = Field(
        None, description="Factor on rotated queries and keys; null is 0.1 ln(factor) + 1, or 1 if factor is less."
    )
    truncate: bool = Field(True, description="Round the limits of the channels to whole channels.")


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling, Field(discriminator="kind")]


class RopeConfig(Frozen):
    """Rotary positions (arXiv:2104.09864)."""

    theta: PositiveFloat = Field(10_000.0, description="Base of the wavelengths.")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Share of a head's channels that rotate: the first ones."
    )
    scaling: RopeScaling | None = Field(None, description="How wavelengths are stretched for longer texts.")

    def rotated_channels(self, head_dim: int) -> int:
        """The number of a head's channels that rotate."""
        return int(head_dim * self.share)

    def problem(self, head_dim: int) -> str | None:
        """Why heads of this size cannot be rotated, as a sentence."""
        channels = self.rotated_channels(head_dim)
        if channels < 2 or channels % 2:
            return (
                f"rope.share ({self.share:g}) of head_dim ({head_dim}) is {channels} channels, but RoPE rotates pairs:"
                " it must be even and at least 2"
            )
        return None

    def reduced(self) -> Self:
        """The same structure for heads of 8 channels."""
        return self.model_copy(update={"share": max(0.25, round(self.share * 4) / 4)})
