"""Reduce a configuration to a size that compiles in a second: the same structure and options, with small numbers.

Nothing is dropped: the pattern of windows, the ratio of query to key-value heads, tying, caps, adapters, the terms of
the objective. Terms with weight 0 in the configuration are enabled, and all get a large enough weight: an error in
a term scaled by 1e-4 would be lost in the rounding of the others.
"""

import math

from maxlm.checkpoint.folder import find_checkpoint, read_metadata, trained_as
from maxlm.config.execution import DEFAULT_EXECUTION, ExecutionConfig
from maxlm.config.layers import LayerConfig, LayerGroup, PatternLayerConfig
from maxlm.config.mesh import MeshConfig
from maxlm.config.model import ModelConfig, MultiTokenConfig
from maxlm.config.regularization import RegularizationConfig
from maxlm.config.train import TrainConfig
from maxlm.core.sharding import MESH_AXES
from maxlm.errors import CheckpointError

# Rows and tokens of a batch: rows for eight devices or four microbatches, tokens for more than one attention block.
NUM_ROWS = 8
ROW_LENGTH = 96
# Devices that all meshes fit on: three axes of size two.
NUM_DEVICES = 8

_AUXILIARY_WEIGHT = 0.1


def full_model(config: TrainConfig) -> tuple[ModelConfig, ExecutionConfig, str]:
    """The model that a configuration trains, how it is computed, and the source of its shape.

    The default shape replaces that of a checkpoint that does not exist yet.
    """
    if config.model is not None:
        return config.model, config.execution or DEFAULT_EXECUTION, "its own"
    try:
        checkpoint = find_checkpoint(config.init_from)
    except CheckpointError:
        origin = f"the default one, because {config.init_from} does not exist yet"
        modules = MultiTokenConfig() if config.objective.trains_modules else None
        return ModelConfig(multi_token=modules), config.execution or DEFAULT_EXECUTION, origin
    trained = trained_as(read_metadata(checkpoint), where=checkpoint)
    model, execution = trained.merged, trained.execution
    return config.objective.trained_part(model), config.execution or execution, f"that of {config.init_from}"


def own_mesh(config: TrainConfig) -> MeshConfig:
    """The mesh of a configuration, with its free axis set to the remaining devices here."""
    mesh = config.mesh
    sizes = {axis: getattr(mesh, axis) for axis in MESH_AXES}
    left = NUM_DEVICES // (mesh.slices * math.prod(size for size in sizes.values() if size != -1))
    # All devices on the free axis is no specific request: then it is one device.
    left = max(left, 1) if mesh != MeshConfig() else 1
    return mesh.model_copy(update={axis: left for axis, size in sizes.items() if size == -1})


def reduced_model(
    model: ModelConfig, *, vocab_size: int, repeats: int = 1, mesh: MeshConfig | None = None
) -> ModelConfig:
    """The same structure with small numbers; it fits two devices per axis, and `mesh`, if `model` does.

    Args:
      repeats: groups of layers per pipeline stage.
    """
    mesh = mesh or MeshConfig(fsdp=1)
    windows = sorted({window for _, part in model.each_part() if (window := getattr(part, "window", None))})

    def reduced_layer(layer: LayerConfig) -> LayerConfig:
        mixer = layer.mixer.reduced(mesh)
        if (window := getattr(mixer, "window", None)) is not None and window > 5:
            # A few tokens, in the same order of size.
            mixer = mixer.model_copy(update={"window": 5 + 6 * windows.index(window)})
        return LayerConfig(mixer=mixer, mlp=layer.mlp.reduced(mesh))

    def reduced_position(layer: PatternLayerConfig) -> PatternLayerConfig:
        small = reduced_layer(layer)
        return PatternLayerConfig(mixer=small.mixer, mlp=small.mlp, times=min(layer.times, 2))

    def reduced_repeat(group: LayerGroup) -> int:
        # Repeats that two stages can share, once and twice each, if those of the model can.
        kept = math.gcd(group.repeat, math.lcm(4, 2 * repeats, mesh.stage * repeats))
        return 3 if kept == 1 and group.repeat % 3 == 0 else kept

    groups = [
        LayerGroup(
            repeat=reduced_repeat(group) if number == model.longest_group else 1,
            pattern=tuple(reduced_position(layer) for layer in group.pattern),
        )
        for number, group in enumerate(model.layers)
    ]
    modules = model.multi_token
    if modules is not None and modules.layer is not None:
        modules = modules.model_copy(update={"layer": reduced_layer(modules.layer)})
    changes = {
        "vocab_size": vocab_size,
        "embed_dim": math.lcm(16, mesh.fsdp * mesh.expert * mesh.context),
        "layers": tuple(groups),
        "multi_token": modules,
    }
    return model.model_copy(update=changes)


def reduced_execution(execution: ExecutionConfig) -> ExecutionConfig:
    """The same options in float32: rounding to fewer bits turns the last bit of a sum into a step, and hides
    differences."""
    changes = {
        "max_length": 2 * ROW_LENGTH,
        "activation_dtype": "float32",
        "matmul_dtype": "float32",
        "gradient_sum_dtype": "float32",
        "parameter_dtype": "float32",
        "eight_bit": None,
        "loss_chunk_length": 48,
        "pipeline": execution.pipeline.model_copy(update={"microbatches": None}),
    }
    return execution.model_copy(update=changes)


def _regularization(config: RegularizationConfig) -> RegularizationConfig:
    """The losses of routers enabled."""
    names = ("router_balance", "router_z_loss")
    return config.model_copy(update={name: max(getattr(config, name), _AUXILIARY_WEIGHT) for name in names})


def reduced_config(config: TrainConfig, *, vocab_size: int) -> TrainConfig:
    """The configuration of the small model, with every term of its objective enabled."""
    model, execution, _ = full_model(config)
    repeats = execution.pipeline.repeats
    return config.model_copy(
        update={
            "model": reduced_model(model, vocab_size=vocab_size, repeats=repeats, mesh=own_mesh(config)),
            "execution": reduced_execution(execution),
            "objective": config.objective.for_verification(),
            "regularization": _regularization(config.regularization),
            "adapters": config.adapters and config.adapters.reduced(),
            "batch_size": NUM_ROWS,
            "accumulate": 1,
            "row_length": ROW_LENGTH,
        }
    )


def describe_subject(config: TrainConfig, full: TrainConfig, origin: str) -> str:
    """What was verified, in a sentence: `config`, which is `full` reduced."""
    model, eight_bit = config.model, full.execution.eight_bit
    left_off = f", without the 8-bit rounding of execution.eight_bit={eight_bit}" if eight_bit else ""
    kinds = dict.fromkeys(part.kind for _, part in model.each_part())
    adapters = ""
    if config.adapters is not None:
        stored = f" on a base in {config.adapters.base.kind}" if config.adapters.base else ""
        adapters = f", {config.adapters.kind} adapters{stored}"
    return (
        f"{config.objective.kind}{adapters}; the model is {origin}, at {model.num_layers}"
        f" layers ({', '.join(kinds)}), width {model.embed_dim}; {NUM_ROWS} rows of {ROW_LENGTH} tokens,"
        f" float32{left_off}"
    )
