"""Check that a mesh fits a run before anything is allocated, and name the number to change."""

import math
from collections.abc import Mapping

import jax

from maxlm.config.adapters import PromptTuningConfig
from maxlm.config.execution import ExecutionConfig
from maxlm.config.train import TrainConfig
from maxlm.core.hardware import multiplies_fp8
from maxlm.core.sharding import LOGICAL_AXES
from maxlm.errors import ConfigError
from maxlm.runtime.progress import console


def check_layout(config: TrainConfig, sizes: Mapping[str, int]) -> None:
    """Raise ConfigError, naming every size that the mesh does not divide and the nearest one that fits.

    Args:
      config: with the resolved model.
      sizes: devices along each mesh axis.
    """
    problems = [
        *_rows(config, sizes),
        *_tokens(config, sizes),
        *_attention(config.execution, sizes),
        *_weights(config, sizes),
        *_prompt(config, sizes),
    ]
    if problems:
        raise ConfigError(problems)


def check_precision(config: TrainConfig, device: jax.Device) -> None:
    """Raise ConfigError if the device does not support the precision of the model's matrix products."""
    if config.execution.eight_bit == "fp8" and not multiplies_fp8(device):
        raise ConfigError(
            [f"execution.eight_bit: fp8 needs fp8 matrix units, and {device.device_kind} has none; set int8, or null"]
        )


def note_idle_devices(sizes: Mapping[str, int], num_devices: int) -> None:
    """Print a note if a mesh with all sizes given uses fewer devices than there are."""
    if (used := math.prod(sizes.values())) < num_devices:
        console.print(f"mesh uses {used} of {num_devices} devices; set an axis, such as mesh.data, to -1 to use all")


def _rows(config: TrainConfig, sizes: Mapping[str, int]) -> list[str]:
    axes = ("data", "fsdp", "expert")
    parts = math.prod(sizes[axis] for axis in axes)
    over = [_product(axes, sizes)] if parts > 1 else []
    if (stages := sizes["stage"]) > 1:
        microbatches = config.execution.pipeline.microbatches or stages
        if microbatches % stages:
            return [
                f"execution.pipeline.microbatches: {microbatches} is not divisible by mesh.stage = {stages};"
                f" the nearest that fits is {nearest_multiple(microbatches, stages)}"
            ]
        # Outside the pipeline, the rows are sharded over the stages too.
        parts *= microbatches
        over.insert(0, f"execution.pipeline.microbatches = {microbatches}")
    if (config.batch_size // config.accumulate) % parts == 0:
        return []
    fits = nearest_multiple(config.batch_size, parts * config.accumulate)
    return [
        f"batch_size: {config.batch_size} in accumulate={config.accumulate} microbatches is not divisible by"
        f" {' and '.join(over)}; the nearest that fits is {fits}"
    ]


def _tokens(config: TrainConfig, sizes: Mapping[str, int]) -> list[str]:
    axes = ("context", "tensor")
    parts = math.prod(sizes[axis] for axis in axes)
    described = _product(axes, sizes)
    if sizes["context"] > 1 and config.execution.context_attention == "ring":
        # Ring attention gives each device two chunks of a row, one from each half, to balance the work.
        parts = math.lcm(parts, 2 * sizes["context"])
        described += ", each with two chunks of a row"
    if config.row_length % parts == 0:
        return []
    return [
        f"row_length: {config.row_length} is not divisible by {described};"
        f" the nearest that fits is {nearest_multiple(config.row_length, parts)}"
    ]


def _attention(execution: ExecutionConfig, sizes: Mapping[str, int]) -> list[str]:
    in_a_ring = sizes["context"] > 1 and execution.context_attention == "ring"
    if not in_a_ring or execution.attention not in ("cudnn", "reference"):
        return []
    return [
        f"execution.attention: {execution.attention} cannot merge parts of a row, as ring attention over mesh.context ="
        f" {sizes['context']} does; set it to auto or xla, or execution.context_attention to all_to_all"
    ]


def _prompt(config: TrainConfig, sizes: Mapping[str, int]) -> list[str]:
    schedule = config.execution.pipeline.schedule
    if sizes["stage"] == 1 or schedule != "1f1b" or not isinstance(config.adapters, PromptTuningConfig):
        return []
    return [
        "adapters.kind: prompt passes its virtual tokens through all layers, of which a stage of"
        " execution.pipeline.schedule=1f1b has its own part; set gpipe, or mesh.stage=1"
    ]


def _weights(config: TrainConfig, sizes: Mapping[str, int]) -> list[str]:
    model, execution = config.model, config.execution
    problems: list[str] = []

    def divides(name: str, size: int, *axes: str, times: int = 1) -> None:
        parts = math.prod(sizes[axis] for axis in axes) * times
        if size % parts == 0:
            return
        change = f"set it to {nearest_multiple(size, parts)}"
        if len(wide := [axis for axis in axes if sizes[axis] > 1]) == 1:
            fits = max(n for n in range(1, sizes[wide[0]] + 1) if size % (n * times) == 0 or n == 1)
            change += f", or mesh.{wide[0]}={fits}"
        problems.append(f"model.{name}: {size} is not divisible by {_product(axes, sizes)}; {change}")

    exchanges_heads = execution.context_attention == "all_to_all"
    for key, part in model.each_part():
        sizes_of_part = {name: axis for name, axis in part.sharded.items() if getattr(part, name) is not None}
        for name, axis in sizes_of_part.items():
            exchanged = ["context"] if axis == "heads" and exchanges_heads else []
            divides(f"{key}.{name}", getattr(part, name), *LOGICAL_AXES[axis], *exchanged)
    divides("vocab_size", model.vocab_size, "tensor")
    divides("embed_dim", model.embed_dim, "fsdp", "expert", "context")
    if sizes["stage"] > 1:
        number = model.longest_group
        key = "layers.repeat" if len(model.layers) == 1 else f"layers.{number}.repeat"
        divides(key, model.layers[number].repeat, "stage", times=execution.pipeline.repeats)
    return problems


def nearest_multiple(size: int, of: int) -> int:
    """The nearest multiple of `of` to `size`, at least `of` itself."""
    return max(of, round(size / of) * of)


def _product(axes: tuple[str, ...], sizes: Mapping[str, int]) -> str:
    """`mesh.data * mesh.fsdp = 8`, of the axes larger than 1."""
    wide = [axis for axis in axes if sizes[axis] > 1]
    return f"{' * '.join(f'mesh.{axis}' for axis in wide)} = {math.prod(sizes[axis] for axis in wide)}"
