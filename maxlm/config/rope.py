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


class DynamicScaling(Frozen):
    """A larger base for texts that are longer than the original length, by how much they are (NTK-aware scaling)."""

    kind: Literal["dynamic"]
    factor: PositiveFloat
    original_length: Count = Field(description="Tokens of a text that the model was trained with first.")


class LongRopeScaling(Frozen):
    """Each wavelength times its own factor, one for short texts and one for long ones (arXiv:2402.13753)."""

    kind: Literal["longrope"]
    original_length: Count = Field(description="Tokens of the longest short text.")
    short_factors: tuple[PositiveFloat, ...] = Field(description="A factor for each pair of rotated channels.")
    long_factors: tuple[PositiveFloat, ...] = Field(description="A factor for each pair of rotated channels.")
    attention_factor: PositiveFloat = Field(1.0, description="Factor on rotated queries and keys.")


RopeScaling = Annotated[
    LinearScaling | Llama3Scaling | YarnScaling | DynamicScaling | LongRopeScaling, Field(discriminator="kind")
]


class RopeConfig(Frozen):
    """Rotary positions (arXiv:2104.09864)."""

    theta: PositiveFloat = Field(10_000.0, description="Base of the wavelengths.")
    share: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="Share of a head's channels that rotate: the first ones."
    )
    scaling: RopeScaling | None = Field(None, description="How wavelengths are stretched for longer texts.")
    two_dimensional: bool = Field(
        False,
        description="Half of the channels rotate by the position up to the end of the prefix, the other half by the"
        " number of tokens after it (GLM, arXiv:2103.10360).",
    )

    half_frequencies: bool = Field(
        False, description="Round the radians per token to float16, as the code of ChatGLM-6B does."
    )

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
        if self.two_dimensional and channels % 4:
            return (
                f"rope.two_dimensional rotates two halves of the {channels} channels in pairs: their number must be a"
                " multiple of 4"
            )
        if self.scaling is not None and (self.two_dimensional or self.half_frequencies):
            return "rope.two_dimensional and rope.half_frequencies have no scaling; leave one of them out"
        if isinstance(self.scaling, LongRopeScaling):
            lengths = {len(self.scaling.short_factors), len(self.scaling.long_factors)}
            if lengths != {channels // 2}:
                found = " and ".join(map(str, sorted(lengths)))
                return (
                    "rope.scaling: short_factors and long_factors must have a factor for each of the"
                    f" {channels // 2} pairs of channels that rotate, and have {found}"
                )
        return None

    @property
    def depends_on_length(self) -> bool:
        """Whether wavelengths depend on the length of a document."""
        return isinstance(self.scaling, DynamicScaling | LongRopeScaling)

    def reduced(self) -> Self:
        """The same structure for heads of 8 channels."""
        parts = 2 if self.two_dimensional else 4
        share, scaling = max(1, round(self.share * parts)) / parts, self.scaling
        if isinstance(scaling, LongRopeScaling):
            pairs = int(8 * share) // 2
            factors = {"short_factors": scaling.short_factors[:pairs], "long_factors": scaling.long_factors[:pairs]}
            scaling = scaling.model_copy(update=factors)
        return self.model_copy(update={"share": share, "scaling": scaling})
