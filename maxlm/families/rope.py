"""Rotary positions in config.json: `rope_parameters`, or `rope_theta` and `rope_scaling` before version 5."""

import math
from typing import Any

from maxlm.config.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeConfig,
    RopeScaling,
    YarnScaling,
)
from maxlm.errors import CheckpointError
from maxlm.families.settings import Settings


def read_rope(
    settings: Settings, *, theta: float, share: float | None = None, original_length: int | None = None
) -> RopeConfig:
    """The rotary positions of a model.

    Args:
      theta: where it is missing.
      share: of the channels that rotate, where it is missing; None: all of them, and no other share is possible.
      original_length: of the texts that the model was trained with first, where it is missing beside the scaling;
        None: what the scaling says, or the longest.
    """
    sections = [each for key in ("rope_parameters", "rope_scaling") if (each := settings.section(key))]
    theta = settings.number("rope_theta", theta)
    if share is not None:
        share = settings.number("partial_rotary_factor", share)
    ropes = [
        RopeConfig(
            theta=section.number("rope_theta", theta),
            share=1.0 if share is None else section.number("partial_rotary_factor", share),
            scaling=_scaling(settings, section, original_length),
        )
        for section in sections or [Settings({}, settings.where)]
    ]
    for section in sections:
        section.check_all_read()
    if ropes[0] != ropes[-1]:
        # Versions of transformers differ in the one that they take.
        raise CheckpointError(f"{settings.where}: rope_parameters and rope_scaling differ; remove one of them")
    return ropes[0]


def read_ropes_by_kind(settings: Settings, **theta: float) -> dict[str, RopeConfig] | None:
    """The rotary positions of each kind of layer in `layer_types`; None if there are no `rope_parameters`.

    theta: of each kind, where it is missing.
    """
    by_kind, scaling = settings.section("rope_parameters"), settings.section("rope_scaling")
    if by_kind is None:
        if scaling and (name := scaling.get("type", None)) and not scaling.get("rope_type", None):
            # transformers 5 takes it for "default" in these models.
            raise CheckpointError(f"{scaling.where}: type is {name!r}; call it rope_type, as all versions read it")
        return None
    given = {kind: by_kind.get(kind, None) for kind in theta}
    # transformers overlooks what stands beside the kinds.
    by_kind.check_all_read()
    settings.require("rope_scaling", None)
    length = settings.get("max_position_embeddings", None)
    return {
        kind: read_rope(
            Settings({"rope_parameters": given[kind], "max_position_embeddings": length}, by_kind.where),
            theta=default,
        )
        for kind, default in theta.items()
    }


def _scaling(settings: Settings, section: Settings, original: int | None) -> RopeScaling | None:
    old_name = section.get("type", "default")
    kind = section.get("rope_type", old_name)

    def original_length() -> int:
        of_scaling = section.size("original_max_position_embeddings", settings.get("max_position_embeddings"))
        # What stands beside the scaling counts, as Phi-3 has it.
        return settings.size("original_max_position_embeddings", of_scaling if original is None else original)

    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(kind="linear", factor=section.number("factor"))
        case "llama3":
            return Llama3Scaling(
                kind="llama3",
                factor=section.number("factor"),
                low_frequency_factor=section.number("low_freq_factor"),
                high_frequency_factor=section.number("high_freq_factor"),
                original_length=original_length(),
            )
        case "yarn":
            factor, attention_factor = section.number("factor"), section.number("attention_factor", None)
            of_keys, of_all = section.number("mscale", None), section.number("mscale_all_dim", None)
            if attention_factor is None and of_keys and of_all:
                attention_factor = mscale(factor, of_keys) / mscale(factor, of_all)
            return YarnScaling(
                kind="yarn",
                factor=factor,
                original_length=original_length(),
                beta_fast=section.number("beta_fast", None) or 32.0,
                beta_slow=section.number("beta_slow", None) or 1.0,
                attention_factor=attention_factor,
                truncate=section.get("truncate", True),
            )
        case "dynamic":
            # transformers compares lengths with the longest one, whatever this is.
            section.get("original_max_position_embeddings", None)
            return DynamicScaling(
                kind="dynamic",
                factor=section.number("factor"),
                original_length=settings.size("max_position_embeddings"),
            )
        case "longrope" | "su":
            length = original_length()
            factor = section.number("factor", None) or settings.size("max_position_embeddings") / length
            by_factor = math.sqrt(1 + math.log(factor) / math.log(length)) if factor > 1 else 1.0
            return LongRopeScaling(
                kind="longrope",
                original_length=length,
                short_factors=tuple(section.items("short_factor") or ()),
                long_factors=tuple(section.items("long_factor") or ()),
                attention_factor=section.number("attention_factor", None) or by_factor,
            )
    raise CheckpointError(
        f"{section.where}: rope_type is {kind!r}, which is not supported; it must be default, linear, dynamic, llama3,"
        " yarn or longrope"
    )


def mscale(factor: float, weight: float) -> float:
    """The factor on queries and keys for texts that are `factor` times longer (arXiv:2309.00071, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def write_ropes_by_kind(**ropes: RopeConfig) -> dict[str, Any]:
    """The settings of each kind of layer in `layer_types`, which version 5 reads."""
    written = {kind: write_rope(rope) for kind, rope in ropes.items()}
    return {
        "rope_parameters": {
            kind: {"rope_theta": each["rope_theta"], **(each["rope_scaling"] or {"rope_type": "default"})}
            for kind, each in written.items()
        }
    }


def write_rope(rope: RopeConfig | None) -> dict[str, Any]:
    """The settings as they are before version 5, which later ones read too."""
    if rope is None:
        return {}
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.share != 1:
        written["partial_rotary_factor"] = rope.share
    match rope.scaling:
        case LinearScaling(factor=factor):
            written["rope_scaling"] = {"rope_type": "linear", "factor": factor}
        case Llama3Scaling() as scaling:
            written["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        case YarnScaling() as scaling:
            written["rope_scaling"] = {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
                "truncate": scaling.truncate,
            }
            if scaling.attention_factor is not None:
                written["rope_scaling"]["attention_factor"] = scaling.attention_factor
        case DynamicScaling() as scaling:
            written["rope_scaling"] = {"rope_type": "dynamic", "factor": scaling.factor}
        case LongRopeScaling() as scaling:
            written["rope_scaling"] = {
                "rope_type": "longrope",
                "original_max_position_embeddings": scaling.original_length,
                "short_factor": list(scaling.short_factors),
                "long_factor": list(scaling.long_factors),
                "attention_factor": scaling.attention_factor,
            }
            written["original_max_position_embeddings"] = scaling.original_length
    return written
